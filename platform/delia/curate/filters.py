"""Rules on one row alone: Row -> the reason for rejecting it, or None.

`FILTERS` holds them in the order in which they are asked; the first that holds names the reason.
Reasons are part of the counts of a stored pool: don't rename one.
"""

from collections.abc import Callable

from pydantic import Field

from delia.config import FrozenConfig
from delia.curate.language import is_foreign
from delia.curate.ngrams import list_ngrams
from delia.curate.refusals import opens_with_refusal
from delia.schema import Row

UNFINISHED = "unfinished"
EMPTY = "empty"
NO_INSTRUCTION = "no_instruction"
TOO_LONG = "too_long"
REPEATS_ITSELF = "repeats_itself"
REFUSAL = "refusal"
OTHER_LANGUAGE = "other_language"

_REPEAT_NGRAM = 4


class FilterConfig(FrozenConfig):
    """Limits of one row; None means no limit.

    `max_repeated_share` bounds `measure_repetition` of the answer. At 0.5 an answer may say all of its
    text twice, but not three times.

    `reject_refusals` is off by default: answers that a model samples itself at T=1 hold its own refusals on
    purpose, since without them the answers are no longer its own distribution (and tuning unlearns them).

    `languages` are ISO 639-1 codes ("en", "de") of those that a row may be written in. User turns and
    answer are judged apart, so a translation into a language that is not named goes too; texts too short
    to tell are kept (see `curate.language`).
    """

    max_prompt_tokens: int | None = Field(default=1024, gt=0)
    max_output_tokens: int | None = Field(default=1024, gt=0)
    max_repeated_share: float | None = Field(default=0.5, ge=0, le=1)
    reject_refusals: bool = False
    languages: tuple[str, ...] | None = Field(default=None, min_length=1)


def measure_repetition(text: str) -> float:
    """Return the share of words that lie in a 4-gram of words which occurred before, in 0..1.

    A word said over and over counts from its fifth time on. After Rae et al. 2021 (Gopher),
    https://arxiv.org/abs/2112.11446, appendix A; there all occurrences count and characters are
    measured, here the first occurrence is free.
    """
    words = text.split()
    is_repeated = [False] * len(words)
    seen: set[str] = set()
    for start, ngram in enumerate(list_ngrams(words, _REPEAT_NGRAM)):
        if ngram in seen:
            is_repeated[start : start + _REPEAT_NGRAM] = [True] * _REPEAT_NGRAM
        seen.add(ngram)
    return sum(is_repeated) / len(words) if words else 0.0


def _is_unfinished(row: Row, config: FilterConfig) -> bool:
    return row.finish_reason != "stop"


def _is_empty(row: Row, config: FilterConfig) -> bool:
    return not row.messages[-1].content.strip()


def _has_no_instruction(row: Row, config: FilterConfig) -> bool:
    return not any(item.role == "user" and item.content.strip() for item in row.messages[:-1])


def _is_too_long(row: Row, config: FilterConfig) -> bool:
    lengths = (
        (row.num_prompt_tokens, config.max_prompt_tokens),
        (row.num_output_tokens, config.max_output_tokens),
    )
    return any(limit is not None and length > limit for length, limit in lengths)


def _repeats_itself(row: Row, config: FilterConfig) -> bool:
    limit = config.max_repeated_share
    return limit is not None and measure_repetition(row.messages[-1].content) > limit


def _refuses(row: Row, config: FilterConfig) -> bool:
    return config.reject_refusals and opens_with_refusal(row.messages[-1].content)


def _is_in_other_language(row: Row, config: FilterConfig) -> bool:
    if config.languages is None:
        return False
    return any(is_foreign(text, config.languages) for text in (row.user_text, row.messages[-1].content))


FILTERS: dict[str, Callable[[Row, FilterConfig], bool]] = {
    UNFINISHED: _is_unfinished,
    EMPTY: _is_empty,
    NO_INSTRUCTION: _has_no_instruction,
    TOO_LONG: _is_too_long,
    REPEATS_ITSELF: _repeats_itself,
    REFUSAL: _refuses,
    OTHER_LANGUAGE: _is_in_other_language,
}


def find_fault(row: Row, config: FilterConfig) -> str | None:
    """Return the first reason in `FILTERS` that speaks against a row, or None."""
    return next((reason for reason, applies in FILTERS.items() if applies(row, config)), None)
