"""One trial: a mixture -> an adapter -> its scores. What `adapt` does once and `search` many times."""

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from delia.chat import save_tokenizer
from delia.config import FrozenConfig, build_method, describe_method, fingerprint
from delia.errors import DeliaError, StoppedError
from delia.flow.encoding import Encode, encode_here, encode_mixture, encode_on_ray
from delia.flow.workspace import Workspace
from delia.mix.mixture import MixConfig, mix
from delia.schema import Adapter, Mixture
from delia.store.directories import upload_directory
from delia.store.pools import Pool, index_rows
from delia.store.scores import read_score_column
from delia.store.tables import Manifest, commit, is_finished, read_manifest
from delia.train.building import TrainInput
from delia.train.guards import check_template
from delia.train.launch import LogMetrics, catch_termination, forward_log, run_training
from delia.train.settings import TrainConfig

EMPTY_POOL_ROOT = "no pool"


class ArmConfig(FrozenConfig):
    """One way to train on the same task and pool: how much is mixed in, and how it is trained."""

    mix: MixConfig
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm with its mixture, ready to train."""

    config: ArmConfig
    mixture: Mixture
    fingerprint: str
    address: str


def plan_arm(
    config: ArmConfig, space: Workspace, pool: Pool | None, *, allowed_modules: tuple[str, ...] = ()
) -> Arm:
    """Draw the mixture and name the adapter.

    Raises:
        ConfigError: A research method can't be built.
        MixtureError: The pool can't supply the ratio.
        TrainError: The pool is of another template.
    """
    if pool is not None:
        check_template(pool.manifest.details.get("template_hash"), space.chat.template_hash)
    task_rows = space.task.rows_by_split["train"]
    mixture = mix(
        task_rows,
        pool.index.group_ids() if pool else {},
        config.mix,
        pool_root=pool.manifest.root if pool else EMPTY_POOL_ROOT,
        task_digest=space.task.digest,
    )
    loaded = f"{space.model.dtype} {space.model.attention} {space.model.quantisation}"
    scores = config.train.row_scores
    parts: list[str | dict[str, Any]] = [space.model_id, loaded, space.chat.template_hash, mixture.root]
    for method in (config.train.token_weighter, config.train.parameter_mask, config.train.input_corruption):
        if method is not None:
            parts.append(describe_method(method, build_method(method, allowed_modules=allowed_modules)))
    if scores is not None:  # a table is named by its address, which says nothing of what is in it
        parts += [
            f"{row_id} {score!r}"
            for row_id, score in sorted(read_score_column(scores.path, scores.column).items())
        ]
    name = fingerprint(config.train.name_content(), *parts)
    return Arm(config=config, mixture=mixture, fingerprint=name, address=space.address("adapters", name))


def build_input(
    arm: Arm,
    space: Workspace,
    pool: Pool | None,
    *,
    encode: Encode = encode_here,
    allowed_modules: tuple[str, ...] = (),
) -> tuple[TrainInput, dict[str, int]]:
    """Look up the mixture's rows and encode them; also return how many long ones were dropped or truncated.

    Raises:
        TrainError: A row would teach nothing, or none is left.
    """
    config, chat, instruction = arm.config.train, space.chat, space.task.long_instruction
    rows, counts = encode_mixture(
        arm.mixture,
        space.task.rows_by_split["train"],
        pool.index if pool else index_rows(()),
        config,
        chat,
        encode=encode,
    )
    task = TrainInput(
        model=space.model,
        config=config,
        rows=rows,
        token_ids=tuple(chat.token_ids.values()) if _moves_rows(config) else (),
        instruction_ids=tuple(chat.tokenizer.encode(f" {instruction}", add_special_tokens=False))
        if instruction
        else (),
        allowed_modules=allowed_modules,
    )
    return task, counts


def _moves_rows(config: TrainConfig) -> bool:
    return any("token_rows" in stage.parts for stage in config.stages)


@dataclass(frozen=True)
class _Running:
    name: str
    started: float
    sink: ExitStack
    num_by_fate: dict[str, int]


@ray.remote(num_cpus=0)
def _train_remotely(task: TrainInput, name: str, storage: str, output: str, log: LogMetrics) -> None:
    run_training(task, name=name, storage=storage, output=output, log=log)


def train_arms(
    arms: Mapping[str, Arm],
    space: Workspace,
    pool: Pool | None,
    *,
    logs: Mapping[str, LogMetrics],
    max_concurrent: int,
    allowed_modules: tuple[str, ...] = (),
    on_done: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, Adapter]:
    """Train each arm that is not finished, a few at a time; return the adapters by name.

    A job of its own for each arm: Ray Train wants the main thread of a process. Arms of one fingerprint are one
    training, by the first one's name.

    Raises:
        StoppedError: SIGTERM came, and each arm that was running has a checkpoint or is finished.
        TrainError: See `run_training`.
    """
    first_by_address: dict[str, str] = {}
    for name, arm in arms.items():
        first_by_address.setdefault(arm.address, name)
    waiting = [name for address, name in first_by_address.items() if not is_finished(address)]
    running: dict[ray.ObjectRef, _Running] = {}  # type: ignore[type-arg]
    stopped: list[str] = []
    # whatever ends first, each log is forwarded to its end
    with catch_termination() as is_stopping, ExitStack() as everything:
        while running or (waiting and not is_stopping.is_set()):
            while waiting and len(running) < max_concurrent and not is_stopping.is_set():
                name = waiting.pop(0)
                task, num_by_fate = build_input(
                    arms[name], space, pool, encode=encode_on_ray, allowed_modules=allowed_modules
                )
                sink = everything.enter_context(ExitStack())
                log = sink.enter_context(forward_log(logs[name], is_stopping=is_stopping))
                storage = space.address("checkpoints", "")
                reference = _train_remotely.remote(
                    task, arms[name].fingerprint, storage, arms[name].address, log
                )
                del task  # the training alone keeps its shards, and they go with it
                running[reference] = _Running(name, time.monotonic(), sink, num_by_fate)
            done, _ = ray.wait(list(running), num_returns=1)
            ended = running.pop(done[0])
            try:
                ray.get(done[0])
            except RayTaskError as error:
                if isinstance(error.cause, StoppedError):  # the others have a checkpoint to write yet
                    stopped.append(str(error.cause))
                    continue
                raise error.cause if isinstance(error.cause, DeliaError) else error from None
            seal_adapter(arms[ended.name], space, counts=ended.num_by_fate)
            ended.sink.close()  # its actor is a process
            on_done(ended.name, time.monotonic() - ended.started)
        if is_stopping.is_set():
            left = f"arms {waiting} did not begin" if waiting else "every arm began"
            raise StoppedError("; ".join((*stopped, f"stopped by SIGTERM as adapters were trained, {left}")))
    return {name: read_adapter(arm.address) for name, arm in arms.items()}


def seal_adapter(arm: Arm, space: Workspace, *, counts: Mapping[str, int] | None = None) -> None:
    """Add tokenizer and lineage to the adapter's files, and commit the directory; `counts` are of its rows."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(space.chat, folder)
        upload_directory(Path(folder), arm.address)
    commit(
        arm.address,
        Manifest(
            kind="adapter",
            fingerprint=arm.fingerprint,
            root=arm.mixture.root,
            counts={"rows": len(arm.mixture.row_ids), "task_rows": sum(arm.mixture.is_task)}
            | dict(counts or {}),
            parents={"model": space.model_id, "task": space.task.digest, "mixture": arm.mixture.root},
            details={
                "base_model": space.model.path,
                "model": space.model.model_dump(mode="json"),
                "template_hash": space.chat.template_hash,
                "tokens": dict(space.chat.token_ids),
                "diverse_ratio": arm.mixture.diverse_ratio,
                "train": arm.config.train.model_dump(mode="json"),
            },
        ),
    )


def read_adapter(address: str) -> Adapter:
    """Read a finished adapter directory."""
    manifest = read_manifest(address, kind="adapter")
    return Adapter(
        path=address,
        fingerprint=manifest.fingerprint,
        base_model=str(manifest.details["base_model"]),
        template_hash=str(manifest.details["template_hash"]),
        mixture_root=manifest.parents["mixture"],
        tokens={str(key): int(value) for key, value in manifest.details["tokens"].items()},
    )
