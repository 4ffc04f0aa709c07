"""What an arm trains on: each row of the mixture as it would be encoded alone, wherever and in whatever pieces."""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import ray

from delia.errors import ChatError, StoreError, TrainError
from delia.flow import encoding
from delia.flow.encoding import Facts, Part, encode_here, encode_mixture, encode_on_ray
from delia.flow.workspace import Workspace, open_workspace
from delia.mix.mixture import MixConfig, mix
from delia.schema import Message, Mixture, Row, SeedTask, Task
from delia.store.candidates import to_row_table
from delia.store.models import ModelConfig
from delia.store.pools import Pool, read_pool, write_pool
from delia.store.tables import read_table, write_table
from delia.train.rows import TASK, TrainRows
from delia.train.settings import StageConfig, TrainConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
MAX_LENGTH = 24
"""A third of the pool's rows is longer."""
NUM_CPUS = 4
"""Of the tests' cluster."""


def make_chat(question: str, answer: str) -> tuple[Message, ...]:
    return (Message(role="user", content=question), Message(role="assistant", content=answer))


TASK_ROWS = tuple(
    SeedTask(task_id=f"t{i}", messages=make_chat(f"say {i} <sep>", f"yes {i}")) for i in range(3)
)
POOL_ROWS = tuple(
    Row(
        row_id=f"{source}{i}", index=i, source=source, messages=make_chat(f"{source} {'fox ' * i}", f"no {i}")
    )
    for source in ("self", "web")
    for i in range(20)
)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    rows = {"train": TASK_ROWS, "dev": (), "test": ()}
    task = Task(name="tiny", digest="d", rows_by_split=rows, tokens=("<sep>",), long_instruction="say")
    return open_workspace(str(tmp_path_factory.mktemp("runs")), STARTER, task)


@pytest.fixture
def pool(tmp_path) -> Pool:
    """Rows in groups of six: parts of the mixture begin and end in the middle of them."""
    tables = [to_row_table(POOL_ROWS[start : start + 6]) for start in range(0, 40, 6)]
    return write_pool(
        str(tmp_path / "pool"), rows=tables, rejections=[], fingerprint="f", parents={}, details={}
    )


@pytest.fixture
def draw(pool) -> Callable[..., Mixture]:
    """Return a function of settings."""

    def draw(**settings: object) -> Mixture:
        config = MixConfig(**({"diverse_ratio": 8.0} | settings))
        return mix(TASK_ROWS, pool.index.group_ids(), config, pool_root="p", task_digest="t")

    return draw


def make_config(**settings: object) -> TrainConfig:
    stages = (StageConfig(max_steps=2, warmup_steps=0),)
    return TrainConfig(**({"stages": stages, "max_length": MAX_LENGTH, "on_long": "drop"} | settings))


def assert_encoded(rows: TrainRows, mixture: Mixture, space: Workspace, config: TrainConfig) -> None:
    """Hold rows to each chat of a mixture encoded by itself."""
    by_id = {row.row_id: (row.messages, row.source) for row in POOL_ROWS}
    by_id |= {row.task_id: (row.messages, TASK) for row in TASK_ROWS}
    row = 0
    for row_id in mixture.row_ids:
        messages, source = by_id[row_id]
        whole = space.chat.encode_chat(messages, train_on=config.train_on)
        chat = space.chat.fit(whole, max_length=config.max_length, on_long=config.on_long)
        if chat is None:
            continue
        ids, mask = rows[row]
        assert (tuple(ids.tolist()), tuple(mask.tolist())) == (chat.input_ids, chat.loss_mask), row_id
        assert (rows.lengths_R[row], rows.num_trained_R[row]) == (len(ids), mask[1:].sum())
        assert rows.sources[rows.source_R[row]] == source
        assert rows.has_token_R[row] == (space.chat.token_ids["<sep>"] in ids)
        row += 1
    assert row == len(rows)


@pytest.mark.parametrize("rows_per_shard", [1, 5, 100])
@pytest.mark.parametrize("on_long", ["drop", "truncate_prompt_left"])
def test_every_row_is_what_its_chat_is_encoded_to_alone(
    space, pool, draw, monkeypatch, rows_per_shard, on_long
):
    monkeypatch.setattr(encoding, "SHARD_TOKENS", rows_per_shard * MAX_LENGTH)
    config = make_config(on_long=on_long)
    for settings in ({}, {"num_distinct": 4}, {"shares": {"web": 1.0}, "diverse_ratio": 6.0}):
        mixture = draw(**settings)
        rows, counts = encode_mixture(mixture, TASK_ROWS, pool.index, config, space.chat)
        assert_encoded(rows, mixture, space, config)
        num_long = sum(counts.values())
        assert num_long > 0
        assert len(rows) == len(mixture.row_ids) - counts["dropped_long"]
        num_stored = len({row_id for row_id in mixture.row_ids if row_id[0] != "t"})
        assert len(rows.shards) == 1 + -(-num_stored // rows_per_shard)


def test_a_row_is_refused_by_its_number_in_the_mixture_wherever_it_is_stored(space, pool, draw, monkeypatch):
    mixture = draw()
    number = len(mixture.row_ids) - 2
    row = next(row for row in POOL_ROWS if row.row_id == mixture.row_ids[number])
    encode_chat = type(space.chat).encode_chat

    def forget(self, messages, train_on):
        whole = encode_chat(self, messages, train_on=train_on)
        is_bad = messages == row.messages
        return replace(whole, loss_mask=(False,) * len(whole.input_ids)) if is_bad else whole

    monkeypatch.setattr(type(space.chat), "encode_chat", forget)
    text = row.messages[-1].content
    with pytest.raises(TrainError, match=f"row {number}, '{text}', has no trained token"):
        encode_mixture(mixture, TASK_ROWS, pool.index, make_config(), space.chat)


def test_a_changed_row_of_the_mixture_is_seen_as_it_is_read(space, pool, draw, tmp_path):
    mixture, path = draw(), str(tmp_path / "pool" / "rows.parquet")
    records = read_table(path).to_pylist()
    changed = next(item for item in records if item["row_id"] == mixture.row_ids[-1])
    changed["messages"][1]["content"] = "forged"
    write_table(path, read_table(path).from_pylist(records, schema=read_table(path).schema))
    index = read_pool(str(tmp_path / "pool")).index
    with pytest.raises(StoreError, match=f"row {mixture.row_ids[-1]} was changed"):
        encode_mixture(mixture, TASK_ROWS, index, make_config(), space.chat)


def test_texts_are_held_part_by_part(space, tmp_path):
    """30 MB of them pass by the process that draws a mixture of all and reads 50 rows at a time."""
    text, num_rows = "fox " * 2500, 3000
    tables = [
        to_row_table(
            [Row(row_id=f"d{i}", index=i, source="s", messages=make_chat(f"{text}{i}", "no")) for i in part]
        )
        for part in (range(start, start + 30) for start in range(0, num_rows, 30))
    ]
    address = str(tmp_path / "large")
    write_pool(address, rows=tables, rejections=[], fingerprint="f", parents={}, details={})
    del tables

    def encode(parts: Sequence[Part], config: TrainConfig, chat: object) -> Iterator[tuple[None, Facts]]:
        for part in parts:
            size = len(part.load())
            flags = np.zeros(size, np.bool_)
            yield (
                None,
                Facts(
                    lengths_P=np.full(size, 9),
                    num_trained_P=np.full(size, 1),
                    has_token_P=flags,
                    was_long_P=flags,
                ),
            )

    tracemalloc.start()
    try:
        index = read_pool(address).index
        config = MixConfig(diverse_ratio=num_rows / len(TASK_ROWS))
        mixture = mix(TASK_ROWS, index.group_ids(), config, pool_root="p", task_digest="t")
        long = make_config(max_length=encoding.SHARD_TOKENS // 50)
        rows, _ = encode_mixture(mixture, TASK_ROWS, index, long, space.chat, encode=encode)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == num_rows + len(TASK_ROWS)
    assert peak < num_rows * len(text) / 5


# ---- on Ray


def encode_both(mixture: Mixture, pool: Pool, space: Workspace, config: TrainConfig) -> Sequence[TrainRows]:
    return [
        encode_mixture(mixture, TASK_ROWS, pool.index, config, space.chat, encode=encode)[0]
        for encode in (encode_here, encode_on_ray)
    ]


@ray.remote(num_cpus=NUM_CPUS)
class Training:
    """Stands for one that holds every CPU."""

    def begin(self) -> None:
        """Do nothing."""


def test_shards_of_the_cluster_are_those_of_this_process_even_where_every_cpu_is_held(
    cluster, space, pool, draw, monkeypatch
):
    monkeypatch.setattr(encoding, "SHARD_TOKENS", 5 * MAX_LENGTH)
    training = Training.remote()
    ray.get(training.begin.remote())
    try:
        here, there = encode_both(draw(), pool, space, make_config())
    finally:
        ray.kill(training)
    assert len(there.shards) == len(here.shards) > NUM_CPUS
    for number in range(len(here.shards)):
        for name in ("ids_T", "mask_T", "starts_P1"):
            own, other = (getattr(rows.shards[number], name) for rows in (here, there))
            assert own.dtype == other.dtype
            assert own.tolist() == other.tolist()
    for name in ("shard_R", "place_R", "lengths_R", "num_trained_R", "source_R", "has_token_R"):
        assert np.array_equal(getattr(here, name), getattr(there, name)), name
    assert here.sources == there.sources


def test_what_a_task_of_ray_refuses_is_refused_as_here(cluster, space, pool, draw, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD_TOKENS", 5 * MAX_LENGTH)
    mixture, config = draw(), make_config(on_long="error")
    refusals = []
    for encode in (encode_here, encode_on_ray):
        with pytest.raises(ChatError, match=f"max_length is {MAX_LENGTH}") as refused:
            encode_mixture(mixture, TASK_ROWS, pool.index, config, space.chat, encode=encode)
        refusals.append(str(refused.value))
    assert refusals[0] == refusals[1]


def test_so_many_parts_are_encoded_at_a_time_as_there_are_cpus(space, monkeypatch):
    """A part that is sent before an earlier one was taken would fill the store ahead of the reader."""
    running, most = 0, 0

    class Remote:
        def options(self, **settings: object) -> "Remote":
            return self

        def remote(self, part: Part, *rest: object) -> tuple[str, str]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            return "shard", "facts"

    def get(reference: str) -> str:
        nonlocal running
        running -= 1
        return reference

    monkeypatch.setattr(encoding.ray, "remote", lambda function: Remote())
    monkeypatch.setattr(encoding.ray, "put", lambda value: value)
    monkeypatch.setattr(encoding.ray, "get", get)
    monkeypatch.setattr(encoding.ray, "cluster_resources", lambda: {"CPU": 3.0})
    chats = [TASK_ROWS[0].messages]
    parts = [Part(load=lambda: chats, number_P=np.arange(1)) for _ in range(10)]
    assert len(list(encode_on_ray(parts, make_config(), space.chat))) == 10
    assert (running, most) == (0, 3)
