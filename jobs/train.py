"""Train a recipe's adapter on its mixture, and nothing else.

    python jobs/train.py starter_sep --set arm.mix.diverse_ratio=5
    python jobs/train.py starter_sep --preview 3
    ray job submit --working-dir . --runtime-env runtime-env.yaml -- python jobs/train.py starter_sep

Reads the recipe's pool (synthesised first if it is missing); resumes at the last committed checkpoint.
SIGTERM (`ray job stop`) ends it with status 75 after a checkpoint of the step it is in. `--preview` shows
rows, their trained tokens green on a terminal (or with FORCE_COLOR set), else in [[ ]], and the packing.
"""

import os
import sys

from delia.flow.adapt import AdaptConfig, open_job
from delia.flow.stages import preview_training, train_adapter
from delia.recipes.command_line import parse_job, run_job


def main() -> None:
    """Run the job that the command line names."""
    job = parse_job(sys.argv[1:], kind=AdaptConfig, usage=__doc__ or "", previews=True)
    if job.dry_run:
        open_job(job.settings)
    elif job.preview is not None:
        is_coloured = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
        preview_training(
            job.settings,
            num_rows=job.preview,
            is_coloured=is_coloured,
            say=print,
            allowed_modules=job.allowed_modules,
        )
    else:
        train_adapter(job.settings, say=print, allowed_modules=job.allowed_modules)


if __name__ == "__main__":
    run_job(main)
