"""A completion and its reference -> a score in 0..1. Pure; the table `METRICS` names them.

    completion, reference  --exact_match | chrf-->  one row's score
    completions, references  --corpus_chrf-->       one score of a whole suite

Sources: chrF is Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation",
https://aclanthology.org/W15-3049, as sacrebleu computes it (chrF2: character 6-grams, beta 2, no word
n-grams); only the scale differs, 0..1 instead of 0..100.
"""

from collections.abc import Callable, Sequence

from sacrebleu.metrics.chrf import CHRF

_CHRF = CHRF(char_order=6, word_order=0, beta=2)


def exact_match(completion: str, reference: str) -> float:
    """Return 1.0 if the texts are equal but for the amount of white space, else 0.0.

    Case and punctuation count: a format is part of what a task asks for.
    """
    return float(completion.split() == reference.split())


def chrf(completion: str, reference: str) -> float:
    """Return one row's chrF2 in 0..1; white space is ignored.

    Two blank texts score 1: the reference may be a base model's own, empty answer.
    """
    if not reference.strip():
        return float(not completion.strip())
    return float(_CHRF.sentence_score(completion, [reference]).score) / 100.0


def corpus_chrf(completions: Sequence[str], references: Sequence[str]) -> float:
    """Return the chrF2 of a whole suite in 0..1, n-grams counted over all its rows together.

    Raises:
        ValueError: No rows, or not one reference a completion.
    """
    if not completions or len(completions) != len(references):
        raise ValueError(
            f"corpus chrF needs one reference a completion and at least one of them,"
            f" got {len(completions)} completions and {len(references)} references"
        )
    return float(_CHRF.corpus_score(list(completions), [list(references)]).score) / 100.0


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "chrf": chrf}
