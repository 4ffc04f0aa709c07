"""What one step saw and how fast it was: the metrics that the first worker logs."""

import resource
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from delia.metrics import labelled
from delia.train.packing import Stream
from delia.train.rows import TrainRows


class StepTally:
    """A step's clock and counts; made when the step begins.

    Attributes:
        batch: Row numbers of the global batch.
        num_trained: How many of its tokens the loss counts.
    """

    def __init__(self, rows: TrainRows, batch: Sequence[int]) -> None:
        """Start the clock."""
        chosen = np.asarray(batch)
        self.batch = batch
        self.num_trained = int(rows.num_trained_R[chosen].sum())
        self._num_tokens = int(rows.lengths_R[chosen].sum())
        self._started = time.monotonic()

    def read(self, *, loss: float, norm: float, rate: float) -> dict[str, float]:
        """Return the step's metrics."""
        seconds = time.monotonic() - self._started
        return {
            "train/loss": loss,
            "train/gradient_norm": norm,
            "train/learning_rate": rate,
            "train/tokens_per_second": self._num_tokens / seconds,
            "train/trained_tokens_per_second": self.num_trained / seconds,
            "train/step_seconds": seconds,
            "train/peak_memory_bytes": read_peak_memory(),
        }


class SourceLosses:
    """The losses of a step's trained tokens, added up by source; nearly free."""

    def __init__(self, rows: TrainRows) -> None:
        """Start with nothing."""
        self._rows = rows
        self._sums_S2 = torch.zeros((len(rows.sources), 2), dtype=torch.float64)

    def add(self, stream: Stream, losses_N: Tensor) -> None:
        """Enter a micro-batch: each trained token's loss in nats, before weights."""
        source_N = stream.look_up(self._rows.source_R).long()
        self._sums_S2 = self._sums_S2.to(losses_N.device)  # it stays there: no step waits for the GPU
        entries_N2 = torch.stack((losses_N.detach(), torch.ones_like(losses_N)), 1).double()
        self._sums_S2.index_add_(0, source_N.to(losses_N.device), entries_N2)

    def read(self, num_workers: int) -> dict[str, float]:
        """Return the mean over all workers' tokens of each source that had some; every worker must call it."""
        if num_workers > 1:
            dist.all_reduce(self._sums_S2)
        return {
            labelled("train/source_loss", source): total / count
            for source, (total, count) in zip(self._rows.sources, self._sums_S2.tolist(), strict=True)
            if count
        }


def read_peak_memory() -> float:
    """Return the most bytes that this process held so far: allocated on its GPU, else resident."""
    if torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
