"""Openings of instructions: the first word, and the first content word after it.

    "Write a short poem about rain" -> ("write", "short")      "what is the capital of peru ?" -> ("what", "capital")

A light stand-in for the root verb and its direct noun object in Wang et al. 2022 (Self-Instruct),
https://arxiv.org/abs/2212.10560, figure 3. Differs: there a parser finds verb and object, here position and
a list of English function words do, so adjectives stand in for nouns and questions count too; in other
languages the second word is mostly just the next one.
"""

import re

from delia.curate.ngrams import normalise

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_FUNCTION_WORD_LIST = (
    "a an the this that these those my your his her its our their me you him it us them i we he she they"
    " is are was were be been being am do does did has have had can could will would shall should may might must"
    " of in on at by for from to with about into onto over under between as than and or but if so not no"
    " what which who whom whose when where why how there here some any each every all both please"
)
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


def find_opening(instruction: str) -> tuple[str, str]:
    """Return the first word and the first content word after it, case-folded; "" where there is none."""
    words = _WORD.findall(normalise(instruction))
    first = words[0] if words else ""
    return first, next((word for word in words[1:] if word not in _FUNCTION_WORDS), "")
