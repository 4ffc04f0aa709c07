"""What a run logs goes to Ray's metric exporter too: from there to Prometheus and the dashboard.

    Run.log_metrics  --every value, by step-->       MLflow
                     --the latest, by run name-->    ray.util.metrics -> Prometheus

A process that is not connected to Ray exports nothing. MLflow's counters are running totals of one
run; Prometheus wants what was added, so each run remembers its last total.
"""

from collections.abc import Mapping
from functools import cache

import ray
from ray.util.metrics import Counter, Gauge

from delia.metrics import METRIC_BY_NAME, Metric, prometheus_name, split_label

RUN, SUITE, METRIC = "run", "suite", "metric"
SCORE = "evaluate/score"


class Exporter:
    """The exported side of one run; `run_name` is its label, as run ids would have no end."""

    def __init__(self, run_name: str) -> None:
        """Start with every total at 0."""
        self._labels = {RUN: run_name}
        self._totals: dict[str, float] = {}

    def export(self, values: Mapping[str, float]) -> None:
        """Set gauges, and add to counters what came since their last total; scores have `export_score`."""
        if not ray.is_initialized():
            return
        for name, value in values.items():
            found = split_label(name)
            if found is None:
                continue
            metric, labels = found[0], self._labels
            if metric.label:
                labels = {**labels, metric.label: found[1]}
            if metric.kind == "gauge":
                _open_gauge(metric).set(float(value), labels)
            elif value > self._totals.get(name, 0.0):
                _open_counter(metric).inc(value - self._totals.get(name, 0.0), self._labels)
                self._totals[name] = value

    def export_score(self, suite: str, metric: str, value: float) -> None:
        """Set the score of a suite in one metric."""
        if ray.is_initialized():
            labels = {**self._labels, SUITE: suite, METRIC: metric}
            _open_gauge(METRIC_BY_NAME[SCORE]).set(float(value), labels)


@cache
def _open_gauge(metric: Metric) -> Gauge:
    keys = (RUN, SUITE, METRIC) if metric.name == SCORE else (RUN, metric.label) if metric.label else (RUN,)
    return Gauge(prometheus_name(metric), metric.description, tag_keys=keys)


@cache
def _open_counter(metric: Metric) -> Counter:
    return Counter(prometheus_name(metric), metric.description, tag_keys=(RUN,))
