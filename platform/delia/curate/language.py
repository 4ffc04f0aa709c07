"""Languages: is a text surely in another language than those that are wanted?

    text --lingua's confidence in each of its 75 languages--> bool

A text is foreign if one language that is not wanted has half of the confidence or more, and all wanted ones
together less than 0.05. Too short a text spreads its confidence and is kept, as are code and numbers: of
1,500 questions of the starter's world and 1,230 English sentences of `sep-hallucination`, one is taken for
another language (a list of the chemical elements, for Latin).

The detector compares all its languages, since one that knows the wanted ones alone calls everything one of
them. It takes 1.1 GB of memory and seven seconds, once a process, and over a millisecond for a sentence. So its mode of
low accuracy is asked first, which takes a fifth of the time and a tenth of the memory: a text that even it holds for
likelier in a wanted language than not is kept. It can't reject one: it took one English sentence of 20-40 letters in
eight for a foreign one.
"""

from functools import cache, lru_cache
from typing import Any

from delia.errors import ConfigError

_FOREIGN_SHARE = 0.5
_WANTED_SHARE = 0.05
_KEPT_SHARE = 0.5
_MAX_REMEMBERED = 200
"""Letters of a text whose verdict is remembered: short answers come again and again."""


@cache
def find_languages(codes: tuple[str, ...]) -> frozenset[Any]:
    """Return lingua's languages of ISO 639-1 codes.

    Raises:
        ConfigError: A code that lingua does not know, with those that it does.
    """
    if not codes:
        return frozenset()
    from lingua import Language  # late: 96 MB of models, and few pools ask for a language

    by_code = {item.iso_code_639_1.name.lower(): item for item in Language.all()}
    unknown = [code for code in codes if code not in by_code]
    if unknown:
        raise ConfigError(
            f"curate.languages are ISO 639-1 codes of languages that lingua tells apart, got {unknown}; there"
            f" are {sorted(by_code)}"
        )
    return frozenset(by_code[code] for code in codes)


@cache
def _build_detectors() -> tuple[Any, Any]:
    """Return the quick detector and the thorough one."""
    from lingua import LanguageDetectorBuilder

    builder = LanguageDetectorBuilder.from_all_languages()
    thorough = builder.build()
    return builder.with_low_accuracy_mode().build(), thorough


def is_foreign(text: str, codes: tuple[str, ...]) -> bool:
    """Tell whether a text is surely in a language other than those of the codes."""
    judge = _judge_short if len(text) <= _MAX_REMEMBERED else _judge
    return judge(text, codes)


def _judge(text: str, codes: tuple[str, ...]) -> bool:
    wanted = find_languages(codes)
    quick, thorough = _build_detectors()
    if _measure_share(quick.compute_language_confidence_values(text), wanted) >= _KEPT_SHARE:
        return False
    values = thorough.compute_language_confidence_values(text)
    return bool(values[0].value >= _FOREIGN_SHARE and _measure_share(values, wanted) < _WANTED_SHARE)


_judge_short = lru_cache(maxsize=1 << 14)(_judge)


def _measure_share(values: Any, wanted: frozenset[Any]) -> float:
    return float(sum(item.value for item in values if item.language in wanted))
