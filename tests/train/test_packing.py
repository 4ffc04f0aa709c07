"""Micro-batches without padding: every row once, a bound on tokens, balanced workers, labels by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delia.train.packing import join_stream, pack_batch
from delia.train.rows import TASK, join_rows

LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 5), st.integers(2, 200))
def test_workers_share_a_batch_exactly_within_the_bound(lengths, num_workers, max_tokens):
    batch = list(range(len(lengths)))
    parts = pack_batch(batch, lengths, num_workers=num_workers, max_tokens=max_tokens)
    assert len(parts) == num_workers
    assert len({len(part) for part in parts}) == 1, "workers enter collectives a different number of times"
    micro_batches = [micro_batch for part in parts for micro_batch in part]
    assert Counter(row for micro_batch in micro_batches for row in micro_batch) == Counter(batch)
    for micro_batch in micro_batches:
        assert len(micro_batch) <= 1 or sum(lengths[row] for row in micro_batch) <= max_tokens


@given(LENGTHS, st.integers(1, 4))
def test_workers_differ_by_one_row_at_most(lengths, num_workers):
    """A bound of Graham's: the longest part exceeds any other by no more than one row's tokens."""
    parts = pack_batch(range(len(lengths)), lengths, num_workers=num_workers, max_tokens=10_000)
    loads = [sum(lengths[row] for micro_batch in part for row in micro_batch) for part in parts]
    assert max(loads) - min(loads) <= max(lengths)


def test_no_more_passes_are_made_than_tokens_ask_for():
    lengths = [40] * 12
    parts = pack_batch(range(12), lengths, num_workers=2, max_tokens=120)
    assert [[len(micro_batch) for micro_batch in part] for part in parts] == [[3, 3], [3, 3]]


def test_a_row_over_the_bound_is_alone_and_a_row_that_comes_twice_is_trained_twice():
    assert pack_batch([0, 1, 1], [90, 5], num_workers=1, max_tokens=20) == [[[0], [1, 1]]]


ROWS = join_rows(
    [
        ((5, 6, 7, 8), (False, False, True, True)),
        ((9, 10), (True, True)),
        ((11, 12, 13), (False, True, False)),
    ],
    sources=[TASK, "magpie", "magpie"],
    has_token=[True, False, False],
)


def test_rows_lie_end_to_end_and_positions_restart():
    stream = join_stream(ROWS, [2, 0, 1])
    assert stream.ids_T.tolist() == [11, 12, 13, 5, 6, 7, 8, 9, 10]
    assert stream.positions_T.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert stream.lengths == (3, 4, 2)


def test_a_label_is_predicted_from_the_place_before_it_in_its_own_row():
    """Row 1 begins with a trained id, which only another row's end comes before: it is not trained."""
    stream = join_stream(ROWS, [2, 0, 1])
    assert stream.labels_N.tolist() == [12, 7, 8, 10]
    assert stream.places_N.tolist() == [0, 4, 5, 7]
    assert stream.row_N.tolist() == [0, 1, 1, 2]
    assert ROWS.num_trained_R.tolist() == [2, 1, 1]


def test_no_rows_make_a_stream_that_counts_nothing():
    stream = join_stream(ROWS, [])
    assert (stream.lengths, stream.ids_T.tolist(), stream.labels_N.tolist()) == ((2,), [0, 0], [])


def test_rows_keep_where_they_came_from():
    ids, mask = ROWS[2]
    assert (ids.tolist(), mask.tolist()) == ([11, 12, 13], [False, True, False])
    assert ROWS.is_task_R.tolist() == [True, False, False]
    assert ROWS.lengths_R.tolist() == [4, 2, 3]
    with pytest.raises(IndexError):
        ROWS[3]
