"""What `--preview` shows: which rows, what of them is trained, and what packing does."""

import pytest

from delia.train.preview import (
    COLOURS,
    MARKS,
    choose_rows,
    describe_packing,
    mark_trained,
    preview_rows,
)
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig

WORDS = ["zero", "one", "two", "three", "four", "five"]


def decode(ids) -> str:
    """As tokenizers do: the first word has no space before it."""
    return " ".join(WORDS[token] for token in ids)


@pytest.fixture
def rows():
    """Five rows of two to four ids; of the task's the second has the token."""
    encoded = [((0, 1, 2), (False, True, True))] * 3 + [((3, 4, 5, 1), (False, True, False, True))] * 2
    return join_rows(
        encoded,
        sources=[TASK, "magpie", TASK, "magpie", TASK],
        has_token=[False, False, True, False, False],
    )


def test_the_tasks_rows_with_a_token_come_first_and_diverse_ones_in_turn(rows):
    assert choose_rows(rows, 3) == [2, 1, 0]
    assert choose_rows(rows, 9) == [2, 1, 0, 3, 4]
    assert choose_rows(rows, 0) == []


def test_each_run_of_trained_tokens_stands_between_marks_and_keeps_its_space():
    ids, mask = (3, 4, 5, 1), (False, True, False, True)
    assert mark_trained(ids, mask, decode=decode, marks=MARKS) == "three[[ four]] five[[ one]]"
    assert mark_trained(ids, (False,) * 4, decode=decode, marks=MARKS) == "three four five one"
    assert mark_trained(ids, (True,) * 4, decode=decode, marks=MARKS) == "[[three four five one]]"


def test_a_row_is_shown_with_its_source_and_counts_and_coloured_on_a_terminal(rows):
    plain = list(preview_rows(rows, num_rows=2, decode=decode, is_coloured=False))
    assert plain == [
        "row 2 of task: 3 tokens, 2 trained",
        "zero[[ one two]]",
        "",
        "row 1 of magpie: 3 tokens, 2 trained",
        "zero[[ one two]]",
        "",
    ]
    start, end = COLOURS
    coloured = list(preview_rows(rows, num_rows=1, decode=decode, is_coloured=True))
    assert coloured[1] == f"zero{start} one two{end}"


def test_packing_is_told_in_numbers(make_input):
    """24 rows in batches of 24: all ids in one step, on two workers of at most 60 ids a micro-batch."""
    stages = (StageConfig(max_steps=3), StageConfig(rows="token", max_steps=1))
    task = make_input(stages=stages, global_batch_size=24, max_tokens_per_micro_batch=60, num_workers=2)
    num_tokens = sum(len(ids) for ids, _ in task.rows)
    num_trained = sum(int(mask.sum()) for _, mask in task.rows)
    longest = max(task.rows.lengths_R)
    of_all, first, second = describe_packing(task)
    assert of_all == (
        f"rows: 24, 8 of the task; tokens: {num_tokens}, {num_trained} trained ({num_trained / num_tokens:.2f});"
        f" longest row: {longest}, train.max_length=512"
    )
    assert first.startswith(
        f"stage 0: 3 steps of 24 rows on 2 workers, {num_tokens} tokens a step; micro-batches"
    )
    assert "a step and worker: 2 to 2" in first
    assert f"{num_tokens / 240:.2f} of 60 tokens full" in first
    assert second.startswith("stage 1: 1 steps of 24 rows")
