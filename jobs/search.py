"""Search how much diverse data to mix in, and how fast to learn, on index views of one pool.

    python jobs/search.py search_starter_sep --set ratios=[0,3,10]
    ray job submit --working-dir . --runtime-env runtime-env.yaml -- python jobs/search.py search_starter_sep

Scores on dev. A killed driver, started again, goes on; the chosen settings are left for `jobs/adapt.py`.
"""

import sys

from delia.recipes.command_line import parse_job, run_job
from delia.search.campaign import open_search, search
from delia.search.space import SearchConfig
from delia.search.surface import format_tradeoffs


def main() -> None:
    """Run the campaign, print the trade-off and the command that adapts with the chosen settings."""
    job = parse_job(sys.argv[1:], kind=SearchConfig, usage=__doc__ or "")
    if job.dry_run:
        open_search(job.settings)
        return
    outcome = search(job.settings, say=print)
    print(format_tradeoffs(outcome.tradeoffs, outcome.chosen))
    print(f"\nadapt with the chosen settings:\n  python jobs/adapt.py --from {outcome.config_address}")


if __name__ == "__main__":
    run_job(main)
