"""Pools: equal for any number of replicas and after any restart, and never fewer rows than asked for."""

import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from delia.curate.settings import CurateConfig
from delia.errors import PoolError
from delia.flow.pool import build_pool, pool_fingerprint
from delia.flow.workspace import Workspace
from delia.schema import SeedTask
from delia.store.candidates import Candidate, from_candidate_table
from delia.store.merkle import merkle_root
from delia.store.pools import Pool
from delia.store.tables import Manifest, is_finished, read_table

LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)


def read_candidates(path: Path) -> list[Candidate]:
    return from_candidate_table(read_table(str(path)))


def list_chunks(space: Workspace) -> list[Path]:
    return sorted((Path(space.output_dir) / "candidates").rglob("*.parquet"))


def without_seconds(pool: Pool) -> Manifest:
    """Return the manifest less what the clock says; all else is the same however a pool was made."""
    cost = {name: value for name, value in pool.manifest.details["cost"].items() if "seconds" not in name}
    return dataclasses.replace(pool.manifest, details=pool.manifest.details | {"cost": cost})


@pytest.fixture(scope="module")
def built(cluster: None, opened: Workspace, build: Callable[..., Pool]) -> tuple[Workspace, Pool]:
    """The pool that one replica makes."""
    space = dataclasses.replace(opened, output_dir=f"{opened.output_dir}/one")
    return space, build(space)


@pytest.fixture
def resumable(built: tuple[Workspace, Pool], space: Workspace) -> Workspace:
    """A workspace with the candidates of `built`, and no pool."""
    shutil.copytree(f"{built[0].output_dir}/candidates", f"{space.output_dir}/candidates")
    return space


# ---- one pool, whatever happens


def test_two_replicas_make_the_pool_of_one(built, space, build, read_back):
    pool = build(space, num_replicas=2)

    assert without_seconds(pool) == without_seconds(built[1])
    assert pool.rows == built[1].rows
    assert read_back(space) == read_back(built[0])


def test_a_restart_that_finds_half_of_the_chunks_makes_the_same_pool(built, resumable, build):
    chunks = list_chunks(resumable)
    for path in chunks[::2]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in list_chunks(resumable)}
    pool = build(resumable, num_replicas=2)

    assert without_seconds(pool) == without_seconds(built[1])
    assert pool.rows == built[1].rows
    assert len(kept) >= 2
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_stored_candidates_make_the_same_pool_with_no_engine(built, resumable, build):
    before = list_chunks(resumable)

    assert without_seconds(build(resumable, num_replicas=None)) == without_seconds(built[1])
    assert list_chunks(resumable) == before


def test_a_finished_pool_is_read_and_not_made_again(built, make_config):
    space, pool = built
    logged: list[dict[str, float]] = []
    again = build_pool(make_config(), space, engine=None, log=lambda metrics, step: logged.append(metrics))

    assert again == pool
    assert logged == []


# ---- what a pool is


def test_a_pool_has_as_many_rows_of_each_source_as_were_asked_for_in_index_order(built):
    rows = built[1].rows

    assert Counter(row.source for row in rows) == {"web": 24, "self": 12}
    assert [(row.source, row.index) for row in rows] == sorted((row.source, row.index) for row in rows)
    assert built[1].manifest.root == merkle_root([row.leaf for row in rows])


def test_a_pool_is_the_accepted_part_of_the_first_candidates_that_suffice(built, read_back):
    """Every candidate below a source's last row is in the pool or rejected; none above it is."""
    space, pool = built
    rejections = read_back(space)
    for source in ("web", "self"):
        accepted = {row.index for row in pool.rows if row.source == source}
        rejected = {item.index for item in rejections if item.source == source}
        assert accepted | rejected == set(range(max(accepted) + 1))
        assert accepted & rejected == set()


def test_every_rejection_is_kept_named_and_counted(built, read_back):
    space, pool = built
    rejections = read_back(space)
    reasons = Counter(item.reason for item in rejections)

    assert reasons["unfinished"] > 5
    counts = {f"rejected_{reason}": count for reason, count in reasons.items()}
    assert pool.manifest.counts == {"accepted": 36, **counts}
    assert pool.manifest.parents == {"model": space.model_id, "task": "d"}


def test_the_last_metrics_that_are_logged_are_those_of_the_pool(built, resumable, make_config, read_back):
    logged: dict[str, float] = {}
    steps: list[int] = []

    def log(metrics: dict[str, float], step: int) -> None:
        logged.update(metrics)
        steps.append(step)

    pool = build_pool(make_config(), resumable, engine=None, log=log)
    num_rejected = len(read_back(resumable))

    assert (logged["synthesize/accepted"], logged["synthesize/rejected"]) == (36, num_rejected)
    cost = pool.manifest.details["cost"]
    spent = ("prompt_tokens", "output_tokens", "engine_seconds", "device_seconds")
    assert set(cost) == {*spent, *(f"{name}_per_row" for name in spent)}
    for name in cost:
        assert logged[f"synthesize/{name}"] == cost[name]
    candidates = [item for path in list_chunks(resumable) for item in read_candidates(path)]
    decided = {item.row_id for item in (*pool.rows, *read_back(resumable))}
    assert cost["output_tokens"] >= sum(
        item.num_output_tokens for item in candidates if item.row_id in decided
    )
    assert cost["output_tokens_per_row"] == cost["output_tokens"] / 36
    assert steps == sorted(steps)
    assert steps[-1] == 36 + num_rejected


# ---- other settings


def test_a_changed_rule_curates_the_stored_candidates_again_into_a_pool_of_its_own(
    built, resumable, make_config, build, read_back
):
    short = LOOSE.model_copy(update={"max_output_tokens": 9})
    strict = make_config(num_rows=4, max_candidates=64, curate=short)
    pool = build(resumable, strict, num_replicas=None)
    reasons = Counter(item.reason for item in read_back(resumable, strict))

    assert max(row.num_output_tokens for row in pool.rows) <= 9
    assert reasons["too_long"] > 0
    assert pool.manifest.root != built[1].manifest.root
    assert {row.row_id for row in pool.rows} <= {
        item.row_id for path in list_chunks(resumable) for item in read_candidates(path)
    }


def test_dev_and_test_prompts_are_kept_out_of_a_pool(built, resumable, make_config, build, read_back):
    """The first row of a source becomes a test row: it is rejected, and another takes its place."""
    first = next(row for row in built[1].rows if row.source == "web")
    held_out = SeedTask(task_id="x", messages=first.messages)
    task = dataclasses.replace(
        resumable.task, rows_by_split={**resumable.task.rows_by_split, "test": (held_out,)}, digest="e"
    )
    config = make_config(num_rows=8)
    pool = build(dataclasses.replace(resumable, task=task), config, num_replicas=None)
    rejections = read_back(dataclasses.replace(resumable, task=task), config)

    assert first.row_id not in {row.row_id for row in pool.rows}
    assert {item.row_id for item in rejections if item.reason == "overlaps_eval"} == {first.row_id}


def test_the_name_of_a_pool_changes_with_all_that_decides_its_rows(opened, make_config):
    spaces = [
        opened,
        dataclasses.replace(opened, model_id="other"),
        dataclasses.replace(opened, task=dataclasses.replace(opened.task, digest="e")),
        dataclasses.replace(opened, chat=dataclasses.replace(opened.chat, template_hash="f")),
    ]
    names = [pool_fingerprint(make_config(), item) for item in spaces]
    names += [
        pool_fingerprint(config, opened)
        for config in (
            make_config(num_rows=26),
            make_config(max_tokens=17),
            make_config(curate=CurateConfig()),
        )
    ]

    assert len(set(names)) == len(names)
    assert pool_fingerprint(make_config(), dataclasses.replace(opened, output_dir="/x")) == names[0]


# ---- never silently less


def test_a_source_that_runs_out_is_an_error_with_the_numbers_and_leaves_no_pool(
    resumable, make_config, build
):
    config = make_config(num_rows=400, max_candidates=16)
    with pytest.raises(PoolError) as refused:
        build(resumable, config, num_replicas=None)

    message = str(refused.value)
    assert message.startswith("source 'web' gave ")
    num_accepted = int(message.split()[3])
    num_rejected = sum(map(int, re.findall(r"'\w+': (\d+)", message)))
    assert f" {num_accepted} of 400 rows before its candidates ran out" in message
    assert num_accepted + num_rejected == 16
    assert "raise max_candidates, loosen curate or stop, or ask for fewer rows" in message
    assert not is_finished(resumable.address("pools", pool_fingerprint(config, resumable)))


def test_nothing_stored_and_no_engine_is_an_error_and_not_an_empty_pool(space, build):
    with pytest.raises(PoolError, match=r"source 'web' gave 0 of 24 rows .* \(rejected: {}\)"):
        build(space, num_replicas=None)
