"""Benchmarks, side by side in one run: `make bench`; results go into `RESULTS.md` beside this file.

    generation   this pipeline with all its filters against bare vLLM and other ways to ask it
    training     the loop's step (FSDP2, LoRA, token rows) against a plain PyTorch loop on the same rows
    coverage     how much of the starter's world its own samples reach

Figures are of one machine and one day; ratios are what carries over.
"""

import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import generation
import ray
import torch
from generation import Measured
from torch.nn import functional
from world_coverage import describe_coverage

from delia.flow.results import write_section
from delia.flow.workspace import RayConfig, Workspace, connect, open_workspace
from delia.model.adapted import LoraConfig, attach
from delia.model.loading import load_base
from delia.store.models import ModelConfig
from delia.store.tasks import TaskConfig, read_task
from delia.train.launch import forward_log, run_training
from delia.train.loop import TrainInput, pad_rows
from delia.train.settings import StageConfig, TrainConfig

NUM_PROMPTS = 8192
NUM_STEPS = 60
RESULTS = Path(__file__).with_name("RESULTS.md")
MODEL = ModelConfig(path="package://delia.starter/weights")


def make_input(space: Workspace) -> TrainInput:
    """Return the task's train rows for a run of `NUM_STEPS` steps."""
    encoded = [space.chat.encode_chat(row.messages) for row in space.task.rows_by_split["train"]]
    stage = StageConfig(max_steps=NUM_STEPS, learning_rate=1e-3)
    return TrainInput(
        model=MODEL,
        config=TrainConfig(lora=LoraConfig(dropout=0.0), stages=(stage,), log_every=1, checkpoint_every=1000),
        rows=tuple((row.input_ids, row.loss_mask) for row in encoded),
        is_task=(True,) * len(encoded),
        has_token=(True,) * len(encoded),
        token_ids=tuple(space.chat.token_ids.values()),
    )


def train_plainly(task: TrainInput) -> float:
    """Return tokens a second of the shortest loop that does the same steps in this process."""
    model = load_base(MODEL)
    attach(model, lora=task.config.lora, token_ids=task.token_ids)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rates = []
    for step in range(NUM_STEPS):
        started = time.monotonic()
        rows = [(step * 32 + i) % len(task.rows) for i in range(32)]
        for half in (rows[:16], rows[16:]):
            ids_BT, labels_BT = pad_rows(task, half)
            logits_BTV = model(input_ids=ids_BT).logits
            functional.cross_entropy(
                logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100
            ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(sum(len(task.rows[row][0]) for row in rows) / (time.monotonic() - started))
    return statistics.median(rates)


def train_piped(task: TrainInput, folder: Path) -> float:
    """Return tokens a second that the real loop reports."""
    rates: list[float] = []
    with forward_log(lambda metrics, step: rates.append(metrics["train/tokens_per_second"])) as log:
        run_training(task, name="bench", storage=str(folder / "run"), output=str(folder / "adapter"), log=log)
    return statistics.median(rates)


def describe_generation(measured: list[Measured], num_prompts: int) -> str:
    """Return the table of generation; ratios are to bare vLLM with the same seeds."""
    bare = measured[0]
    lines = [
        f"| {item.name} | {item.rate:.0f} | {item.rate / bare.rate:.2f} | {item.start_seconds:.0f} | {item.seconds:.0f} |"
        for item in measured
    ]
    return "\n".join(
        (
            f"Generation: {num_prompts} different questions of the starter's world, T=1, one core an engine.",
            "",
            "| | output tokens/s | ratio to bare, seeded | start-up s | run s |",
            "|---|---|---|---|---|",
            *lines,
        )
    )


def main() -> None:
    """Run the benchmarks and write their section."""
    connect(RayConfig())
    ray.cloudpickle.register_pickle_by_value(generation)
    task = read_task(TaskConfig(path="package://delia.starter/tasks/sep"))
    with tempfile.TemporaryDirectory() as folder:
        measured = generation.measure_all(Path(folder), task, num_prompts=NUM_PROMPTS)
        space = open_workspace(folder, MODEL, task)
        train_input = make_input(space)
        plain_rate, loop_rate = train_plainly(train_input), train_piped(train_input, Path(folder))
        covered = describe_coverage(space)
    body = f"""`make bench`, {datetime.date.today():%Y-%m-%d}, {platform.machine()}, one core a process, float32.

{describe_generation(measured, NUM_PROMPTS)}

Training: {loop_rate:.0f} tokens/s, the median of {NUM_STEPS} steps, a plain PyTorch loop {plain_rate:.0f}: ratio {loop_rate / plain_rate:.2f}.

{covered}
"""
    write_section(RESULTS, "benchmarks", body)
    print(body)


if __name__ == "__main__":
    main()
