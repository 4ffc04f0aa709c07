"""Kill -9 at each point where a pool goes from one stage to the next: it ends as one that nobody killed."""

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace
from typing import Any

import pytest

from delia.store.pools import Pool, read_pool, read_rejections
from delia.store.tables import read_table

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("aimed_driver.py")
aimed = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
driver = aimed.driver
PATIENCE = 600
"""Seconds for what takes a few on a machine with nothing else to do."""
POINTS = {
    "after the chunks of round one": True,
    "in round two": True,
    "after the chunks of round two": False,
    "in rows.parquet": False,
    "after rows.parquet": False,
    "after rejected.parquet": False,
    "after manifest.json": False,
}
"""Where -> whether anything is left to generate there."""
WRITING = [point for point in POINTS if "." in point]


def read_asked(job: Any) -> list[str]:
    """Return the chunks that engines were asked for, by all starts."""
    file = job.output_dir.with_suffix(".asked")
    return file.read_text().splitlines() if file.exists() else []


@pytest.fixture(scope="module")
def build_until() -> Iterator[Callable[..., int]]:
    """Return a function that makes a pool in a process that is killed at a point; it returns how that ended."""
    command = [sys.executable, str(SCRIPT), "serve"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment) as server:

        def build(point: str, victims: str, output_dir: Path) -> int:
            print(output_dir, point, victims, sep="\t", file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield build


def list_stored(output_dir: Path) -> dict[Path, int]:
    """Return the finished chunks, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in (output_dir / "candidates").glob("*/*.parquet")}


@pytest.mark.parametrize("point", POINTS)
def test_one_process_that_is_killed_at_a_point_leaves_what_the_next_one_makes_a_whole_pool_of(
    whole, rejections, local_stage, build_until, tmp_path, point
):
    output_dir = tmp_path / "killed"
    output_dir.mkdir()
    assert build_until(point, "both", output_dir) == signal.SIGKILL
    stored = list_stored(output_dir)
    tables = [read_table(str(path)).select(["source", "index"]) for path in stored]
    made = {f"{row['source']}:{row['index']}" for table in tables for row in table.to_pylist()}
    stage = local_stage()
    pool = aimed.build(output_dir)

    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert pool.manifest.counts == whole.manifest.counts
    assert read_rejections(driver.find_pool(driver.open_space(str(output_dir)))) == rejections
    assert bool(stage.answered) == POINTS[point]
    assert len(made) > 0
    assert made.isdisjoint(stage.answered), "a finished chunk was made again"
    assert stored.items() <= list_stored(output_dir).items()


def wait_for_orphan(output_dir: Path) -> None:
    """Wait until the acceptance that was left behind has ended, and hold that it had no error."""
    file = output_dir.with_suffix(".orphan")
    give_up = time.monotonic() + PATIENCE
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < give_up, "the orphan did not end"
        time.sleep(0.01)
    assert file.read_text() == "whole"


@pytest.mark.parametrize("point", ["in rows.parquet", "in rejected.parquet"])
def test_an_orphan_that_writes_after_its_successors_commit_changes_nothing(
    whole, rejections, local_stage, build_until, tmp_path, point
):
    output_dir = tmp_path / "killed"
    output_dir.mkdir()
    assert build_until(point, "driver", output_dir) == signal.SIGKILL
    aimed.build(output_dir)
    wait_for_orphan(output_dir)

    address = driver.find_pool(driver.open_space(str(output_dir)))
    pool = read_pool(address)
    assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
    assert pool.manifest.counts == whole.manifest.counts
    assert read_rejections(address) == rejections


# ---- on Ray


def check_same(job: Any, pool: Pool, whole: Pool, rejections: list[Any]) -> None:
    assert pool.manifest.root == whole.manifest.root
    assert pool.rows == whole.rows
    assert pool.manifest.counts == whole.manifest.counts
    found = read_rejections(job.find_pool())
    assert len(found) > 0
    assert found == rejections


def check_aimed_kill(job: Any, whole: Pool, rejections: list[Any], *, is_unfinished: bool) -> None:
    """Wait for the kill, start the job again, and compare pool, rejections and what was generated."""
    job.process.wait(PATIENCE)
    assert job.output_dir.with_suffix(".reached").exists(), job.log.read_text()[-6000:]
    stored, num_asked = job.list_chunks(), len(read_asked(job))
    job.start()
    check_same(job, job.finish(), whole, rejections)

    again = read_asked(job)[num_asked:]
    assert bool(again) == is_unfinished
    assert set(again).isdisjoint(stored), "a finished chunk was asked for again"
    now = job.list_chunks()
    assert {path: now.get(path) for path in stored} == stored, "a finished chunk was written again"


@pytest.mark.system
def test_a_pool_that_is_killed_between_its_tables_ends_like_a_whole_one(make_job, whole, rejections):
    job = make_job(script=SCRIPT, DELIA_AIM="after rows.parquet:both")
    check_aimed_kill(job, whole, rejections, is_unfinished=False)


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS)
def test_a_pool_that_is_killed_between_two_stages_ends_like_a_whole_one(make_job, whole, rejections, point):
    job = make_job(script=SCRIPT, DELIA_AIM=f"{point}:both")
    check_aimed_kill(job, whole, rejections, is_unfinished=POINTS[point])


@pytest.mark.soak
@pytest.mark.parametrize("point", WRITING)
def test_an_acceptance_that_is_killed_while_it_writes_is_begun_again_by_its_driver(
    make_job, whole, rejections, point
):
    job = make_job(script=SCRIPT, DELIA_AIM=f"{point}:acceptance")
    check_same(job, job.finish(), whole, rejections)
    assert job.output_dir.with_suffix(".reached").exists()
    asked = read_asked(job)
    assert len(set(asked)) == len(asked), "a chunk was asked for again"


@pytest.mark.soak
def test_an_actor_that_writes_after_its_successors_commit_changes_nothing(make_job, whole, rejections):
    job = make_job(script=SCRIPT, DELIA_AIM="in rows.parquet:driver")
    job.process.wait(PATIENCE)
    job.start()
    job.finish()
    wait_for_orphan(job.output_dir)
    check_same(job, read_pool(job.find_pool()), whole, rejections)
