"""Rules on one row alone."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from delia.curate.filters import (
    EMPTY,
    FILTERS,
    NO_INSTRUCTION,
    OTHER_LANGUAGE,
    REFUSAL,
    REPEATS_ITSELF,
    TOO_LONG,
    UNFINISHED,
    FilterConfig,
    find_fault,
    measure_repetition,
)
from delia.schema import Message, Row

CONFIG = FilterConfig(max_prompt_tokens=10, max_output_tokens=20, max_repeated_share=0.5)
LOOP = "red cat sees dog " * 3
TWICE = "red cat sees dog " * 2


def make_row(
    *,
    instruction: str = "name a cat",
    answer: str = "tom",
    finish_reason: str = "stop",
    lengths: tuple[int, int] = (10, 20),
) -> Row:
    messages = (
        Message(role="system", content="be kind"),
        Message(role="user", content=instruction),
        Message(role="assistant", content=answer),
    )
    num_prompt_tokens, num_output_tokens = lengths
    return Row(
        row_id="r0",
        index=0,
        source="s",
        messages=messages,
        finish_reason=finish_reason,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (make_row(), None),
        (make_row(finish_reason="length"), UNFINISHED),
        (make_row(answer=" \n"), EMPTY),
        (make_row(instruction="\t"), NO_INSTRUCTION),
        (make_row(lengths=(11, 20)), TOO_LONG),
        (make_row(lengths=(10, 21)), TOO_LONG),
        (make_row(answer=LOOP), REPEATS_ITSELF),
        (make_row(answer=TWICE), None),
        (make_row(instruction=LOOP), None),
    ],
)
def test_a_row_is_rejected_for_the_reason_that_it_gives(row: Row, reason: str | None):
    assert find_fault(row, CONFIG) == reason


def test_a_system_turn_alone_is_no_instruction():
    row = replace(make_row(), messages=(make_row().messages[0], make_row().messages[2]))

    assert find_fault(row, CONFIG) == NO_INSTRUCTION


def test_a_row_with_every_fault_is_rejected_in_the_order_of_the_table():
    row = make_row(finish_reason="length", answer="", instruction="", lengths=(99, 99))

    assert find_fault(row, CONFIG) == UNFINISHED
    assert find_fault(replace(row, finish_reason="stop"), CONFIG) == EMPTY
    assert find_fault(make_row(instruction="", lengths=(99, 99)), CONFIG) == NO_INSTRUCTION
    assert find_fault(make_row(lengths=(99, 99), answer=LOOP), CONFIG) == TOO_LONG
    assert list(FILTERS) == [
        "unfinished", "empty", "no_instruction", "too_long", "repeats_itself", "refusal", "other_language"
    ]  # fmt: skip


def test_a_limit_of_none_limits_nothing():
    config = FilterConfig(max_prompt_tokens=None, max_output_tokens=None, max_repeated_share=None)

    assert find_fault(make_row(lengths=(9999, 9999), answer=LOOP), config) is None


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("a b c", 0.0),
        ("a a a a", 0.0),
        ("a a a a a", 4 / 5),
        ("x a b c d y a b c d", 4 / 10),
        ("a b c d a b c d", 4 / 8),
        ("a b c d a b c d a b c d", 8 / 12),
        ("a b c d e a b c d f a b c e", 4 / 14),
    ],
)
def test_repetition_is_the_share_of_words_in_4_grams_said_before(text: str, share: float):
    assert measure_repetition(text) == pytest.approx(share)


def test_refusals_and_languages_are_kept_unless_settings_say_otherwise():
    """By default the model's own refusals stay: without them answers are no longer its own distribution."""
    refusal = make_row(answer="I'm sorry, but I can't help with that.")
    foreign = make_row(answer="Der Fuchs jagt den Hasen durch den dunklen Wald.")

    assert [find_fault(row, FilterConfig()) for row in (refusal, foreign)] == [None, None]
    assert find_fault(refusal, FilterConfig(reject_refusals=True)) == REFUSAL
    assert find_fault(foreign, FilterConfig(languages=("en",))) == OTHER_LANGUAGE


def test_languages_are_asked_of_the_instruction_and_of_the_answer_apart():
    german, english = "Der Fuchs jagt den Hasen durch den dunklen Wald.", "Say what the fox does in the wood."
    config = FilterConfig(languages=("en",))

    assert find_fault(make_row(instruction=german, answer=english), config) == OTHER_LANGUAGE
    assert find_fault(make_row(instruction=english, answer=german), config) == OTHER_LANGUAGE
    assert find_fault(make_row(instruction=english, answer=english), config) is None
    assert (
        find_fault(make_row(instruction=german, answer=english), FilterConfig(languages=("de", "en"))) is None
    )


def test_no_language_at_all_is_no_setting():
    with pytest.raises(ValidationError, match="languages"):
        FilterConfig(languages=())
