"""Candidates are screened in processes of their own: the pool is that of one process, whatever dies or is slow."""

import dataclasses
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.errors import PoolError, StoreError
from delia.flow import pool as flow
from delia.flow import screening
from delia.flow.acceptance import host_acceptance
from delia.flow.pool import PoolConfig, pool_fingerprint
from delia.flow.screening import ScreenerActor, Screeners, host_screeners
from delia.flow.workspace import Workspace
from delia.generate.engine import SamplingConfig
from delia.store.pools import Pool, read_rejections
from delia.store.tasks import TaskConfig
from delia.synthesize.pipeline import StoredChunk
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)
BY_MEANING = LOOSE.model_copy(update={"embedder": "base", "semantic_threshold": 0.97, "num_screeners": 2})
Kill = Callable[[Any, int], None]


@pytest.fixture(autouse=True)
def patient(monkeypatch) -> None:
    """Wait for processes as long as it takes on a busy machine."""
    monkeypatch.setattr(screening, "PATIENCE", 600.0)


@pytest.fixture
def config(make_config) -> PoolConfig:
    """Settings that screening takes time for."""
    return make_config(curate=BY_MEANING, num_rows=24, max_candidates=96, max_tokens=64)


@pytest.fixture
def processes() -> dict[Any, int]:
    """Screeners' actors -> the number of the process that each began in, by `screen_apart`."""
    return {}


@pytest.fixture
def screen_apart(monkeypatch, local_stage, processes) -> Callable[..., Counter[Any]]:
    """Return a function that lets pools be screened and accepted in processes; it returns each one's batches.

    Chunks are made in this process. `kill` is called with a batch's actor and the number of those before, once it has
    been sent.
    """

    def arrange(kill: Kill = lambda actor, number: None) -> Counter[Any]:
        sent: Counter[Any] = Counter()

        @contextmanager
        def host(*args: Any, **options: Any) -> Iterator[Screeners]:
            with host_screeners(*args, **options) as screeners:
                while screeners._starting:
                    screeners._admit(timeout=120)
                for actor in screeners._under_way:
                    processes[actor] = ray.get(actor.__ray_call__.remote(get_process))
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


def get_process(_: Any) -> int:
    """Return the number of the process that runs an actor."""
    return os.getpid()


def check_equal(pool: Pool, space: Workspace, whole: Pool, here: Workspace, name: str) -> None:
    """Hold that two pools have the same rows, rejections and cost."""
    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert pool.manifest.counts == whole.manifest.counts
    rejections = [read_rejections(item.address("pools", name)) for item in (space, here)]
    assert rejections[0] == rejections[1]
    # chunks that were still under way when their source had ended cost nothing
    assert pool.manifest.details["cost"] == whole.manifest.details["cost"]


def test_the_pool_is_that_of_one_process_though_screeners_die(
    cluster, space, build, build_here, config, screen_apart, processes
):
    whole, here = build_here(space, config)

    restarted: list[bool] = []

    def kill(actor: Any, number: int) -> None:
        if number in (1, 4):
            killed = processes[actor]
            os.kill(killed, signal.SIGKILL)
            processes[actor] = ray.get(actor.__ray_call__.remote(get_process))
            restarted.append(processes[actor] != killed)

    sent = screen_apart(kill)
    pool = build(space, config)

    assert sent.total() > 4
    assert len(sent) == 2, "the pool was begun anew, with other screeners"
    assert restarted == [True, True]
    assert pool.manifest.counts["rejected_semantic_duplicate"] > 0
    check_equal(pool, space, whole, here, pool_fingerprint(config, space))


def test_one_that_dies_of_everything_ends_the_job_with_the_way_out(
    cluster, space, build, config, screen_apart, monkeypatch
):
    monkeypatch.setattr(flow, "MAX_LOSSES", 2)
    sent = screen_apart(lambda actor, number: ray.kill(actor))

    with pytest.raises(
        PoolError, match=r"a process that curates died 2 times after 0 candidates .* run the job again"
    ):
        build(space, config)
    assert len(sent) >= 2


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
    [
        ({}, 0),
        ({"reject_refusals": True}, 0),
        ({"embedder": "base"}, 0),
        ({"languages": ("en",)}, 3),
        ({"embedder": "base", "semantic_threshold": 0.9}, 3),
    ],
)
def test_there_are_as_many_as_settings_say_where_a_rule_is_costly_and_else_none(
    cluster, space, settings, number
):
    curate = CurateConfig(num_screeners=3, **settings)
    with host_screeners(curate, space, eval_rows=()) as screeners:
        assert len(screeners._starting) + len(screeners._under_way) == number
        assert bool(screeners._under_way) == bool(number), "the first one was not waited for"


def test_where_no_node_has_room_for_one_the_accepting_process_screens_and_says_so(
    cluster, space, build, build_here, config, screen_apart, monkeypatch, caplog
):
    whole, here = build_here(space, config)
    monkeypatch.setattr(screening, "MEMORY", 2**60)
    monkeypatch.setattr(screening, "PATIENCE", 0.5)
    screen_apart()
    monkeypatch.setattr(flow, "host_screeners", host_screeners)  # to wait for both would be to wait for ever
    pool = build(space, config)

    assert "no node has room for a process that screens" in caplog.text
    check_equal(pool, space, whole, here, pool_fingerprint(config, space))


def test_stored_candidates_that_are_enough_start_no_engine(
    cluster, space, build, build_here, config, screen_apart, monkeypatch
):
    """Though one who reads ahead would be at the end of them before the last is decided on."""
    whole, here = build_here(space, config)
    shutil.rmtree(here.address("pools", pool_fingerprint(config, here)))
    sent = screen_apart()
    monkeypatch.setattr("delia.synthesize.pipeline.run_script", None)
    pool = build(here, config)

    assert sent.total() > 0
    assert pool.manifest.root == whole.manifest.root


def test_rows_of_a_file_and_the_answers_to_them_are_screened_apart_too(
    cluster, space, build, build_here, screen_apart, tmp_path
):
    words = ("fox", "owl", "bear", "fox", "wolf", "hen", "cat")
    rows = [{"prompt": f"what of the {word} ?", "completion": "yes"} for word in words]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    file = SourceConfig(name="file", rows=TaskConfig(path=str(path)), num_rows=5)
    method = MethodConfig(method="delia.methods.synthesizer.answering.Answering")
    answers = SourceConfig(
        name="answers", synthesizer=method, feeds_on=("file",), num_rows=2, max_candidates=5
    )
    synthesize = SynthesizeConfig(
        sources=(file, answers), sampling=SamplingConfig(max_tokens=64), chunk_size=2
    )
    config = PoolConfig(
        synthesize=synthesize, curate=BY_MEANING.model_copy(update={"semantic_threshold": 0.99999})
    )
    whole, here = build_here(space, config)
    sent = screen_apart()
    pool = build(space, config)

    assert sent.total() >= 5
    assert pool.manifest.counts["rejected_duplicate"] == 1
    check_equal(pool, space, whole, here, pool_fingerprint(config, space))


def test_a_node_that_does_not_see_the_chunks_says_what_to_set(space):
    actor = ScreenerActor(BY_MEANING, space, eval_rows=())

    with pytest.raises(StoreError, match=r"output_dir='.*' is another directory on another node"):
        actor.screen(StoredChunk(source="web", address=f"{space.output_dir}/none", num_candidates=1))
