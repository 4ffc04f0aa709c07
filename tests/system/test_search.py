"""A search campaign on the real components: killed, started again, finished, and its choice adapted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "ratios=[0,0.5]",
    "num_anchor_seeds=1",
    "recipe.pool.synthesize.sources.0.num_rows=64",
    "recipe.pool.synthesize.chunk_size=64",
    "recipe.arm.mix.diverse_ratio=0.5",
    "recipe.arm.train.stages.0.max_steps=6",
    "recipe.arm.train.stages.1.max_steps=3",
    "recipe.engine.num_replicas=1",
)
TRIALS = {"trial ratio-0-rate-1", "trial ratio-0.5-rate-1", "trial rows-only"}


@contextmanager
def campaign(output_dir: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start the job in a session of its own, and kill what is left of it and of its cluster in the end."""
    settings = [part for text in (*SETTINGS, f"recipe.output_dir={output_dir}") for part in ("--set", text)]
    with log.open("ab") as stream:
        job = subprocess.Popen(
            [sys.executable, "jobs/search.py", "search_starter_sep", *settings],
            stdout=stream,
            stderr=stream,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
            start_new_session=True,
        )
    try:
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


@pytest.mark.system
@pytest.mark.timeout(2400)
def test_a_killed_campaign_goes_on_and_keeps_what_was_finished(tmp_path: Path) -> None:
    output_dir, log = tmp_path / "runs", tmp_path / "log"
    with campaign(output_dir, log) as first:
        for _ in range(900):
            if list(output_dir.glob("evals/*/manifest.json")):
                break
            assert first.poll() is None, log.read_text()[-4000:]
            time.sleep(1)
    finished = {path: path.stat().st_mtime_ns for path in output_dir.glob("*/*/manifest.json")}
    assert any(path.parts[-3] == "evals" for path in finished)

    with campaign(output_dir, log) as second:
        assert second.wait(1000) == 0, log.read_text()[-6000:]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished step was done twice"

    client = MlflowClient(f"sqlite:///{output_dir}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("delia").experiment_id])
    ended = {run.info.run_name for run in runs if run.info.status == "FINISHED"}
    assert "search" in ended
    assert {name for name in ended if name.startswith("trial")} <= TRIALS
    text = log.read_text()
    for name in TRIALS:
        assert name.removeprefix("trial ") in text.rpartition("task score")[2]
    chosen = next(output_dir.glob("search-*/chosen.yaml"))
    done = subprocess.run(
        [sys.executable, "jobs/adapt.py", "--from", str(chosen), "--dry-run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
    )
    assert done.returncode == 0, done.stderr
