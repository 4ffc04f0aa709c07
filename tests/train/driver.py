"""A driver to be killed: trains what a JSON file says, and notes each logged step in another.

python driver.py settings.json storage output steps.jsonl
"""

import json
import sys
from pathlib import Path

from delia.flow.workspace import RayConfig, connect
from delia.store.models import ModelConfig
from delia.train.launch import run_training
from delia.train.loop import TrainInput
from delia.train.settings import TrainConfig


def main() -> None:
    settings, storage, output, steps = sys.argv[1:]
    tree = json.loads(Path(settings).read_text())
    task = TrainInput(
        model=ModelConfig.model_validate(tree["model"]),
        config=TrainConfig.model_validate(tree["config"]),
        rows=tuple((tuple(ids), tuple(mask)) for ids, mask in tree["rows"]),
        is_task=tuple(tree["is_task"]),
        has_token=tuple(tree["has_token"]),
        token_ids=tuple(tree["token_ids"]),
    )
    connect(RayConfig(num_cpus=2))
    with Path(steps).open("a") as file:

        def log(metrics: dict[str, float], step: int) -> None:
            file.write(json.dumps([step, metrics["train/loss"]]) + "\n")
            file.flush()

        run_training(task, name="run", storage=storage, output=output, log=log)


if __name__ == "__main__":
    main()
