"""One trial: a mixture -> an adapter -> its scores. What `adapt` does once and `search` many times."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ray

from delia.chat import ChatEncoder, EncodedChat, save_tokenizer
from delia.config import FrozenConfig, fingerprint
from delia.errors import TrainError
from delia.flow.workspace import Workspace
from delia.mix.mixture import MixConfig, mix
from delia.schema import Adapter, Messages, Mixture
from delia.store.pools import Pool
from delia.store.scores import read_score_column
from delia.store.tables import Manifest, commit, is_finished, read_manifest, upload_directory
from delia.train.building import TrainInput
from delia.train.launch import LogMetrics, forward_log, run_training
from delia.train.rows import TASK, join_rows
from delia.train.settings import RowScoresConfig, TrainConfig

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


def plan_arm(config: ArmConfig, space: Workspace, pool: Pool | None) -> Arm:
    """Draw the mixture and name the adapter.

    Raises:
        MixtureError: The pool can't supply the ratio.
    """
    task_rows = space.task.rows_by_split["train"]
    mixture = mix(
        task_rows,
        pool.rows if pool else (),
        config.mix,
        pool_root=pool.manifest.root if pool else EMPTY_POOL_ROOT,
        task_digest=space.task.digest,
    )
    loaded = f"{space.model.dtype} {space.model.attention}"
    scores = config.train.row_scores
    parts = [space.model_id, loaded, space.chat.template_hash, mixture.root]
    if scores is not None:  # a table is named by its address, which says nothing of what is in it
        parts += [
            f"{row_id} {score!r}"
            for row_id, score in sorted(read_score_column(scores.path, scores.column).items())
        ]
    name = fingerprint(config.train, *parts)
    return Arm(config=config, mixture=mixture, fingerprint=name, address=space.address("adapters", name))


def encode_rows(
    chats: Sequence[Messages], config: TrainConfig, chat: ChatEncoder
) -> list[EncodedChat | None]:
    """Turn chats into ids and masks once; None where a long row is dropped by setting.

    Raises:
        TrainError: A row without a trained token.
    """
    encoded = []
    for number, messages in enumerate(chats):
        row = chat.fit(
            chat.encode_chat(messages, train_on=config.train_on),
            max_length=config.max_length,
            on_long=config.on_long,
        )
        if row is not None and not any(row.loss_mask):
            raise TrainError(f"row {number} has no trained token: {messages[-1].content[:80]!r}")
        encoded.append(row)
    return encoded


def build_input(
    arm: Arm, space: Workspace, pool: Pool | None, *, allowed_modules: tuple[str, ...] = ()
) -> TrainInput:
    """Look up the mixture's rows and encode them."""
    by_id = {row.row_id: (row.messages, row.source) for row in (pool.rows if pool else ())}
    by_id.update({row.task_id: (row.messages, TASK) for row in space.task.rows_by_split["train"]})
    config, chat = arm.config.train, space.chat
    chats, sources = zip(*(by_id[row_id] for row_id in arm.mixture.row_ids), strict=True)
    encoded = encode_rows(chats, config, chat)
    kept = [(row, source) for row, source in zip(encoded, sources, strict=True) if row is not None]
    ids = [row_id for row_id, row in zip(arm.mixture.row_ids, encoded, strict=True) if row is not None]
    token_ids = tuple(chat.token_ids.values()) if _moves_rows(config) else ()
    instruction = space.task.long_instruction
    return TrainInput(
        model=space.model,
        config=config,
        rows=join_rows(
            [(row.input_ids, row.loss_mask) for row, _ in kept],
            sources=[source for _, source in kept],
            has_token=[any(token in row.input_ids for token in chat.token_ids.values()) for row, _ in kept],
            scores=look_up_scores(config.row_scores, ids) if config.row_scores else None,
        ),
        token_ids=token_ids,
        instruction_ids=tuple(chat.tokenizer.encode(f" {instruction}", add_special_tokens=False))
        if instruction
        else (),
        allowed_modules=allowed_modules,
    )


def look_up_scores(config: RowScoresConfig, row_ids: Sequence[str]) -> list[float]:
    """Return each row's score.

    Raises:
        StoreError: There is no such table or column.
        TrainError: Rows without a score, and no score for such rows.
    """
    scores = read_score_column(config.path, config.column)
    missing = [row_id for row_id in row_ids if row_id not in scores]
    if missing and config.missing is None:
        raise TrainError(
            f"train.row_scores: {len(missing)} of {len(row_ids)} rows have no {config.column!r} in {config.path!r},"
            f" the first is {missing[0]!r}; score them, or set train.row_scores.missing to a score for such rows"
        )
    return [scores.get(row_id, config.missing or 0.0) for row_id in row_ids]


def _moves_rows(config: TrainConfig) -> bool:
    return any("token_rows" in stage.parts for stage in config.stages)


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

    A job of its own for each arm: Ray Train wants the main thread of a process.
    """
    waiting = [name for name, arm in arms.items() if not is_finished(arm.address)]
    running: dict[ray.ObjectRef, tuple[str, float, ExitStack]] = {}  # type: ignore[type-arg]
    with ExitStack() as everything:  # whatever ends first, each log is forwarded to its end
        while waiting or running:
            while waiting and len(running) < max_concurrent:
                name = waiting.pop(0)
                task = build_input(arms[name], space, pool, allowed_modules=allowed_modules)
                sink = everything.enter_context(ExitStack())
                log = sink.enter_context(forward_log(logs[name]))
                storage = space.address("checkpoints", "")
                reference = _train_remotely.remote(
                    task, arms[name].fingerprint, storage, arms[name].address, log
                )
                running[reference] = (name, time.monotonic(), sink)
            done, _ = ray.wait(list(running), num_returns=1)
            name, started, sink = running.pop(done[0])
            ray.get(done[0])
            seal_adapter(arms[name], space)
            sink.close()  # its actor is a process
            on_done(name, time.monotonic() - started)
    return {name: read_adapter(arm.address) for name, arm in arms.items()}


def seal_adapter(arm: Arm, space: Workspace) -> None:
    """Add tokenizer and lineage to the adapter's files, and commit the directory."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(space.chat, folder)
        upload_directory(Path(folder), arm.address)
    commit(
        arm.address,
        Manifest(
            kind="adapter",
            fingerprint=arm.fingerprint,
            root=arm.mixture.root,
            counts={"rows": len(arm.mixture.row_ids), "task_rows": sum(arm.mixture.is_task)},
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
