"""Ray Train around the loop: workers, checkpoints, restarts, the log of the driver and its wish to stop.

    TrainInput -> TorchTrainer (V2) -> the last checkpoint's adapter files at `output`

The run's name is the fingerprint of its input, so a new driver that trains the same thing finds
the last committed checkpoint under `storage` and goes on from there. SIGTERM to the driver (a preempted
node, `ray job stop`) ends a run after its next checkpoint, which it makes at the end of the step.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pyarrow.fs as pafs
import ray
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from delia.errors import StoppedError, TrainError
from delia.store.tables import join, open_filesystem
from delia.train.building import TrainInput
from delia.train.guards import Outcome
from delia.train.loop import ADAPTER_FOLDER, train_worker
from delia.train.snapshot import mend_snapshot

logger = logging.getLogger(__name__)
LogMetrics = Callable[[dict[str, float], int], None]


@ray.remote(num_cpus=0)
class LogSink:
    """Carries metrics from the first worker to the driver, which alone talks to the tracker, and its wish back."""

    def __init__(self) -> None:
        """Start empty."""
        self._lines: list[tuple[dict[str, float], int]] = []
        self._is_stopping = False

    def put(self, metrics: dict[str, float], step: int) -> None:
        """Keep one line."""
        self._lines.append((metrics, step))

    def drain(self) -> list[tuple[dict[str, float], int]]:
        """Hand over what has come since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def stop(self) -> None:
        """Note that the driver wants an end."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        """Tell whether it does."""
        return self._is_stopping


@dataclass
class RemoteLog:
    """A worker's line to its driver; it never waits for it, but at the end."""

    sink: Any
    _answer: Any = field(default=None, init=False)
    _sent: Any = field(default=None, init=False)

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Send one line."""
        self._sent = self.sink.put.remote(metrics, step)

    def flush(self) -> None:
        """Wait until all lines have come: what is on its way when its sender ends is lost."""
        if self._sent is not None:
            with suppress(RayActorError):  # with its node; nobody will read them
                ray.get(self._sent)  # lines of one sender come in order

    def asks_to_stop(self) -> bool:
        """Tell whether the driver wants an end; what it knows is as old as the last call."""
        if self._answer is None:
            self._answer = self.sink.is_stopping.remote()
        if not ray.wait([self._answer], timeout=0)[0]:
            return False
        answer, self._answer = self._answer, None
        try:
            return bool(ray.get(answer))
        except RayActorError:  # with its node; nobody will ask any more
            return False


@contextmanager
def catch_termination() -> Iterator[threading.Event]:
    """While this is open the first SIGTERM sets the event and ends nothing; the second one is as ever.

    Only a main thread hears signals; elsewhere the event is never set.
    """
    is_stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield is_stopping
        return
    before = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        is_stopping.set()

    signal.signal(signal.SIGTERM, note)
    try:
        yield is_stopping
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def forward_log(log: LogMetrics, *, is_stopping: threading.Event | None = None) -> Iterator[RemoteLog]:
    """Forward the workers' metrics to `log` on this process, every second and at the end.

    A log that is a line already is handed on as it is. Once `is_stopping` is set the workers are told.
    """
    if isinstance(log, RemoteLog):
        yield log
        return
    sink = LogSink.remote()  # type: ignore[attr-defined]  # added by the decorator
    finished = threading.Event()

    def drain() -> None:
        try:
            lines = ray.get(sink.drain.remote())
        except RayActorError as error:  # with its node; lines are lost, the training is not
            logger.warning("a log of training is lost: %s", error)
            return
        for metrics, step in lines:
            log(metrics, step)

    def forward() -> None:
        while not finished.wait(1.0):
            if is_stopping is not None and is_stopping.is_set():
                sink.stop.remote()
            drain()

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield RemoteLog(sink)
    finally:
        finished.set()
        thread.join()
        drain()
        ray.kill(sink)


def work(settings: Mapping[str, Any]) -> Outcome:
    """Run on each worker: train, and end when the driver's log has all lines."""
    outcome = train_worker(settings)
    settings["log"].flush()
    return outcome


def run_training(task: TrainInput, *, name: str, storage: str, output: str, log: LogMetrics) -> None:
    """Train, or go on where a killed run of the same name stopped; write the adapter's files.

    Args:
        task: What is trained on what; kept in Ray's object store.
        name: The run's name under `storage`; equal inputs must have equal names.
        storage: Address that every worker can write, for checkpoints.
        output: Address of the adapter directory; the caller commits its manifest.
        log: Called on this process with metrics and step.

    Raises:
        TrainError: The workers failed more than `max_failures` times, or the loss can't be trusted; with
            the last good checkpoint.
        StoppedError: The driver asked for an end; the checkpoint is committed.
    """
    config = task.config
    mend_snapshot(join(storage, name))
    with forward_log(log) as remote_log:
        trainer = TorchTrainer(
            work,  # type: ignore[arg-type]  # V2 hands on what the first worker returns
            train_loop_config={"input": [ray.put(task)], "log": remote_log},
            # shards in the host's memory are added up there, beside those on GPUs
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config.use_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=config.num_workers,
                use_gpu=config.use_gpu,
                resources_per_worker={
                    "CPU": config.num_cpus_per_worker,
                    **({"GPU": 1} if config.use_gpu else {}),
                },
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # Train V2's, which mypy takes for V1's
                name=name,
                storage_path=storage if "://" in storage else os.path.abspath(storage),
                failure_config=FailureConfig(max_failures=config.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=config.num_kept_checkpoints),
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}},
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise TrainError(f"training {name} failed: {error}") from error
    last = read_last(result, name=name, num_steps=config.max_steps)
    source = join(last.path, ADAPTER_FOLDER)
    target_filesystem, target = open_filesystem(output)
    target_filesystem.create_dir(target, recursive=True)
    pafs.copy_files(
        source,
        target,
        source_filesystem=last.filesystem,
        destination_filesystem=target_filesystem,
    )


def read_last(result: Any, *, name: str, num_steps: int) -> Checkpoint:
    """Return the checkpoint of the last step; refuse the result of a training that did not reach it.

    Raises:
        TrainError: A worker could not go on; with the last good checkpoint.
        StoppedError: The driver asked for an end.
    """
    outcome: Outcome = result.return_value
    good = "none yet"
    if result.checkpoint is not None:
        good = f"step {(result.metrics or {})['step']} in {result.checkpoint.path}"
    if outcome.problem:
        raise TrainError(f"training {name}: {outcome.problem}; last good checkpoint: {good}")
    if outcome.step < num_steps:
        raise StoppedError(
            f"training {name} was asked to stop and did so after step {outcome.step} of {num_steps};"
            f" checkpoint: {good}; start it again with the same settings to go on from there"
        )
    if result.checkpoint is None:
        raise TrainError(f"training {name} left no checkpoint")
    last: Checkpoint = result.checkpoint
    return last
