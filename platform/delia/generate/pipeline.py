"""Requests -> completions on Ray Data: one vLLM engine a replica, spread over the nodes.

    requests --from_arrow, a block a batch--> map_batches(EngineActor) --> completions, as they finish

Replicas are Ray Data actors; Ray restarts a lost one and runs its batch again. Because each request
carries its own seed, text does not depend on the number of replicas or on the order. A `FollowUp`
turns completions into a second turn inside the actor, so that an instruction and its answer cost
one engine start.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.exceptions import ActorDiedError, RayTaskError

from delia.errors import DeliaError, EngineError
from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig, build_engine
from delia.store.models import ModelConfig

SCHEMA = pa.schema(
    [
        ("request_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("seed", pa.int64()),
        ("adapter", pa.string()),
    ]
)


class FollowUp(Protocol):
    """Makes the second turn's request from the first turn's completion, or None to leave it."""

    def __call__(self, completion: Completion) -> Request | None:
        """Return the next request; it must keep the request id."""
        ...


class EngineActor:
    """One replica: holds an engine for the life of the stage."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        sampling: SamplingConfig,
        end_ids: tuple[int, ...],
        follow_up: FollowUp | None = None,
    ) -> None:
        """Start the engine; Ray calls this once a replica."""
        self._sampling = sampling
        self._end_ids = end_ids
        self._follow_up = follow_up
        self._engine = build_engine(model, config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer one batch: columns of `SCHEMA` -> columns of a completion, a row a turn."""
        requests = [Request(**row, prompt_ids=tuple(ids)) for row, ids in _split_ids(batch)]
        completions = self._answer(requests)
        turns = [(completion, 1) for completion in completions]
        if self._follow_up is not None:
            replies = [self._follow_up(completion) for completion in completions]
            second = self._answer([reply for reply in replies if reply is not None])
            turns += [(completion, 2) for completion in second]
        return pa.table(
            {
                "request_id": [item.request_id for item, _ in turns],
                "turn": pa.array([turn for _, turn in turns], pa.int8()),
                "token_ids": pa.array([list(item.token_ids) for item, _ in turns], pa.list_(pa.int32())),
                "finish_reason": [item.finish_reason for item, _ in turns],
                "num_prompt_tokens": pa.array([item.num_prompt_tokens for item, _ in turns], pa.int32()),
                "logprobs": pa.array([list(item.logprobs) for item, _ in turns], pa.list_(pa.float32())),
            }
        )

    def _answer(self, requests: list[Request]) -> list[Completion]:
        if not requests:
            return []
        return self._engine.generate(requests, self._sampling, end_ids=self._end_ids)


def _split_ids(batch: pa.Table) -> Iterator[tuple[dict[str, Any], list[int]]]:
    rest = batch.drop_columns(["prompt_ids"]).to_pylist()
    return zip(rest, batch.column("prompt_ids").to_pylist(), strict=True)


def _to_table(requests: Sequence[Request]) -> pa.Table:
    return pa.table(
        {
            "request_id": [request.request_id for request in requests],
            "prompt_ids": [np.asarray(request.prompt_ids, np.int32) for request in requests],
            "seed": [request.seed for request in requests],
            "adapter": [request.adapter for request in requests],
        },
        schema=SCHEMA,
    )


def stream_completions(
    requests: Sequence[Request],
    *,
    model: ModelConfig,
    engine: EngineConfig,
    sampling: SamplingConfig,
    end_ids: Sequence[int],
    follow_up: FollowUp | None = None,
) -> Iterator[pa.Table]:
    """Yield tables of completions, a batch each, in the order in which batches finish.

    A batch holds both turns of its requests. Stop reading to stop the stage: what is not in flight
    is never generated, and the engines are freed.

    Raises:
        ValueError: Two requests have one id.
        EngineError: An engine can't start, or refuses an adapter that it would die of.
        DeliaError: What the follow-up raised.
    """
    if not requests:
        return
    if len({request.request_id for request in requests}) != len(requests):
        raise ValueError("request ids must be distinct")
    size = engine.batch_size
    blocks = [_to_table(requests[i : i + size]) for i in range(0, len(requests), size)]
    replicas = min(engine.num_replicas, len(blocks))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    dataset = ray.data.from_arrow(blocks).map_batches(
        EngineActor,
        fn_constructor_args=(model, engine, sampling, tuple(end_ids), follow_up),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=replicas),
        num_cpus=engine.num_cpus_per_replica,
        num_gpus=engine.num_gpus_per_replica or None,
        runtime_env={"env_vars": worker_environment()},
    )
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except RayTaskError as error:
        if isinstance(error.cause, DeliaError):
            raise error.cause from error
        raise
    except ActorDiedError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise EngineError(f"an engine could not start, or died for good: {reason}") from error


def to_completions(table: pa.Table) -> list[tuple[int, Completion]]:
    """Return (turn, completion) for each row of a table of completions."""
    return [
        (
            row["turn"],
            Completion(
                request_id=row["request_id"],
                token_ids=tuple(row["token_ids"]),
                finish_reason=row["finish_reason"],
                num_prompt_tokens=row["num_prompt_tokens"],
                logprobs=tuple(row["logprobs"]),
            ),
        )
        for row in table.to_pylist()
    ]


def worker_environment() -> dict[str, str]:
    """Return what every engine worker needs: one thread a replica unless told otherwise, no hub calls."""
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0"),
        "VLLM_NO_USAGE_STATS": "1",
    }
