"""Which rows a step trains on: a pure function of (rows, seed, step), so resuming needs no state.

Each epoch shuffles task rows and diverse rows apart and merges them at even spacing, so that every
batch holds its share of the task. A plain shuffle at ratio 100 leaves most batches without a task row.
"""

from collections.abc import Sequence
from functools import lru_cache

from delia.rng import make_random


def merge_evenly(num_task: int, num_diverse: int, *, seed: int, epoch: int) -> list[int]:
    """Return one epoch's order of row numbers: task rows are 0..num_task-1, diverse rows follow."""
    rng = make_random(seed, "epoch", epoch)
    positions: list[tuple[float, int]] = []
    for start, count in ((0, num_task), (num_task, num_diverse)):
        numbers = list(range(start, start + count))
        rng.shuffle(numbers)
        offset = rng.random()
        positions += [((place + offset) / count, number) for place, number in enumerate(numbers)]
    return [number for _, number in sorted(positions)]


class BatchOrder:
    """The global batches of one stage over the chosen rows."""

    def __init__(self, is_task: Sequence[bool], *, chosen: Sequence[int], batch_size: int, seed: int) -> None:
        """Remember which of the chosen rows are the task's; at least one row is needed."""
        if not chosen:
            raise ValueError("an order needs at least one row, got 0")
        self._numbers = sorted(chosen, key=lambda row: not is_task[row])
        self._num_task = sum(is_task[row] for row in chosen)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)

    def _compute_epoch(self, epoch: int) -> list[int]:
        num_diverse = len(self._numbers) - self._num_task
        merged = merge_evenly(self._num_task, num_diverse, seed=self._seed, epoch=epoch)
        return [self._numbers[number] for number in merged]

    def batch(self, step: int) -> list[int]:
        """Return the row indices of a step; an epoch's end may fall inside a batch."""
        size = len(self._numbers)
        places = range(step * self._batch_size, (step + 1) * self._batch_size)
        return [self._epoch(place // size)[place % size] for place in places]
