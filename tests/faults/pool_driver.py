"""A driver to be killed: makes one pool in two rounds on a Ray cluster of its own, and prints the pool's root.

python pool_driver.py output_dir scripted|vllm [number of nodes]

With nodes, the head has no CPU, and each other node has room for both replicas: one may be lost.
"""

import os
import sys
from functools import partial

import ray
from ray.cluster_utils import Cluster

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.flow.pool import PoolConfig, build_pool, pool_fingerprint
from delia.flow.workspace import RayConfig, Workspace, connect, open_workspace, start_slowly
from delia.generate.engine import EngineConfig, SamplingConfig, ScriptedConfig
from delia.schema import Message, SeedTask, Task
from delia.store.models import ModelConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
SYSTEM = "name the colour of the red fox , the grey wolf and the black cat ."
QUESTION = (Message(role="user", content="say fox in lingo"), Message(role="assistant", content="ka mu"))
TASK = Task(
    name="t",
    digest="d",
    rows_by_split={"train": (SeedTask(task_id="t0", messages=QUESTION),), "dev": (), "test": ()},
)
NUM_CHUNKS = 8
"""No pool of `POOL` is finished with fewer chunks: 5 of the first round and 3 of the second."""
POOL = PoolConfig(
    synthesize=SynthesizeConfig(
        sources=(
            SourceConfig(
                name="web",
                synthesizer=MethodConfig(
                    method="delia.methods.synthesizer.magpie.Magpie", knobs={"system": SYSTEM}
                ),
                num_rows=40,
                max_candidates=160,
            ),
            SourceConfig(
                name="answers",
                synthesizer=MethodConfig(method="delia.methods.synthesizer.answering.Answering"),
                feeds_on=("web",),
                num_rows=24,
                max_candidates=40,
            ),
        ),
        sampling=SamplingConfig(max_tokens=22),  # some answers are cut, and rejected
        chunk_size=8,
    ),
    curate=CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None),
)
ENGINES = {
    "scripted": EngineConfig(
        kind="scripted", num_replicas=2, scripted=ScriptedConfig(seconds_per_request=0.05)
    ),
    "vllm": EngineConfig(kind="vllm", num_replicas=2),
}


def open_space(output_dir: str) -> Workspace:
    """Return where the pool is made."""
    return open_workspace(output_dir, STARTER, TASK)


def find_pool(space: Workspace) -> str:
    """Return the address of the pool."""
    return space.address("pools", pool_fingerprint(POOL, space))


def start_nodes(num_nodes: int) -> None:
    """Start several nodes on this machine, and connect to them."""
    cluster = start_slowly(partial(Cluster, initialize_head=True, head_node_args={"num_cpus": 0}))
    for _ in range(num_nodes):
        start_slowly(partial(cluster.add_node, num_cpus=2))
    cluster.wait_for_nodes(timeout=300)
    ray.init(address=cluster.address, log_to_driver=False)


def main() -> None:
    output_dir, kind, num_nodes = (*sys.argv[1:], "0")[:3]
    if int(num_nodes):
        start_nodes(int(num_nodes))
    else:
        connect(RayConfig(num_cpus=4))
    pool = build_pool(POOL, open_space(output_dir), engine=ENGINES[kind], log=lambda metrics, step: None)
    print("root", pool.manifest.root, flush=True)
    os._exit(0)  # threads of Ray that outlive the cluster's end can end a finished driver with an error


if __name__ == "__main__":
    main()
