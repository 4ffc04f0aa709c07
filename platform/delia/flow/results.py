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
COLOURS = {PLAIN: "tab:red", DELIA: "tab:blue", RECIPE: "tab:green", "rows_only": "tab:orange"}


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
    """Draw scores as SVG: a panel a suite, a line an arm, a dot a seed."""
    import matplotlib as mpl  # late: development only

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "delia", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot

    names = list(result.reports)
    size = (2.5 + 1.4 * len(suites), 0.8 + 0.22 * len(names))
    figure, grid = pyplot.subplots(1, len(suites), sharey=True, figsize=size, squeeze=False)
    for axes, suite in zip(grid[0], suites, strict=True):
        for line, name in enumerate(names):
            means = [report.interval(suite, result.metric).estimate for report in result.reports[name]]
            colour = next((colour for start, colour in COLOURS.items() if name.startswith(start)), "black")
            axes.plot(means, [line] * len(means), "o", color=colour, markersize=4, alpha=0.7)
        axes.set_title(suite, fontsize=8)
        axes.set_xlim(-0.05, 1.05)
        axes.grid(alpha=0.3)
    grid[0][0].set_yticks(range(len(names)), names)
    grid[0][0].invert_yaxis()
    figure.supxlabel(result.metric.replace("_", " "), fontsize=8)
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
