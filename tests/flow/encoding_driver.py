"""A driver that encodes every row of a pool on Ray, and says what memory it takes.

python encoding_driver.py pool_directory; a JSON line before, one a shard, and one at the end
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from large_driver import STARTER, measure_memory

from delia.chat import ChatEncoder
from delia.flow.encoding import Facts, Part, encode_mixture, encode_on_ray
from delia.flow.workspace import RayConfig, connect, open_workspace
from delia.mix.mixture import MixConfig, mix
from delia.schema import Message, SeedTask, Task
from delia.store.pools import read_pool
from delia.train.settings import StageConfig, TrainConfig

TASK_ROW = SeedTask(
    task_id="t0",
    messages=(Message(role="user", content="say it"), Message(role="assistant", content="it")),
)


def report(**fields: int) -> None:
    print(json.dumps({"bytes": measure_memory(), **fields}), flush=True)


def encode(parts: Sequence[Part], config: TrainConfig, chat: ChatEncoder) -> Iterator[tuple[Any, Facts]]:
    """Encode on Ray, and measure after each shard."""
    for number, part in enumerate(encode_on_ray(parts, config, chat)):
        report(shard=number)
        yield part


def main() -> None:
    connect(RayConfig(num_cpus=2))
    task = Task(name="t", digest="d", rows_by_split={"train": (TASK_ROW,), "dev": (), "test": ()})
    space, pool = open_workspace(sys.argv[1], STARTER, task), read_pool(sys.argv[1])
    config = TrainConfig(stages=(StageConfig(max_steps=1),), max_length=1024)
    report(started=1)
    ratio = float(pool.manifest.counts["accepted"])
    mixture = mix(
        (TASK_ROW,),
        pool.index.group_ids(),
        MixConfig(diverse_ratio=ratio),
        pool_root=pool.manifest.root,
        task_digest="d",
    )
    rows, _ = encode_mixture(mixture, (TASK_ROW,), pool.index, config, space.chat, encode=encode)
    report(rows=len(rows), tokens=int(rows.lengths_R.sum()))
    os._exit(0)  # as large_driver.py


if __name__ == "__main__":
    main()
