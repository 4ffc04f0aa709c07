"""Candidates are screened in processes of their own: the pool is that of one process, whatever dies or is slow."""

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from delia.curate.pipeline import CurateConfig
from delia.errors import PoolError, StoreError
from delia.flow import pool as flow
from delia.flow import screening
from delia.flow.acceptance import host_acceptance
from delia.flow.pool import MAX_LOSSES, PoolConfig, pool_fingerprint
from delia.flow.screening import AHEAD, Screeners, host_screeners
from delia.flow.workspace import Workspace
from delia.store.pools import Pool, read_rejections

LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)
BY_MEANING = LOOSE.model_copy(update={"embedder": "base", "semantic_threshold": 0.99, "num_screeners": 2})
Kill = Callable[[Any, int], None]


@pytest.fixture
def config(make_config) -> PoolConfig:
    """Settings that screening takes time for."""
    return make_config(curate=BY_MEANING, num_rows=24, max_candidates=96, max_tokens=64)


@pytest.fixture
def screen_apart(monkeypatch, local_stage) -> Callable[..., Counter[Any]]:
    """Return a function that lets pools be screened and accepted in processes; it returns each one's batches.

    Chunks are made in this process. `kill` is called with a batch's actor and the number of those before, once it has
    been sent.
    """

    def arrange(kill: Kill = lambda actor, number: None) -> Counter[Any]:
        sent: Counter[Any] = Counter()

        @contextmanager
        def host(*args: Any, **options: Any) -> Iterator[Screeners]:
            with host_screeners(*args, **options) as screeners:
                begin = screeners._begin

                def watch(item: Any) -> Any:
                    ref = begin(item)
                    actor = next(actor for actor, refs in screeners._under_way.items() if ref in refs)
                    kill(actor, sent.total())
                    sent[actor] += 1
                    return ref

                monkeypatch.setattr(screeners, "_begin", watch)
                yield screeners

        local_stage()
        monkeypatch.setattr(flow, "host_screeners", host)
        monkeypatch.setattr(flow, "host_acceptance", host_acceptance)
        return sent

    return arrange


@pytest.fixture
def build_here(build, local_stage, tmp_path) -> Callable[..., tuple[Pool, Workspace]]:
    """Return a function that makes a pool in this process alone, in a directory of its own."""

    def make(space: Workspace, config: PoolConfig) -> tuple[Pool, Workspace]:
        local_stage()
        here = dataclasses.replace(space, output_dir=str(tmp_path / "here"))
        return build(here, config), here

    return make


def check_equal(pool: Pool, space: Workspace, whole: Pool, here: Workspace, name: str) -> None:
    """Hold that two pools have the same rows, rejections and cost."""
    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert pool.manifest.counts == whole.manifest.counts
    rejections = [read_rejections(item.address("pools", name)) for item in (space, here)]
    assert rejections[0] == rejections[1]
    # chunks that were still under way when their source had ended cost nothing
    assert pool.manifest.details["cost"] == whole.manifest.details["cost"]


def test_the_pool_is_that_of_one_process(cluster, space, build, build_here, config, screen_apart):
    whole, here = build_here(space, config)
    sent = screen_apart()
    pool = build(space, config)

    assert len(sent) == 2, "one screener had all the work"
    assert pool.manifest.counts["rejected_semantic_duplicate"] > 0
    check_equal(pool, space, whole, here, pool_fingerprint(config, space))


def test_it_is_so_where_the_screeners_die(cluster, space, build, build_here, config, screen_apart):
    whole, here = build_here(space, config)

    def kill(actor: Any, number: int) -> None:
        if number in (1, 4):
            ray.kill(actor, no_restart=False)

    sent = screen_apart(kill)
    pool = build(space, config)

    assert sent.total() > 4
    assert len(sent) == 2, "the pool was begun anew, with other screeners"
    check_equal(pool, space, whole, here, pool_fingerprint(config, space))


def test_one_that_dies_of_everything_ends_the_job_with_the_way_out(
    cluster, space, build, config, screen_apart
):
    sent = screen_apart(lambda actor, number: ray.kill(actor))

    with pytest.raises(PoolError, match=r"died 3 times after 0 candidates .* run the job again"):
        build(space, config)
    assert len(sent) >= MAX_LOSSES


def test_a_damaged_chunk_is_the_stores_error_and_not_the_screeners(
    cluster, space, build, build_here, config, screen_apart
):
    _, here = build_here(space, config)
    shutil.rmtree(here.address("pools", pool_fingerprint(config, here)))
    chunk = sorted(Path(here.address("candidates", "")).glob("*/*.parquet"))[0]
    chunk.write_bytes(chunk.read_bytes()[:-9])
    sent = screen_apart()

    with pytest.raises(StoreError, match=re.escape(chunk.name)) as caught:
        build(here, config)
    assert type(caught.value) is StoreError
    assert sent.total() > 0


def test_the_number_of_screeners_is_no_part_of_a_pools_name(space, config):
    more = config.model_copy(update={"curate": BY_MEANING.model_copy(update={"num_screeners": 7})})

    assert pool_fingerprint(more, space) == pool_fingerprint(config, space)


@pytest.mark.parametrize(
    ("settings", "number"),
    [({}, 0), ({"reject_refusals": True}, 0), ({"languages": ("en",)}, 3), ({"embedder": "base"}, 0)],
)
def test_there_are_as_many_as_settings_say_where_a_rule_is_costly_and_else_none(
    cluster, space, settings, number
):
    curate = CurateConfig(num_screeners=3, **settings)
    with host_screeners(curate, space, eval_rows=()) as screeners:
        assert len(screeners._under_way) == number


# ---- the order, with batches that are done when a test says so


class Slow:
    """Screeners whose batches are letters, done once they are in `done`; `sent` has what each was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.done: set[str] = set()
        self.sent: list[list[str]] = [[] for _ in range(count)]
        monkeypatch.setattr(screening, "_is_done", self.done.__contains__)
        self.screeners = Screeners([SlowActor(items) for items in self.sent])


class SlowActor:
    """An actor's handle: `screen.remote` notes the item, which is its own result."""

    def __init__(self, items: list[str]) -> None:
        self.screen = SimpleNamespace(remote=lambda item: items.append(item) or item)


def test_batches_come_in_their_order_and_are_read_ahead_so_far_and_no_further(monkeypatch):
    slow, read = Slow(monkeypatch, 2), []
    results = slow.screeners.screen_ahead(read.append(item) or item for item in "abcdefghij")
    slow.done.update("bcde")  # all that comes after the first

    assert next(results) == "a"  # who takes it waits for it
    assert read == list("abcde")[: AHEAD * 2 + 1]
    assert [next(results) for _ in range(4)] == list("bcde")
    slow.done.update("fghij")
    assert list(results) == list("fghij")


def test_a_batch_that_is_done_is_handed_on_before_more_is_read(monkeypatch):
    slow, read = Slow(monkeypatch, 2), []
    slow.done.update("abc")
    results = slow.screeners.screen_ahead(read.append(item) or item for item in "abc")

    assert [(next(results), len(read)) for _ in range(3)] == [("a", 1), ("b", 2), ("c", 3)]


def test_the_slower_of_two_gets_less_to_do(monkeypatch):
    slow = Slow(monkeypatch, 2)
    items = iter("abcdefgh")
    results = slow.screeners.screen_ahead(
        slow.done.update(item if item != "a" else "") or item for item in items
    )

    assert list(results) == list("abcdefgh")
    assert slow.sent == [["a"], list("bcdefgh")]


def test_without_screeners_items_pass_one_by_one(monkeypatch):
    read: list[str] = []
    results = Screeners(()).screen_ahead(read.append(item) or item for item in "ab")

    assert next(results) == "a"
    assert read == ["a"]
    assert list(results) == ["b"]
