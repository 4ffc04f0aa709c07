"""A driver on a cluster of nodes that differ, in a process of its own; prints what each run of requests was like.

tiny     1 CPU: too small for an engine, which asks for 2
plain    2 CPUs: one engine, and a slow one
special  4 CPUs, a GPU in name and the resource `special`: two engines
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from delia.flow.workspace import start_slowly
from delia.generate.attempts import Ask
from delia.generate.engine import EngineConfig, Request, SamplingConfig
from delia.generate.pipeline import answer_requests, run_script, to_blocks, to_completions
from delia.generate.scripted import ScriptedEngine
from delia.store.models import ModelConfig

MODEL = ModelConfig(path="package://delia.starter/weights")
SAMPLING = SamplingConfig(max_tokens=12)
REQUESTS = [Request(request_id=str(place), prompt_ids=(9, 10 + place), seed=place) for place in range(32)]
ENGINE = EngineConfig(
    kind="scripted", num_cpus_per_replica=2, batch_size=1, max_concurrent_batches=1, node_wait_seconds=0
)
DONE_BY_OTHERS = 24


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for what other processes do; give up where it would never come."""
    give_up = time.monotonic() + 600
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def run(title: str, folder: Path, name_by_node: dict[str, str], **settings: object) -> None:
    """Answer all requests; where `plain` takes part, its first block ends when others have done most of them."""
    begun, done = folder / f"{title}-begun", folder / f"{title}-done"
    begun.mkdir()
    done.mkdir()

    def answer(block: pa.Table, ask: Ask) -> pa.Table:
        node = name_by_node[ray.get_runtime_context().get_node_id()]
        (begun / node).touch()
        if node == "plain":
            wait_until(lambda: len(list(done.iterdir())) >= DONE_BY_OTHERS)
        elif title == "anywhere":
            wait_until((begun / "plain").exists)
        table = answer_requests(block, ask)
        if node != "plain":
            (done / block["request_id"][0].as_py()).touch()
        return table.append_column("node", pa.array([node] * table.num_rows))

    engine = ENGINE.model_copy(update=settings)
    blocks = to_blocks(REQUESTS, engine.batch_size)
    tables = list(
        run_script(
            answer,
            blocks,
            model=MODEL,
            engine=engine,
            sampling=SAMPLING,
            end_ids=(),
        )
    )
    counts = Counter(name for table in tables for name in table["node"].to_pylist())
    answers = {item.request_id: item for table in tables for item in to_completions(table.drop(["node"]))}
    direct = ScriptedEngine(MODEL, ENGINE).generate(REQUESTS, SAMPLING, end_ids=())
    is_whole = sorted(table.num_rows for table in tables) == sorted(block.num_rows for block in blocks)
    is_equal = is_whole and answers == {item.request_id: item for item in direct}
    print(title, "equal" if is_equal else "other", *(f"{name}={counts[name]}" for name in sorted(counts)))


def main() -> None:
    folder = Path(sys.argv[1])
    cluster = start_slowly(partial(Cluster, initialize_head=True, head_node_args={"num_cpus": 1}))
    special = partial(cluster.add_node, num_cpus=4, num_gpus=1, resources={"special": 2})
    nodes = {
        "tiny": cluster.head_node,
        "plain": start_slowly(partial(cluster.add_node, num_cpus=2)),
        "special": start_slowly(special),
    }
    cluster.wait_for_nodes(timeout=300)
    ray.init(address=cluster.address, log_to_driver=False)
    name_by_node = {node.node_id: name for name, node in nodes.items()}
    everything = ray.available_resources()
    del everything["object_store_memory"]

    run("anywhere", folder, name_by_node, num_replicas=4)  # there is room for three
    run("special", folder, name_by_node, num_replicas=2, resources_per_replica={"special": 1.0})
    run("gpu", folder, name_by_node, num_gpus_per_replica=1.0, batch_size=5)

    wait_until(lambda: everything.items() <= ray.available_resources().items())
    print("free again", everything.items() <= ray.available_resources().items(), everything["GPU"])
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
