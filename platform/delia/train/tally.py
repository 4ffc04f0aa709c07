"""What one step saw and how fast it was: the metrics that the first worker logs."""

import resource
import time
from collections.abc import Sequence

import numpy as np
import torch

from delia.train.meters import SourceLosses
from delia.train.rows import TrainRows


class StepTally:
    """A step's clock and counts; made when the step begins.

    Attributes:
        batch: Row numbers of the global batch.
        num_trained: How many of its tokens the loss counts.
        by_source: This worker's losses, by source.
    """

    def __init__(self, rows: TrainRows, batch: Sequence[int]) -> None:
        """Start the clock."""
        chosen = np.asarray(batch)
        self.batch = batch
        self.num_trained = int(rows.num_trained_R[chosen].sum())
        self.by_source = SourceLosses(rows)
        self._num_tokens = int(rows.lengths_R[chosen].sum())
        self._started = time.monotonic()

    def read(self, *, loss: float, norm: float, rate: float, num_workers: int) -> dict[str, float]:
        """Return the step's metrics; every worker must call it, since sources' losses are added up over all."""
        seconds = time.monotonic() - self._started
        return {
            "train/loss": loss,
            "train/gradient_norm": norm,
            "train/learning_rate": rate,
            "train/tokens_per_second": self._num_tokens / seconds,
            "train/trained_tokens_per_second": self.num_trained / seconds,
            "train/step_seconds": seconds,
            "train/peak_memory_bytes": read_peak_memory(),
            **self.by_source.read(num_workers),
        }


def read_peak_memory() -> float:
    """Return the most bytes that this process held so far: allocated on its GPU, else resident."""
    if torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
