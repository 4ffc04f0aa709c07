"""One worker of several on gloo, without Ray: trains what a file says, and leaves what it logged and the adapter.

python worker.py task.pickle rank num_workers folder
"""

import json
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from delia.train import checkpoints, loop
from delia.train.building import TrainInput


def main() -> None:
    settings, rank, num_workers, place = sys.argv[1:]
    folder, lines = Path(place), []
    task: TrainInput = pickle.loads(Path(settings).read_bytes())  # the test's own
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=int(rank), world_size=int(num_workers)
    )

    def report(metrics, checkpoint) -> None:
        if rank == "0" and (Path(checkpoint.path) / loop.ADAPTER_FOLDER).is_dir():
            shutil.copytree(Path(checkpoint.path) / loop.ADAPTER_FOLDER, folder / "adapter")

    class Line:
        def __call__(self, metrics, step) -> None:
            lines.append((step, metrics))

        def asks_to_stop(self) -> bool:
            return False

    context = SimpleNamespace(
        get_world_rank=lambda: int(rank),
        get_world_size=lambda: int(num_workers),
        get_local_world_size=lambda: int(num_workers),
    )
    played = SimpleNamespace(
        get_context=lambda: context, get_all_reported_checkpoints=lambda: [], report=report
    )
    loop.ray = checkpoints.ray = SimpleNamespace(get=lambda value: value, train=played)
    loop.train_worker({"input": [task], "log": Line()})
    if rank == "0":
        (folder / "lines.json").write_text(json.dumps(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
