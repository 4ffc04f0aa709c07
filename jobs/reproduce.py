"""Measure the README's claims again: three seeds, baselines and controls, on the test split.

    python jobs/reproduce.py reproduce_sep            # or reproduce_lingo; without a name both

Writes `tests/benchmarks/RESULTS.md` and a plot beside it. Hours on two cores; safe to stop and start.
"""

import datetime
import platform as machine
import shlex
import sys
from pathlib import Path

from delia.flow.adapt import open_job
from delia.flow.reproduction import ReproduceConfig, reproduce
from delia.flow.results import default_pairs, draw_plot, format_arms, format_differences, write_section
from delia.recipes.command_line import parse_job, run_job

RESULTS = Path("tests/benchmarks/RESULTS.md")
ALL = ("reproduce_sep", "reproduce_lingo")


def run(argv: list[str]) -> None:
    """Reproduce one recipe and write its section."""
    job = parse_job(argv, kind=ReproduceConfig, usage=__doc__ or "")
    if job.dry_run:
        open_job(job.settings.recipe)
        return
    result = reproduce(job.settings, say=lambda text: print(text, flush=True))
    suites = result.reports["base"][0].suite_names()
    name = job.settings.recipe.name
    when = f"{datetime.date.today():%Y-%m-%d}, {machine.machine()}, {result.metric}, test split"
    body = "\n\n".join(
        (
            f"`python jobs/reproduce.py {shlex.join(argv)}`: {when}, seeds {list(job.settings.seeds)}"
            " (means, then each seed)."
            + "".join(f" {name}: {variant}." for name, variant in result.tuned.items()),
            format_arms(result, suites),
            "Paired differences over all seeds, 95 % bootstrap intervals clustered by wording:",
            format_differences(result, default_pairs(result), suites),
            f"![scores]({name}.svg)",
        )
    )
    write_section(RESULTS, name, body)
    draw_plot(result, suites, RESULTS.parent / f"{name}.svg")
    print(body)


def main() -> None:
    """Reproduce what the command line names, or everything."""
    arguments = sys.argv[1:]
    for argv in [arguments] if arguments else [[name] for name in ALL]:
        run(argv)


if __name__ == "__main__":
    run_job(main)
