"""Where runs go: the setting or the environment, what is refused, and a store that two drivers create at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from delia.errors import ConfigError
from delia.track.connection import resolve_uri
from delia.track.runs import TrackConfig, Tracker


def test_a_deleted_experiment_is_an_error_with_the_way_out(store: Path):
    gone = Tracker(TrackConfig(experiment="gone"), str(store / "mlflow.db"))
    gone.client.delete_experiment(gone.experiment_id)
    with pytest.raises(ConfigError, match="mlflow experiments restore"):
        Tracker(TrackConfig(experiment="gone"), str(store / "mlflow.db"))


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("http://a:5000", "http://b:5000", "http://a:5000"),
        (None, "http://b:5000", "http://b:5000"),
        (None, None, "sqlite:////runs/x/mlflow.db"),
    ],
)
def test_the_setting_wins_over_the_environment_and_that_over_sqlite(
    setting: str | None, environment: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if environment:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    assert resolve_uri(setting, default_store="/runs/x/mlflow.db", artifact_root=None) == expected


@pytest.mark.parametrize(
    ("uri", "default_store", "reason"),
    [
        (None, "s3://bucket/runs/mlflow.db", "needs a local file"),
        ("postgresql://me:pw@db/mlflow", "/runs", "keeps no artifacts"),
        ("./mlruns", "/runs", "runs go to http"),
        ("sqlite:///mlflow.db", "/runs", "runs go to http"),
    ],
)
def test_a_store_that_can_not_work_is_refused_before_any_work(
    uri: str | None, default_store: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=reason) as caught:
        resolve_uri(uri, default_store=default_store, artifact_root=None)
    assert "me:pw" not in str(caught.value)


OPEN_STORE = """
import sys
from delia.track.runs import TrackConfig, Tracker
with Tracker(TrackConfig(), sys.argv[1]).run("train") as run:
    print(run.run_id)
"""


def test_two_drivers_that_create_the_store_at_once_both_work_and_say_nothing(tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    command = [sys.executable, "-c", OPEN_STORE, f"{tmp_path}/mlflow.db"]
    drivers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    texts = [driver.communicate(timeout=300) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], texts
    assert [error for _, error in texts] == ["", ""]
    tracker = Tracker(TrackConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"), "/nowhere")
    runs = tracker.client.search_runs([tracker.experiment_id])
    assert {run.info.run_id for run in runs} == {out.strip() for out, _ in texts}


def test_tracking_is_imported_without_mlflow_and_turns_its_telemetry_off(tmp_path: Path):
    code = f"""
import os, sys
import delia.track.registry, delia.track.runs
assert "mlflow" not in sys.modules
delia.track.runs.Tracker(delia.track.runs.TrackConfig(), {str(tmp_path / "mlflow.db")!r})
from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY
assert MLFLOW_DISABLE_TELEMETRY.get()  # MLflow's own verdict is always "disabled" under pytest
assert os.environ["DO_NOT_TRACK"] == "true"
"""
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "false", "DO_NOT_TRACK": "false"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
