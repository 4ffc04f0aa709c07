"""A global batch -> micro-batches that hold no padding: rows end to end, each attending to itself alone.

    row numbers --pack_batch--> row numbers by worker and micro-batch --join_stream--> Stream

Linear layers see one long row; attention is told where rows begin (`model.attention`), and positions
restart with each. So packed and unpacked gradients are equal, and no flop is spent on padding.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delia.train.rows import TrainRows


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One micro-batch; T ids of all its rows, N of them predict a trained token.

    Attributes:
        rows: Row numbers, in order.
        lengths: How many ids each has; they sum to T.
        ids_T: Token ids, int64.
        positions_T: Place inside the row, from 0.
        places_N: Where in the stream a trained token is predicted: one before it.
        labels_N: The trained tokens.
        row_N: For each, its row's place in `rows`.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    ids_T: Tensor
    positions_T: Tensor
    places_N: Tensor
    labels_N: Tensor
    row_N: Tensor

    def look_up(self, values_R: NDArray[Any]) -> Tensor:
        """Return what the row of each trained token has in an array over all rows, [N]."""
        return torch.from_numpy(values_R[np.array(self.rows, np.int64)])[self.row_N]


def pack_batch(
    batch: Sequence[int], lengths: Sequence[int], *, num_workers: int, max_tokens: int
) -> list[list[list[int]]]:
    """Return row numbers by worker and micro-batch, at most `max_tokens` ids each.

    The longest row goes first, each to the micro-batch with the fewest ids (Graham 1969, longest
    processing time first): workers end a step at nearly the same time, which filling one micro-batch
    after the other would not do. A row over the limit has a micro-batch to itself. Every worker gets
    the same number of them, some empty, because collectives must be entered by all.
    """
    ordered = sorted(batch, key=lambda row: (-lengths[row], row))
    total = sum(min(lengths[row], max_tokens) for row in batch)
    num_rounds = max(1, -(-total // (max_tokens * num_workers)))
    while True:
        parts = _spread(ordered, lengths, num_rounds * num_workers)
        fits = all(len(part) <= 1 or sum(lengths[row] for row in part) <= max_tokens for part in parts)
        if fits:
            return [parts[worker::num_workers] for worker in range(num_workers)]
        num_rounds += 1


def _spread(ordered: Sequence[int], lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    fill = [(0, place) for place in range(num_parts)]
    for row in ordered:
        tokens, place = heapq.heappop(fill)
        parts[place].append(row)
        heapq.heappush(fill, (tokens + int(lengths[row]), place))
    return parts


def join_stream(rows: TrainRows, chosen: Sequence[int]) -> Stream:
    """Lay rows end to end; no rows give two ids that count nothing, so that collectives are entered."""
    pieces = [rows[row] for row in chosen] or [(np.zeros(2, np.int32), np.zeros(2, np.bool_))]
    lengths = [len(ids) for ids, _ in pieces]
    is_trained = np.concatenate([mask for _, mask in pieces])
    starts = np.cumsum([0, *lengths[:-1]])
    is_trained[starts] = False  # a row's first id is told by nothing: the id before it is another row's
    ids = np.concatenate([ids for ids, _ in pieces]).astype(np.int64)
    trained = np.flatnonzero(is_trained)
    return Stream(
        rows=tuple(chosen),
        lengths=tuple(lengths),
        ids_T=torch.from_numpy(ids),
        positions_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        places_N=torch.from_numpy(trained - 1),
        labels_N=torch.from_numpy(ids[trained]),
        row_N=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)[trained]),
    )
