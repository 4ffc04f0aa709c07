"""The 100 real rows of the DELIA authors through the whole path, the starter as base.

It is far too small to learn them: what counts is that rows of over a thousand tokens go through
synthesis, training, both engines and the registry, and that too small a limit is said before any work.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parents[2]
SMALL = (
    "pool.synthesize.sources.0.num_rows=64",
    "pool.synthesize.chunk_size=64",
    "arm.mix.diverse_ratio=0.5",
    "arm.train.stages.0.max_steps=2",
    "arm.train.stages.1.max_steps=2",
    "arm.train.global_batch_size=8",
    "arm.train.token_init=mean_vocabulary",  # the stand-in reads 64 x 32 of these rows: minutes on one core
    "engine.num_replicas=1",
    "evaluate.num_kl_rows=8",
    "evaluate.num_verify_rows=4",
)


def adapt(*settings: str) -> subprocess.CompletedProcess[str]:
    assigned = [part for text in settings for part in ("--set", text)]
    return subprocess.run(
        [sys.executable, "jobs/adapt.py", "sep_hallucination", *assigned],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1400,
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform")},
    )


@pytest.mark.system
@pytest.mark.timeout(1500)
def test_the_real_rows_end_as_a_verified_version(tmp_path: Path) -> None:
    done = adapt(*SMALL, f"output_dir={tmp_path}/runs")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    version = client.get_model_version_by_alias("sep-hallucination", "candidate")
    assert version.tags["delia.verified"].startswith("4/4 equal greedy completions")
    assert version.tags["delia.licence"] == "MIT"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("arm.train.max_length=512", "max_length is 512"),
        ("engine.max_model_len=1024", "raise engine.max_model_len"),
    ],
)
def test_a_limit_that_the_real_rows_exceed_is_said_before_any_work(
    setting: str, message: str, tmp_path: Path
) -> None:
    done = adapt(setting, f"output_dir={tmp_path}/runs")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()
