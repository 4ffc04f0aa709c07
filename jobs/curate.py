"""Curate a recipe's stored candidates again, with other filters: nothing is generated.

    python jobs/curate.py starter_sep --set pool.curate.near_duplicate_threshold=0.9

Run `jobs/synthesize.py` first. Another setting gives another pool; the old one stays.
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
        synthesize_pool(job.settings, say=print, stored_only=True, allowed_modules=job.allowed_modules)


if __name__ == "__main__":
    run_job(main)
