"""Engines run ahead of who reads their results by as many blocks as they hold, and no further."""

import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from delia.generate.attempts import Ask
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.generate.pipeline import count_places, run_script
from delia.store.models import ModelConfig

NUM_BLOCKS = 60


@pytest.fixture
def begin(cluster: None, tmp_path: Path) -> Callable[..., tuple[object, Callable[[], int]]]:
    """Return a function that begins `NUM_BLOCKS` blocks: their results, and how many have been begun."""

    def begin(engine: EngineConfig, *, has_rows: bool = True) -> tuple[object, Callable[[], int]]:
        def note(block: pa.Table, ask: Ask) -> pa.Table:
            (tmp_path / str(block["start"][0].as_py())).touch()
            return block if has_rows or block["start"][0].as_py() == NUM_BLOCKS - 1 else block.slice(0, 0)

        tables = run_script(
            note,
            [pa.table({"start": [start]}) for start in range(NUM_BLOCKS)],
            model=ModelConfig(path="package://delia.starter/weights"),
            engine=engine,
            sampling=SamplingConfig(),
            end_ids=(),
        )
        return tables, lambda: len(list(tmp_path.iterdir()))

    return begin


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for what replicas do; give up where it would never come."""
    give_up = time.monotonic() + 600
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def test_a_slow_reader_holds_back_the_engines_and_one_that_stops_ends_them(begin):
    import ray

    everything = ray.cluster_resources()["CPU"]
    engine = EngineConfig(kind="scripted", num_replicas=2, max_concurrent_batches=2)
    num_places = 2 * count_places(engine)
    tables, count_begun = begin(engine)
    for num_taken in range(4):
        next(tables)  # the reader is done with those before this one
        wait_until(lambda: count_begun() == num_taken + num_places)  # noqa: B023  # called at once
        time.sleep(0.5)  # what would go on goes on now
        assert count_begun() == num_taken + num_places
    tables.close()
    wait_until(lambda: ray.available_resources().get("CPU") == everything)

    assert count_begun() <= 3 + 2 * num_places < NUM_BLOCKS


def test_the_smallest_engine_comes_to_the_end(begin):
    tables, _ = begin(EngineConfig(kind="scripted", max_concurrent_batches=1))

    assert sorted(table["start"][0].as_py() for table in tables) == list(range(NUM_BLOCKS))


def test_blocks_that_come_to_nothing_hold_back_no_others(begin):
    tables, count_begun = begin(EngineConfig(kind="scripted", max_concurrent_batches=1), has_rows=False)

    assert [table["start"].to_pylist() for table in tables] == [[NUM_BLOCKS - 1]]
    assert count_begun() == NUM_BLOCKS
