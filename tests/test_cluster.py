"""`cluster.yaml` against Ray's own schema and against what the platform expects of a cluster."""

import re
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def test_ray_accepts_the_cluster_and_needs_no_cloud_account_to_say_so(cluster, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)

    prepared = prepare_config(cluster)
    validate_config(prepared)

    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    assert prepared["worker_setup_commands"] == prepared["head_setup_commands"] == cluster["setup_commands"]


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"headnode": {}}, jsonschema.ValidationError, "'headnode' was unexpected"),
        ({"idle_timeout_minutes": "ten"}, jsonschema.ValidationError, "'ten' is not of type 'number'"),
        ({"head_node_type": "boss"}, ValueError, "`head_node_type` must be one of"),
    ],
)
def test_ray_would_refuse_a_mistake(cluster, change, error, reason):
    with pytest.raises(error, match=reason):
        validate_config(prepare_config(cluster | change))


def test_the_head_runs_no_work(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    start = " ".join(cluster["head_start_ray_commands"])

    assert head["resources"] == {"CPU": 0, "GPU": 0, "memory": 0}
    assert "--num-cpus=0 --num-gpus=0 --memory=0" in start


def test_workers_of_both_kinds_come_when_needed_and_go(cluster):
    workers = {name: node for name, node in cluster["available_node_types"].items() if name != "head"}

    bounds = {name: (node["min_workers"], node["max_workers"]) for name, node in workers.items()}
    assert bounds == {"cpu_worker": (0, 8), "gpu_worker": (0, 8)}
    assert cluster["max_workers"] == 16
    assert "GPU" not in workers["cpu_worker"]["resources"]
    assert workers["gpu_worker"]["resources"]["GPU"] > 0


def test_nodes_get_what_set_up_reads_and_the_token_and_nothing_else(cluster):
    """Ray hashes every mounted file at each `ray up`: mounting the root would bring .venv and runs along."""
    mounts = cluster["file_mounts"]
    token = mounts.pop("~/.ray/auth_token")

    assert token == "~/.ray/auth_token"
    assert mounts == {f"~/delia/{name}": name for name in mounts.values()}
    assert [name for name in mounts.values() if not (ROOT / name).exists()] == []
    needed = {"Makefile", "README.md", "LICENSE", "pyproject.toml", "requirements", "platform"}
    assert set(mounts.values()) == needed


def test_every_node_starts_ray_with_the_token_and_from_the_environment_that_was_set_up(cluster):
    profile, setup = cluster["setup_commands"]

    assert "RAY_AUTH_MODE=token" in profile
    assert "PATH=$HOME/delia/.venv/bin:$PATH" in profile
    assert re.match(r"make -C ~/delia setup ACCEL=", setup)


def test_the_dashboard_is_not_open_to_the_network(cluster):
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
