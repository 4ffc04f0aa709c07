"""Ray Train around the loop: workers, checkpoints, restarts, and the log of the driver.

    TrainInput -> TorchTrainer (V2) -> the last checkpoint's adapter files at `output`

The run's name is the fingerprint of its input, so a new driver that trains the same thing finds
the last committed checkpoint under `storage` and goes on from there.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import ray
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from delia.errors import TrainError
from delia.store.tables import join, open_filesystem
from delia.train.building import TrainInput
from delia.train.loop import ADAPTER_FOLDER, train_worker

logger = logging.getLogger(__name__)
LogMetrics = Callable[[dict[str, float], int], None]


@ray.remote(num_cpus=0)
class LogSink:
    """Carries metrics from the first worker to the driver, which alone talks to the tracker."""

    def __init__(self) -> None:
        """Start empty."""
        self._lines: list[tuple[dict[str, float], int]] = []

    def put(self, metrics: dict[str, float], step: int) -> None:
        """Keep one line."""
        self._lines.append((metrics, step))

    def drain(self) -> list[tuple[dict[str, float], int]]:
        """Hand over what has come since the last call."""
        lines, self._lines = self._lines, []
        return lines


@dataclass(frozen=True)
class RemoteLog:
    """What a worker calls to log: it never waits for the driver."""

    sink: Any

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Send one line."""
        self.sink.put.remote(metrics, step)


@contextmanager
def forward_log(log: LogMetrics) -> Iterator[RemoteLog]:
    """Forward the workers' metrics to `log` on this process, every second and at the end."""
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


def run_training(task: TrainInput, *, name: str, storage: str, output: str, log: LogMetrics) -> None:
    """Train, or go on where a killed run of the same name stopped; write the adapter's files.

    Args:
        task: What is trained on what; kept in Ray's object store.
        name: The run's name under `storage`; equal inputs must have equal names.
        storage: Address that every worker can write, for checkpoints.
        output: Address of the adapter directory; the caller commits its manifest.
        log: Called on this process with metrics and step.

    Raises:
        TrainError: The workers failed more than `max_failures` times.
    """
    config = task.config
    with forward_log(log) as remote_log:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"input": [ray.put(task)], "log": remote_log},
            torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
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
    if result.checkpoint is None:
        raise TrainError(f"training {name} left no checkpoint under {storage}")
    source = join(result.checkpoint.path, ADAPTER_FOLDER)
    target_filesystem, target = open_filesystem(output)
    target_filesystem.create_dir(target, recursive=True)
    pafs.copy_files(
        source,
        target,
        source_filesystem=result.checkpoint.filesystem,
        destination_filesystem=target_filesystem,
    )
