"""Checkpoints through torch DCP: trained parameters, optimizer state and the step.

Each worker writes its own shards, so any number of workers can read them back. Ray Train commits a
checkpoint when every worker has reported it; a directory on disk is not yet one.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

_SHARDED = StateDictOptions(ignore_frozen_params=True)


def _state(model: nn.Module, optimizers: list[torch.optim.AdamW], step: int) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model, options=_SHARDED),
        "optimizers": {
            str(index): get_optimizer_state_dict(model, optimizer, options=_SHARDED)
            for index, optimizer in enumerate(optimizers)
        },
        "step": torch.tensor(step),
    }


def save_checkpoint(
    model: nn.Module, optimizers: list[torch.optim.AdamW], step: int, directory: Path
) -> None:
    """Write this worker's shards; every worker must call it."""
    save(_state(model, optimizers, step), checkpoint_id=str(directory))


def load_checkpoint(model: nn.Module, optimizers: list[torch.optim.AdamW], directory: Path) -> int:
    """Read parameters and optimizer state in place; return the step that comes next."""
    state = _state(model, optimizers, 0)
    load(state, checkpoint_id=str(directory))
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=False))
    for index, optimizer in enumerate(optimizers):
        set_optimizer_state_dict(model, optimizer, state["optimizers"][str(index)], options=_SHARDED)
    return int(state["step"])


def gather_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters, whole, on the CPU of the first worker; empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
