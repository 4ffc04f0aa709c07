"""Requests through replicas on Ray: equal answers on any number of them, and nothing left behind."""

import dataclasses
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from delia.errors import ChatError, EngineError
from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig
from delia.generate.pipeline import FollowUp, stream_completions, to_completions
from delia.generate.scripted import ScriptedEngine
from delia.store.models import ModelConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
SAMPLING = SamplingConfig(max_tokens=12)
END_IDS = (2,)
REQUESTS = [
    Request(request_id=f"r{place}", prompt_ids=(9, 10 + place, 11, 12), seed=place) for place in range(40)
]


def stream(requests: list[Request], *, follow_up: FollowUp | None = None, **settings: object):
    engine = EngineConfig(kind="scripted", **{"batch_size": 8, **settings})
    return stream_completions(
        requests, model=STARTER, engine=engine, sampling=SAMPLING, end_ids=END_IDS, follow_up=follow_up
    )


def generate(requests: list[Request], num_replicas: int = 1) -> dict[str, Completion]:
    tables = stream(requests, num_replicas=num_replicas)
    return {item.request_id: item for table in tables for _, item in to_completions(table)}


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_any_number_of_replicas_answers_as_one_engine_does(cluster, num_replicas):
    direct = ScriptedEngine(STARTER, EngineConfig()).generate(REQUESTS, SAMPLING, end_ids=END_IDS)

    assert generate(REQUESTS, num_replicas) == {item.request_id: item for item in direct}


def test_two_requests_of_one_id_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match="request ids must be distinct"):
        generate([*REQUESTS, REQUESTS[3]])


def test_no_requests_start_nothing():
    assert generate([]) == {}
    assert list(stream([])) == []


def test_a_second_turn_is_answered_beside_the_first_and_only_where_one_is_asked_for(cluster):
    def ask_the_even(completion: Completion) -> Request | None:
        number = int(completion.request_id[1:])
        if number % 2:
            return None
        return Request(request_id=completion.request_id, prompt_ids=(300, *completion.token_ids), seed=number)

    turns = [
        (turn, item)
        for table in stream(REQUESTS, follow_up=ask_the_even, num_replicas=2)
        for turn, item in to_completions(table)
    ]
    first = {item.request_id: item for turn, item in turns if turn == 1}
    second = {item.request_id: item for turn, item in turns if turn == 2}

    assert len(turns) == 40 + 20
    assert first == generate(REQUESTS)
    assert set(second) == {f"r{place}" for place in range(0, 40, 2)}
    assert [i for name, i in second.items() if i.num_prompt_tokens != 1 + len(first[name].token_ids)] == []


def test_a_table_holds_both_turns_of_one_whole_batch(cluster):
    def again(completion: Completion) -> Request:
        return Request(request_id=completion.request_id, prompt_ids=(300,))

    batches = [
        Counter(item.request_id for _, item in to_completions(table))
        for table in stream(REQUESTS, follow_up=again, num_replicas=2)
    ]
    expected = [Counter({f"r{place}": 2 for place in range(start, start + 8)}) for start in range(0, 40, 8)]

    assert sorted(batches, key=lambda batch: int(min(batch, key=lambda name: int(name[1:]))[1:])) == expected


def test_a_stream_that_is_no_longer_read_gives_its_replicas_back(cluster):
    import ray

    everything = ray.cluster_resources()["CPU"]
    many = [dataclasses.replace(REQUESTS[i % 40], request_id=f"r{i}") for i in range(2000)]
    tables = stream(many, num_replicas=2)
    next(tables)
    tables.close()
    give_up = time.monotonic() + 120
    while ray.available_resources().get("CPU") != everything and time.monotonic() < give_up:
        time.sleep(0.1)

    assert ray.available_resources().get("CPU") == everything


def test_an_error_on_a_replica_reaches_the_caller_as_what_it_is(cluster):
    def refuse(completion: Completion) -> Request:
        raise ChatError(f"no second turn for {completion.request_id}")

    with pytest.raises(ChatError, match="no second turn for r0"):
        list(stream(REQUESTS[:1], follow_up=refuse))


def test_an_engine_that_can_not_start_ends_the_stage_with_its_reason(cluster):
    engine = EngineConfig(kind="vllm")
    nowhere = ModelConfig(path="/no/such/model")

    with pytest.raises(EngineError, match=r"could not start.*'/no/such/model' has no config\.json"):
        list(stream_completions(REQUESTS, model=nowhere, engine=engine, sampling=SAMPLING, end_ids=END_IDS))


ON_THREE_NODES = """
import time
import ray
from ray.cluster_utils import Cluster
from delia.generate.engine import EngineConfig, Request, SamplingConfig
from delia.generate.pipeline import stream_completions, to_completions
from delia.store.models import ModelConfig

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
for _ in range(2):
    cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
ray.init(address=cluster.address)
number_by_node = {node["NodeID"]: number for number, node in enumerate(ray.nodes())}


def tell_node(completion):
    time.sleep(0.5)  # long enough that one replica does not answer everything
    node = ray.get_runtime_context().get_node_id()
    return Request(request_id=completion.request_id, prompt_ids=(number_by_node[node],))


tables = stream_completions(
    [Request(request_id=str(place), prompt_ids=(9,)) for place in range(30)],
    model=ModelConfig(path="unused"),
    engine=EngineConfig(kind="scripted", num_replicas=3, batch_size=1),
    sampling=SamplingConfig(max_tokens=1),
    end_ids=(),
    follow_up=tell_node,
)
nodes = [item.token_ids[0] for table in tables for turn, item in to_completions(table) if turn == 2]
print("nodes", len(nodes), *sorted(set(nodes)))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.system
def test_replicas_sit_on_different_nodes(tmp_path: Path):
    """In a process of its own, since this one is connected to another cluster."""
    script = tmp_path / "three_nodes.py"
    script.write_text(ON_THREE_NODES)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)

    assert "nodes 30 0 1 2" in result.stdout.splitlines()
