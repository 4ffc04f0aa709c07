"""A training that loses a worker or its driver, or is asked to stop, ends like one that did not: bit for bit."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from delia.errors import StoppedError
from delia.model.lora import LoraConfig
from delia.store.adapters import read_tensors
from delia.store.models import ModelConfig
from delia.train.building import TrainInput
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig, TrainConfig

ROOT = Path(__file__).parents[2]
NUM_KILLS = int(os.environ.get("DELIA_TRAINING_KILLS", "20"))
PATIENCE = 600
"""Seconds for what takes a few on a machine with nothing else to do."""
TOKEN = 7


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Poll until something holds; the limit is generous, and only there so that a failure ends."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.02)


class Driver:
    """A training in a process of its own, with a Ray of its own, that may be killed and started again."""

    def __init__(self, folder: Path, task: TrainInput) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "task.pickle").write_bytes(pickle.dumps(task))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        names = ("task.pickle", "storage", "adapter", "steps.jsonl")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        script = Path(__file__).with_name("train_driver.py")
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *(str(self.folder / name) for name in names)],
                stdout=output,
                stderr=output,
                env=environment | {"PYTHONPATH": str(ROOT / "platform")},
                start_new_session=True,
            )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def finish(self) -> dict[str, torch.Tensor]:
        assert self.wait() == 0, self.read_output()
        return read_tensors(self.folder / "adapter")

    def read_output(self) -> str:
        return (self.folder / "output.txt").read_text()[-3000:]

    def read_steps(self) -> list[int]:
        """Return the logged steps in the order in which they came."""
        file = self.folder / "steps.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line)[0] for line in lines if line.endswith("\n")]

    def reach(self, step: int) -> None:
        """Wait for a step to be logged."""

        def is_there() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"it ended before step {step}: {self.read_output()}"
            return max(self.read_steps(), default=0) >= step

        wait_for(is_there, f"step {step}")

    def find_workers(self) -> list[psutil.Process]:
        """Return the processes that train."""
        assert self.process is not None
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if "RayTrainWorker" in read_command(process)]

    def kill_worker(self, rng: random.Random) -> None:
        wait_for(lambda: len(self.find_workers()) == 2, "two workers")
        worker = rng.choice(self.find_workers())
        worker.kill()
        wait_for(lambda: not is_alive(worker), "the worker's end")

    def kill(self) -> None:
        """Kill the driver, and wait until Ray has seen to its workers."""
        assert self.process is not None
        workers = self.find_workers()
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not any(map(is_alive, workers)), "the workers' end")


def read_command(process: psutil.Process) -> str:
    """Return a process's command line, empty if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def is_alive(process: psutil.Process) -> bool:
    """Tell whether a process still does anything; one that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def make_task(base: Path, *, num_steps: int, checkpoint_every: int, dropout: float) -> TrainInput:
    """Two workers and dropout on a tiny Llama; the first 8 of 24 rows are the task's."""
    rng = random.Random(0)
    rows = []
    for _ in range(24):
        ids = (TOKEN, *(rng.randrange(30, 60) for _ in range(rng.randint(5, 14))))
        rows.append((ids, (False,) * 3 + (True,) * (len(ids) - 3)))
    stage = StageConfig(
        max_steps=num_steps, learning_rate=1e-3, token_learning_rate=1e-3, schedule="cosine", weight_decay=0.1
    )
    return TrainInput(
        model=ModelConfig(path=str(base)),
        config=TrainConfig(
            lora=LoraConfig(rank=4, alpha=8, dropout=dropout),
            stages=(stage,),
            global_batch_size=7,
            max_tokens_per_micro_batch=30,
            num_workers=2,
            checkpoint_every=checkpoint_every,
            log_every=1,
        ),
        rows=join_rows(rows, sources=[TASK] * 8 + ["diverse"] * 16, has_token=[True] * 24),
        token_ids=(TOKEN,),
    )


@pytest.fixture(scope="module")
def make_driver(save_shape, tmp_path_factory) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def make(*, num_steps: int, checkpoint_every: int, dropout: float = 0.1) -> Driver:
        folder = tmp_path_factory.mktemp("training")
        base = save_shape("llama")
        task = make_task(base, num_steps=num_steps, checkpoint_every=checkpoint_every, dropout=dropout)
        drivers.append(Driver(folder / "run", task))
        drivers[-1].start()
        return drivers[-1]

    yield make
    for driver in drivers:
        if driver.process is not None and driver.process.poll() is None:
            driver.process.kill()
            driver.process.wait()


def assert_equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


SHORT = {"num_steps": 240, "checkpoint_every": 20}


@pytest.fixture(scope="module")
def undisturbed(make_driver) -> dict[str, torch.Tensor]:
    """What 240 steps leave that nobody disturbs."""
    driver = make_driver(**SHORT)
    tensors = driver.finish()
    assert driver.read_steps() == list(range(1, 241))
    return tensors


@pytest.mark.system
def test_a_killed_worker_and_a_killed_driver_change_nothing(make_driver, undisturbed):
    driver = make_driver(**SHORT)
    driver.reach(41)
    driver.kill_worker(random.Random(0))
    assert 240 not in driver.read_steps(), "the kill came too late to show anything"
    num_seen = len(driver.read_steps())
    wait_for(lambda: len(driver.read_steps()) > num_seen, "a step after the kill")
    driver.kill()
    before = driver.read_steps()
    assert 240 not in before, "the kill came too late to show anything"
    assert before.count(1) == 1, "without its worker the run started again at its first step"
    assert not (driver.folder / "adapter").exists()

    driver.start()
    assert_equal_tensors(driver.finish(), undisturbed)
    after = driver.read_steps()[len(before) :]
    assert after == list(range(after[0], 241))
    assert after[0] % 20 == 1, "it went on from no checkpoint"
    assert after[0] > 20, "the second driver started at the first step"


@pytest.mark.soak
def test_a_driver_that_is_asked_to_stop_leaves_a_checkpoint_of_that_very_step(make_driver, undisturbed):
    driver = make_driver(**SHORT)
    driver.reach(25)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.wait() == StoppedError.STATUS, driver.read_output()
    before = driver.read_steps()
    assert before == list(range(1, before[-1] + 1))
    assert before[-1] < 240, "the signal came too late to show anything"
    message = driver.read_output().splitlines()[-1]
    assert (
        f"was asked to stop and did so after step {before[-1]} of 240; checkpoint: step {before[-1]}"
        in message
    )

    driver.start()
    assert_equal_tensors(driver.finish(), undisturbed)
    assert driver.read_steps() == list(range(1, 241)), "a step was done twice, or never"


@pytest.mark.soak
def test_a_training_that_was_asked_to_stop_goes_on_with_another_number_of_workers(make_driver):
    """Without dropout, which is drawn by worker; rounding is all that differs, 1e-5 of each tensor's norm at most."""
    expected = make_driver(**SHORT, dropout=0.0).finish()
    driver = make_driver(**SHORT, dropout=0.0)
    driver.reach(25)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.wait() == StoppedError.STATUS, driver.read_output()
    before = driver.read_steps()

    file = driver.folder / "task.pickle"
    task: TrainInput = pickle.loads(file.read_bytes())
    alone = task.config.model_copy(update={"num_workers": 1})
    file.write_bytes(pickle.dumps(replace(task, config=alone)))
    driver.start()
    tensors = driver.finish()
    assert driver.read_steps() == list(range(1, 241))
    assert before[-1] < 240, "the signal came too late to show anything"
    far = {name: float((tensors[name] - value).norm() / value.norm()) for name, value in expected.items()}
    assert {name: share for name, share in far.items() if not share <= 1e-5} == {}


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_random_kills_of_workers_and_drivers_change_nothing(make_driver):
    """Kills fall into steps, saving, committing and starting, wherever the seconds happen to lead."""
    num_steps = 50 * (NUM_KILLS + 4)
    settings = {"num_steps": num_steps, "checkpoint_every": 7}
    expected = make_driver(**settings).finish()

    rng = random.Random(0)
    driver = make_driver(**settings)
    for number in range(NUM_KILLS):
        driver.reach(50 * (number + 1) - rng.randrange(25))
        time.sleep(rng.uniform(0, 1))
        if number % 2:
            driver.kill()
            driver.start()
        else:
            driver.kill_worker(rng)
        assert num_steps not in driver.read_steps(), "the kill came too late to show anything"
    assert_equal_tensors(driver.finish(), expected)
    assert driver.read_steps().count(1) == 1, "a run started again at its first step"
