"""A driver that makes one large pool of numbered questions, and says what memory it takes as it goes on.

python large_driver.py output_dir num_rows; a JSON line every now and then, and the pool's root at the end
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.flow.pool import PoolConfig, build_pool
from delia.flow.workspace import RayConfig, connect, open_workspace
from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig
from delia.schema import Message, Rejection, Row, Task
from delia.store.models import ModelConfig
from delia.synthesize.socket import SynthesisContext
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
NO_TASK = Task(name="t", digest="d", rows_by_split={"train": (), "dev": (), "test": ()})
CHUNK_SIZE = 8192
"""What Ray Data keeps in the driver is by chunk, some 12 kB of each: a large pool wants large ones."""
NUM_REPORTS = 50


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """One question an index, no two alike."""

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        question = (Message(role="user", content=f"say {index} fox"),)
        return (
            context.row(index, question, completions)
            if completions
            else context.ask(index, question, turn="a")
        )


def measure_memory() -> int:
    """Return the bytes of this process's own memory, its anonymous pages.

    Pages of the object store are not counted: they are shared while the replica lives that wrote them, and would seem
    to be this process's own from its end on.
    """
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return 1024 * int(fields["Anonymous"].split()[0])


def main() -> None:
    output_dir, num_rows = sys.argv[1], int(sys.argv[2])
    connect(RayConfig(num_cpus=4))
    source = SourceConfig(
        name="numbered",
        synthesizer=MethodConfig(method="large_driver.Numbered"),
        num_rows=num_rows,
        max_candidates=num_rows + num_rows // 10 + CHUNK_SIZE,
    )
    config = PoolConfig(
        synthesize=SynthesizeConfig(
            sources=(source,), sampling=SamplingConfig(max_tokens=32), chunk_size=CHUNK_SIZE
        ),
        curate=CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None),
    )
    reported = 0

    def report(metrics: dict[str, float], num_seen: int) -> None:
        nonlocal reported
        if num_seen * NUM_REPORTS >= reported * num_rows:
            reported += 1
            print(json.dumps({"seen": num_seen, "bytes": measure_memory()}), flush=True)

    pool = build_pool(
        config,
        open_workspace(output_dir, STARTER, NO_TASK),
        engine=EngineConfig(kind="scripted", num_replicas=2),
        log=report,
        allowed_modules=("large_driver",),
    )
    print(json.dumps({"root": pool.manifest.root, "counts": pool.manifest.counts, "bytes": measure_memory()}))
    sys.stdout.flush()
    os._exit(0)  # threads of Ray that outlive the cluster's end can end a finished driver with an error


if __name__ == "__main__":
    main()
