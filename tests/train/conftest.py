"""A tiny Llama, rows to train on, Ray Train for real, and its part played in this process."""

import json
import pickle
import random
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray.train import Checkpoint

from delia.model.adapted import LoraConfig
from delia.store.adapters import read_tensors
from delia.store.models import ModelConfig
from delia.train.building import TrainInput
from delia.train.guards import Outcome
from delia.train.launch import run_training
from delia.train.loop import ADAPTER_FOLDER, train_worker
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig, TrainConfig
from delia.train.snapshot import SNAPSHOT

TOKEN = 7
PATIENCE = 600
MakeInput = Callable[..., TrainInput]
Tensors = dict[str, torch.Tensor]


@dataclass
class Run:
    """What a run logged, by step, and left."""

    losses: dict[int, float] = field(default_factory=dict)
    readings: dict[int, dict[str, float]] = field(default_factory=dict)
    by_source: dict[int, dict[str, float]] = field(default_factory=dict)
    checkpoints: dict[int, Path] = field(default_factory=dict)
    adapter: Path | None = None
    outcome: Outcome | None = None

    def enter(self, metrics: dict[str, float], step: int) -> None:
        """Take a line of a worker's log."""
        if "train/meter_seconds" in metrics:
            self.readings[step] = metrics
            return
        assert step not in self.losses, f"step {step} was logged twice"
        self.losses[step] = metrics["train/loss"]
        names = (name for name in metrics if name.startswith("train/source_loss/"))
        self.by_source[step] = {name.rpartition("/")[2]: metrics[name] for name in names}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by name."""
        assert self.adapter is not None, "the run did not reach its end"
        return read_tensors(self.adapter)


@dataclass
class LocalLine:
    """A worker's line to a driver in this process, which asks to stop after a step."""

    run: Run
    stop_after: int | None

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        self.run.enter(metrics, step)

    def asks_to_stop(self) -> bool:
        return max(self.run.losses, default=0) == self.stop_after


@pytest.fixture(scope="session")
def tiny_llama(save_shape) -> ModelConfig:
    """Weights wide enough that a few steps are seen in the loss."""
    return ModelConfig(path=str(save_shape("llama", initializer_range=0.1)))


@pytest.fixture(scope="session")
def make_input(tiny_llama) -> MakeInput:
    """Return a function of settings; the first 8 of 24 rows are the task's, every third has the token."""
    rng = random.Random(0)
    rows = []
    for number in range(24):
        ids = [rng.randrange(30, 60) for _ in range(rng.randint(5, 14))]
        if number % 3 == 0:
            ids[1] = TOKEN
        start = rng.randint(2, len(ids) - 2)
        rows.append((tuple(ids), (False,) * start + (True,) * (len(ids) - start)))

    def make(
        *,
        token_ids: tuple[int, ...] = (TOKEN,),
        dropout: float = 0.0,
        dtype: str = "float32",
        **settings: Any,
    ) -> TrainInput:
        stages = (StageConfig(max_steps=12, learning_rate=1e-2, token_learning_rate=3e-2, warmup_steps=3),)
        standard = {
            "stages": stages,
            "lora": LoraConfig(rank=4, alpha=8, dropout=dropout),
            "global_batch_size": 7,
            "max_tokens_per_micro_batch": 30,
            "checkpoint_every": 6,
            "log_every": 1,
            "seed": 3,
        }
        return TrainInput(
            model=tiny_llama.model_copy(update={"dtype": dtype}),
            config=TrainConfig(**(standard | settings)),
            rows=join_rows(
                rows,
                sources=[TASK] * 8 + ["diverse"] * 16,
                has_token=[TOKEN in ids for ids, _ in rows],
            ),
            token_ids=token_ids,
        )

    return make


@pytest.fixture(scope="session")
def measure_loss() -> Callable[[Any, TrainInput], float]:
    """Return a function of a model: its loss in nats a trained token over all rows, by HF's own forward pass."""

    def measure(model: Any, task: TrainInput) -> float:
        nats, count = 0.0, 0
        for row in range(len(task.rows)):
            ids, mask = (torch.tensor(part.tolist()) for part in task.rows[row])
            with torch.no_grad():
                logprobs_TV = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            losses_T = -logprobs_TV.gather(1, ids[1:, None])[:, 0]
            nats, count = nats + float(losses_T[mask[1:]].sum()), count + int(mask[1:].sum())
        return nats / count

    return measure


@pytest.fixture(scope="session")
def find_far() -> Callable[..., dict[str, float]]:
    """Return a function: tensors over 1e-5 from the expected, as a share of its norm, or of its move from a start."""

    def find(found: Tensors, expected: Tensors, start: Tensors | None = None) -> dict[str, float]:
        assert found.keys() == expected.keys()
        moved = {name: value if start is None else value - start[name] for name, value in expected.items()}
        norms = {name: float((found[name] - value).norm()) for name, value in expected.items()}
        return {name: norm for name, norm in norms.items() if not norm <= 1e-5 * float(moved[name].norm())}

    return find


@pytest.fixture(scope="session")
def world_of_one(tmp_path_factory) -> Iterator[None]:
    """A gloo group of this process alone."""
    file = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def train_here(monkeypatch, tmp_path_factory, world_of_one) -> Callable[..., Run]:
    """Return a function that runs a worker in this process, from the last of some checkpoints if there are any.

    Real model, FSDP2, optimizer and DCP; of Ray Train only the four calls that a worker makes. It may be one
    of several: it then takes its part of each batch, and adds up its own gradients alone.
    """

    def train(
        task: TrainInput,
        *checkpoints: Path,
        stop_after: int | None = None,
        rank: int = 0,
        num_workers: int = 1,
    ) -> Run:
        run, folder = Run(), tmp_path_factory.mktemp("checkpoints")

        def report(metrics: dict[str, int], checkpoint: Checkpoint) -> None:
            kept = folder / str(metrics["step"])
            shutil.copytree(checkpoint.path, kept)
            run.checkpoints[metrics["step"]] = kept
            if (kept / ADAPTER_FOLDER).is_dir():
                run.adapter = kept / ADAPTER_FOLDER

        played = SimpleNamespace(
            get_context=lambda: SimpleNamespace(
                get_world_rank=lambda: rank,
                get_world_size=lambda: num_workers,
                get_local_world_size=lambda: num_workers,
            ),
            get_all_reported_checkpoints=lambda: [
                SimpleNamespace(checkpoint=Checkpoint.from_directory(path)) for path in checkpoints
            ],
            report=report,
        )
        for module in ("loop", "checkpoints"):
            local = SimpleNamespace(get=lambda value: value, train=played)
            monkeypatch.setattr(f"delia.train.{module}.ray", local)
        run.outcome = train_worker({"input": [task], "log": LocalLine(run, stop_after)})
        return run

    return train


@pytest.fixture(scope="session")
def work_together(tmp_path_factory) -> Iterator[Callable[..., tuple[Run, Path]]]:
    """Return a function that has a task's workers run in processes on gloo, without Ray; they stay for the next.

    It returns what the first one logged, and where all left their files (`worker.py`).
    """
    workers: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def is_done(worker: subprocess.Popen[str]) -> bool:
        is_there = select.select([worker.stdout], [], [], PATIENCE)[0]
        return bool(is_there) and worker.stdout.readline() == "done\n"

    def stop() -> None:
        for worker in workers:
            worker.kill()
            worker.wait()
        workers.clear()

    def work(task: TrainInput, *, does: str) -> tuple[Run, Path]:
        folder, num_workers = tmp_path_factory.mktemp("together"), task.config.num_workers
        (folder / "task.pickle").write_bytes(pickle.dumps(task))
        workers.extend(start() for _ in range(num_workers - len(workers)))
        order = {"does": does, "task": str(folder / "task.pickle"), "folder": str(folder)}
        for rank, worker in enumerate(workers[:num_workers]):
            worker.stdin.write(json.dumps(order | {"rank": rank, "num_workers": num_workers}) + "\n")
            worker.stdin.flush()
        if not all(is_done(worker) for worker in workers[:num_workers]):
            stop()  # one that is left waiting would fail the next test too
            pytest.fail("a worker failed: its error is above")
        run = Run()
        for step, metrics in json.loads((folder / "lines.json").read_text()):
            run.enter(metrics, step)
        return run, folder

    yield work
    stop()


@pytest.fixture(scope="session")
def train_together(work_together) -> Callable[[TrainInput], Run]:
    """Return a function that trains in as many processes as a task has workers."""

    def train(task: TrainInput) -> Run:
        run, folder = work_together(task, does="train")
        run.adapter = folder / str(task.config.max_steps) / ADAPTER_FOLDER
        run.checkpoints = {int(place.name): place for place in folder.iterdir() if place.name.isdecimal()}
        return run

    return train


@pytest.fixture(scope="session")
def train_on_ray(cluster, tmp_path_factory) -> Callable[..., Run]:
    """Return a function that trains on Ray Train; equal storage and name go on from each other."""

    def train(task: TrainInput, *, storage: Path | None = None) -> Run:
        run, folder = Run(), tmp_path_factory.mktemp("ray-train")

        def log(metrics: dict[str, float], step: int) -> None:
            run.losses[step] = metrics["train/loss"]

        storage = storage or folder
        run_training(task, name="run", storage=str(storage), output=str(folder / "adapter"), log=log)
        run.adapter = folder / "adapter"
        committed = json.loads((storage / "run" / SNAPSHOT).read_text())["checkpoint_results"]
        kept = [storage / "run" / item["checkpoint_dir_name"] for item in committed]
        steps = (task.config.max_steps - task.config.checkpoint_every, task.config.max_steps)
        run.checkpoints = dict(zip(steps, kept, strict=True))
        return run

    return train


@pytest.fixture(scope="session")
def run_of_one(train_on_ray, make_input) -> Run:
    """Twelve steps on one worker, checkpoints at 6 and 12."""
    return train_on_ray(make_input())


@pytest.fixture(scope="session")
def run_of_two(train_on_ray, make_input) -> Run:
    """The same twelve steps on two workers."""
    return train_on_ray(make_input(num_workers=2))
