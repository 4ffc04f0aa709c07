"""The result of a search: task score against forgetting, with intervals, and a choice inside the noise.

Task score is the mean over the task's suites, kept score the mean over what must not change. No
winner is declared inside the noise: of the trials whose paired difference from the best includes 0,
the one with the least off-task change is chosen, that is the highest kept score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from delia.errors import ConfigError
from delia.evaluate.harness import EvalReport
from delia.evaluate.intervals import Interval, mean_interval, paired_difference
from delia.search.space import SearchConfig


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """One trial's place on the curve."""

    task: Interval
    kept: Interval


def collect_scores(report: EvalReport, suites: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the scores [n] of several suites in the task's first metric, and their phrasings.

    Raises:
        ConfigError: A suite is not in the report, with those that are.
    """
    missing = [suite for suite in suites if suite not in report.suites]
    if missing:
        raise ConfigError(f"no suite {missing} on this split; the task has {report.suite_names()}")
    metric = next(iter(report.scores))
    parts = [report.select(suite, metric) for suite in suites]
    return np.concatenate([values for values, _ in parts]), [c for _, names in parts for c in names]


def summarise(reports: Mapping[str, EvalReport], config: SearchConfig) -> dict[str, Tradeoff]:
    """Return every trial's task and kept scores with their intervals."""
    return {
        name: Tradeoff(
            task=mean_interval(*collect_scores(report, config.task_suites), seed=0),
            kept=mean_interval(*collect_scores(report, config.kept_suites), seed=0),
        )
        for name, report in reports.items()
    }


def choose(reports: Mapping[str, EvalReport], config: SearchConfig) -> str:
    """Return the trial with the highest kept score among those not told apart from the best.

    The best is the one with the highest sum of task and kept score.
    """
    tradeoffs = summarise(reports, config)
    best = max(tradeoffs, key=lambda name: tradeoffs[name].task.estimate + tradeoffs[name].kept.estimate)
    best_scores, clusters = collect_scores(reports[best], config.task_suites)
    equal = []
    for name, report in reports.items():
        scores, _ = collect_scores(report, config.task_suites)
        difference = paired_difference(best_scores, scores, clusters, seed=0)
        if difference.low <= 0:
            equal.append(name)
    return max(equal, key=lambda name: (tradeoffs[name].kept.estimate, name))


def format_tradeoffs(tradeoffs: Mapping[str, Tradeoff], chosen: str) -> str:
    """Return the curve as text, the least forgetful trial first; `*` marks the chosen one."""
    ordered = sorted(tradeoffs, key=lambda name: -tradeoffs[name].kept.estimate)
    width = max(len(name) for name in tradeoffs) + 2
    lines = [f"{'trial'.ljust(width)}  task score             kept score"]
    for name in ordered:
        task, kept = tradeoffs[name].task, tradeoffs[name].kept
        mark = "* " if name == chosen else "  "
        cells = [f"{item.estimate:.3f} [{item.low:.3f},{item.high:.3f}]" for item in (task, kept)]
        lines.append(f"{(mark + name).ljust(width)}  {'  '.join(cells)}")
    return "\n".join(lines)
