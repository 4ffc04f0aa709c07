"""Storage that fails, is full, was damaged or holds other settings: a clear error, and never a wrong pool."""

import dataclasses
import errno
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from delia.config import MethodConfig
from delia.errors import StoreError
from delia.flow.pool import PoolConfig, build_pool
from delia.flow.workspace import Workspace
from delia.generate import pipeline
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.rng import make_random
from delia.store.pools import Pool

driver = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("pool_driver.py"))))
NUM_WRITES = 1 + driver.NUM_CHUNKS + 3
"""A probe, the chunks of two rounds when they are made in order, and the pool's tables and manifest."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return driver.open_space(str(tmp_path_factory.mktemp("storage")))


@pytest.fixture
def make_space(opened: Workspace, tmp_path: Path) -> Callable[[str], Workspace]:
    return lambda name: dataclasses.replace(opened, output_dir=str(tmp_path / name))


def build(space: Workspace, config: PoolConfig = driver.POOL, *, num_replicas: int = 1) -> Pool:
    engine = EngineConfig(kind="scripted", num_replicas=num_replicas)
    return build_pool(config, space, engine=engine, log=lambda metrics, step: None)


def list_files(space: Workspace) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(space.output_dir).rglob("*") if path.is_file()}


def list_chunks(space: Workspace) -> list[Path]:
    return sorted((Path(space.output_dir) / "candidates").rglob("*.parquet"))


# ---- a disk that is full


@pytest.mark.parametrize("num_whole", [0, 1, 5, 9, NUM_WRITES - 3, NUM_WRITES - 2, NUM_WRITES - 1])
def test_a_full_disk_ends_the_job_with_the_address_and_a_later_run_makes_the_same_pool(
    make_space, local_stage, monkeypatch, num_whole
):
    local_stage()
    written, whole = make_space("full"), build(make_space("whole"))
    remaining = iter(range(num_whole))

    def sync(descriptor: int) -> None:
        if next(remaining, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", sync)
        with pytest.raises(StoreError, match=r"can't write '.*/full/.*No space left on device; free space"):
            build(written)
    kept = list_files(written)
    assert len(kept) == max(0, num_whole - 1)  # less the probe: nothing half-written, none under its name
    assert not any("partial" in name or "manifest" in name for name in kept)

    pool = build(written)
    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert kept.items() <= list_files(written).items()


def test_engines_are_given_back_at_once_when_a_chunk_can_not_be_written(make_space, local_stage, monkeypatch):
    stage, events = local_stage(), []

    def run_script(script, blocks, **fields):
        try:
            yield from stage(script, blocks, **fields)
        finally:
            events.append("closed")

    def write_table(address: str, table: object) -> None:
        raise StoreError(f"can't write {address!r}")

    monkeypatch.setattr("delia.synthesize.pipeline.run_script", run_script)
    monkeypatch.setattr("delia.synthesize.pipeline.write_table", write_table)
    try:
        build(make_space("full"))
    except StoreError:
        events.append("seen")

    assert events == ["closed", "seen"]


# ---- a place that can't be written


def test_a_place_below_a_file_is_refused_before_any_engine_starts(make_space, local_stage, tmp_path):
    stage = local_stage()
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StoreError, match=r"'.*/file/runs/.*; free space there or allow writing, or set another"
    ):
        build(make_space("file/runs"))
    assert stage.answered == []


def test_an_object_store_that_no_one_answers_for_is_refused_before_any_engine_starts(
    opened, local_stage, monkeypatch
):
    stage = local_stage()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # `discard`: no one listens there
    with pytest.raises(
        StoreError, match=r"can't read 's3://bucket/runs/pools/.*; see that it can be reached"
    ):
        build(dataclasses.replace(opened, output_dir="s3://bucket/runs"))
    assert stage.answered == []


# ---- what lies there already


def with_sampling(**fields: object) -> PoolConfig:
    sampling = SamplingConfig(**{"max_tokens": 48, **fields})
    synthesize = driver.POOL.synthesize.model_copy(update={"sampling": sampling})
    return driver.POOL.model_copy(update={"synthesize": synthesize})


def with_source(number: int, **fields: object) -> PoolConfig:
    sources = list(driver.POOL.synthesize.sources)
    sources[number] = sources[number].model_copy(update=fields)
    synthesize = driver.POOL.synthesize.model_copy(update={"sources": tuple(sources)})
    return driver.POOL.model_copy(update={"synthesize": synthesize})


OTHERS = {
    "sampling": with_sampling(temperature=0.5),
    "knobs": with_source(
        0,
        synthesizer=MethodConfig(
            method="delia.methods.synthesizer.magpie.Magpie", knobs={"system": f"{driver.SYSTEM} twice"}
        ),
    ),
    "second round": with_source(
        1,
        synthesizer=MethodConfig(
            method="delia.methods.synthesizer.answering.Answering", knobs={"temperature": 0.0}
        ),
    ),
    "first round's size": with_source(0, num_rows=32),
}


@pytest.mark.parametrize("name", list(OTHERS))
def test_a_resume_with_other_settings_takes_none_of_the_old_chunks_for_its_own(make_space, local_stage, name):
    local_stage()
    space, fresh = make_space("resumed"), build(make_space("fresh"), OTHERS[name])
    first = build(space)
    for path in list_chunks(space)[::2]:  # as if the first job was killed half-way
        path.unlink()
    resumed = build(space, OTHERS[name])

    assert (resumed.manifest.root, resumed.rows) == (fresh.manifest.root, fresh.rows)
    assert resumed.manifest.root != first.manifest.root


def test_a_half_written_file_is_never_taken_for_a_chunk(make_space, local_stage):
    stage = local_stage()
    whole, space = build(make_space("whole")), make_space("half")
    num_answered = len(stage.answered)
    for path in list_chunks(make_space("whole")):
        half = Path(space.output_dir) / path.relative_to(make_space("whole").output_dir)
        half.parent.mkdir(parents=True, exist_ok=True)
        half.with_name(f"{half.name}.partial-7").write_bytes(path.read_bytes()[:100])
    pool = build(space)

    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert len(stage.answered) == 2 * num_answered


@pytest.mark.parametrize("num_bytes", [0, 4, 2000, -1])
def test_a_chunk_that_was_cut_on_the_disk_is_named_and_made_again_once_it_is_removed(
    make_space, local_stage, num_bytes
):
    local_stage()
    rows, space = build(make_space("whole")).rows, make_space("cut")
    os.rename(make_space("whole").output_dir, space.output_dir)
    Path(driver.find_pool(space), "manifest.json").unlink()
    cut = list_chunks(space)[2]
    cut.write_bytes(cut.read_bytes()[:num_bytes])
    with pytest.raises(StoreError, match=f"'{cut}' is not .*; remove it and run its job again"):
        build(space)
    cut.unlink()

    assert build(space).rows == rows


# ---- replicas and order


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_any_number_of_replicas_makes_the_same_pool_of_shuffled_chunks(
    cluster, make_space, local_stage, monkeypatch, num_replicas
):
    local_stage()
    web = driver.POOL.synthesize.model_copy(update={"sources": driver.POOL.synthesize.sources[:1]})
    config = driver.POOL.model_copy(update={"synthesize": web})  # each round starts engines: one will do
    whole = build(make_space("whole"), config)

    def run_shuffled(script, blocks, **fields):
        shuffled = list(blocks)
        make_random("shuffled", num_replicas).shuffle(shuffled)
        return pipeline.run_script(script, shuffled, **fields)

    monkeypatch.setattr("delia.synthesize.pipeline.run_script", run_shuffled)
    pool = build(make_space("replicas"), config, num_replicas=num_replicas)

    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert pool.manifest.counts == whole.manifest.counts
