"""A run killed anywhere ends like one that was not: bit for bit, and within 1e-5 on other workers."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from delia.store.adapters import read_tensors
from delia.train.settings import StageConfig

STAGES = (
    StageConfig(parts=("token_rows",), rows="token", max_steps=4, token_learning_rate=3e-2, warmup_steps=2),
    StageConfig(max_steps=5, learning_rate=1e-2, warmup_steps=2, schedule="cosine", weight_decay=0.1),
)


def assert_equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def test_a_run_resumed_after_any_step_ends_like_the_whole_one(train_here, make_input):
    """Two stages with dropout: parameters, both optimizers, order, schedule and seeds all have to be right."""
    task = make_input(stages=STAGES, checkpoint_every=1, dropout=0.2)
    whole = train_here(task)
    assert len(whole.checkpoints) == 9

    for step, checkpoint in whole.checkpoints.items():
        if step < 9:
            rest = train_here(task, checkpoint)
            assert rest.losses == {later: loss for later, loss in whole.losses.items() if later > step}
            assert_equal_tensors(rest.tensors, whole.tensors)


def test_dropout_is_drawn_anew_each_step_and_never_by_the_adapter_alone(train_here, make_input):
    """Without this the test above could pass with dropout that is off, or equal in every step."""
    stages = (StageConfig(max_steps=3, learning_rate=1e-9, token_learning_rate=1e-9, warmup_steps=0),)
    whole_batch = {"stages": stages, "global_batch_size": 24}
    still, wild = (train_here(make_input(dropout=share, **whole_batch)).tensors for share in (0.0, 0.9))
    b_name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert not torch.equal(still[b_name], wild[b_name])


def test_a_checkpoint_of_two_workers_goes_on_with_one(run_of_two, run_of_one, train_here, make_input):
    rest = train_here(make_input(), run_of_two.checkpoints[6])
    assert list(rest.losses) == list(range(7, 13))
    expected = [run_of_one.losses[step] for step in rest.losses]
    assert list(rest.losses.values()) == pytest.approx(expected, rel=1e-5)
    for name, value in rest.tensors.items():
        torch.testing.assert_close(value, run_of_two.tensors[name], atol=1e-4, rtol=0)


def test_a_finished_run_started_again_trains_nothing_and_leaves_the_same(
    train_on_ray, make_input, run_of_one
):
    storage = run_of_one.checkpoints[12].parents[1]
    again = train_on_ray(make_input(), storage=storage)
    assert again.losses == {}
    assert_equal_tensors(again.tensors, run_of_one.tensors)


# ---- kills


def wait_for(condition: Callable[[], object], what: str, *, seconds: float = 300) -> None:
    """Poll until something holds; the limit is generous, and only there so that a failure ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)


class Driver:
    """A training in a process of its own, with a Ray of its own, that may be killed and started again."""

    def __init__(self, folder: Path, task) -> None:
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "task.pickle").write_bytes(pickle.dumps(task))

    def start(self) -> None:
        names = ("task.pickle", "storage", "adapter", "steps.jsonl")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        command = [
            sys.executable,
            str(Path(__file__).with_name("driver.py")),
            *(str(self.folder / n) for n in names),
        ]
        with (self.folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def finish(self) -> dict[str, torch.Tensor]:
        assert self.process is not None
        code = self.process.wait(timeout=600)
        assert code == 0, (self.folder / "output.txt").read_text()[-3000:]
        return read_tensors(self.folder / "adapter")

    def read_steps(self) -> list[int]:
        """Return the logged steps in the order in which they came."""
        file = self.folder / "steps.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line)[0] for line in lines if line.endswith("\n")]

    def list_committed(self) -> list[str]:
        """Return the checkpoints that Ray Train has committed, by the file that it resumes from."""
        snapshot = self.folder / "storage" / "run" / "checkpoint_manager_snapshot.json"
        return [item["checkpoint_dir_name"] for item in read_json(snapshot).get("checkpoint_results", [])]

    def find_workers(self) -> list[psutil.Process]:
        """Return the processes that train."""
        assert self.process is not None
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if "RayTrainWorker" in read_command(process)]

    def is_running(self) -> bool:
        assert self.process is not None
        return self.process.poll() is None


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


def read_json(file: Path) -> dict:
    """Return a file's JSON, nothing while it is not there or half written."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


@pytest.fixture
def make_driver(tmp_path) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def make(name: str, task) -> Driver:
        (tmp_path / name).mkdir()
        drivers.append(Driver(tmp_path / name, task))
        return drivers[-1]

    yield make
    for driver in drivers:
        if driver.process is not None and driver.is_running():
            driver.process.kill()
            driver.process.wait()


@pytest.fixture
def long_task(make_input):
    """Long enough to be killed in the middle: 240 steps, a checkpoint every 20, dropout on."""
    stage = StageConfig(max_steps=240, learning_rate=1e-3, token_learning_rate=1e-3, warmup_steps=10)
    return make_input(stages=(stage,), checkpoint_every=20, dropout=0.1)


@pytest.mark.system
def test_a_killed_worker_and_a_killed_driver_change_nothing(make_driver, long_task):
    """Three runs of one training: undisturbed, its worker killed, its driver killed and started again."""
    undisturbed = make_driver("undisturbed", long_task)
    undisturbed.start()
    expected = undisturbed.finish()
    assert undisturbed.read_steps() == list(range(1, 241))

    loses_worker = make_driver("loses-worker", long_task)
    loses_worker.start()
    wait_for(loses_worker.list_committed, "a committed checkpoint")
    (worker,) = loses_worker.find_workers()
    worker.kill()
    wait_for(lambda: not is_alive(worker), "the worker's end")
    assert 240 not in loses_worker.read_steps(), "the kill came too late to show anything"
    assert_equal_tensors(loses_worker.finish(), expected)
    assert loses_worker.read_steps().count(1) == 1, "the run started again at its first step"

    loses_driver = make_driver("loses-driver", long_task)
    loses_driver.start()
    wait_for(loses_driver.list_committed, "a committed checkpoint")
    (orphan,) = loses_driver.find_workers()
    loses_driver.process.kill()
    loses_driver.process.wait()
    wait_for(lambda: not is_alive(orphan), "the worker's end")
    before = loses_driver.read_steps()
    assert 240 not in before, "the kill came too late to show anything"
    assert not (loses_driver.folder / "adapter").exists()

    loses_driver.start()
    assert_equal_tensors(loses_driver.finish(), expected)
    after = loses_driver.read_steps()[len(before) :]
    assert after[0] > 20, "the second driver did not go on from the checkpoint"
    assert after == list(range(after[0], 241))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_driver_killed_at_any_moment_again_and_again_changes_nothing(make_driver, long_task):
    """Kills fall into starting, training, saving and exporting, wherever the seconds happen to lead."""
    undisturbed = make_driver("undisturbed", long_task)
    undisturbed.start()
    expected = undisturbed.finish()

    shaken = make_driver("shaken", long_task)
    for seconds in (4, 9, 14, 17, 20, 23, 26, 30):
        shaken.start()
        time.sleep(seconds)
        if not shaken.is_running():
            break
        workers = shaken.find_workers()
        shaken.process.kill()
        shaken.process.wait()
        wait_for(lambda workers=workers: not any(map(is_alive, workers)), "the workers' end")
    shaken.start()
    assert_equal_tensors(shaken.finish(), expected)
