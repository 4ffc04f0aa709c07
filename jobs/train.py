"""Train a recipe's adapter on its mixture, and nothing else.

    python jobs/train.py starter_sep --set arm.mix.diverse_ratio=5
    ray job submit --working-dir . --runtime-env runtime-env.yaml -- python jobs/train.py starter_sep

Reads the recipe's pool (synthesised first if it is missing); resumes at the last committed checkpoint.
"""

import sys

from delia.flow.adapt import AdaptConfig, open_job
from delia.flow.stages import train_adapter
from delia.recipes.command_line import parse_job, run_job


def main() -> None:
    """Run the job that the command line names."""
    job = parse_job(sys.argv[1:], kind=AdaptConfig, usage=__doc__ or "")
    if job.dry_run:
        open_job(job.settings)
    else:
        train_adapter(job.settings, say=print, allowed_modules=job.allowed_modules)


if __name__ == "__main__":
    run_job(main)
