"""DELIA's meters: what the task and the diverse rows ask of the parameters, read while training and changing nothing.

    probe rows, the same at each reading --> gradients by source, their cosine, the change by a task step, off-task KL

DELIA (arXiv 2408.10841) claims that diverse data buffers: that a step on the task changes the diverse rows'
gradient, less of it along the task's direction and more against it. To first order that change is -e F g, with
F the Fisher information on the diverse prompts when their answers are the model's own samples, so that its
cosine with the task's gradient g is negative (`train/buffering_cosine`), and the gradient itself is zero in
expectation before any step.

A reading costs a forward and a backward pass over `num_rows` rows of the task, three over as many diverse rows,
however many sources there are, two forward passes over the latter, and one over a short prompt with each word.

All workers read the same rows, so that the sharded gradients that FSDP averages are those of one. Dropout is off,
parameters are put back bit for bit, and the generators of random numbers are not used.
"""

import time
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from delia.metrics import labelled
from delia.model.original import find_changes
from delia.rng import make_random
from delia.train.building import TrainInput
from delia.train.divergence import HeldTokens
from delia.train.neighbours import Neighbours
from delia.train.packing import Stream, join_stream, pack_batch
from delia.train.passes import reshard, sync_gradients
from delia.train.rows import TASK, TrainRows
from delia.train.settings import MetersConfig
from delia.train.weighting import weigh_equally

Gradient = list[Tensor]
"""This worker's part of the gradient by each parameter that a stage moves, float32."""


class Meters:
    """Reads a model in training every `every` steps; all workers must read together."""

    def __init__(self, model: PreTrainedModel, task: TrainInput, config: MetersConfig) -> None:
        """Choose the probe rows, and the words that the first token is measured against."""
        self.every = config.every
        self._model = model
        self._config = task.config
        self._rows = task.rows
        self._probe = choose_probe(task.rows, config)
        self._has_base = not find_changes(model)
        self._neighbours = Neighbours.choose(model, task, config)
        self._started = time.monotonic()
        self._seconds = 0.0

    def read(self, optimizer: torch.optim.AdamW) -> dict[str, float]:
        """Return all readings by the names of `delia.metrics`.

        Args:
            optimizer: The one whose parameters the coming step moves; its state is not touched.
        """
        started = time.monotonic()
        was_training = self._model.training
        self._model.eval()
        readings = self._read_gradients(optimizer)
        diverse = self._rows_of(source for source in self._probe if source != TASK)
        if self._has_base and diverse:
            readings["train/off_task_kl"] = self._measure_divergence(diverse)
        if self._neighbours is not None:
            readings |= self._neighbours.read(self._model)
        self._model.zero_grad(set_to_none=True)
        self._model.train(was_training)
        ended = time.monotonic()
        self._seconds += ended - started
        share = self._seconds / (ended - self._started)
        return readings | {"train/meter_seconds": ended - started, "train/meter_share": share}

    def _read_gradients(self, optimizer: torch.optim.AdamW) -> dict[str, float]:
        groups = optimizer.param_groups
        moved = [parameter for group in groups for parameter in group["params"]]
        by_source = {source: self._compute_gradient(rows, moved) for source, rows in self._probe.items()}
        readings = {
            labelled("train/source_gradient_norm", source): self._dot(gradient, gradient) ** 0.5
            for source, gradient in by_source.items()
        }
        diverse = self._rows_of(source for source in self._probe if source != TASK)
        if TASK not in by_source or not diverse:
            return readings
        before = self._compute_gradient(diverse, moved)
        saved = [_local(parameter).clone() for parameter in moved]
        self._step_on(by_source[TASK], groups)
        after = self._compute_gradient(diverse, moved)
        with torch.no_grad():
            for parameter, value in zip(moved, saved, strict=True):
                _local(parameter).copy_(value)
        change = [late - early for late, early in zip(after, before, strict=True)]
        norm = self._dot(before, before) ** 0.5
        return readings | {
            "train/gradient_cosine": self._cosine(by_source[TASK], before),
            "train/buffering_change": self._dot(change, change) ** 0.5 / norm if norm else 0.0,
            "train/buffering_cosine": self._cosine(change, by_source[TASK]),
        }

    @torch.no_grad()
    def _step_on(self, gradient: Gradient, groups: list[dict[str, Any]]) -> None:
        """Go down a gradient by as much as Adam's first step does: each group by its rate a parameter."""
        parts = iter(gradient)
        for group in groups:
            chosen = [next(parts) for _ in group["params"]]
            length = self._dot(chosen, chosen) ** 0.5
            if length:
                step = group["peak"] * sum(p.numel() for p in group["params"]) ** 0.5 / length
                for parameter, part in zip(group["params"], chosen, strict=True):
                    _local(parameter).sub_(part, alpha=step)

    def _compute_gradient(self, rows: list[int], moved: list[nn.Parameter]) -> Gradient:
        """Return the gradient of the mean loss over the trained tokens of some rows."""
        self._model.zero_grad(set_to_none=True)
        num_trained = int(self._rows.num_trained_R[rows].sum())
        passes = self._pack(rows)
        for place, stream in enumerate(passes):
            sync_gradients(self._model, is_last=place == len(passes) - 1)
            loss, _ = cast(Any, self._model).compute_loss(stream, weigh_equally)
            (loss / num_trained).backward()
        gradient = [
            torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad).float().clone() for p in moved
        ]
        self._model.zero_grad(set_to_none=True)
        return gradient

    @torch.no_grad()
    def _measure_divergence(self, rows: list[int]) -> float:
        """Return KL(base || model) in nats a trained token."""
        total, count = 0.0, 0
        for stream in self._pack(rows):
            held = HeldTokens(is_held_N=torch.ones(len(stream.labels_N), dtype=torch.bool))
            _, nats_N = cast(Any, self._model).compute_loss(stream, weigh_equally, held)
            total, count = total + float(nats_N.double().sum()), count + len(nats_N)
            reshard(self._model)
        return total / count

    def _pack(self, rows: list[int]) -> list[Stream]:
        """Lay rows out; without dropout layers are not checkpointed, so that then each goes alone."""
        limit = 1 if self._config.gradient_checkpointing else self._config.max_tokens_per_micro_batch
        (parts,) = pack_batch(rows, self._rows.lengths_R.tolist(), num_workers=1, max_tokens=limit)
        return [join_stream(self._rows, part) for part in parts if part]

    def _rows_of(self, sources: Iterable[str]) -> list[int]:
        return [row for source in sources for row in self._probe[source]]

    def _cosine(self, one: Gradient, other: Gradient) -> float:
        norms = (self._dot(one, one) * self._dot(other, other)) ** 0.5
        return self._dot(one, other) / norms if norms else 0.0

    def _dot(self, one: Gradient, other: Gradient) -> float:
        """Return the inner product over all workers' parts, each shard once."""
        device = next(self._model.parameters()).device
        parts = [(a.double() * b.double()).sum() for a, b in zip(one, other, strict=True)]
        total = torch.stack(parts).sum().to(device)
        num_workers = dist.get_world_size()
        if num_workers == 1:
            return float(total)
        dist.all_reduce(total)
        num_copies = num_workers // (self._config.shard_group or num_workers)
        return float(total) / num_copies


def choose_probe(rows: TrainRows, config: MetersConfig) -> dict[str, list[int]]:
    """Return the rows that are read, by source: up to `num_rows` of the task, and as many diverse ones in all.

    Diverse rows are spread evenly over the sources, earlier ones first with what does not divide, and each has
    one at least: its gradient is read too.
    """
    others = [source for source in rows.sources if source != TASK]
    share, rest = divmod(config.num_rows, max(1, len(others)))
    wanted = {source: max(1, share + (place < rest)) for place, source in enumerate(others)}
    probe = {}
    for place, source in enumerate(rows.sources):
        there = np.flatnonzero(rows.source_R == place).tolist()
        count = min(wanted.get(source, config.num_rows), len(there))
        probe[source] = sorted(make_random(config.seed, "probe", source).sample(there, count))
    return probe


def _local(tensor: Tensor) -> Tensor:
    """Return this worker's part of a tensor, which shares its memory."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
