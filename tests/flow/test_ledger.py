"""What a pool says that it cost, whoever reads the candidates that it is made of."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delia.flow.pool import PoolConfig, build_pool
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig

ON_CPU = EngineConfig(kind="scripted")
ON_GPUS = EngineConfig(kind="scripted", num_gpus_per_replica=8, tensor_parallel_size=8)


def build_ledger(config: PoolConfig, space: Workspace, engine: EngineConfig | None) -> dict[str, float]:
    pool = build_pool(config, space, engine=engine, log=lambda metrics, step: None)
    ledger: dict[str, float] = pool.manifest.details["cost"]
    return ledger


@pytest.mark.parametrize("reader", [ON_CPU, ON_GPUS, None], ids=["CPU", "GPUs", "no engine"])
@pytest.mark.parametrize(("writer", "num_devices"), [(ON_CPU, 1), (ON_GPUS, 8)], ids=["CPU", "GPUs"])
def test_stored_candidates_cost_the_devices_that_made_them(
    space, local_stage, make_config, writer, num_devices, reader
):
    """The reader's pool is the smaller one: it generates nothing, and its engine plays no part."""
    local_stage()
    build_ledger(make_config(num_rows=24), space, writer)
    ledger = build_ledger(make_config(num_rows=12), space, reader)

    assert ledger["engine_seconds"] > 0
    assert ledger["device_seconds"] == num_devices * ledger["engine_seconds"]


def test_a_pool_of_candidates_of_several_engines_adds_up_what_each_took(space, local_stage, make_config):
    local_stage()
    small = build_ledger(make_config(num_rows=12), space, ON_GPUS)
    large = build_ledger(make_config(num_rows=36), space, ON_CPU)
    stored = small["engine_seconds"]

    assert large["engine_seconds"] > stored
    assert large["device_seconds"] == 8 * stored + (large["engine_seconds"] - stored)


def test_device_seconds_that_were_not_stored_are_left_out_and_no_row_is_lost(space, local_stage, make_config):
    stage = local_stage()
    build_ledger(make_config(num_rows=24), space, ON_GPUS)
    for path in (Path(space.output_dir) / "candidates").rglob("*.parquet"):
        table: pa.Table = pq.read_table(path)
        pq.write_table(table.drop_columns("device_seconds"), path)
    stage.answered.clear()
    ledger = build_ledger(make_config(num_rows=12), space, ON_CPU)

    assert stage.answered == []
    assert ledger["engine_seconds"] > 0
    assert {name for name in ledger if "device" in name} == set()
