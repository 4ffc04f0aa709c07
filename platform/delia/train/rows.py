"""The rows of a mixture as a trainer reads them: a few facts of each in arrays, and their tokens in shards.

    EncodedRow --join_shard--> Shard --Shards--> TrainRows[row]

A shard is an object in Ray's store, which hands it out without a copy, brings it to the nodes that read it and writes
it to disk where memory is short. So a worker holds a few shards, however large the mixture is. How rows are cut
into shards is where they lie and nothing else: row i is row i in any of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from delia.schema import TASK_SOURCE

TASK = TASK_SOURCE
NUM_HELD = 16
"""So many shards are held by a process; the next one takes the place of the one read longest ago."""
EncodedRow = tuple[Sequence[int], Sequence[bool]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Encoded chats, end to end; legend: P rows, T tokens of them.

    Attributes:
        ids_T: Token ids, int32.
        mask_T: Which of them the loss counts, bool.
        starts_P1: Where each row begins, and where the last one ends, int64 [P + 1].
    """

    ids_T: NDArray[np.int32]
    mask_T: NDArray[np.bool_]
    starts_P1: NDArray[np.int64]

    def __getitem__(self, place: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids and mask of a row, as views."""
        part = slice(self.starts_P1[place], self.starts_P1[place + 1])
        return self.ids_T[part], self.mask_T[part]

    def count_trained(self) -> NDArray[np.int64]:
        """Return how many ids of each row the loss counts, [P]; a row's first id has nothing to be told from."""
        totals = np.concatenate(([0], np.cumsum(self.mask_T, dtype=np.int64)))
        after_first_P = np.minimum(self.starts_P1[:-1] + 1, self.starts_P1[1:])
        counts_P: NDArray[np.int64] = totals[self.starts_P1[1:]] - totals[after_first_P]
        return counts_P


class Shards:
    """The shards of a training, each here or in Ray's store; a process fetches what it reads and holds a few."""

    def __init__(self, places: Sequence[Any]) -> None:
        """Remember where they are: each a `Shard`, or a reference to one; nothing is fetched."""
        self._places = tuple(places)
        # no method of its own, which would keep the references until a collection of cycles
        self._fetch = lru_cache(maxsize=NUM_HELD)(partial(_fetch, self._places))

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self._places)

    def __getitem__(self, number: int) -> Shard:
        """Return one, fetched if it is not held."""
        return self._fetch(number)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send where they are, not those that are held."""
        return Shards, (self._places,)


def _fetch(places: Sequence[Any], number: int) -> Shard:
    place = places[number]
    shard: Shard = place if isinstance(place, Shard) else ray.get(place)
    return shard


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainRows:
    """Encoded chats; legend: R rows. A chat that is repeated lies in its shard once.

    Attributes:
        shards: Their tokens.
        shard_R: In which shard each row lies, int32.
        place_R: Which row of its shard it is, int32.
        lengths_R: The number of its ids, int64.
        num_trained_R: How many of them the loss counts, int64.
        sources: Names of sources; `TASK` is the task's own.
        source_R: Each row's place in `sources`, int16.
        has_token_R: Whether a declared task token occurs in the row, bool.
        score_R: What `train.row_scores` says of each row, float32; None without that setting.
    """

    shards: Shards
    shard_R: NDArray[np.int32]
    place_R: NDArray[np.int32]
    lengths_R: NDArray[np.int64]
    num_trained_R: NDArray[np.int64]
    sources: tuple[str, ...]
    source_R: NDArray[np.int16]
    has_token_R: NDArray[np.bool_]
    score_R: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source_R)

    def __getitem__(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids and mask of a row, as views."""
        return self.shards[int(self.shard_R[row])][int(self.place_R[row])]

    def stream_ids(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Yield the ids of each shard, and how often each of them occurs in the rows, shard by shard."""
        for number in range(len(self.shards)):
            shard = self.shards[number]
            places = self.place_R[self.shard_R == number]
            times_P = np.bincount(places, minlength=len(shard.starts_P1) - 1)
            yield shard.ids_T, np.repeat(times_P, np.diff(shard.starts_P1))

    @property
    def is_task_R(self) -> NDArray[np.bool_]:
        """Return which rows are the task's."""
        is_task = np.array([name == TASK for name in self.sources], np.bool_)
        is_task_R: NDArray[np.bool_] = is_task[self.source_R]
        return is_task_R


def join_shard(rows: Sequence[EncodedRow]) -> Shard:
    """Return encoded rows as arrays."""
    return Shard(
        ids_T=np.array([token for ids, _ in rows for token in ids], np.int32),
        mask_T=np.array([flag for _, mask in rows for flag in mask], np.bool_),
        starts_P1=np.cumsum([0, *(len(ids) for ids, _ in rows)]).astype(np.int64),
    )


def number_sources(sources: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int16]]:
    """Return the names of sources in the order in which they occur, and each row's place among them."""
    names = tuple(dict.fromkeys(sources))
    places = {name: place for place, name in enumerate(names)}
    return names, np.array([places[source] for source in sources], np.int16)


def join_rows(
    rows: Sequence[EncodedRow],
    *,
    sources: Sequence[str],
    has_token: Sequence[bool] | None = None,
    scores: Sequence[float] | None = None,
) -> TrainRows:
    """Return encoded rows in one shard, in this process.

    Args:
        rows: Ids and mask of each.
        sources: The name of each row's source, `TASK` for the task's own.
        has_token: Whether a declared task token occurs in each; none by default.
        scores: A number for each, or none.
    """
    shard = join_shard(rows)
    names, source_R = number_sources(sources)
    return TrainRows(
        shards=Shards([shard]),
        shard_R=np.zeros(len(rows), np.int32),
        place_R=np.arange(len(rows), dtype=np.int32),
        lengths_R=np.diff(shard.starts_P1),
        num_trained_R=shard.count_trained(),
        sources=names,
        source_R=source_R,
        has_token_R=np.array(has_token if has_token is not None else [False] * len(rows), np.bool_),
        score_R=None if scores is None else np.array(scores, np.float32),
    )
