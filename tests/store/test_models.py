"""Base models: where an address leads on this machine, and when two are the same model."""

import importlib.resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from delia.errors import ConfigError
from delia.store.models import ModelConfig, identify_model, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.arange(6.0)}, tmp_path / "model.safetensors")
    return tmp_path


def identify(directory: Path) -> str:
    return identify_model(ModelConfig(path=str(directory)))


def test_a_directory_with_a_config_is_a_model(model):
    assert resolve_model(ModelConfig(path=str(model))) == model


def test_a_path_may_start_at_home(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve_model(ModelConfig(path=f"~/{model.name}")) == model


def test_a_packaged_model_is_found_where_the_package_lies():
    found = resolve_model(ModelConfig(path="package://delia.starter/weights"))
    assert found == Path(str(importlib.resources.files("delia.starter"))) / "weights"


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./nowhere/model", "nowhere", "a/b/c", "package://delia.starter/nowhere"]
)
def test_a_path_without_a_model_is_never_taken_for_a_hub_id(path):
    with pytest.raises(ConfigError, match=r"has no config\.json in .*; give a model directory") as caught:
        resolve_model(ModelConfig(path=path, revision=COMMIT))
    assert f"base model {path!r}" in str(caught.value)


def test_a_hub_id_without_a_revision_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match=r"'org/name' is a hub id without a revision; set model\.revision"):
        resolve_model(ModelConfig(path="org/name"))


def test_a_hub_id_is_downloaded_at_its_revision(monkeypatch, tmp_path):
    asked = []

    def download(repo_id: str, *, revision: str) -> str:
        asked.append((repo_id, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model(ModelConfig(path="org/name", revision=COMMIT)) == tmp_path
    assert asked == [("org/name", COMMIT)]


def test_a_model_of_the_hub_is_its_commit():
    assert identify_model(ModelConfig(path="org/name", revision=COMMIT)) == f"org/name@{COMMIT}"


def test_a_copy_elsewhere_is_the_same_model(model, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert identify(copy) == identify(model)
    assert identify(model).startswith("local@")


@pytest.mark.parametrize("change", ["config", "weight", "new file", "name", "size"])
def test_a_changed_model_is_another(model, change):
    before = identify(model)
    weights = model / "model.safetensors"
    if change == "config":
        (model / "config.json").write_text('{"model_type": "qwen2"}')
    elif change == "weight":
        save_file({"weight": torch.arange(6.0) + 1}, weights)
    elif change == "new file":
        save_file({"more": torch.zeros(1)}, model / "more.safetensors")
    elif change == "name":
        weights.rename(model / "other.safetensors")
    else:
        save_file({"weight": torch.arange(7.0)}, weights)
    assert identify(model) != before


def test_what_is_no_weight_does_not_make_another_model(model):
    before = identify(model)
    (model / "README.md").write_text("about it")
    assert identify(model) == before
