"""A real Prometheus with the shipped configuration reads what a run logs, under the table's names."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml

from delia.track.runs import TrackConfig, Tracker

CONFIG = Path(__file__).parents[2] / "dashboards" / "prometheus.yml"


def query(address: str, expression: str) -> list[dict]:
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        result: list[dict] = json.load(answer)["data"]["result"]
    return result


@pytest.fixture
def prometheus(cluster, tmp_path: Path) -> Iterator[str]:
    """Scrape the test's own Ray node in place of the list that Ray keeps of all; the rest is as shipped."""
    program = shutil.which("prometheus")
    assert program, "make test-system installs the packages of requirements/apt.txt"
    config = yaml.safe_load(CONFIG.read_text())
    node = ray.nodes()[0]
    (job,) = config["scrape_configs"]
    del job["file_sd_configs"]
    job["static_configs"] = [{"targets": [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"]}]
    config["global"]["scrape_interval"] = "1s"
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [program, f"--config.file={file}", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log, env=dict(os.environ)
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.system
def test_prometheus_reads_what_a_run_logs_under_the_names_of_the_table(
    prometheus: str, tmp_path: Path
) -> None:
    with Tracker(TrackConfig(), default_store=str(tmp_path / "mlflow.db")).run("watched") as run:
        run.log_metrics({"train/loss": 1.25, "synthesize/accepted": 40}, step=1)
        run.log_scores({("follow", "exact_match"): 0.5})
    expected = {
        'delia_train_loss{run="watched"}': 1.25,
        'delia_synthesize_accepted_total{run="watched"}': 40.0,
        'delia_evaluate_score{run="watched",suite="follow",metric="exact_match"}': 0.5,
    }
    found: dict[str, float] = {}
    for _ in range(240):
        try:
            answers = {name: query(prometheus, name) for name in expected}
        except OSError:  # it opens its port a little after it starts
            answers = {}
        found = {name: float(series[0]["value"][1]) for name, series in answers.items() if series}
        if found == expected:
            break
        time.sleep(1)
    assert found == expected
    assert query(prometheus, '{__name__=~"ray_delia_.+"}') == []
