"""Synthesise a recipe's diverse pool: candidates from vLLM on Ray Data, curated until enough are accepted.

    python jobs/synthesize.py starter_sep --set pool.synthesize.sources.0.num_rows=5000
    ray job submit --working-dir . --runtime-env runtime-env.yaml -- python jobs/synthesize.py starter_sep

Killed and started again, it generates only what is missing. `jobs/train.py` reads the pool.
"""

import sys

from delia.flow.adapt import AdaptConfig, open_job
from delia.flow.stages import synthesize_pool
from delia.recipes.command_line import parse_job, run_job


def main() -> None:
    """Run the job that the command line names."""
    job = parse_job(sys.argv[1:], kind=AdaptConfig, usage=__doc__ or "")
    if job.dry_run:
        open_job(job.settings)
    else:
        synthesize_pool(job.settings, say=print, allowed_modules=job.allowed_modules)


if __name__ == "__main__":
    run_job(main)
