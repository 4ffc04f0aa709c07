"""The socket of input corruption: what a model reads in the place of an answer's own tokens.

    corruption(answer ids, progress, vocabulary, rng) -> as many ids

Labels stay as they are: a token is told as itself, from what was put before it. A method is handed the
answers alone, so that a prompt can't change, and a generator that depends on (seed, step, row), so that
packing, workers and restarts change nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from delia.errors import TrainError
from delia.rng import make_random
from delia.train.packing import Stream
from delia.train.rows import TrainRows


class InputCorruption(Protocol):
    """A method of corruption; a frozen value whose fields are its knobs."""

    def __call__(
        self, answer_ids: Sequence[int], *, progress: float, vocab_size: int, rng: random.Random
    ) -> list[int]:
        """Return what the model reads in an answer's place.

        Args:
            answer_ids: The trained tokens of a row, in order.
            progress: The share of all steps that is done, from 0 to below 1.
            vocab_size: Ids lie below it.
            rng: The row's own at this step.
        """
        ...


def corrupt_stream(
    stream: Stream,
    rows: TrainRows,
    corruption: InputCorruption,
    *,
    names: tuple[int | str, ...],
    progress: float,
    vocab_size: int,
) -> Stream:
    """Return a stream with corrupted inputs and the same labels.

    Args:
        stream: As it was joined.
        rows: Where it came from.
        corruption: The method.
        names: What the generators are derived from, beside the row: seed and step.
        progress: See `InputCorruption`.
        vocab_size: See `InputCorruption`.

    Raises:
        TrainError: The method returned something else than as many ids of the vocabulary.
    """
    ids_T = stream.ids_T.clone()
    start = 0
    for row, length in zip(stream.rows, stream.lengths, strict=False):  # a stream of no rows has filler
        ids, mask = rows[row]
        answer = ids[mask].tolist()
        rng = make_random(*names, row)
        changed = corruption(answer, progress=progress, vocab_size=vocab_size, rng=rng)
        if len(changed) != len(answer) or not all(0 <= token < vocab_size for token in changed):
            raise TrainError(
                f"{corruption!r} must return {len(answer)} ids below {vocab_size} for an answer of as many, got"
                f" {len(changed)} up to {max(changed, default=0)}; mend the method or its knobs"
            )
        ids_T[start : start + length][torch.from_numpy(mask.copy())] = torch.tensor(changed, dtype=torch.long)
        start += length
    return replace(stream, ids_T=ids_T)
