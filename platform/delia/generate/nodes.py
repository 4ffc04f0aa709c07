"""Whether the cluster has a node that can hold an engine: Ray waits for one without a word, and for ever."""

import logging
import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from delia.errors import EngineError
from delia.generate.engine import RESERVED_RESOURCES, EngineConfig

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


def wait_for_node(config: EngineConfig) -> None:
    """Return once some node is large enough for a replica, busy or not.

    A cluster that can grow is asked to; `node_wait_seconds` bound what that may take.

    Raises:
        EngineError: There is none, with what a replica asks for and what the nodes have.
    """
    wanted = {"CPU": config.num_cpus_per_replica, "GPU": config.num_gpus_per_replica}
    wanted = {name: amount for name, amount in wanted.items() if amount} | config.resources_per_replica
    if _has_node(wanted):
        return
    shortage = (
        f"no node can hold an engine: engine.num_cpus_per_replica={config.num_cpus_per_replica:g} and"
        f" num_gpus_per_replica={config.num_gpus_per_replica:g}{_describe_more(config)}, while nodes have"
        f" {_describe_nodes()}"
    )
    logger.warning("%s; waiting up to %g s for one that can", shortage, config.node_wait_seconds)
    deadline = time.monotonic() + config.node_wait_seconds
    demand = placement_group([wanted])  # what an autoscaler sees
    try:
        while not _has_node(wanted):
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"{shortage}; add such a node, ask for less, or raise engine.node_wait_seconds"
                    f"={config.node_wait_seconds:g}"
                )
            time.sleep(POLL_SECONDS)
    finally:
        remove_placement_group(demand)


def _list_resources() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _has_node(wanted: dict[str, float]) -> bool:
    return any(
        all(offered.get(name, 0.0) >= amount for name, amount in wanted.items())
        for offered in _list_resources()
    )


def _describe_more(config: EngineConfig) -> str:
    return f", resources_per_replica={config.resources_per_replica}" if config.resources_per_replica else ""


def _describe_nodes() -> str:
    return "; ".join(sorted({_describe(offered) for offered in _list_resources()}))


def _describe(offered: dict[str, float]) -> str:
    custom = [
        f"{amount:g} {name}"
        for name, amount in sorted(offered.items())
        if name not in RESERVED_RESOURCES and not name.startswith("node:")
    ]
    return ", ".join((f"{offered.get('CPU', 0.0):g} CPUs and {offered.get('GPU', 0.0):g} GPUs", *custom))
