"""What an arm trains on: the rows of its mixture, looked up and encoded shard by shard.

    Mixture + Task + PoolIndex --cut--> Part, Part, ... --encode_here | encode_on_ray--> Shard, ... --> TrainInput

The task's rows are the first shard. Diverse rows follow in the order of the pool's table, so that each part reads
its own stretch of it, and no process holds the texts of more than one.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from delia.chat import ChatEncoder, EncodedChat
from delia.errors import DeliaError, TrainError
from delia.schema import Messages, Mixture, Row, SeedTask
from delia.store.pools import PoolIndex
from delia.store.scores import read_score_column
from delia.train.guards import check_left, check_trained
from delia.train.rows import TASK, Shard, Shards, TrainRows, join_shard, number_sources
from delia.train.settings import RowScoresConfig, TrainConfig

logger = logging.getLogger(__name__)
SHARD_TOKENS = 2**20
"""A shard of diverse rows has at most so many: 5 MB, which a worker fetches for a single row of it."""
MEMORY = 2**29
"""Bytes of a process that encodes, half of them before it begins; a head node that offers no memory encodes nothing."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Chats that become one shard; legend: P chats.

    Attributes:
        load: Reads them, on any process.
        number_P: Each one's place in the mixture, by which an error names it.
    """

    load: Callable[[], Sequence[Messages]]
    number_P: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """What is known of a shard's rows without their tokens; legend: P rows.

    Attributes:
        lengths_P: The number of ids, int64; 0 where a long row was dropped.
        num_trained_P: How many of them the loss counts, int64.
        has_token_P: Whether a declared task token occurs.
        was_long_P: Whether the chat was longer than the limit.
    """

    lengths_P: NDArray[np.int64]
    num_trained_P: NDArray[np.int64]
    has_token_P: NDArray[np.bool_]
    was_long_P: NDArray[np.bool_]


Encode = Callable[[Sequence[Part], TrainConfig, ChatEncoder], Iterator[tuple[Any, Facts]]]
"""Yields each part's shard, or a reference to it, and its facts, in order."""


def encode_rows(
    chats: Sequence[Messages], config: TrainConfig, chat: ChatEncoder
) -> list[EncodedChat | None]:
    """Turn chats into ids and masks once; None where a long row is dropped by setting.

    Raises:
        ChatError: A long row, where the setting is to refuse it.
        TrainError: A row without a trained token, or whose last one ends no turn.
    """
    return [row for row, _ in _encode(chats, range(len(chats)), config, chat)]


def _encode(
    chats: Sequence[Messages], numbers: Sequence[int], config: TrainConfig, chat: ChatEncoder
) -> Iterator[tuple[EncodedChat | None, bool]]:
    """Yield each chat's ids and mask, and whether it was longer."""
    for number, messages in zip(numbers, chats, strict=True):
        whole = chat.encode_chat(messages, train_on=config.train_on)
        name = f"row {number}, {messages[-1].content[:80]!r},"
        check_trained(whole.input_ids, whole.loss_mask, end_ids=chat.end_ids, name=name)
        row = chat.fit(whole, max_length=config.max_length, on_long=config.on_long)
        yield row, len(whole.input_ids) > config.max_length


def encode_part(part: Part, config: TrainConfig, chat: ChatEncoder) -> tuple[Shard, Facts]:
    """Read and encode the chats of a part; one that is dropped has no ids.

    Raises:
        StoreError: Rows were changed, or can't be read.
        ChatError, TrainError: See `encode_rows`.
    """
    rows, was_long = zip(*_encode(part.load(), part.number_P.tolist(), config, chat), strict=True)
    shard = join_shard([(row.input_ids, row.loss_mask) if row else ((), ()) for row in rows])
    tokens = set(chat.token_ids.values())
    return shard, Facts(
        lengths_P=np.diff(shard.starts_P1),
        num_trained_P=shard.count_trained(),
        has_token_P=np.array([row is not None and not tokens.isdisjoint(row.input_ids) for row in rows]),
        was_long_P=np.array(was_long),
    )


def encode_here(
    parts: Sequence[Part], config: TrainConfig, chat: ChatEncoder
) -> Iterator[tuple[Shard, Facts]]:
    """Encode in this process, which then holds all shards."""
    for part in parts:
        yield encode_part(part, config, chat)


def encode_on_ray(
    parts: Sequence[Part], config: TrainConfig, chat: ChatEncoder
) -> Iterator[tuple[Any, Facts]]:
    """Encode on all nodes, as many parts at a time as the cluster has CPUs; shards stay in its store.

    The store keeps a shard as long as this process has its reference, or a task that was sent it, and makes one
    again that was lost with its node. The task's rows, and a part of the pool that is alone, are encoded
    in this process: another one takes seconds to start.
    """
    num_here = 1 if len(parts) > 2 else len(parts)
    for part in parts[:num_here]:
        shard, facts = encode_part(part, config, chat)
        yield ray.put(shard), facts
    remote: Any = ray.remote(encode_part).options(
        num_cpus=0,  # it must find a place beside trainings that hold every CPU for hours
        memory=MEMORY,
        num_returns=2,
        scheduling_strategy="SPREAD",
    )
    width = max(1, int(ray.cluster_resources().get("CPU", 1)))
    shared = ray.put(chat)
    running: deque[tuple[Any, Any]] = deque()
    for part in parts[num_here:]:
        running.append(remote.remote(part, config, shared))
        if len(running) == width:
            yield _take(running)
    while running:
        yield _take(running)


def _take(running: deque[tuple[Any, Any]]) -> tuple[Any, Facts]:
    shard, facts = running.popleft()
    try:
        return shard, ray.get(facts)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, DeliaError) else error from None


def encode_mixture(
    mixture: Mixture,
    task_rows: Sequence[SeedTask],
    index: PoolIndex,
    config: TrainConfig,
    chat: ChatEncoder,
    *,
    encode: Encode = encode_here,
) -> tuple[TrainRows, dict[str, int]]:
    """Look up the mixture's rows and encode them; also return how many long ones were dropped or truncated.

    Legend: M rows of the mixture, the last D of them drawn from the pool, R of the M are left; U different chats, in
    the order in which they are stored.

    Args:
        mixture: Of these task rows, which come first in it, and of this pool.
        task_rows: The task's rows to train on.
        index: The pool's.
        config: How rows are encoded, and what scores they have.
        chat: The chat format.
        encode: Where it is done, and where the shards are kept.

    Raises:
        ChatError, TrainError, StoreError: See `encode_part`; or no row is left, or one has no score.
    """
    drawn = pa.array(mixture.row_ids[len(task_rows) :], pa.string())
    place_D = compute.index_in(drawn, value_set=index.row_ids).to_numpy().astype(np.int64)
    place_U, first_U, stored_D = np.unique(place_D, return_index=True, return_inverse=True)
    row_M = np.concatenate((np.arange(len(task_rows)), len(task_rows) + stored_D))
    source_U = [TASK] * len(task_rows) + index.sources.take(place_U).to_pylist()
    parts = list(_cut(task_rows, index, place_U, first_U, size=max(1, SHARD_TOKENS // config.max_length)))
    shards, facts = zip(*encode(parts, config, chat), strict=True)

    lengths_U = np.concatenate([each.lengths_P for each in facts])
    was_long_U = np.concatenate([each.was_long_P for each in facts])
    sizes = [len(part.number_P) for part in parts]
    is_left_M = lengths_U[row_M] > 0
    row_R = row_M[is_left_M]
    source_M = [source_U[row] for row in row_M.tolist()]
    sources = [source_U[row] for row in row_R.tolist()]
    check_left(sources, source_M, config)
    names, source_R = number_sources(sources)
    ids = [mixture.row_ids[number] for number in np.flatnonzero(is_left_M).tolist()]
    scores = look_up_scores(config.row_scores, ids) if config.row_scores else None
    rows = TrainRows(
        shards=Shards(shards),
        shard_R=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[row_R],
        place_R=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])[row_R],
        lengths_R=lengths_U[row_R],
        num_trained_R=np.concatenate([each.num_trained_P for each in facts])[row_R],
        sources=names,
        source_R=source_R,
        has_token_R=np.concatenate([each.has_token_P for each in facts])[row_R],
        score_R=None if scores is None else np.array(scores, np.float32),
    )
    return rows, _count_long(len(row_M) - len(row_R), int(was_long_U[row_M].sum()), len(row_M), config)


def _cut(
    task_rows: Sequence[SeedTask],
    index: PoolIndex,
    place_U: NDArray[np.int64],
    first_U: NDArray[np.int64],
    *,
    size: int,
) -> Iterator[Part]:
    """Yield the task's rows, and the pool's at some places, `size` at a time; `first_U` are numbers among the drawn."""
    yield Part(load=lambda: [row.messages for row in task_rows], number_P=np.arange(len(task_rows)))
    for start in range(0, len(place_U), size):
        part = slice(start, start + size)
        yield Part(
            load=partial(_load_chats, index.read, place_U[part].tolist()),
            number_P=len(task_rows) + first_U[part],
        )


def _load_chats(read: Callable[[Sequence[int]], tuple[Row, ...]], places: Sequence[int]) -> list[Messages]:
    return [row.messages for row in read(places)]


def _count_long(num_dropped: int, num_long: int, num_rows: int, config: TrainConfig) -> dict[str, int]:
    """Return what became of long rows, and warn of it."""
    num_truncated = num_long - num_dropped
    if num_long:
        logger.warning(
            "of %d rows %d were dropped and %d truncated: train.max_length=%d, train.on_long=%s",
            num_rows,
            num_dropped,
            num_truncated,
            config.max_length,
            config.on_long,
        )
    return {"dropped_long": num_dropped, "truncated_long": num_truncated}


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
