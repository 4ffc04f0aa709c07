"""Benchmarks, side by side in one run: `make bench`; results go into `RESULTS.md` beside this file.

    generation        this pipeline with its default filters against bare vLLM and other ways to ask it
    filters           this pipeline with its default filters and with every one, against bare vLLM
    training          the loop beside TRL's SFTTrainer, three sizes of model
    training_gpu      the same at 1 B parameters, and the loss alone beside Liger's; only where there is a GPU
    near_duplicates   the curator's beside datasketch's and text-dedup's
    coverage          how much of the starter's world its own samples reach

`python tests/benchmarks/run.py training` runs one of them; each has a section of its own. Figures are of one machine and one day; ratios are what carries over.
"""

import datetime
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from generation import describe_filters, describe_generation
from near_duplicates import describe_near_duplicates
from training import describe_training
from training_gpu import describe_gpu_training
from world_coverage import describe_coverage

from delia.flow.results import write_section
from delia.flow.workspace import RayConfig, connect, open_workspace
from delia.store.models import ModelConfig
from delia.store.tasks import TaskConfig, read_task

NUM_PROMPTS = 280_000
"""Bare vLLM, 4.3 output tokens an answer, takes five minutes for them on one quiet core."""
NUM_FILTERED = 160_000
"""Five minutes and more for the pipeline: semantic duplicates are compared with all that were accepted."""
RESULTS = Path(__file__).with_name("RESULTS.md")
MODEL = ModelConfig(path="package://delia.starter/weights")
TASK = TaskConfig(path="package://delia.starter/tasks/sep")


def measure_generation() -> str:
    """Run the ways to generate."""
    connect(RayConfig())
    with tempfile.TemporaryDirectory() as folder:
        return describe_generation(Path(folder), TASK, NUM_PROMPTS)


def measure_filters() -> str:
    """Run the pipeline with more filters."""
    connect(RayConfig())
    with tempfile.TemporaryDirectory() as folder:
        return describe_filters(Path(folder), TASK, NUM_FILTERED)


def measure_gpu_training() -> str:
    """Train on the GPU."""
    connect(RayConfig())
    return describe_gpu_training()


def measure_coverage() -> str:
    """Make a pool of the world's own samples."""
    connect(RayConfig())
    with tempfile.TemporaryDirectory() as folder:
        return describe_coverage(open_workspace(folder, MODEL, read_task(TASK)))


PARTS: dict[str, Callable[[], str]] = {
    "generation": measure_generation,
    "filters": measure_filters,
    "training": describe_training,
    "training_gpu": measure_gpu_training,
    "near_duplicates": describe_near_duplicates,
    "coverage": measure_coverage,
}


def main() -> None:
    """Run the benchmarks that are named, or all, and write a section each."""
    names = sys.argv[1:] or [name for name in PARTS if torch.cuda.is_available() or name != "training_gpu"]
    if unknown := sorted(set(names) - PARTS.keys()):
        sys.exit(f"no benchmark {unknown}; there are {list(PARTS)}")
    for name in names:
        when = f"{datetime.date.today():%Y-%m-%d}, {platform.machine()}, one core a process, float32"
        body = f"`python tests/benchmarks/run.py {name}`: {when}.\n\n{PARTS[name]()}\n"
        write_section(RESULTS, f"bench: {name}", body)
        print(body, flush=True)


if __name__ == "__main__":
    main()
