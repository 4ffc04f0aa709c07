"""The rows of a mixture as a trainer reads them: a few flat arrays, shared by all workers of a node.

Ray keeps arrays in shared memory and hands them out without a copy, so a worker holds what it reads
in a step, however large the mixture is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TASK = "task"
EncodedRow = tuple[Sequence[int], Sequence[bool]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainRows:
    """Encoded chats, end to end; legend: R rows, T tokens of all rows.

    Attributes:
        ids_T: Token ids, int32.
        mask_T: Which of them the loss counts, bool.
        starts_R1: Where each row begins, and where the last one ends, int64 [R + 1].
        sources: Names of sources; `TASK` is the task's own.
        source_R: Each row's place in `sources`, int16.
        has_token_R: Whether a declared task token occurs in the row, bool.
        score_R: What `train.row_scores` says of each row, float32; None without that setting.
    """

    ids_T: NDArray[np.int32]
    mask_T: NDArray[np.bool_]
    starts_R1: NDArray[np.int64]
    sources: tuple[str, ...]
    source_R: NDArray[np.int16]
    has_token_R: NDArray[np.bool_]
    score_R: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source_R)

    def __getitem__(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return ids and mask of a row, as views."""
        part = slice(self.starts_R1[row], self.starts_R1[row + 1])
        return self.ids_T[part], self.mask_T[part]

    @property
    def lengths_R(self) -> NDArray[np.int64]:
        """Return the number of ids of each row."""
        return np.diff(self.starts_R1)

    @property
    def num_trained_R(self) -> NDArray[np.int64]:
        """Return how many ids of each row the loss counts; a row's first id has nothing to be told from."""
        totals = np.concatenate(([0], np.cumsum(self.mask_T, dtype=np.int64)))
        after_first_R = np.minimum(self.starts_R1[:-1] + 1, self.starts_R1[1:])
        counts_R: NDArray[np.int64] = totals[self.starts_R1[1:]] - totals[after_first_R]
        return counts_R

    @property
    def is_task_R(self) -> NDArray[np.bool_]:
        """Return which rows are the task's."""
        is_task = np.array([name == TASK for name in self.sources], np.bool_)
        is_task_R: NDArray[np.bool_] = is_task[self.source_R]
        return is_task_R


def join_rows(
    rows: Sequence[EncodedRow],
    *,
    sources: Sequence[str],
    has_token: Sequence[bool] | None = None,
    scores: Sequence[float] | None = None,
) -> TrainRows:
    """Return encoded rows as arrays.

    Args:
        rows: Ids and mask of each.
        sources: The name of each row's source, `TASK` for the task's own.
        has_token: Whether a declared task token occurs in each; none by default.
        scores: A number for each, or none.
    """
    names = tuple(dict.fromkeys(sources))
    return TrainRows(
        ids_T=np.array([token for ids, _ in rows for token in ids], np.int32),
        mask_T=np.array([flag for _, mask in rows for flag in mask], np.bool_),
        starts_R1=np.cumsum([0, *(len(ids) for ids, _ in rows)]).astype(np.int64),
        sources=names,
        source_R=np.array([names.index(source) for source in sources], np.int16),
        has_token_R=np.array(has_token if has_token is not None else [False] * len(rows), np.bool_),
        score_R=None if scores is None else np.array(scores, np.float32),
    )
