"""A worker process on gloo, without Ray: does what each line of its input says, and answers with a line.

    {"does": "train", "task": task.pickle, "rank": 0, "num_workers": 2, "folder": where it leaves its files}

Each run has a process group of its own. Files are lines.json, what the first worker logged, and a directory a
checkpoint, into which every worker puts its shards. A worker that does "step" leaves, instead of checkpoints,
step.pt: what the loop has of a step before it moves anything, whole, and which parameters lay there gathered. One that
does "stray" finds a stand-in of its own for the token, and leaves rows-RANK.pt.
"""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from delia.train import building, checkpoints, loop
from delia.train.building import TrainInput


def train(task: TrainInput, rank: int, num_workers: int, folder: Path) -> None:
    """Play one worker of Ray Train."""
    lines: list[tuple[int, dict[str, float]]] = []
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_workers)

    def report(metrics: dict[str, int], checkpoint: Any) -> None:
        shutil.copytree(checkpoint.path, folder / str(metrics["step"]), dirs_exist_ok=True)

    class Line:
        def __call__(self, metrics: dict[str, float], step: int) -> None:
            lines.append((step, metrics))

        def asks_to_stop(self) -> bool:
            return False

    context = SimpleNamespace(
        get_world_rank=lambda: rank,
        get_world_size=lambda: num_workers,
        get_local_world_size=lambda: num_workers,
    )
    played = SimpleNamespace(
        get_context=lambda: context, get_all_reported_checkpoints=lambda: [], report=report
    )
    loop.ray = checkpoints.ray = SimpleNamespace(get=lambda value: value, train=played)  # type: ignore[assignment]
    try:
        loop.train_worker({"input": [task], "log": Line()})
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (folder / "lines.json").write_text(json.dumps(lines))


@contextmanager
def kept_gradients(rank: int, folder: Path) -> Iterator[None]:
    """Let the loop start from an adapter that has moved, and keep the gradients that it is about to clip."""
    built: list[PreTrainedModel] = []
    gathered: dict[str, list[str]] = {}

    def build(task: TrainInput) -> PreTrainedModel:
        built.append(build_model(task))
        move(built[0])
        compute_loss = built[0].compute_loss

        def compute(*arguments: Any) -> Any:
            found = compute_loss(*arguments)
            gathered["forward"] = name_gathered(built[0])
            return found

        built[0].compute_loss = compute
        return built[0]

    def read(meters: loop.Meters, optimizer: torch.optim.AdamW) -> dict[str, float]:
        readings = read_meters(meters, optimizer)
        gathered["reading"] = name_gathered(built[0])
        return readings

    def clip(parameters: list[nn.Parameter], max_norm: float) -> float:
        gathered["backward"] = name_gathered(built[0])
        named = dict(built[0].named_parameters())
        gradients = {name: gather(p.grad).clone() for name, p in named.items() if p.grad is not None}
        first = next(iter(named.values()))
        mesh = tuple(first.device_mesh.shape) if isinstance(first, DTensor) else ()
        norm = clip_gradients(parameters, max_norm)
        if rank == 0:
            found = {"gradients": gradients, "norm": norm, "mesh": mesh, "gathered": gathered}
            torch.save(found, folder / "step.pt")
        return norm

    build_model, clip_gradients, read_meters = loop.build_model, loop.clip_gradients, loop.Meters.read
    with (
        patch.multiple(loop, build_model=build, clip_gradients=clip, report_checkpoint=lambda *_: None),
        patch.object(loop.Meters, "read", read),
    ):
        yield


@contextmanager
def stray_starts(rank: int, folder: Path) -> Iterator[None]:
    """Let each worker find another stand-in for the token, and keep the rows that it starts with."""
    build_model = loop.build_model

    def build(task: TrainInput) -> PreTrainedModel:
        with patch.object(building, "find_stand_in", lambda *_: 40 + rank):
            model = build_model(task)
        rows = model.get_input_embeddings().deltas_KD.detach()
        torch.save(gather(rows).clone(), folder / f"rows-{rank}.pt")
        return model

    with patch.object(loop, "build_model", build):
        yield


@torch.no_grad()
def move(model: PreTrainedModel) -> None:
    """Let LoRA and rows differ from nothing, so that every gradient is alive; the same on any mesh."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or name.endswith("deltas_KD"):
            value = 0.1 * torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def name_gathered(model: nn.Module) -> list[str]:
    """Return the parameters that this worker has whole, and not its shard of."""
    return [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whole; all workers must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main() -> None:
    """Serve until the input ends; whatever libraries print goes to the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        task = pickle.loads(Path(order["task"]).read_bytes())  # the test's own
        rank, folder = order["rank"], Path(order["folder"])
        watched = {"step": kept_gradients, "stray": stray_starts}.get(order["does"])
        with watched(rank, folder) if watched else nullcontext():
            train(task, rank, order["num_workers"], folder)
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
