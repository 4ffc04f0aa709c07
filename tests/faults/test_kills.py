"""Kill -9 at a random moment: the pool is that of a job that nobody killed, and no finished chunk is made again.

DELIA_FAULT_SEEDS=500 makes `make soak` as long as one likes; the name of a failed test holds its seed.
"""

import os
import random
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from delia.store.pools import Pool

driver = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("pool_driver.py"))))
KINDS = ("cluster", "driver", "engine", "node", "acceptance")
NUM_SEEDS = int(os.environ.get("DELIA_FAULT_SEEDS", "50"))
PATIENCE = 600
"""Seconds for what takes a few on a machine with nothing else to do."""


def check_survival(job: Any, kinds: tuple[str, ...], whole: Pool, *, seed: int) -> None:
    """Kill a job once for each kind, start it again where the driver died, and compare the pool."""
    rng = random.Random(seed)
    finished: dict[str, int] = {}
    least = 0
    for number, kind in enumerate(kinds, 1):
        most = max(least, (driver.NUM_CHUNKS - 3) * number // len(kinds))
        least = job.kill(kind, rng, least=least, most=most)
        finished |= job.list_chunks()
        if kind in ("cluster", "driver"):
            job.start()
    pool = job.finish()

    assert pool.manifest.root == whole.manifest.root
    assert pool.rows == whole.rows
    assert pool.manifest.counts == whole.manifest.counts
    now = job.list_chunks()
    assert {path: now.get(path) for path in finished} == finished, "a finished chunk was made again"


@pytest.mark.system
@pytest.mark.timeout(3 * PATIENCE)
def test_a_job_that_is_killed_with_its_cluster_and_then_alone_makes_the_pool_of_a_whole_one(make_job, whole):
    check_survival(make_job(), ("cluster", "driver"), whole, seed=1)


@pytest.mark.system
@pytest.mark.timeout(3 * PATIENCE)
def test_a_job_that_loses_an_engine_and_then_a_node_goes_on_to_the_pool_of_a_whole_one(make_job, whole):
    check_survival(make_job(num_nodes=2), ("engine", "node"), whole, seed=2)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_job_that_is_killed_at_a_random_moment_makes_the_pool_of_a_whole_one(make_job, whole, seed):
    kind = KINDS[seed % len(KINDS)]
    check_survival(make_job(num_nodes=2 if kind == "node" else 0), (kind,), whole, seed=1000 + seed)


@pytest.mark.soak
@pytest.mark.timeout(3 * PATIENCE)
@pytest.mark.parametrize(("seed", "kind"), list(enumerate(("cluster", "driver", "engine"))))
def test_a_job_on_vllm_that_is_killed_at_a_random_moment_makes_the_pool_of_a_whole_one(make_job, seed, kind):
    whole = make_job("whole", engine="vllm").finish()

    check_survival(make_job(engine="vllm"), (kind,), whole, seed=2000 + seed)
