"""Where a pool's own processes run: on any node, beside engines that take every CPU."""

from typing import Any

from delia.generate.pipeline import worker_environment


def spread(memory: int) -> dict[str, Any]:
    """Return Ray's options of an actor that asks for memory (in bytes) alone; a head that offers none is spared."""
    return {
        "num_cpus": 0,
        "memory": memory,
        "scheduling_strategy": "SPREAD",
        "runtime_env": {"env_vars": worker_environment()},
    }
