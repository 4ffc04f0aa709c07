"""Where a source ends: at its rows, at its budget, or where it says nothing new; never elsewhere."""

import pytest

from delia.curate.stopping import StopConfig, StopRule
from delia.schema import Message, Rejection, Row


def make_row(tokens: int = 10) -> Row:
    return Row(
        row_id="r",
        index=0,
        source="s",
        messages=(Message(role="user", content="x"),),
        num_output_tokens=tokens,
    )


def make_rejection(reason: str, tokens: int = 10) -> Rejection:
    return Rejection(row_id="r", index=0, source="s", reason=reason, text="", num_output_tokens=tokens)


def follow(rule: StopRule, *decided: Row | Rejection) -> list[str | None]:
    reasons = []
    for item in decided:
        rule.count(item, num_spent=item.num_output_tokens)
        reasons.append(rule.reason)
    return reasons


def test_a_source_ends_with_its_last_row():
    rule = StopRule(StopConfig(), num_rows=2)
    assert follow(rule, make_row(), make_rejection("empty"), make_row()) == [None, None, "rows"]


def test_a_budget_counts_rejected_tokens_too():
    rule = StopRule(StopConfig(max_output_tokens=25), num_rows=9)
    assert follow(rule, make_row(), make_rejection("empty"), make_row(4), make_row(1)) == [
        None,
        None,
        None,
        "tokens",
    ]
    assert (rule.num_accepted, rule.num_output_tokens) == (3, 25)


@pytest.mark.parametrize("reason", ["duplicate", "near_duplicate", "semantic_duplicate"])
def test_repeats_end_a_source_once_a_whole_window_has_too_many(reason):
    rule = StopRule(StopConfig(min_new_share=0.5, window=4), num_rows=9)
    repeat = make_rejection(reason)
    assert follow(rule, make_row(), repeat, repeat, make_row(), repeat) == [None] * 4 + ["novelty"]
    assert rule.new_share == 0.25


def test_rejections_for_other_reasons_say_nothing_about_novelty():
    rule = StopRule(StopConfig(min_new_share=0.9, window=2), num_rows=9)
    assert follow(rule, *[make_rejection("unfinished")] * 8, make_row(), make_row()) == [None] * 10


def test_rows_come_before_the_other_reasons():
    rule = StopRule(StopConfig(max_output_tokens=1), num_rows=1)
    assert follow(rule, make_row()) == ["rows"]
