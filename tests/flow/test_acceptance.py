"""Where a pool is accepted: in a process of its own, whose errors are ours and whose death is survived."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayActorError

from delia.curate.selection import SelectConfig
from delia.curate.settings import CurateConfig
from delia.errors import ConfigError, PoolError, StoreError
from delia.flow import pool as flow
from delia.flow.acceptance import AcceptanceLostError, _Calls, host_acceptance

PATIENCE = 600
"""Seconds for what takes a few on a machine with nothing else to do."""


def kill(actor: Any) -> None:
    """Kill an actor, and wait until it answers no more: Ray kills later than it says."""
    ray.kill(actor)
    with pytest.raises(RayActorError):
        while True:
            ray.get(actor.__ray_ready__.remote(), timeout=PATIENCE)


class Mortal:
    """An acceptance whose process is killed at one of its chunks."""

    def __init__(self, calls: Any, num_chunks: int) -> None:
        self._calls, self._num_left = calls, num_chunks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)

    def take(self, chunk: Any) -> Any:
        if self._num_left == 0:
            kill(self._calls._actor)
        self._num_left -= 1
        return self._calls.take(chunk)


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Return a function of chunk numbers: each start of an acceptance is killed at the next of them."""

    def arrange(*places: int) -> list[int]:
        left, started = list(places), []

        @contextmanager
        def host(*args: Any, **options: Any) -> Iterator[Any]:
            with host_acceptance(*args, **options) as calls:
                started.append(len(started))
                yield Mortal(calls, left.pop(0)) if left else calls

        monkeypatch.setattr(flow, "host_acceptance", host)
        return started

    return arrange


def test_an_acceptance_that_dies_twice_leaves_the_pool_of_one_that_lived(
    cluster, space, build, kill_at, local_stage, tmp_path
):
    local_stage()
    whole = build(space)
    other = dataclasses.replace(space, output_dir=str(tmp_path / "killed"))
    started = kill_at(0, 4)
    pool = build(other)

    assert len(started) == 3
    assert pool.manifest.root == whole.manifest.root
    assert pool.rows == whole.rows
    assert pool.manifest.counts == whole.manifest.counts


def test_one_that_dies_at_every_start_ends_the_job_with_the_number_and_the_way_out(
    cluster, space, build, kill_at, local_stage
):
    local_stage()
    started = kill_at(*[1] * flow.MAX_LOSSES)

    with pytest.raises(
        PoolError, match=r"a process that curates died 3 times after 8 candidates .* run the job again"
    ):
        build(space)
    assert len(started) == flow.MAX_LOSSES


def test_one_that_gets_further_at_every_start_is_started_as_often_as_it_takes(
    cluster, space, build, kill_at, local_stage
):
    local_stage()
    steps: list[int] = []
    started = kill_at(1, 2, 3)
    pool = build(space, log=lambda metrics, step: steps.append(step))

    assert len(started) == 4 > flow.MAX_LOSSES
    progress = steps[:-1]  # the last metrics are the pool's, at the last step
    assert progress == sorted(set(progress)), "a number was logged twice"
    assert pool.manifest.counts["accepted"] == 36


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("a node killed it to have memory again"),
        ObjectLostError("ab" * 14, None, "here"),
        ActorDiedError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_node_can_do_to_it_is_its_loss_and_not_the_jobs_error(monkeypatch, error):
    """Ray's own errors, raised by hand: to run a node out of memory is to run this machine out of it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("delia.flow.acceptance.call", fail)
    with pytest.raises(AcceptanceLostError):
        _Calls(SimpleNamespace(take=None)).take("chunk")


def test_an_error_in_its_process_is_raised_as_itself_before_anything_is_generated(
    cluster, space, make_config, build, local_stage, monkeypatch
):
    stage = local_stage()
    monkeypatch.setattr(flow, "host_acceptance", host_acceptance)

    with pytest.raises(ConfigError, match="allow it with --allow-module"):
        build(space, make_config(curate=CurateConfig(select=SelectConfig(method="os.path.join"))))
    assert stage.answered == []


def test_a_node_that_sees_another_directory_is_refused_before_anything_is_generated(
    space, build, local_stage, monkeypatch
):
    stage = local_stage()
    monkeypatch.setattr("delia.flow.acceptance.exists", lambda address: False)

    with pytest.raises(
        StoreError, match=r"output_dir='.*' is another directory on another node: .* all nodes share"
    ):
        build(space)
    assert stage.answered == []


BESIDE_A_HEAD = """
from collections import Counter
from functools import partial
import ray
from ray.cluster_utils import Cluster
from delia.flow.acceptance import host_acceptance
from delia.flow.workspace import start_slowly

cluster = start_slowly(partial(Cluster, initialize_head=True, head_node_args={"num_cpus": 0, "memory": 0}))
worker = start_slowly(partial(cluster.add_node, num_cpus=1))
cluster.wait_for_nodes(timeout=300)
ray.init(address=cluster.address)


@ray.remote(num_cpus=1)
class Engine:
    def start(self):
        return True


engine = Engine.remote()
ray.get(engine.start.remote())
nodes = Counter()
for _ in range(2):
    with host_acceptance(None, None, None, num_rows={}, eval_rows=()) as acceptance:
        actor = acceptance._actor
        nodes[ray.get(actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))] += 1
print("on the worker:", nodes[worker.node_id], "of", nodes.total())
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.system
def test_it_spares_a_head_and_finds_a_place_on_a_worker_whose_cpus_are_all_taken(tmp_path: Path):
    """In a process of its own, since this one is connected to another cluster."""
    script = tmp_path / "beside_a_head.py"
    script.write_text(BESIDE_A_HEAD)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)

    assert result.returncode == 0, result.stderr[-6000:]
    assert "on the worker: 2 of 2" in result.stdout.splitlines()
