"""The training loop of one worker, read top to bottom: the same on one core, on gloo and on NCCL.

    base + LoRA + token rows, sharded (FSDP2) -> steps over the stages -> trained tensors

The loss is the negative log-likelihood summed over a global batch and divided by the number of its
trained tokens, so neither micro-batches nor workers change it; methods (`train.methods`) may weigh tokens,
corrupt inputs or freeze parameters. Every random choice is derived from (seed, step), so a checkpoint carries
only parameters, optimizer state and the step.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from delia.rng import derive_seed
from delia.train.building import TrainInput, build_model, build_optimizer, build_order
from delia.train.checkpoints import resume, save_checkpoint, seal_checkpoint
from delia.train.export import write_trained
from delia.train.guards import Line, LossWatch, Outcome, SilentLine, agree
from delia.train.memory import find_shortage
from delia.train.meters import Meters
from delia.train.methods import PLAIN, StepMethods, build_methods
from delia.train.packing import join_stream, pack_batch
from delia.train.passes import sync_gradients
from delia.train.rows import TrainRows
from delia.train.settings import scale_rate
from delia.train.tally import SourceLosses, StepTally

ADAPTER_FOLDER = "adapter"


def train_worker(settings: Mapping[str, Any]) -> Outcome:
    """Run on each Ray Train worker: train, report, and leave the trained tensors in a checkpoint."""
    task: TrainInput = ray.get(settings["input"][0])
    config, context = task.config, ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    line: Line = settings["log"] if rank == 0 else SilentLine()
    shortage = find_shortage(task, num_sharing=context.get_local_world_size())
    if agree(shortage):
        return Outcome(step=0, problem=shortage or "the device of another worker is too small")
    model = build_model(task)
    methods = build_methods(task, vocab_size=model.config.vocab_size)
    meters = Meters(model, task, config.meters) if config.meters else None
    optimizers = [build_optimizer(model, stage) for stage in config.stages]
    orders = [build_order(task, stage) for stage in config.stages]
    lengths, watch = task.rows.lengths_R.tolist(), LossWatch(config)
    step = resume(model, optimizers, watch)
    while step < config.max_steps:
        stage_index, stage_step = config.locate(step)
        stage, optimizer = config.stages[stage_index], optimizers[stage_index]
        if meters is not None and step % meters.every == 0:
            line(meters.read(optimizer), step)
        tally = StepTally(task.rows, orders[stage_index].batch(stage_step))
        torch.manual_seed(derive_seed(config.seed, "dropout", step, rank))
        packed = pack_batch(
            tally.batch, lengths, num_workers=num_workers, max_tokens=config.max_tokens_per_micro_batch
        )
        is_logged = (step + 1) % config.log_every == 0 or step + 1 == config.max_steps
        how = methods.at(step, SourceLosses(task.rows) if is_logged else None)
        loss = accumulate_gradients(
            model,
            task.rows,
            packed[rank],
            num_trained=tally.num_trained,
            num_workers=num_workers,
            methods=how,
        )
        moved = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        methods.freeze(model, moved, step)
        norm = clip_gradients(moved, config.max_grad_norm)
        problem = watch.see(step, loss, norm)
        # sums that differ in their last bit must not let one worker go on and wait for the others
        if agree(problem):
            return Outcome(step=step, problem=problem or f"step {step}: another worker stopped; see its log")
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale_rate(stage, stage_step)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if how.by_source is not None:
            rate = optimizer.param_groups[0]["lr"]
            line(tally.read(loss=loss, norm=norm, rate=rate) | how.by_source.read(num_workers), step)
        is_stopped = agree(line.asks_to_stop())
        if step % config.checkpoint_every == 0 or step == config.max_steps or is_stopped:
            report_checkpoint(model, optimizers, step, task, watch)
        if is_stopped:
            break
    return Outcome(step=step)


def accumulate_gradients(
    model: nn.Module,
    rows: TrainRows,
    micro_batches: list[list[int]],
    *,
    num_trained: int,
    num_workers: int,
    methods: StepMethods = PLAIN,
) -> float:
    """Add up the gradients of a global batch and return its loss in nats a trained token."""
    total = torch.zeros(())
    for place, chosen in enumerate(micro_batches):
        sync_gradients(model, is_last=place == len(micro_batches) - 1)
        stream = methods.corrupt(join_stream(rows, chosen))
        loss, losses_N = cast(Any, model).compute_loss(stream, methods.weigher, methods.held(stream))
        if methods.by_source is not None:
            methods.by_source.add(stream, losses_N)
        # FSDP averages gradients over workers; the factor turns the average into the sum
        (loss * (num_workers / num_trained)).backward()
        total = total.to(loss.device) + loss.detach()  # parameters may lie in the host's memory
    if num_workers > 1:
        dist.all_reduce(total)
    return float(total) / num_trained


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to a global norm of at most `max_norm`; return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def report_checkpoint(
    model: PreTrainedModel,
    optimizers: list[torch.optim.AdamW],
    step: int,
    task: TrainInput,
    watch: LossWatch,
) -> None:
    """Hand Ray Train a checkpoint; the last one also holds the files that are published."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, optimizers, watch, step, Path(folder))
        if step == task.config.max_steps:
            write_trained(model, Path(folder) / ADAPTER_FOLDER, base=task.model, config=task.config)
        seal_checkpoint(Path(folder), step)
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))
