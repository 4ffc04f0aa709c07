"""Blocks -> results on Ray Data: one vLLM engine a replica, spread over the nodes.

    blocks --from_arrow--> map_batches(EngineActor: a Script asks the engine) --> results, as they finish

Replicas are Ray Data actors; Ray restarts a lost one and runs its blocks again, and `attempts` gives up
what kills one time after time. Because each request carries its own seed, text does not depend on the
number of replicas or on the order.
"""

import os
import sys
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from delia.errors import DeliaError, EngineError
from delia.generate.attempts import Ask, AttemptLog, CarefulEngine
from delia.generate.calls import call
from delia.generate.clock import Account, SharedClock
from delia.generate.engine import FAULTS, Completion, EngineConfig, Request, SamplingConfig, build_engine
from delia.generate.nodes import wait_for_node
from delia.rng import hash_text
from delia.store.models import ModelConfig

SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("seed", pa.int64()),
        ("adapter", pa.string()),
        ("temperature", pa.float64()),
        ("max_tokens", pa.int64()),
        ("json_schema", pa.string()),
        ("end_ids", pa.list_(pa.int32())),
    ]
)
"""The columns of a block of requests."""
ENGINE_SECONDS = "engine_seconds"
DEVICE_SECONDS = "device_seconds"
SOURCE = "source"
"""The column of a block that says what it belongs to; see `skip` of `run_script`."""
SWITCH_SECONDS = 2e-5
"""After how long a script gives the interpreter back to the thread that steps the engine, which asks for it thousands
of times a second; at Python's 5 ms an engine all but stands while a script prepares its next block."""


class Script(Protocol):
    """What a replica does with one block; it may ask its engine any number of times.

    It is sent to every replica, and must give the same table for the same block and the same answers.
    """

    def __call__(self, block: pa.Table, ask: Ask) -> pa.Table:
        """Return the block's result; `ask` answers requests in their order."""
        ...


class EngineActor:
    """One replica: holds an engine for the life of the stage; several blocks are in it at a time."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        sampling: SamplingConfig,
        end_ids: tuple[int, ...],
        script: Script,
        attempts: Any,
    ) -> None:
        """Start the engine; Ray calls this once a replica."""
        engine = build_engine(model, config)
        sys.setswitchinterval(SWITCH_SECONDS)
        generate = partial(engine.generate, sampling=sampling, end_ids=end_ids)
        self._script, self._config = script, config
        self._clock = SharedClock()
        self._engine = CarefulEngine(generate, attempts, num_callers=config.max_concurrent_batches)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Run the script on a block; what it was charged is added, see `add_seconds`.

        Of a block that is no longer wanted there is nothing.
        """
        source = block[SOURCE][0].as_py() if SOURCE in block.column_names else ""
        if not self._engine.enter(hash_text(str(block.slice(0, 1).to_pylist())), source):
            return pa.table({})
        account = Account()
        table = self._script(block, partial(self._ask, account))
        if table.num_rows == 0:
            self._engine.leave_empty()
        return add_seconds(table, account.seconds, self._config)

    def _ask(self, account: Account, requests: Sequence[Request]) -> list[Completion]:
        with self._clock.running(account):
            return self._engine.ask(requests)


def add_seconds(table: pa.Table, seconds: float, engine: EngineConfig) -> pa.Table:
    """Return a block's result with each row's part of the engine's seconds, and of those of its devices.

    It is told here what devices they were: who reads the result later may have others.
    """
    share = seconds / max(1, table.num_rows)
    for name, value in ((ENGINE_SECONDS, share), (DEVICE_SECONDS, share * engine.num_devices)):
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.float64()))
    return table


def answer_requests(block: pa.Table, ask: Ask) -> pa.Table:
    """Answer a block of requests once each: the plainest script."""
    completions = ask([Request(**row, prompt_ids=tuple(ids)) for row, ids in _split_ids(block)])
    return pa.table(
        {
            "request_id": [item.request_id for item in completions],
            "token_ids": pa.array([list(item.token_ids) for item in completions], pa.list_(pa.int32())),
            "finish_reason": [item.finish_reason for item in completions],
            "num_prompt_tokens": pa.array([item.num_prompt_tokens for item in completions], pa.int32()),
            "logprobs": pa.array([list(item.logprobs) for item in completions], pa.list_(pa.float32())),
            "error": [item.error for item in completions],
        }
    )


def _split_ids(batch: pa.Table) -> Iterator[tuple[dict[str, Any], list[int]]]:
    rows = batch.drop_columns(["prompt_ids"]).to_pylist()
    rest = [{**row, "end_ids": tuple(row["end_ids"])} for row in rows]
    return zip(rest, batch.column("prompt_ids").to_pylist(), strict=True)


def to_blocks(requests: Sequence[Request], size: int) -> list[pa.Table]:
    """Cut requests into tables of at most `size` rows, for `answer_requests`.

    Raises:
        ValueError: Two requests have one id.
    """
    if len({request.request_id for request in requests}) != len(requests):
        raise ValueError("request ids must be distinct")
    names = [name for name in SCHEMA.names if name != "prompt_ids"]
    return [
        pa.table(
            {
                "prompt_ids": [np.asarray(request.prompt_ids, np.int32) for request in part],
                **{name: [getattr(request, name) for request in part] for name in names},
            },
            schema=SCHEMA,
        )
        for part in (requests[start : start + size] for start in range(0, len(requests), size))
    ]


def run_script(
    script: Script,
    blocks: Sequence[pa.Table],
    *,
    model: ModelConfig,
    engine: EngineConfig,
    sampling: SamplingConfig,
    end_ids: Sequence[int],
    skip: Collection[str] = (),
) -> Generator[pa.Table, None, None]:
    """Run a script on every block, each on one of the replicas; yield results as blocks are done.

    Replicas that are lost are restarted, and their blocks run again. Stop reading to stop the work: no more
    blocks are begun than replicas hold, `2 * max_concurrent_batches` each, before the reader asks for more.

    Args:
        script: What is done with a block.
        blocks: Tables without empty ones among them.
        model: The model that the engines serve.
        engine: Kind and number of replicas.
        sampling: How tokens are drawn where a request does not say.
        end_ids: Tokens that end an answer.
        skip: Sources whose blocks need not be begun any more; the reader may add to them after each result.

    Raises:
        EngineError: No node can hold an engine, one can't start, fails on everything, or refuses an adapter that it
            would die of.
        DeliaError: What the script raised.
    """
    if not blocks:
        return
    wait_for_node(engine)
    log_class: Any = ray.remote(AttemptLog)
    attempts = log_class.options(num_cpus=0, max_restarts=-1).remote(
        max_quarantined=engine.max_quarantined,
        max_ahead=count_places(engine) * min(engine.num_replicas, len(blocks)),
    )
    arguments = (model, engine, sampling, tuple(end_ids), script, attempts)
    tables: Any = _map_blocks(blocks, engine, arguments).iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    )
    try:
        skipped: set[str] = set()
        for table in tables:
            if table.num_rows:
                yield table
                attempts.count_taken.remote()
            if more := set(skip) - skipped:
                skipped |= more
                with suppress(RayActorError):  # its node died: some blocks too many are begun
                    call(attempts.refuse, sorted(more))
    except RayTaskError as error:
        if isinstance(error.cause, DeliaError):
            raise error.cause from error
        raise
    except ActorDiedError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise EngineError(f"an engine could not start, or died for good: {reason}") from error
    finally:
        ray.kill(attempts)


def count_places(engine: EngineConfig) -> int:
    """Return how many blocks a replica holds: as many wait as are in its engine."""
    return 2 * engine.max_concurrent_batches


def _map_blocks(
    blocks: Sequence[pa.Table], engine: EngineConfig, arguments: tuple[Any, ...]
) -> ray.data.Dataset:
    """Return the stage, not yet begun: every block on one of the replicas, each built with `arguments`."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    return ray.data.from_arrow(list(blocks)).map_batches(
        EngineActor,
        fn_constructor_args=arguments,
        # with GPUs Ray Data insists on a number, and joins blocks that are smaller: none is but the last
        batch_size=max(block.num_rows for block in blocks) if engine.num_gpus_per_replica else None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=min(engine.num_replicas, len(blocks)),
            max_tasks_in_flight_per_actor=count_places(engine),
            max_concurrent_calls_per_actor=engine.max_concurrent_batches,
            enable_true_multi_threading=True,
        ),
        num_cpus=engine.num_cpus_per_replica,
        num_gpus=engine.num_gpus_per_replica or None,
        resources=engine.resources_per_replica or None,
        runtime_env={"env_vars": worker_environment()},
    )


def to_completions(table: pa.Table) -> list[Completion]:
    """Return the completions in a result of `answer_requests`.

    Raises:
        EngineError: A request was given up, or its prompt leaves no room for an answer.
    """
    completions = []
    for row in table.select([item.name for item in fields(Completion)]).to_pylist():
        sequences = {name: tuple(row[name]) for name in ("token_ids", "logprobs")}
        completions.append(Completion(**row | sequences))
        if row["finish_reason"] in FAULTS:
            raise EngineError(f"request {row['request_id']} was not answered: {row['error']}")
    return completions


def worker_environment() -> dict[str, str]:
    """Return what every engine worker needs: one thread a replica unless told otherwise, no hub calls."""
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
        "VLLM_NO_USAGE_STATS": "1",
    }
