"""A reproduction as Markdown and as a plot: every arm, every seed, every difference.

Written by `jobs/reproduce.py` into `tests/benchmarks/RESULTS.md`; a section is replaced by its heading.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from delia.flow.reproduction import RECIPE, Reproduction
from delia.flow.table import format_interval

PLAIN, DELIA = "plain", "delia"


def format_arms(result: Reproduction, suites: Sequence[str]) -> str:
    """Return a Markdown table: the mean over seeds, and each seed's score in brackets."""
    lines = [f"| arm | {' | '.join(suites)} | off-task KL |", f"|---|{'---|' * (len(suites) + 1)}"]
    for name, reports in result.reports.items():
        cells = []
        for suite in suites:
            means = [report.interval(suite, result.metric).estimate for report in reports]
            apart = f" ({', '.join(f'{mean:.3f}' for mean in means)})" if len(means) > 1 else ""
            cells.append(f"{np.mean(means):.3f}{apart}")
        drift = result.drift.get(name)
        cells.append(f"{np.mean(drift):.4f}" if drift else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_differences(result: Reproduction, pairs: Sequence[tuple[str, str]], suites: Sequence[str]) -> str:
    """Return a Markdown table of paired differences with 95 % intervals, clustered by wording."""
    lines = [f"| difference | {' | '.join(suites)} |", f"|---|{'---|' * len(suites)}"]
    for ours, theirs in pairs:
        cells = [format_interval(result.difference(ours, theirs, suite)) for suite in suites]
        lines.append(f"| {ours} - {theirs} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_section(path: Path, heading: str, body: str) -> None:
    """Replace the section under `## heading` of a Markdown file, or append it."""
    text = path.read_text() if path.exists() else "# Results\n"
    section = f"## {heading}\n\n{body.rstrip()}\n"
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text, num_replaced = pattern.subn(lambda match: section + "\n", text)
    if not num_replaced:
        text = f"{text.rstrip()}\n\n{section}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text.rstrip()}\n")


def draw_plot(result: Reproduction, suites: Sequence[str], path: Path) -> None:
    """Draw the mean score of each arm on each suite, a dot a seed, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "delia"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 5))
    names = list(result.reports)
    for row, name in enumerate(names):
        for column, suite in enumerate(suites):
            means = [report.interval(suite, result.metric).estimate for report in result.reports[name]]
            x = np.full(len(means), column + (row - len(names) / 2) * 0.8 / len(names))
            axes.plot(x, means, "o", color=f"C{row % 10}", markersize=5, label=name if column == 0 else None)
    axes.set_xticks(range(len(suites)), suites)
    axes.set_ylabel(result.metric.replace("_", " "))
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def default_pairs(result: Reproduction) -> list[tuple[str, str]]:
    """Return the comparisons that the claims rest on: DELIA and the recipe against every plain arm.

    An arm `plain, X` is compared with `delia, X` where there is one, else with `delia`; an arm
    `delia, X` without such a twin is a control, and `delia` is compared with it.
    """
    plain = [name for name in result.reports if name.startswith(PLAIN)]
    twins = {name: name.replace(PLAIN, DELIA, 1) for name in plain}
    ours = {name: twin if twin in result.reports else DELIA for name, twin in twins.items()}
    pairs = [(ours[name], name) for name in plain] + [(RECIPE, name) for name in plain]
    controls = [name for name in result.reports if name.startswith(f"{DELIA},") and name not in ours.values()]
    pairs += [(DELIA, name) for name in controls]
    return [pair for pair in pairs if pair[0] in result.reports]
