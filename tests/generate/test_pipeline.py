"""Requests through replicas on Ray: equal answers on any number of them, and nothing left behind."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from delia.errors import ChatError, EngineError
from delia.generate.attempts import Ask
from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig, ScriptedConfig
from delia.generate.pipeline import (
    ENGINE_SECONDS,
    Script,
    answer_requests,
    run_script,
    to_blocks,
    to_completions,
)
from delia.generate.scripted import ScriptedEngine
from delia.store.models import ModelConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
SAMPLING = SamplingConfig(max_tokens=12)
END_IDS = (2,)
PATIENCE = 600
"""Seconds for what takes a few on a machine with nothing else to do."""
REQUESTS = [
    Request(request_id=f"r{place}", prompt_ids=(9, 10 + place, 11, 12), seed=place) for place in range(40)
]


def make_engine(**settings: object) -> EngineConfig:
    return EngineConfig(kind="scripted", **{"batch_size": 8, **settings})


def stream(requests: list[Request], *, script: Script = answer_requests, **settings: object):
    engine = make_engine(**settings)
    blocks = to_blocks(requests, engine.batch_size)
    return run_script(script, blocks, model=STARTER, engine=engine, sampling=SAMPLING, end_ids=END_IDS)


def generate(requests: list[Request], num_replicas: int = 1) -> dict[str, Completion]:
    tables = stream(requests, num_replicas=num_replicas)
    return {item.request_id: item for table in tables for item in to_completions(table)}


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_any_number_of_replicas_answers_as_one_engine_does(cluster, num_replicas):
    direct = ScriptedEngine(STARTER, EngineConfig()).generate(REQUESTS, SAMPLING, end_ids=END_IDS)

    assert generate(REQUESTS, num_replicas) == {item.request_id: item for item in direct}


def test_a_block_carries_all_that_a_request_says():
    asked: list[Request] = []

    def ask(requests):
        asked.extend(requests)
        return [Completion(request_id="r", token_ids=(), finish_reason="stop")]

    request = Request(
        request_id="r",
        prompt_ids=(9, 10),
        seed=3,
        adapter="a",
        temperature=0.5,
        max_tokens=7,
        json_schema="{}",
        end_ids=(4, 5),
    )
    answer_requests(to_blocks([request], 1)[0], ask)

    assert asked == [request]
    assert all(getattr(request, item.name) != item.default for item in dataclasses.fields(Request))


def test_two_requests_of_one_id_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match="request ids must be distinct"):
        generate([*REQUESTS, REQUESTS[3]])


def test_no_requests_start_nothing():
    assert generate([]) == {}
    assert list(stream([])) == []


def test_a_script_asks_as_often_as_it_needs_and_its_result_is_one_table_a_block(cluster):
    def ask_twice(block: pa.Table, ask: Ask) -> pa.Table:
        first = to_completions(answer_requests(block, ask))
        second = ask(
            [Request(request_id=item.request_id, prompt_ids=(300, *item.token_ids)) for item in first]
        )
        names = [item.request_id for item in first]
        return pa.table({"request_id": names, "asked": [item.num_prompt_tokens for item in second]})

    tables = list(stream(REQUESTS, script=ask_twice, num_replicas=2))
    first = generate(REQUESTS)
    asked = {row["request_id"]: row["asked"] for table in tables for row in table.to_pylist()}

    assert asked == {name: 1 + len(item.token_ids) for name, item in first.items()}
    assert sorted(table["request_id"].to_pylist() for table in tables) == sorted(
        [f"r{place}" for place in range(start, start + 8)] for start in range(0, 40, 8)
    )


def test_the_time_of_the_engine_is_shared_out_over_the_rows_and_counted_once(cluster):
    """Two blocks side by side keep one engine busy: its seconds are not those of both callers added.

    Each block takes 0.8 s of them. Whenever they meet, none is charged less than half of what it took.
    """
    started = time.monotonic()
    tables = list(stream(REQUESTS[:16], scripted=ScriptedConfig(seconds_per_request=0.1)))
    elapsed = time.monotonic() - started
    seconds = [table[ENGINE_SECONDS][0].as_py() * table.num_rows for table in tables]

    assert 8 * 0.1 <= sum(seconds) <= elapsed
    assert min(seconds) >= 0.5 * 8 * 0.1


def test_several_blocks_are_in_one_engine_at_a_time(cluster):
    """Each block waits until another one has begun: alone it would wait for ever."""

    def meet(block: pa.Table, ask: Ask) -> pa.Table:
        begun.append(block["request_id"][0].as_py())
        give_up = time.monotonic() + PATIENCE
        while len(begun) < 2:
            assert time.monotonic() < give_up, "no other block"
            time.sleep(0.01)
        return pa.table({"begun": [len(begun)]})

    begun: list[str] = []
    tables = list(stream(REQUESTS[:16], script=meet))

    assert [table["begun"][0].as_py() for table in tables] == [2, 2]


def test_a_request_that_could_not_be_answered_is_an_error_where_answers_are_read(cluster):
    long = [dataclasses.replace(REQUESTS[0], prompt_ids=(9,) * 512)]
    with pytest.raises(EngineError, match=r"request r0 was not answered: the prompt has 512 ids"):
        [to_completions(table) for table in stream(long)]


def test_a_stream_that_is_no_longer_read_gives_its_replicas_back(cluster):
    import ray

    everything = ray.cluster_resources()["CPU"]
    many = [dataclasses.replace(REQUESTS[i % 40], request_id=f"r{i}") for i in range(2000)]
    tables = stream(many, num_replicas=2)
    next(tables)
    tables.close()
    give_up = time.monotonic() + PATIENCE
    while ray.available_resources().get("CPU") != everything and time.monotonic() < give_up:
        time.sleep(0.1)

    assert ray.available_resources().get("CPU") == everything


def test_an_error_on_a_replica_reaches_the_caller_as_what_it_is(cluster):
    def refuse(block: pa.Table, ask: Ask) -> pa.Table:
        raise ChatError(f"no second turn for {block['request_id'][0].as_py()}")

    with pytest.raises(ChatError, match="no second turn for r0"):
        list(stream(REQUESTS[:1], script=refuse))


def test_an_engine_that_can_not_start_ends_the_stage_with_its_reason(cluster):
    engine = EngineConfig(kind="vllm")
    nowhere = ModelConfig(path="/no/such/model")

    with pytest.raises(EngineError, match=r"could not start.*'/no/such/model' has no config\.json"):
        blocks = to_blocks(REQUESTS, 8)
        list(run_script(answer_requests, blocks, model=nowhere, engine=engine, sampling=SAMPLING, end_ids=()))


def test_blocks_of_a_source_that_is_no_longer_wanted_are_not_begun(cluster):
    """Two sources in turn, 20 blocks each, one block at a time; after its third result the first is not wanted."""

    def tell(block: pa.Table, ask: Ask) -> pa.Table:
        time.sleep(0.05)
        return block

    blocks = [pa.table({"source": [name], "start": [start]}) for start in range(20) for name in ("a", "b")]
    unwanted: set[str] = set()
    seen: list[str] = []
    engine = make_engine(max_concurrent_batches=1)
    for table in run_script(
        tell,
        blocks,
        model=STARTER,
        engine=engine,
        sampling=SAMPLING,
        end_ids=END_IDS,
        skip=unwanted,
    ):
        seen.append(table["source"][0].as_py())
        if seen.count("a") == 3:
            unwanted.add("a")

    assert seen.count("b") == 20
    assert 3 <= seen.count("a") < 20


def test_an_engine_that_no_node_can_hold_is_refused_with_what_it_asks_for_and_what_there_is(cluster):
    with pytest.raises(
        EngineError,
        match=r"num_cpus_per_replica=64 and num_gpus_per_replica=0, while nodes have 4 CPUs and 0 GPUs; add such",
    ):
        list(stream(REQUESTS[:1], num_cpus_per_replica=64, node_wait_seconds=0))


def test_an_engine_whose_resource_no_node_has_is_refused_with_its_name(cluster):
    with pytest.raises(
        EngineError,
        match=r"resources_per_replica={'a100': 1.0}, while nodes have 4 CPUs and 0 GPUs; add such",
    ):
        list(stream(REQUESTS[:1], resources_per_replica={"a100": 1.0}, node_wait_seconds=0))


def test_an_engine_waits_for_a_node_that_joins(cluster, monkeypatch):
    """The node is made up: what Ray tells of the cluster changes at the third time that it is asked."""
    import ray

    from delia.generate import nodes

    large = {"Alive": True, "Resources": {"CPU": 64.0}}
    told = [[*ray.nodes()], [*ray.nodes()], [*ray.nodes(), large]]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: told.pop(0) if told[1:] else told[0])
    monkeypatch.setattr(nodes, "POLL_SECONDS", 0.01)

    nodes.wait_for_node(make_engine(num_cpus_per_replica=64, node_wait_seconds=600))
    assert len(told) == 1
    assert large in told[0]


ON_THREE_NODES = """
import sys
import time
from functools import partial
from pathlib import Path
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster
from delia.flow.workspace import start_slowly
from delia.generate.engine import EngineConfig, Request, SamplingConfig
from delia.generate.pipeline import run_script, to_blocks
from delia.store.models import ModelConfig

cluster = start_slowly(partial(Cluster, initialize_head=True, head_node_args={"num_cpus": 2}))
for _ in range(2):
    start_slowly(partial(cluster.add_node, num_cpus=2))
cluster.wait_for_nodes(timeout=300)
ray.init(address=cluster.address)
begun = Path(sys.argv[1])
number_by_node = {node["NodeID"]: number for number, node in enumerate(ray.nodes())}


def tell_node(block, ask):
    node = number_by_node[ray.get_runtime_context().get_node_id()]
    (begun / str(node)).touch()
    give_up = time.monotonic() + 600
    while len(list(begun.iterdir())) < 3:  # no replica does everything before another has started
        assert time.monotonic() < give_up, "replicas share a node"
        time.sleep(0.05)
    return pa.table({"node": [node]})


tables = run_script(
    tell_node,
    to_blocks([Request(request_id=str(place), prompt_ids=(9,)) for place in range(30)], 1),
    model=ModelConfig(path="package://delia.starter/weights"),
    engine=EngineConfig(kind="scripted", num_replicas=3, max_concurrent_batches=1),
    sampling=SamplingConfig(max_tokens=1),
    end_ids=(),
)
nodes = [table["node"][0].as_py() for table in tables]
print("nodes", len(nodes), *sorted(set(nodes)))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.system
def test_replicas_sit_on_different_nodes(tmp_path: Path):
    """In a process of its own, since this one is connected to another cluster."""
    script = tmp_path / "three_nodes.py"
    script.write_text(ON_THREE_NODES)
    (tmp_path / "begun").mkdir()
    command = [sys.executable, str(script), str(tmp_path / "begun")]
    result = subprocess.run(command, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr[-6000:]
    assert "nodes 30 0 1 2" in result.stdout.splitlines()
