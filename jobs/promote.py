r"""Move the alias `champion` to a recipe's candidate, after verified export and the gate.

    python jobs/promote.py promote_starter_sep
    ray job submit --working-dir . --runtime-env runtime-env.yaml -- \
        python jobs/promote.py promote_starter_sep

The candidate is compared with the champion on the test split, suite by suite, by non-inferiority.
"""

import sys

from delia.flow.adapt import open_job
from delia.flow.promotion import PromoteConfig, promote_version
from delia.recipes.command_line import parse_job, run_job


def main() -> None:
    """Run the job that the command line names."""
    job = parse_job(sys.argv[1:], kind=PromoteConfig, usage=__doc__ or "")
    if job.dry_run:
        open_job(job.settings.recipe)
        return
    version = promote_version(job.settings, say=print)
    print(f"champion: {version.uri}")


if __name__ == "__main__":
    run_job(main)
