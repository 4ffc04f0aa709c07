"""With a bucket as `output_dir`: training, scoring and registering leave nothing on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from delia.errors import ConfigError
from delia.flow.promotion import PromoteConfig, promote_version
from delia.recipes.starter import starter_sep
from delia.store.adapters import check_servable
from delia.store.tasks import digest_task, write_task
from delia.track.registry import fetch_adapter
from delia.track.runs import TrackConfig, Tracker


def test_a_bucket_holds_checkpoints_adapter_and_scores(object_store, small_task, tmp_path):
    digest = digest_task(small_task.rows_by_split, small_task.tokens, small_task.long_instruction)
    object.__setattr__(small_task, "digest", digest)
    write_task(str(tmp_path / "task"), small_task)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"MLFLOW_TRACKING_URI": store}
    object_store.create_bucket(Bucket="bucket")
    driver = Path(__file__).with_name("remote_driver.py")
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        [sys.executable, str(driver), "s3://bucket/runs", str(tmp_path / "task")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path / "cwd",
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    left = json.loads(done.stdout.splitlines()[-1])
    assert left["adapter"].startswith("s3://bucket/runs/adapters/")
    assert left["steps"] == [1, 2]
    assert left["scored"]
    assert left["rows"] == {"base": 8, "adapter": 8}
    keys = [item["Key"] for item in object_store.list_objects_v2(Bucket="bucket")["Contents"]]
    assert {key.split("/")[1] for key in keys if key != "runs/"} == {"adapters", "checkpoints", "evals"}
    assert list((tmp_path / "cwd").iterdir()) == []

    tracker = Tracker(TrackConfig(tracking_uri=store), default_store="")
    fetched = fetch_adapter(tracker, left["version"], tmp_path / "fetched")
    check_servable(fetched)
    assert (fetched / "tokenizer.json").is_file()


def test_the_gates_lock_is_not_put_into_a_bucket():
    recipe = starter_sep().model_copy(update={"output_dir": "s3://bucket/runs"})
    with pytest.raises(
        ConfigError, match="needs a local or mounted directory, not 's3://bucket/runs'; set lock_dir"
    ):
        promote_version(PromoteConfig(recipe=recipe), say=lambda text: None)
