"""The environment of every test and of every worker that a test starts."""

import os
from collections.abc import Iterator

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_DISABLE_TELEMETRY="1",
)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray cluster of 4 logical CPUs for all tests that need one; it starts once."""
    import ray  # late: most tests need none

    from delia.flow.workspace import RayConfig, connect

    connect(RayConfig(num_cpus=4))
    yield
    ray.shutdown()
