"""TrainInput -> a model with what is trained on it, sharded over all workers, and its optimizers."""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from delia.errors import TrainError
from delia.model.adapted import TokenRows, attach, initialise_rows, part_of, takes_decay
from delia.model.attention import use_packed_attention
from delia.model.loading import check_precision, find_layers, load_base
from delia.model.lora import READS_ROWS
from delia.model.original import check_base_is_there
from delia.model.stand_in import find_stand_in
from delia.store.models import ModelConfig
from delia.train.export import check_storable
from delia.train.head import read_head
from delia.train.objective import prepare_loss
from delia.train.order import BatchOrder
from delia.train.rows import TrainRows
from delia.train.settings import StageConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainInput:
    """Everything a worker needs beside its rank; travels once through Ray's object store, but for the rows' tokens."""

    model: ModelConfig
    config: TrainConfig
    rows: TrainRows
    token_ids: tuple[int, ...] = ()
    instruction_ids: tuple[int, ...] = ()
    allowed_modules: tuple[str, ...] = ()


def build_model(task: TrainInput) -> PreTrainedModel:
    """Load the base, attach what is trained, and shard it; `compute_loss` is then its only entrance.

    LoRA matrices are initialised before sharding, from the seed, the base and the task's rows: any number of
    workers starts from the same values.
    """
    config = task.config
    check_precision(task.model)
    model = load_base(task.model, for_training=True)
    device = "cuda" if config.use_gpu else "cpu"
    if model.device.type != device:
        cast(nn.Module, model).to(device)
    reads_rows = config.token_init == "stand_in" or (config.lora and config.lora.init in READS_ROWS)
    numbers = np.flatnonzero(task.rows.is_task_R).tolist() if reads_rows else []
    task_rows = [(ids.tolist(), mask.tolist()) for ids, mask in (task.rows[row] for row in numbers)]
    stand_ins: list[int | None] = []
    if config.token_init == "stand_in":
        stand_ins = [find_stand_in(model, task_rows, token_id) for token_id in task.token_ids]
    starts_from_loss = config.lora is not None and config.lora.init == "loftq"
    attach(
        model,
        lora=config.lora,
        token_ids=task.token_ids,
        trains_base=config.trains_base,
        seed=config.seed,
        task_rows=[ids for ids, _ in task_rows],
        whole=load_base(task.model) if starts_from_loss else None,
    )
    if config.trains_base:
        check_storable(model, task.model)
    initialise_rows(model, config.token_init, instruction_ids=task.instruction_ids, stand_ins=stand_ins)
    if isinstance(rows := model.get_input_embeddings(), TokenRows) and dist.get_world_size() > 1:
        # stand-ins are an arg-max: two machines may find two words
        dist.broadcast(rows.deltas_KD.data, src=0)
    use_packed_attention(model)
    head = read_head(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.kl_weight is not None:
        check_base_is_there(model)
    if config.compile:
        for layer in find_layers(model):
            layer.compile(dynamic=True)
    model.train()
    shard(model, config)
    prepare_loss(model, head)
    return model


def shard(model: PreTrainedModel, config: TrainConfig) -> None:
    """Shard layer by layer over all workers (FSDP2), or over groups of `shard_group` of them (HSDP).

    Trained parameters are kept and stepped in float32, and cast to the base's dtype where they are used,
    which FSDP does even for one worker; one worker in float32 has nothing to gain from it, and the packed
    weights of a quantised base can't be sharded (PEFT's layers cast for themselves there).
    """
    # a model calls the dtype of its first parameter its own, and that may be a token row's float32
    num_workers, dtype = dist.get_world_size(), cast(nn.Linear, model.get_output_embeddings()).weight.dtype
    is_whole = dtype == torch.float32 or getattr(model, "is_quantized", False)
    if num_workers == 1 and is_whole and not config.offload:
        _widen(model)
        return
    group = config.shard_group or num_workers
    if num_workers % group:
        raise TrainError(f"train.shard_group={group} must divide the {num_workers} workers; set a divisor")
    device = "cuda" if config.use_gpu else "cpu"
    if group == num_workers:
        mesh = init_device_mesh(device, (num_workers,))
    else:
        names = ("replicate", "shard")
        mesh = init_device_mesh(device, (num_workers // group, group), mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=config.use_gpu) if config.offload else OffloadPolicy()
    layers = find_layers(model)
    if not layers:
        raise TrainError(
            f"{type(model).__name__} keeps its decoder layers in no one list, and is sharded by them; train it with"
            " one worker in float32, or take another base"
        )
    for layer in [*layers, model]:
        _widen(layer)  # one at a time: a whole base in float32 need not fit
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)


def _widen(module: nn.Module) -> None:
    """Turn what is trained and not yet sharded into float32."""
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def build_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """Return AdamW over the parts that a stage moves; each group keeps its peak rate.

    Its state is there from the start: a checkpoint of an earlier stage would else make it by a step
    on zeros, which Adam counts, so that saving would change what is trained.
    """
    peaks = {
        "lora": stage.learning_rate,
        "token_rows": stage.token_learning_rate,
        "base": stage.learning_rate,
    }
    groups = []
    for part in stage.parts:
        for decay, is_decayed in ((stage.weight_decay, True), (0.0, False)):
            params = [
                parameter
                for name, parameter in model.named_parameters()
                if part_of(name) == part and takes_decay(name, parameter) == is_decayed
            ]
            if params:
                peak = peaks[part]
                groups.append({"params": params, "lr": peak, "peak": peak, "weight_decay": decay})
    if not groups:
        raise TrainError(f"a stage moves {list(stage.parts)}, but none of them is attached")
    optimizer = torch.optim.AdamW(groups)
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def build_order(task: TrainInput, stage: StageConfig) -> BatchOrder:
    """Return a stage's batches over all rows, or over those in which a token occurs."""
    rows = task.rows
    chosen = [i for i, flag in enumerate(rows.has_token_R.tolist()) if flag or stage.rows == "mixture"]
    if not chosen:
        raise TrainError("a stage trains on rows with a declared token, but no row has one")
    return BatchOrder(
        rows.is_task_R.tolist(),
        chosen=chosen,
        batch_size=task.config.global_batch_size,
        seed=task.config.seed,
    )
