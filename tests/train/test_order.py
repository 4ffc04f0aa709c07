"""The order of rows: every row once an epoch, the task's evenly spread, a pure function of the step."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delia.train.order import BatchOrder, merge_evenly


def make_order(num_task: int, num_diverse: int, batch_size: int, *, seed: int = 0) -> BatchOrder:
    is_task = [True] * num_task + [False] * num_diverse
    return BatchOrder(is_task, chosen=range(len(is_task)), batch_size=batch_size, seed=seed)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_holds_every_row_once(num_task, num_diverse, seed, epoch):
    merged = merge_evenly(num_task, num_diverse, seed=seed, epoch=epoch)
    assert sorted(merged) == list(range(num_task + num_diverse))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 17))
def test_batches_run_through_epoch_after_epoch(num_task, num_diverse, batch_size):
    order, size = make_order(num_task, num_diverse, batch_size), num_task + num_diverse
    stream = [row for step in range(-(-3 * size // batch_size)) for row in order.batch(step)]
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("seed", range(5))
def test_at_ratio_ten_every_batch_of_32_holds_two_to_four_task_rows(seed):
    """32 rows in eleven are 2.9 of the task; the merge may be one off at each end, and an epoch may end inside."""
    order = make_order(100, 1000, 32, seed=seed)
    counts = Counter(sum(row < 100 for row in order.batch(step)) for step in range(4 * 1100 // 32))
    assert set(counts) <= {2, 3, 4}
    assert counts[3] > 0.7 * counts.total()


@pytest.mark.parametrize("ratio", [1, 3, 100])
def test_any_run_of_rows_holds_its_share_of_the_task_to_within_one(ratio):
    merged = merge_evenly(20, 20 * ratio, seed=1, epoch=0)
    for length in (ratio + 1, 5 * (ratio + 1), 11 * (ratio + 1)):
        held = [sum(n < 20 for n in merged[i : i + length]) for i in range(len(merged) - length)]
        assert set(held) <= {length // (ratio + 1) + off for off in (-1, 0, 1)}


def test_a_step_has_its_batch_whatever_was_asked_before():
    one, other = make_order(7, 30, 8), make_order(7, 30, 8)
    backwards = {step: one.batch(step) for step in reversed(range(20))}
    assert backwards == {step: other.batch(step) for step in range(20)}


def test_seeds_and_epochs_differ_in_order():
    orders = [tuple(merge_evenly(10, 30, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_only_chosen_rows_come_and_the_task_is_told_by_its_flag():
    """Rows 1, 4 and 6 of the eight are the task's; 6 and the diverse rows 0 and 3 are not chosen."""
    is_task = [False, True, False, False, True, False, True, False]
    order = BatchOrder(is_task, chosen=[7, 1, 2, 4, 5], batch_size=5, seed=3)
    for step in range(4):
        batch = order.batch(step)
        assert sorted(batch) == [1, 2, 4, 5, 7]
        places = [place for place, row in enumerate(batch) if is_task[row]]
        assert places[1] - places[0] >= 2, "two task rows in a row, with three diverse rows to lie between"


def test_an_order_of_no_rows_is_refused():
    with pytest.raises(ValueError, match="needs at least one row, got 0"):
        BatchOrder([True], chosen=[], batch_size=4, seed=0)
