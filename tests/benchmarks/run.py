"""Benchmarks, side by side in one run: `make bench`; results go into `RESULTS.md` beside this file.

    generation   this pipeline with all its filters against bare vLLM and other ways to ask it
    training     the loop beside TRL's SFTTrainer, three sizes of model
    coverage     how much of the starter's world its own samples reach

Figures are of one machine and one day; ratios are what carries over.
"""

import datetime
import platform
import tempfile
from pathlib import Path

import generation
import ray
from generation import Measured
from training import describe_training
from world_coverage import describe_coverage

from delia.flow.results import write_section
from delia.flow.workspace import RayConfig, connect, open_workspace
from delia.store.models import ModelConfig
from delia.store.tasks import TaskConfig, read_task

NUM_PROMPTS = 8192
RESULTS = Path(__file__).with_name("RESULTS.md")
MODEL = ModelConfig(path="package://delia.starter/weights")


def describe_generation(measured: list[Measured], num_prompts: int) -> str:
    """Return the table of generation; ratios are to bare vLLM with the same seeds."""
    bare = measured[0]
    lines = [
        f"| {item.name} | {item.rate:.0f} | {item.rate / bare.rate:.2f} | {item.start_seconds:.0f} | {item.seconds:.0f} |"
        for item in measured
    ]
    return "\n".join(
        (
            f"Generation: {num_prompts} different questions of the starter's world, T=1, one core an engine.",
            "",
            "| | output tokens/s | ratio to bare, seeded | start-up s | run s |",
            "|---|---|---|---|---|",
            *lines,
        )
    )


def main() -> None:
    """Run the benchmarks and write their section."""
    connect(RayConfig())
    ray.cloudpickle.register_pickle_by_value(generation)
    task = read_task(TaskConfig(path="package://delia.starter/tasks/sep"))
    with tempfile.TemporaryDirectory() as folder:
        measured = generation.measure_all(Path(folder), task, num_prompts=NUM_PROMPTS)
        space = open_workspace(folder, MODEL, task)
        covered = describe_coverage(space)
    body = f"""`make bench`, {datetime.date.today():%Y-%m-%d}, {platform.machine()}, one core a process, float32.

{describe_generation(measured, NUM_PROMPTS)}

{describe_training()}

{covered}
"""
    write_section(RESULTS, "benchmarks", body)
    print(body)


if __name__ == "__main__":
    main()
