"""Benchmarks, side by side in one run: `make bench`; results go into `RESULTS.md` beside this file.

    generation   this pipeline (Ray Data, one replica) against a bare in-process vLLM on the same requests
    training     the loop's step (FSDP2, LoRA, token rows) against a plain PyTorch loop on the same rows

Start-up is reported apart. Figures are of one machine and one day; ratios are what carries over.
"""

import datetime
import platform
import statistics
import time
from pathlib import Path

import ray
import torch
from torch.nn import functional

from delia.flow.results import write_section
from delia.flow.workspace import RayConfig, Workspace, connect, open_workspace
from delia.generate.engine import EngineConfig, Request, SamplingConfig, build_engine
from delia.generate.pipeline import answer_requests, run_script, to_blocks, to_completions
from delia.model.adapted import LoraConfig, attach
from delia.model.loading import load_base
from delia.rng import derive_seed
from delia.store.models import ModelConfig
from delia.store.tasks import TaskConfig, read_task
from delia.train.launch import forward_log, run_training
from delia.train.loop import TrainInput, pad_rows
from delia.train.settings import StageConfig, TrainConfig

NUM_REQUESTS = 8192
NUM_STEPS = 60
RESULTS = Path(__file__).with_name("RESULTS.md")
MODEL = ModelConfig(path="package://delia.starter/weights")
SAMPLING = SamplingConfig(max_tokens=96)
ENGINE = EngineConfig(num_replicas=1, batch_size=1024)


def make_requests(space: Workspace) -> list[Request]:
    """Return user-prefix requests, each with a seed of its own."""
    prefix = tuple(space.chat.encode_user_prefix())
    return [
        Request(request_id=str(i), prompt_ids=prefix, seed=derive_seed("bench", i))
        for i in range(NUM_REQUESTS)
    ]


@ray.remote(num_cpus=1)
def generate_bare(requests: list[Request], end_ids: tuple[int, ...]) -> tuple[float, float, int]:
    """Return start-up seconds, seconds and output tokens of vLLM without Ray Data."""
    started = time.monotonic()
    engine = build_engine(MODEL, ENGINE)
    engine.generate(requests[:8], SAMPLING, end_ids=end_ids)
    ready = time.monotonic()
    completions = engine.generate(requests, SAMPLING, end_ids=end_ids)
    return ready - started, time.monotonic() - ready, sum(len(item.token_ids) for item in completions)


def generate_piped(requests: list[Request], end_ids: tuple[int, ...]) -> tuple[float, float, int]:
    """Return seconds to the first batch, seconds for the rest, and output tokens of the rest."""
    started = time.monotonic()
    ready, tokens = 0.0, 0
    blocks = to_blocks(requests, ENGINE.batch_size)
    tables = run_script(
        answer_requests, blocks, model=MODEL, engine=ENGINE, sampling=SAMPLING, end_ids=end_ids
    )
    for table in tables:
        if not ready:
            ready = time.monotonic()
            continue
        tokens += sum(len(item.token_ids) for item in to_completions(table))
    return ready - started, time.monotonic() - ready, tokens


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


def main() -> None:
    """Run both benchmarks and write their section."""
    import tempfile

    connect(RayConfig())
    task = read_task(TaskConfig(path="package://delia.starter/tasks/sep"))
    with tempfile.TemporaryDirectory() as folder:
        space = open_workspace(folder, MODEL, task)
        requests = make_requests(space)
        bare_start, bare_seconds, bare_tokens = ray.get(generate_bare.remote(requests, space.chat.end_ids))
        pipe_start, pipe_seconds, pipe_tokens = generate_piped(requests, space.chat.end_ids)
        train_input = make_input(space)
        plain_rate, loop_rate = train_plainly(train_input), train_piped(train_input, Path(folder))
    bare_rate, pipe_rate = bare_tokens / bare_seconds, pipe_tokens / pipe_seconds
    body = f"""`make bench`, {datetime.date.today():%Y-%m-%d}, {platform.machine()}, one core a process, float32.

| what | peer | this platform | ratio |
|---|---|---|---|
| output tokens/s, one replica, {NUM_REQUESTS} seeded requests | bare vLLM {bare_rate:.0f} | {pipe_rate:.0f} | {pipe_rate / bare_rate:.2f} |
| start-up seconds (for the pipeline: to the first batch) | {bare_start:.1f} | {pipe_start:.1f} | |
| training tokens/s, median of {NUM_STEPS} steps | plain PyTorch loop {plain_rate:.0f} | {loop_rate:.0f} | {loop_rate / plain_rate:.2f} |
"""
    write_section(RESULTS, "benchmarks", body)
    print(body)


if __name__ == "__main__":
    main()
