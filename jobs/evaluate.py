"""Score the base model and a recipe's adapter on every suite of its task.

    python jobs/evaluate.py starter_sep --set split=dev
    ray job submit --working-dir . --runtime-env runtime-env.yaml -- python jobs/evaluate.py starter_sep

Trains the adapter first if it is missing; what is scored already is read back.
"""

import sys

from delia.flow.adapt import AdaptConfig, open_job
from delia.flow.stages import evaluate_adapter
from delia.recipes.command_line import parse_job, run_job


def main() -> None:
    """Run the job that the command line names, and print the table."""
    job = parse_job(sys.argv[1:], kind=AdaptConfig, usage=__doc__ or "")
    if job.dry_run:
        open_job(job.settings)
    else:
        print(evaluate_adapter(job.settings, say=print, allowed_modules=job.allowed_modules))


if __name__ == "__main__":
    run_job(main)
