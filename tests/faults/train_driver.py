"""A driver to be killed: trains what a file says, and notes each logged step in another.

python train_driver.py task.pickle storage output steps.jsonl
"""

import json
import pickle
import sys
from pathlib import Path

from delia.flow.workspace import RayConfig, connect
from delia.recipes.command_line import run_job
from delia.train.building import TrainInput
from delia.train.launch import catch_termination, forward_log, run_training


def main() -> None:
    settings, storage, output, steps = sys.argv[1:]
    task: TrainInput = pickle.loads(Path(settings).read_bytes())  # the test's own
    connect(RayConfig(num_cpus=2))
    with Path(steps).open("a") as file:

        def log(metrics: dict[str, float], step: int) -> None:
            file.write(json.dumps([step, metrics["train/loss"]]) + "\n")
            file.flush()

        with catch_termination() as is_stopping, forward_log(log, is_stopping=is_stopping) as line:
            run_training(task, name="run", storage=storage, output=output, log=line)


if __name__ == "__main__":
    run_job(main)
