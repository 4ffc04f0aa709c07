"""A driver whose `output_dir` is a bucket: trains, scores and registers, and prints what it left where.

python remote_driver.py s3://bucket/runs task_directory
"""

import json
import sys

from delia.evaluate.harness import BASE, EvaluateConfig
from delia.flow.evaluation import eval_address, evaluate_adapters
from delia.flow.trial import ArmConfig, plan_arm, train_arms
from delia.flow.workspace import RayConfig, connect, open_workspace
from delia.generate.engine import EngineConfig
from delia.mix.mixture import MixConfig
from delia.model.adapted import LoraConfig
from delia.recipes.starter import STARTER
from delia.store.adapters import fetch_adapter
from delia.store.tables import is_finished
from delia.store.tasks import TaskConfig, read_task
from delia.track.registry import register_adapter
from delia.track.runs import TrackConfig, Tracker
from delia.train.settings import StageConfig, TrainConfig


def main() -> None:
    output_dir, task = sys.argv[1:]
    space = open_workspace(output_dir, STARTER, read_task(TaskConfig(path=task)))
    train = TrainConfig(lora=LoraConfig(rank=2, alpha=2), stages=(StageConfig(max_steps=2),), log_every=1)
    arm = plan_arm(ArmConfig(mix=MixConfig(diverse_ratio=0.0), train=train), space, None)
    connect(RayConfig(num_cpus=4))
    steps: list[int] = []
    logs = {"arm": lambda metrics, step: steps.append(step)}
    adapter = train_arms({"arm": arm}, space, None, logs=logs, max_concurrent=1)["arm"]
    rows = space.task.rows_by_split["dev"]
    config, engine = EvaluateConfig(max_tokens=8), EngineConfig(kind="scripted")
    reports = evaluate_adapters(config, space, {"base": BASE, "adapter": adapter.path}, rows, engine=engine)
    tracker = Tracker(TrackConfig(), default_store=output_dir)
    with tracker.run("train") as run:
        version = register_adapter(tracker, run, fetch_adapter(adapter.path), name="remote", tags={})
    print(
        json.dumps(
            {
                "adapter": adapter.path,
                "steps": sorted(set(steps)),
                "scored": is_finished(eval_address(config, space, adapter.path, rows, engine=engine)),
                "rows": {label: len(report.task_ids) for label, report in reports.items()},
                "version": version.uri,
            }
        )
    )


if __name__ == "__main__":
    main()
