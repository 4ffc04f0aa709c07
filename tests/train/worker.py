"""A worker process on gloo, without Ray: trains what each line of its input says, and answers with a line.

    {"task": task.pickle, "rank": 0, "num_workers": 2, "folder": where it leaves its files}

Each run has a process group of its own. Files are lines.json, what the first worker logged, and a directory a
checkpoint, into which every worker puts its shards.
"""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from delia.train import checkpoints, loop
from delia.train.building import TrainInput


def train(task: TrainInput, rank: int, num_workers: int, folder: Path) -> None:
    """Play one worker of Ray Train."""
    lines: list[tuple[int, dict[str, float]]] = []
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_workers)

    def report(metrics: dict[str, int], checkpoint: Any) -> None:
        shutil.copytree(checkpoint.path, folder / str(metrics["step"]), dirs_exist_ok=True)

    class Line:
        def __call__(self, metrics: dict[str, float], step: int) -> None:
            lines.append((step, metrics))

        def asks_to_stop(self) -> bool:
            return False

    context = SimpleNamespace(
        get_world_rank=lambda: rank,
        get_world_size=lambda: num_workers,
        get_local_world_size=lambda: num_workers,
    )
    played = SimpleNamespace(
        get_context=lambda: context, get_all_reported_checkpoints=lambda: [], report=report
    )
    loop.ray = checkpoints.ray = SimpleNamespace(get=lambda value: value, train=played)  # type: ignore[assignment]
    try:
        loop.train_worker({"input": [task], "log": Line()})
    finally:
        dist.destroy_process_group()
    if rank == 0:
        (folder / "lines.json").write_text(json.dumps(lines))


def main() -> None:
    """Serve until the input ends; whatever libraries print goes to the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        task = pickle.loads(Path(order["task"]).read_bytes())  # the test's own
        train(task, order["rank"], order["num_workers"], Path(order["folder"]))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
