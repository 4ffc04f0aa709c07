"""Rows in shards: how they are cut is where they lie, and a worker fetches what it reads and holds little of it."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from delia.train import rows as rows_module
from delia.train.building import build_order
from delia.train.packing import join_stream, pack_batch
from delia.train.rows import NUM_HELD, Shard, Shards, TrainRows, join_shard


def cut(rows: TrainRows, size: int, *, put: Callable[[Shard], Any] = lambda shard: shard) -> TrainRows:
    """Return the same rows in shards of `size`, the last row first."""
    stored = range(len(rows))[::-1]
    parts = [stored[start : start + size] for start in range(0, len(rows), size)]
    place_R = np.empty(len(rows), np.int64)
    place_R[stored] = np.arange(len(rows))
    return replace(
        rows,
        shards=Shards([put(join_shard([rows[row] for row in part])) for part in parts]),
        shard_R=(place_R // size).astype(np.int32),
        place_R=(place_R % size).astype(np.int32),
    )


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[[Shard], Any], list[int]]]:
    """A store that is not Ray's: what puts a shard there, and the numbers of those that were fetched."""
    stored: list[Shard] = []
    numbers: list[int] = []

    def put(shard: Shard) -> int:
        stored.append(shard)
        return len(stored) - 1

    def get(number: int) -> Shard:
        numbers.append(number)
        return stored[number]

    monkeypatch.setattr(rows_module, "ray", SimpleNamespace(get=get))
    yield put, numbers


@pytest.mark.parametrize("size", [1, 5, 24])
def test_rows_are_the_same_in_shards_of_any_size(make_input, size):
    whole = make_input().rows
    parts = cut(whole, size)
    assert len(parts.shards) == -(-24 // size)
    for (ids, mask), (own_ids, own_mask) in zip(whole, parts, strict=True):
        assert (ids.dtype, mask.dtype) == (own_ids.dtype, own_mask.dtype) == (np.int32, np.bool_)
        assert (ids.tolist(), mask.tolist()) == (own_ids.tolist(), own_mask.tolist())
    streams = [join_stream(rows, [3, 20, 7]) for rows in (whole, parts)]
    assert torch.equal(streams[0].ids_T, streams[1].ids_T)
    assert torch.equal(streams[0].places_N, streams[1].places_N)


def test_a_worker_fetches_the_shards_of_its_own_rows_and_no_other(make_input, fetched):
    put, numbers = fetched
    task = make_input(num_workers=2)
    rows = cut(task.rows, 2, put=put)
    batch = build_order(task, task.config.stages[0]).batch(0)
    packed = pack_batch(batch, rows.lengths_R.tolist(), num_workers=2, max_tokens=30)
    assert numbers == [], "row facts were looked up in shards"

    for micro_batch in packed[0]:
        join_stream(rows, micro_batch)
    own = {int(rows.shard_R[row]) for micro_batch in packed[0] for row in micro_batch}
    assert set(numbers) == own
    assert len(own) < len(rows.shards)
    assert max(Counter(numbers).values()) == 1, "a shard that was held was fetched again"


def test_a_process_holds_a_bounded_number_of_shards(make_input, fetched):
    put, numbers = fetched
    rows = cut(make_input().rows, 1, put=put)
    for row in range(NUM_HELD):
        _ = rows[row]
    _ = rows[0], rows[NUM_HELD - 1]
    assert len(numbers) == NUM_HELD
    _ = rows[NUM_HELD], rows[1]  # the one read longest ago made room
    assert len(numbers) == NUM_HELD + 2


def test_rows_travel_with_where_their_shards_are_and_without_those_that_are_held(make_input, fetched):
    put, numbers = fetched
    rows = cut(make_input().rows, 4, put=put)
    sent = pickle.dumps(rows)
    first = [part.tolist() for part in rows[0]]
    assert pickle.dumps(rows) == sent
    assert [part.tolist() for part in pickle.loads(sent)[0]] == first
    assert numbers == [5, 5], "the copy did not fetch for itself"


def test_a_training_on_shards_of_the_store_is_the_same_to_the_bit(train_on_ray, run_of_one, make_input):
    task = make_input()
    run = train_on_ray(replace(task, rows=cut(task.rows, 3, put=ray.put)))
    assert run.losses == run_of_one.losses
    assert run.tensors.keys() == run_of_one.tensors.keys()
    for name, tensor in run.tensors.items():
        assert torch.equal(tensor, run_of_one.tensors[name]), name
