"""What a run logs is read back from the port that Prometheus scrapes, on a real Ray node."""

import re
import time
import urllib.request

import pytest
import ray

from delia.track import exporter
from delia.track.runs import TrackConfig, Tracker


def scrape() -> dict[tuple[str, str], float]:
    """Return our series of this node by name and labels, Ray's own labels left out."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^ray_(delia_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        ours = [
            pair
            for pair in re.findall(r'(\w+)="([^"]*)"', labels)
            if pair[0] in ("run", "suite", "metric", "source")
        ]
        found[name, " ".join(f"{key}={value}" for key, value in sorted(ours))] = float(value)
    return found


def wait_for(key: tuple[str, str], value: float) -> None:
    """Ray gathers metrics every ten seconds; the limit only ends a failure."""
    seen: object = None
    for _ in range(240):
        try:
            seen = scrape()
            if seen.get(key) == value:
                return
        except OSError as error:  # the node's agent opens its port late
            seen = error
        time.sleep(1)
    raise AssertionError(f"{key} is not {value}: {seen}")


@pytest.fixture
def tracker(tmp_path, monkeypatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracker(TrackConfig(), default_store=str(tmp_path / "mlflow.db"))


def test_gauges_counters_and_scores_arrive_under_their_runs_name(cluster, tracker):
    with tracker.run("exported") as run:
        run.log_metrics({"train/loss": 2.5, "synthesize/accepted": 10}, step=1)
        run.log_metrics({"train/loss": 1.5, "synthesize/accepted": 25}, step=2)
        run.log_metrics({"train/source_loss/magpie": 0.5, "train/source_loss/task": 3.5}, step=2)
        run.log_metrics({"synthesize/accepted": 25}, step=3)
        run.log_scores({("follow", "exact_match"): 0.75})
        with tracker.run("exported too") as other:
            other.log_metrics({"train/loss": 7.0, "synthesize/accepted": 1}, step=1)

    wait_for(("delia_train_loss", "run=exported"), 1.5)
    wait_for(("delia_train_loss", "run=exported too"), 7.0)
    wait_for(("delia_train_source_loss", "run=exported source=magpie"), 0.5)
    wait_for(("delia_train_source_loss", "run=exported source=task"), 3.5)
    wait_for(("delia_synthesize_accepted_total", "run=exported"), 25.0)
    wait_for(("delia_evaluate_score", "metric=exact_match run=exported suite=follow"), 0.75)
    history = tracker.client.get_metric_history(run.run_id, "evaluate/follow_exact_match")
    assert [item.value for item in history] == [0.75]


def test_without_a_cluster_nothing_is_exported_and_mlflow_has_all(tracker, monkeypatch):
    def refuse(metric):
        raise AssertionError(f"{metric.name} was exported")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(exporter, "_open_gauge", refuse)
    monkeypatch.setattr(exporter, "_open_counter", refuse)
    with tracker.run("alone") as run:
        run.log_metrics({"train/loss": 1.0, "synthesize/accepted": 2}, step=1)
        run.log_scores({("follow", "chrf"): 0.5})
    assert tracker.client.get_run(run.run_id).data.metrics == {
        "train/loss": 1.0,
        "synthesize/accepted": 2.0,
        "evaluate/follow_chrf": 0.5,
    }
