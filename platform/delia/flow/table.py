"""Scores as text: one table of models x suites with intervals, and differences between two models."""

from collections.abc import Mapping, Sequence

import numpy as np

from delia.evaluate.harness import EvalReport
from delia.evaluate.intervals import Interval, paired_difference


def format_interval(interval: Interval) -> str:
    """Return `0.975 [.960,.985]`."""
    low, high = (f"{value:.3f}".replace("0.", ".", 1) for value in (interval.low, interval.high))
    return f"{interval.estimate:.3f} [{low},{high}]"


def format_scores(
    reports: Mapping[str, EvalReport], *, metrics: Sequence[str], drift: Mapping[str, float]
) -> str:
    """Return one line a model and one column a suite and metric, with 95 % intervals.

    Args:
        reports: Label -> report; all over the same rows.
        metrics: The metrics that the task declares.
        drift: Off-task KL to the base by label, in nats a token.
    """
    first = next(iter(reports.values()))
    columns = [(suite, metric) for suite in first.suite_names() for metric in metrics]
    several = len(metrics) > 1
    header = [
        "model",
        *(f"{suite} {metric}" if several else suite for suite, metric in columns),
        "off-task KL",
    ]
    lines = [header]
    for label, report in reports.items():
        cells = [format_interval(report.interval(suite, metric)) for suite, metric in columns]
        lines.append([label, *cells, f"{drift[label]:.4f}" if label in drift else "-"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def compare(ours: Sequence[EvalReport], theirs: Sequence[EvalReport], suite: str, metric: str) -> Interval:
    """Return the paired difference of means over several seeds, clustered by phrasing.

    Rows of all seeds that share a phrasing are resampled together, so seeds do not narrow the
    interval as if they were new test rows. A single row can't show a spread: it gives all of -1..1.
    """
    values_a, clusters = zip(*(report.select(suite, metric) for report in ours), strict=True)
    values_b, _ = zip(*(report.select(suite, metric) for report in theirs), strict=True)
    a, b = np.concatenate(values_a), np.concatenate(values_b)
    names = [name for part in clusters for name in part]
    if len(set(names)) == 1:
        return Interval(estimate=float(np.mean(a - b)), low=-1.0, high=1.0)
    return paired_difference(a, b, names, seed=0)
