"""Acceptance as a pure function of the candidates in index order."""

import dataclasses
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from delia.curate.dedup import make_shingles, measure_jaccard
from delia.curate.embedding import embed_hashed
from delia.curate.pipeline import Candidate, Curator
from delia.curate.screening import Screener
from delia.curate.settings import CurateConfig
from delia.curate.stopping import StopConfig, StopRule
from delia.schema import MAX_REJECTED_TEXT, Message, Rejection, Row, SeedTask

HELD_OUT = SeedTask(task_id="t0", messages=(Message(role="user", content="a b c d"),))
CONFIG = CurateConfig(near_duplicate_threshold=0.6, overlap_ngram=4, max_output_tokens=9)


def make_row(index: int, instruction: str, *, answer: str = "yes", num_output_tokens: int = 1) -> Row:
    messages = (Message(role="user", content=instruction), Message(role="assistant", content=answer))
    return Row(
        row_id=f"r{index}",
        index=index,
        source="s",
        messages=messages,
        num_output_tokens=num_output_tokens,
    )


def make_rejection(index: int) -> Rejection:
    return Rejection(row_id=f"r{index}", index=index, source="s", reason="no_answer", text="raw")


def accepted_ids(results: list[Candidate]) -> list[str]:
    return [item.row_id for item in results if isinstance(item, Row)]


@st.composite
def candidate_lists(draw: st.DrawFn) -> list[Candidate]:
    """Candidates over five words, so that duplicates, near-duplicates and overlaps are common."""
    instructions = st.lists(st.sampled_from("abcde"), max_size=7).map(" ".join)
    indices = sorted(draw(st.sets(st.integers(0, 99), max_size=25)))
    return [
        make_rejection(index)
        if draw(st.integers(0, 9)) == 0
        else make_row(index, draw(instructions), answer=draw(st.sampled_from(["yes", "no", ""])))
        for index in indices
    ]


def accept_by_hand(candidates: list[Candidate]) -> list[str]:
    """Say the rules again, with no index and no batches: every row against every accepted one."""
    accepted: dict[str, str] = {}
    for row in candidates:
        if isinstance(row, Rejection) or not row.instruction or not row.messages[-1].content:
            continue
        shingles = make_shingles(row.instruction, 3)
        others = [make_shingles(text, 3) for text in accepted.values()]
        is_near = any(measure_jaccard(shingles, other) >= 0.6 for other in others)
        if not (is_near or row.instruction in accepted.values() or "a b c d" in row.instruction):
            accepted[row.row_id] = row.instruction
    return list(accepted)


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(candidates=candidate_lists(), cuts=st.lists(st.integers(0, 25)), target=st.none() | st.integers(1, 6))
def test_any_cut_into_batches_gives_what_the_rules_say(
    candidates: list[Candidate], cuts: list[int], target: int | None
):
    places = [0, *sorted(min(cut, len(candidates)) for cut in cuts), len(candidates)]
    in_parts, at_once = (Curator(Screener(CONFIG, eval_rows=[HELD_OUT])) for _ in range(2))
    rule, other = (target and StopRule(StopConfig(), num_rows=target) for _ in range(2))
    parts = [in_parts.feed(candidates[start:stop], rule=rule) for start, stop in pairwise(places)]
    results = [item for part in parts for item in part]

    assert results == at_once.feed(candidates, rule=other)
    assert accepted_ids(results) == accept_by_hand(candidates)[:target]
    assert in_parts.counts == Counter(item.reason for item in results if isinstance(item, Rejection))
    assert in_parts.num_accepted == len(accepted_ids(results))


def test_every_rule_names_its_reason_and_all_are_counted():
    candidates: list[Candidate] = [
        make_row(0, "name a small cat"),
        make_row(1, "name a small cat", answer=""),
        make_row(2, "name a dog", num_output_tokens=10),
        make_row(3, "say a b c d now"),
        make_row(4, "NAME a small  cat"),
        make_row(5, "name a small cat please"),
        make_rejection(6),
        make_row(7, "what is rain ?"),
    ]
    curator = Curator(Screener(CONFIG, eval_rows=[HELD_OUT]))
    results = curator.feed(candidates)

    assert [item.reason if isinstance(item, Rejection) else "" for item in results] == [
        "", "empty", "too_long", "overlaps_eval", "duplicate", "near_duplicate", "no_answer", ""
    ]  # fmt: skip
    assert curator.counts == {
        "empty": 1, "too_long": 1, "overlaps_eval": 1, "duplicate": 1, "near_duplicate": 1, "no_answer": 1
    }  # fmt: skip
    assert curator.num_accepted == 2


def test_a_rejected_row_leaves_no_trace_in_what_is_accepted_later():
    """Rows 0 and 1 are refused for their answers, so the same instruction may come in with row 2."""
    rows = [make_row(0, "x y", answer=""), make_row(1, "x y", num_output_tokens=10), make_row(2, "x y")]

    assert accepted_ids(Curator(Screener(CONFIG)).feed(rows)) == ["r2"]


def test_of_two_near_duplicates_the_lower_index_survives():
    first, second = "name a small red cat", "name a small red cat please"

    assert accepted_ids(Curator(Screener(CONFIG)).feed([make_row(3, first), make_row(8, second)])) == ["r3"]
    assert accepted_ids(Curator(Screener(CONFIG)).feed([make_row(3, second), make_row(8, first)])) == ["r3"]


SYSTEM = " ".join(f"rule{i}" for i in range(90))


def make_row_under(system: str, index: int, question: str) -> Row:
    row = make_row(index, question)
    return dataclasses.replace(row, messages=(Message(role="system", content=system), *row.messages))


def test_a_long_system_turn_that_all_rows_share_makes_none_of_them_near_duplicates():
    rng = random.Random(1)
    words = [f"w{i}" for i in range(500)]
    rows = [make_row_under(SYSTEM, index, " ".join(rng.sample(words, 8))) for index in range(100)]
    by_meaning = CurateConfig(embedder="base", semantic_threshold=0.9)

    assert Curator(Screener(CurateConfig())).feed(rows) == rows
    assert Curator(Screener(by_meaning, embed=embed_hashed)).feed(rows) == rows


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        (CurateConfig(), ["near_duplicate", "duplicate"]),
        (CurateConfig(near_duplicate_threshold=None), ["", "duplicate"]),
        (
            CurateConfig(near_duplicate_threshold=None, embedder="base", semantic_threshold=0.99),
            ["semantic_duplicate", "duplicate"],
        ),
    ],
)
def test_one_question_under_another_system_turn_is_near_and_under_the_same_a_duplicate(
    config: CurateConfig, reasons: list[str]
):
    rows = [
        make_row_under(system, index, "name a small red cat")
        for index, system in enumerate(("be brief", "be kind", "be brief"))
    ]
    first, *others = Curator(Screener(config, embed=embed_hashed)).feed(rows)

    assert first == rows[0]
    assert [item.reason if isinstance(item, Rejection) else "" for item in others] == reasons


@pytest.mark.parametrize(("ngram", "num_accepted"), [(1, 1), (3, 2)])
def test_the_size_of_the_ngrams_is_the_setting(ngram: int, num_accepted: int):
    """The same six words in another order: all of their words are shared, and none of their trigrams."""
    curator = Curator(Screener(CurateConfig(ngram=ngram)))
    curator.feed([make_row(0, "one two three four five six"), make_row(1, "six five four three two one")])

    assert curator.num_accepted == num_accepted


def test_a_rejection_keeps_the_beginning_of_the_instruction_and_what_was_paid_for():
    words = " ".join(f"word{i}" for i in range(1000))
    (rejection,) = Curator(Screener(CONFIG)).feed([make_row(4, words, answer="ANSWER", num_output_tokens=10)])

    assert rejection == Rejection(
        row_id="r4",
        index=4,
        source="s",
        reason="too_long",
        text=words[:MAX_REJECTED_TEXT],
        num_output_tokens=10,
    )


def test_a_rejection_of_synthesis_passes_through_as_it_came():
    assert Curator(Screener(CONFIG)).feed([make_rejection(0)]) == [make_rejection(0)]


@pytest.mark.parametrize("second", [5, 4])
def test_candidates_out_of_index_order_are_refused(second: int):
    curator = Curator(Screener(CONFIG))
    curator.feed([make_row(5, "one")])

    with pytest.raises(ValueError, match=f"got index {second} of 's' after 5; sort them"):
        curator.feed([make_row(second, "two")])


def test_order_is_checked_past_the_target_too():
    curator, rule = Curator(Screener(CONFIG)), StopRule(StopConfig(), num_rows=1)
    curator.feed([make_row(4, "one")], rule=rule)

    assert curator.feed([make_row(5, "two")], rule=rule) == []
    with pytest.raises(ValueError, match="got index 5 of 's' after 5"):
        curator.feed([make_row(5, "three")], rule=rule)


def test_past_the_target_candidates_are_neither_rows_nor_rejections():
    """The second row is index 2; rejections before it are kept, those after it are not."""
    first: list[Candidate] = [make_rejection(0), make_row(1, "one"), make_row(2, "two")]
    curator, rule = Curator(Screener(CONFIG)), StopRule(StopConfig(), num_rows=2)

    assert curator.feed([*first, make_rejection(3), make_row(4, "x")], rule=rule) == first
    assert curator.feed([make_row(9, "nine")], rule=rule) == []
    assert (curator.num_accepted, curator.counts) == (2, {"no_answer": 1})


def test_what_train_says_too_is_no_overlap():
    rows = [make_row(0, "say a b c d now")]
    train = SeedTask(task_id="t1", messages=(Message(role="user", content="x a b c d"),))
    longer = SeedTask(task_id="t0", messages=(Message(role="user", content="a b c d e"),))

    assert Curator(Screener(CONFIG, eval_rows=[longer])).feed(rows)[0] != rows[0]
    assert Curator(Screener(CONFIG, eval_rows=[longer], train_rows=[train])).feed(rows) == rows


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("near_duplicate_threshold", 0.2),
        ("near_duplicate_threshold", 1.1),
        ("num_perm", 8),
        ("ngram", 0),
        ("overlap_ngram", 0),
        ("max_prompt_tokens", 0),
        ("max_repeated_share", 1.5),
    ],
)
def test_a_setting_out_of_its_range_is_refused_before_any_work(setting: str, value: float):
    with pytest.raises(ValidationError, match=setting):
        CurateConfig.model_validate({setting: value})


def test_every_threshold_and_size_that_settings_allow_can_be_searched():
    sizes = [(threshold, num_perm) for threshold in (0.3, 0.55, 1.0) for num_perm in (16, 17, 100, 256)]

    for threshold, num_perm in sizes:
        config = CurateConfig(near_duplicate_threshold=threshold, num_perm=num_perm)
        rows = [make_row(0, "one two three four"), make_row(1, "one two three four !")]
        expected = ["r0"] if threshold <= 2 / 3 else ["r0", "r1"]
        assert accepted_ids(Curator(Screener(config)).feed(rows)) == expected


def test_all_of_a_large_feed_is_the_same_in_a_second_curator():
    rng = random.Random(0)
    rows = [make_row(i, " ".join(rng.choices("abcdefghij", k=rng.randint(1, 12)))) for i in range(1500)]
    config = CurateConfig(near_duplicate_threshold=0.5)

    first = Curator(Screener(config)).feed(rows)
    curator = Curator(Screener(config))
    assert first == [item for row in rows for item in curator.feed([row])]
    assert {"duplicate", "near_duplicate"} <= set(curator.counts)
