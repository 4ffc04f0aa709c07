"""Base models: where an address leads on this machine, and when two are the same model."""

import importlib.resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from delia.errors import ConfigError
from delia.store.models import ModelConfig, identify_directory, identify_model, resolve_model

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


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:8]])
def test_a_revision_that_may_move_is_refused(revision):
    config = ModelConfig(path="org/name", revision=revision)
    for ask in (resolve_model, identify_model):
        with pytest.raises(ConfigError, match=rf"model\.revision='{revision}' .* set it to a commit, 40"):
            ask(config)


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


def test_a_local_model_is_what_lies_there_whatever_revision_is_set(model):
    config = ModelConfig(path=str(model), revision=COMMIT)
    before = identify_model(config)
    assert before == identify(model)
    save_file({"weight": torch.arange(6.0) + 1}, model / "model.safetensors")
    assert identify_model(config) != before


def test_weights_that_differ_behind_a_large_embedding_are_told_apart(model):
    """LoRA does not touch the embedding, which comes first in a file."""
    weights = {"a.embedding": torch.zeros(1 << 20), "b.q_proj": torch.zeros(1 << 18)}
    save_file(weights, model / "model.safetensors")
    before = identify(model)
    save_file(weights | {"b.q_proj": torch.full((1 << 18,), 1e-3)}, model / "model.safetensors")
    assert identify(model) != before


def test_one_number_of_a_small_tensor_is_told_apart(model):
    save_file({"weight": torch.zeros(1 << 14)}, model / "model.safetensors")
    before = identify(model)
    save_file(
        {"weight": torch.zeros(1 << 14).index_fill(0, torch.tensor([4000]), 1.0)}, model / "model.safetensors"
    )
    assert identify(model) != before


@pytest.mark.parametrize("change", ["config", "weight", "new file", "name", "size", "tokenizer"])
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
    elif change == "size":
        save_file({"weight": torch.arange(7.0)}, weights)
    else:
        (model / "tokenizer.json").write_text("{}")
    assert identify(model) != before


def test_what_is_no_weight_does_not_make_another_model(model):
    before = identify(model)
    (model / "README.md").write_text("about it")
    assert identify(model) == before


def test_of_another_directory_every_file_counts(model):
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text("{}")
    before = identify_directory(str(model))
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    assert identify_directory(str(model)) != before
