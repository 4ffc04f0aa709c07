"""Where a job keeps its steps, and the Ray cluster that it runs on.

    output_dir/ pools/FP  adapters/FP  evals/FP  served/FP  checkpoints/FP  mlflow.db

A step's directory is named by the fingerprint of everything that decides its content, so a finished
step is found again by any job with the same settings, and changed settings never meet old data.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import ray

from delia.chat import ChatEncoder, load_chat, reserve_tokens
from delia.config import FrozenConfig
from delia.schema import Task
from delia.store.models import ModelConfig, identify_model, resolve_model
from delia.store.tables import join

Started = TypeVar("Started")
LOCAL = "local"
START_ATTEMPTS = 4
SLOW_START = "timed out during startup"
"""Ray waits 30 s for a node that it starts, whatever the load; no setting changes that."""
JOB_ENVIRONMENT = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the entry point of a submitted job."""


class RayConfig(FrozenConfig):
    """The cluster: `address` as `ray.init` takes it; None starts one here, unless inside a job.

    `num_cpus` are the logical CPUs of a cluster that is started here; None means at least four, so
    that small stages fit beside each other on a laptop.
    """

    address: str | None = None
    num_cpus: int | None = None


def starts_cluster(config: RayConfig) -> bool:
    """Tell whether `connect` starts a cluster on this machine, and finds none."""
    if ray.is_initialized() or JOB_ENVIRONMENT in os.environ:
        return False
    return (config.address or os.environ.get("RAY_ADDRESS") or LOCAL) == LOCAL


def connect(config: RayConfig) -> None:
    """Connect to Ray once a process; telemetry is off.

    Inside a submitted job the cluster and the runtime environment are the job's own.
    """
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if JOB_ENVIRONMENT in os.environ:
        ray.init(configure_logging=False, logging_level=logging.WARNING)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs workers at niceness 15: beside anything else on the machine an engine would starve
    os.environ.setdefault("RAY_worker_niceness", "0")
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONWARNINGS": "ignore"}
    address = config.address or os.environ.get("RAY_ADDRESS") or LOCAL
    # "local" starts a cluster even where another one runs on this machine
    num_cpus = (config.num_cpus or max(4, os.cpu_count() or 1)) if address == LOCAL else None
    start = partial(
        ray.init,
        address,
        num_cpus=num_cpus,
        runtime_env={"env_vars": environment},
        configure_logging=False,
        log_to_driver=os.environ.get("DELIA_WORKER_LOGS", "0") == "1",
        logging_level=logging.WARNING,
    )
    start_slowly(start)


def start_slowly(start: Callable[[], Started]) -> Started:
    """Start a node of Ray's, more than once where the machine is too busy for it."""
    for _ in range(START_ATTEMPTS - 1):
        try:
            return start()
        except Exception as error:
            if SLOW_START not in str(error):
                raise
    return start()


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The base model, its chat format and the task of one job, and where its steps lie."""

    output_dir: str
    model: ModelConfig
    model_id: str
    chat: ChatEncoder
    task: Task

    def address(self, kind: str, fingerprint: str) -> str:
        """Return the directory of a step."""
        return join(self.output_dir, kind, fingerprint)


def open_workspace(output_dir: str, model: ModelConfig, task: Task) -> Workspace:
    """Load the chat format, with the task's tokens on unused rows of the vocabulary."""
    path = str(resolve_model(model))
    plain = load_chat(path, chat_template=model.chat_template)
    tokens = reserve_tokens(plain.tokenizer, task.tokens) if task.tokens else {}
    chat = load_chat(path, chat_template=model.chat_template, task_tokens=tokens) if tokens else plain
    return Workspace(
        output_dir=output_dir if "://" in output_dir else os.path.abspath(output_dir),
        model=model,
        model_id=identify_model(model),
        chat=chat,
        task=task,
    )
