"""Checkpoints through torch DCP: trained parameters, optimizer state, recent losses and the step.

Each worker writes its own shards, so any number of workers can read them back. Ray Train commits a
checkpoint when every worker has reported it; a directory on disk is not yet one. Each worker seals its
files with their digests, so one that was cut or changed since is seen, and the one before it is taken. The
first one seals, among its own, a note of how many workers there were: so a seal that is lost is seen too.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
import torch
import xxhash
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from delia.errors import TrainError
from delia.store.tables import join, list_names, read_bytes
from delia.train.guards import LossWatch, agree

logger = logging.getLogger(__name__)
SEAL = "seal-{}.json"
PROGRESS = "progress.json"
"""After which step a checkpoint was made, and by how many workers."""
_SHARDED = StateDictOptions(ignore_frozen_params=True)


def _state(
    model: nn.Module, optimizers: list[torch.optim.AdamW], watch: LossWatch, step: int
) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=_SHARDED),
        "optimizers": {
            str(index): get_optimizer_state_dict(model, optimizer, options=_SHARDED)
            for index, optimizer in enumerate(optimizers)
        },
        "recent_2W": watch.recent_2W,
        "step": torch.tensor(step),
    }


def save_checkpoint(
    model: nn.Module, optimizers: list[torch.optim.AdamW], watch: LossWatch, step: int, directory: Path
) -> None:
    """Write this worker's shards; every worker must call it."""
    save(_state(model, optimizers, watch, step), checkpoint_id=str(directory))


def seal_checkpoint(directory: Path, step: int) -> None:
    """Note the digests of this worker's files beside them, when all of them are there."""
    rank, num_workers = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if rank == 0:
        (directory / PROGRESS).write_text(json.dumps({"step": step, "num_workers": num_workers}))
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    digests = {str(file.relative_to(directory)): _digest(file) for file in files}
    (directory / SEAL.format(rank)).write_text(json.dumps(digests, indent=1))


def read_sealed_step(address: str) -> tuple[int, str]:
    """Return after which step a checkpoint was made, 0 if a seal is missing; and what is missing.

    The files are not held against their digests: that needs all of them.
    """
    names = set(list_names(address))
    if PROGRESS not in names:
        return 0, f"{PROGRESS} is missing"
    try:
        progress: dict[str, int] = json.loads(read_bytes(join(address, PROGRESS)))
        step, seals = progress["step"], [SEAL.format(rank) for rank in range(progress["num_workers"])]
    except (ValueError, KeyError, TypeError):
        return 0, f"{PROGRESS} is not whole"
    missing = [seal for seal in seals if seal not in names]
    return (0, f"{missing[0]} is missing") if missing else (step, "")


def find_damage(directory: Path) -> str:
    """Return what is wrong with the files of a checkpoint, nothing where all are as they were sealed."""
    seals = sorted(directory.glob(SEAL.format("*")))
    if not seals:
        return "it has no seal"
    _, problem = read_sealed_step(str(directory))
    if problem:
        return problem
    for seal in seals:
        try:
            digests: dict[str, str] = json.loads(seal.read_text())
        except ValueError:
            return f"{seal.name} is not whole"
        for name, digest in digests.items():
            file = directory / name
            if not file.is_file():
                return f"{name} is missing"
            if _digest(file) != digest:
                return f"{name} was cut or changed"
    return ""


def _digest(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def resume(model: nn.Module, optimizers: list[torch.optim.AdamW], watch: LossWatch) -> int:
    """Read the newest whole checkpoint that Ray Train has committed; return the step that comes next.

    Raises:
        TrainError: There are checkpoints, and each of them is damaged.
    """
    kept: Sequence[Any] = ray.train.get_all_reported_checkpoints()
    problems: list[str] = []
    for item in reversed(kept):
        with item.checkpoint.as_directory() as directory:
            problem = find_damage(Path(directory))
            if not agree(problem):
                return load_checkpoint(model, optimizers, watch, Path(directory))
        problems.append(f"{item.checkpoint.path}: {problem or 'another worker finds it damaged'}")
        logger.warning("a checkpoint is damaged, the one before it is taken: %s", problems[-1])
    if problems:
        raise TrainError(
            f"no checkpoint of this run is whole ({'; '.join(problems)}); restore one, or remove the run's"
            " directory above them to train from the first step"
        )
    return 0


def load_checkpoint(
    model: nn.Module, optimizers: list[torch.optim.AdamW], watch: LossWatch, directory: Path
) -> int:
    """Read parameters, optimizer state and recent losses in place; return the step that comes next."""
    state = _state(model, optimizers, watch, 0)
    load(state, checkpoint_id=str(directory))
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    for index, optimizer in enumerate(optimizers):
        set_optimizer_state_dict(model, optimizer, state["optimizers"][str(index)], options=_SHARDED)
    return int(state["step"])
