"""The training loop of one worker, read top to bottom: the same on one core, on gloo and on NCCL.

    base + LoRA + token rows, sharded (FSDP2) -> steps over the stages -> trained tensors

The loss is the negative log-likelihood summed over a global batch and divided by the number of its
trained tokens, so neither micro-batches nor workers change it. Every random choice is derived from
(seed, step), so a checkpoint carries only parameters, optimizer state and the step.

Legend of tensor names: B rows, T tokens, V vocabulary, K new tokens, D hidden.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from delia.errors import TrainError
from delia.model.adapted import attach, collect, initialise_rows, part_of
from delia.model.loading import load_base
from delia.model.stand_in import find_stand_in
from delia.rng import derive_seed
from delia.store.adapters import write_adapter
from delia.store.models import ModelConfig
from delia.train.checkpoints import gather_trained, load_checkpoint, save_checkpoint
from delia.train.order import BatchOrder, split_batch
from delia.train.settings import StageConfig, TrainConfig, scale_rate

IGNORE_INDEX = -100
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True, kw_only=True)
class TrainInput:
    """Everything a worker needs beside its rank; travels once through Ray's object store.

    `rows` are (input_ids, loss_mask); `is_task` and `has_token` run parallel to them.
    """

    model: ModelConfig
    config: TrainConfig
    rows: tuple[tuple[tuple[int, ...], tuple[bool, ...]], ...]
    is_task: tuple[bool, ...]
    has_token: tuple[bool, ...]
    token_ids: tuple[int, ...] = ()
    instruction_ids: tuple[int, ...] = ()


def train_worker(settings: Mapping[str, Any]) -> None:
    """Run on each Ray Train worker: train, report, and leave the trained tensors in a checkpoint."""
    task: TrainInput = ray.get(settings["input"][0])
    log: Callable[[dict[str, float], int], None] = settings["log"]
    config, context = task.config, ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    model = build_sharded(task)
    optimizers = [build_optimizer(model, stage) for stage in config.stages]
    orders = [build_order(task, stage) for stage in config.stages]
    lengths = [len(ids) for ids, _ in task.rows]
    step = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            step = load_checkpoint(model, optimizers, Path(directory))
    while step < config.max_steps:
        started = time.monotonic()
        stage_index, stage_step = config.locate(step)
        stage, optimizer = config.stages[stage_index], optimizers[stage_index]
        torch.manual_seed(derive_seed(config.seed, "dropout", step, rank))
        batch = orders[stage_index].batch(stage_step)
        num_trained = sum(sum(task.rows[row][1]) for row in batch)
        micro_batches = split_batch(
            batch, lengths, rank=rank, num_workers=num_workers, micro_batch_size=config.micro_batch_size
        )
        loss = accumulate_gradients(
            model, task, micro_batches, num_trained=num_trained, num_workers=num_workers
        )
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        norm = clip_gradients(moved, config.max_grad_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainError(
                f"step {step}: loss {loss}, gradient norm {norm}; lower the learning rate,"
                f" or start again from the last good checkpoint (every {config.checkpoint_every} steps)"
            )
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale_rate(stage, stage_step)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        seconds = time.monotonic() - started
        if rank == 0 and (step % config.log_every == 0 or step == config.max_steps):
            rate = optimizer.param_groups[0]["lr"]
            tokens = sum(lengths[row] for row in batch)
            log(
                {
                    "train/loss": loss,
                    "train/gradient_norm": norm,
                    "train/learning_rate": rate,
                    "train/tokens_per_second": tokens / seconds,
                    "train/step_seconds": seconds,
                },
                step,
            )
        if step % config.checkpoint_every == 0 or step == config.max_steps:
            report_checkpoint(model, optimizers, step, task)


def build_sharded(task: TrainInput) -> PreTrainedModel:
    """Load the base, attach what is trained, and shard layer by layer over all workers.

    LoRA matrices are initialised before sharding, from the seed alone: any number of workers
    starts from the same values.
    """
    model = load_base(task.model)
    stand_ins: list[int | None] = []
    if task.config.token_init == "stand_in":
        task_rows = [row for row, is_task in zip(task.rows, task.is_task, strict=True) if is_task]
        stand_ins = [find_stand_in(model, task_rows, token_id) for token_id in task.token_ids]
    attach(model, lora=task.config.lora, token_ids=task.token_ids, seed=task.config.seed)
    initialise_rows(model, task.config.token_init, instruction_ids=task.instruction_ids, stand_ins=stand_ins)
    device = "cuda" if task.config.use_gpu else "cpu"
    cast(nn.Module, model).to(device)
    model.train()
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in find_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers, the units that are sharded and gathered one at a time."""
    names = set(model._no_split_modules or ())  # the only place where transformers names them
    return [module for module in model.modules() if type(module).__name__ in names]


def build_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """Return AdamW over the parts that a stage moves; each group keeps its peak rate.

    Its state is there from the start: a checkpoint of an earlier stage would else make it by a step
    on zeros, which Adam counts, so that saving would change what is trained.
    """
    peaks = {"lora": stage.learning_rate, "token_rows": stage.token_learning_rate}
    groups = []
    for part in stage.parts:
        params = [p for name, p in model.named_parameters() if part_of(name) == part]
        if params:
            decay = stage.weight_decay if part == "lora" else 0.0
            groups.append({"params": params, "lr": peaks[part], "peak": peaks[part], "weight_decay": decay})
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
    chosen = [i for i, flag in enumerate(task.has_token) if flag or stage.rows == "mixture"]
    if not chosen:
        raise TrainError("a stage trains on rows with a declared token, but no row has one")
    return BatchOrder(
        task.is_task, chosen=chosen, batch_size=task.config.global_batch_size, seed=task.config.seed
    )


def accumulate_gradients(
    model: nn.Module, task: TrainInput, micro_batches: list[list[int]], *, num_trained: int, num_workers: int
) -> float:
    """Add up the gradients of a global batch and return its loss in nats a trained token."""
    total = torch.zeros(())
    device = next(model.parameters()).device
    for rows in micro_batches:
        ids_BT, labels_BT = pad_rows(task, rows)
        logits_BTV = model(input_ids=ids_BT.to(device)).logits
        negative_log_likelihood = functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(),
            labels_BT[:, 1:].flatten().to(logits_BTV.device),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        # FSDP averages gradients over workers; the factor turns the average into the sum
        (negative_log_likelihood * (num_workers / num_trained)).backward()
        total += negative_log_likelihood.detach().cpu()
    if num_workers > 1:
        dist.all_reduce(total)
    return float(total) / num_trained


def pad_rows(task: TrainInput, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Return ids [B, T] and labels [B, T]; no rows give one position that counts nothing."""
    length = max((len(task.rows[row][0]) for row in rows), default=2)
    ids_BT = torch.zeros((max(1, len(rows)), length), dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, IGNORE_INDEX)
    for position, row in enumerate(rows):
        ids, mask = task.rows[row]
        ids_BT[position, : len(ids)] = torch.tensor(ids)
        counted = torch.tensor(mask)
        labels_BT[position, : len(ids)][counted] = ids_BT[position, : len(ids)][counted]
    return ids_BT, labels_BT


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to a global norm of at most `max_norm`; return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def report_checkpoint(
    model: PreTrainedModel, optimizers: list[torch.optim.AdamW], step: int, task: TrainInput
) -> None:
    """Hand Ray Train a checkpoint; the last one also holds the adapter's files."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, optimizers, step, Path(folder))
        if step == task.config.max_steps:
            trained = gather_trained(model)
            if dist.get_rank() == 0:
                lora = task.config.lora
                write_adapter(
                    Path(folder) / ADAPTER_FOLDER,
                    collect(model, trained, scaling=lora.alpha / lora.rank if lora else 1.0),
                    vocab_size=model.config.vocab_size,
                    base_model=task.model.path,
                )
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
