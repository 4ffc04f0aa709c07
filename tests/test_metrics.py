"""The metric table, and the dashboards that may use nothing else."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from delia.errors import ConfigError
from delia.metrics import (
    METRICS,
    Metric,
    check_metric,
    labelled,
    prometheus_name,
    score_name,
    series_name,
    split_label,
)

DASHBOARDS = Path(__file__).parents[1] / "dashboards"
LABELS = re.compile(r"\{[^}]*\}|\b(?:by|on|without)\s*\([^)]*\)|\[[^\]]*\]")
IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]*\b(?!\s*\()")


def find_expressions(node: Any) -> Iterator[str]:
    """Yield the PromQL of every panel and the metric of every `label_values(metric, label)`."""
    if isinstance(node, dict):
        if "expr" in node:
            yield node["expr"]
        if "definition" in node:
            yield re.sub(r"label_values\((.*), *\w+\)", r"\1", node["definition"])
        for value in node.values():
            yield from find_expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from find_expressions(value)


def read_metric_names(expression: str) -> set[str]:
    """Return the series of a PromQL expression: identifiers outside labels that are no function."""
    return set(IDENTIFIER.findall(LABELS.sub(" ", expression)))


def test_the_reader_of_queries_sees_metrics_and_neither_labels_nor_functions():
    query = 'sum by (suite) (rate(delia_a_total{session="delia_b"}[5m])) / on (x) max(ray_c) * 60'
    assert read_metric_names(query) == {"delia_a_total", "ray_c"}


@pytest.mark.parametrize("path", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.name)
def test_a_dashboard_uses_only_names_of_the_table_and_rays_own(path: Path):
    known = {series_name(metric) for metric in METRICS}
    expressions = list(find_expressions(json.loads(path.read_text())))
    used = {name for expression in expressions for name in read_metric_names(expression)}
    foreign = {name for name in used if not name.startswith("ray_") or name.startswith("ray_delia_")}
    assert foreign - known == set()
    assert len(foreign & known) >= 10


def test_panels_have_their_own_ids_and_places():
    panels = json.loads((DASHBOARDS / "delia.json").read_text())["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


def test_the_scrape_rule_takes_rays_prefix_off_our_names_alone():
    config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    (rule,) = config["scrape_configs"][0]["metric_relabel_configs"]
    assert (rule["source_labels"], rule["target_label"]) == (["__name__"], "__name__")
    replacement = rule["replacement"].replace("$1", r"\1")
    for metric in METRICS:
        matched = re.fullmatch(rule["regex"], f"ray_{series_name(metric)}")
        assert matched is not None
        assert matched.expand(replacement) == series_name(metric)
    assert re.fullmatch(rule["regex"], "ray_node_cpu_utilization") is None


def test_no_name_is_there_that_nothing_logs():
    package = DASHBOARDS.parent / "platform" / "delia"
    source = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "metrics.py")
    assert [metric.name for metric in METRICS if f'"{metric.name}"' not in source] == []


def test_each_name_is_a_room_and_a_quantity_and_stands_once():
    for metric in METRICS:
        assert re.fullmatch(r"[a-z]+/[a-z0-9]+(_[a-z0-9]+)*", metric.name), metric
        assert metric.unit
        assert metric.description
        assert not metric.name.endswith("_total"), "Prometheus appends _total itself"
    assert len({prometheus_name(metric) for metric in METRICS}) == len(METRICS)


@pytest.mark.parametrize(
    ("kind", "series"), [("gauge", "delia_train_loss"), ("counter", "delia_train_loss_total")]
)
def test_a_counter_is_read_under_another_name_than_it_is_written(kind: Any, series: str):
    metric = Metric("train/loss", "nats", kind, "Loss")
    assert prometheus_name(metric) == "delia_train_loss"
    assert series_name(metric) == series


def test_names_of_the_table_and_of_scores_pass():
    assert [check_metric(metric.name) for metric in METRICS] == [metric.name for metric in METRICS]
    assert score_name("negated", "exact_match") == "evaluate/negated_exact_match"
    assert score_name("task", "chrf") == "evaluate/task_chrf"


def test_a_quantity_of_each_source_has_the_source_s_name_and_one_series():
    name = labelled("train/source_loss", "magpie-2.b")
    assert name == "train/source_loss/magpie-2.b"
    metric, source = split_label(name)
    assert (prometheus_name(metric), metric.label, source) == (
        "delia_train_source_loss", "source", "magpie-2.b"
    )  # fmt: skip
    assert labelled("train/token_rank", 3) == "train/token_rank/3"
    assert split_label("train/loss")[1] == ""
    assert split_label("evaluate/follow_chrf") is None


@pytest.mark.parametrize("name", ["train/loss/magpie", "train/source_loss/a b", "train/source_loss/"])
def test_a_label_that_a_quantity_has_not_or_that_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="no metric"):
        check_metric(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("train/los", "did you mean 'train/loss'"),
        ("evaluate/off_task_kll", "did you mean 'evaluate/off_task_kl'"),
        ("loss", "no metric 'loss'"),
        ("evaluate/Follow_match", "no metric"),
        ("evaluate/follow", "no metric"),
        ("train/follow_exact_match", "no metric"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, reason: str):
    with pytest.raises(ConfigError, match=reason):
        check_metric(name)


@pytest.mark.parametrize("suite", ["", "My Suite", "a__b", "a/b", "_a"])
def test_a_suite_that_makes_no_name_is_refused(suite: str):
    with pytest.raises(ConfigError, match="a-z, 0-9 and single underscores"):
        score_name(suite, "exact_match")


def test_the_table_imports_nothing_heavy():
    heavy = ("mlflow", "ray", "torch", "pydantic")
    code = f"import sys, delia.metrics; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
