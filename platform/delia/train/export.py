"""Trained parameters, sharded over all workers -> the files that are published.

    LoRA and token rows  ->  adapter_model.safetensors, adapter_config.json
    all parameters       ->  a model, in the files of its base: one file's weights are whole at a time

Rows of new tokens belong to the input embedding alone, so that a model whose embedding was tied gets an output
head of its own with them.
"""

from collections import Counter
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from delia.errors import TrainError
from delia.model.adapted import TokenRows, collect
from delia.store.adapters import write_adapter
from delia.store.models import ModelConfig, resolve_model
from delia.store.serving import write_model_config
from delia.store.weights import HEAD, find_weights, measure_tensors, write_index, write_tensors
from delia.train.settings import TrainConfig


def write_trained(model: PreTrainedModel, folder: Path, *, base: ModelConfig, config: TrainConfig) -> None:
    """Write what was trained into a folder of the first worker; every worker must call it."""
    if config.trains_base:
        _write_model(model, folder, base=base)
        return
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(cast(nn.Module, model), options=options)
    if dist.get_rank() == 0:
        trained = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        tensors = collect(model, trained, scaling=config.lora.scaling if config.lora else 1.0)
        write_adapter(folder, tensors, vocab_size=model.config.vocab_size, base_model=base.path)


def check_storable(model: PreTrainedModel, base: ModelConfig) -> None:
    """Refuse to train all parameters of a base whose files don't name them: nothing could be written back.

    Raises:
        TrainError: Names that one side has and the other has not.
    """
    files, own = find_weights(resolve_model(base)), _name_weights(model).keys()
    trained = {name for name, _ in model.named_parameters() if not name.endswith("deltas_KD")}
    lost = {_stored_name(model, name) for name in trained} - files.file_by_name.keys()
    unknown = sorted(files.file_by_name.keys() - own)
    if lost or unknown:
        raise TrainError(
            f"all parameters of {base.path!r} are trained, but its files hold them by other names"
            f" (files alone: {unknown[:3]}, model alone: {sorted(lost)[:3]}), so that the result could not be written;"
            " save the base once with transformers' save_pretrained, or train LoRA"
        )


def _stored_name(model: PreTrainedModel, name: str) -> str:
    rows = model.get_input_embeddings()
    if not isinstance(rows, TokenRows):
        return name
    wrapped = next(found for found, module in model.named_modules() if module is rows)
    return name.replace(f"{wrapped}.embedding.", f"{wrapped}.", 1)


def _name_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and buffers, in shards, by the names under which transformers stores them."""
    state = cast(nn.Module, model).state_dict()
    return {_stored_name(model, name): value for name, value in state.items()}


def _write_model(model: PreTrainedModel, folder: Path, *, base: ModelConfig) -> None:
    directory, weights = resolve_model(base), _name_weights(model)
    files, rows, is_first = find_weights(directory), model.get_input_embeddings(), dist.get_rank() == 0
    deltas_KD = _gather(rows.deltas_KD) if isinstance(rows, TokenRows) else None
    embedding = next(f"{name}.weight" for name, module in model.named_modules() if module is rows)
    lacks_head = deltas_KD is not None and HEAD not in files.file_by_name
    totals: Counter[str] = Counter()
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(set(files.file_by_name.values())):
        tensors: dict[str, Tensor] = {}
        for name in sorted(files.names_in(file)):
            value = _gather(weights[name])
            if is_first:
                tensors[name] = value
        if not is_first:
            continue
        if deltas_KD is not None and embedding in tensors:
            if lacks_head:
                tensors[HEAD] = tensors[embedding].clone()
            tensors[embedding][list(cast(TokenRows, rows).token_ids)] += deltas_KD
        dtype = getattr(torch, base.dtype)
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        write_tensors(folder / file, tensors, {"format": "pt"})
        totals.update(measure_tensors(tensors))
    if is_first:
        write_index(files, folder, totals, new_head_from=embedding if lacks_head else None)
        write_model_config(directory, folder, is_untied=deltas_KD is not None, dtype=base.dtype)


def _gather(value: Tensor) -> Tensor:
    """Return a weight whole, in memory of its own on the CPU; every worker must call it."""
    value = value.detach()
    if isinstance(value, DTensor):  # shards that are kept in the host's memory meet on the device
        value = cast(DTensor, value.to(value.device_mesh.device_type)).full_tensor()
    return value.to("cpu", copy=True)
