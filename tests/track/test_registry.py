"""The registry against a real MLflow store on SQLite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from delia.errors import ConfigError, StoreError
from delia.track.registry import (
    DIGEST_TAG,
    digest_directory,
    fetch_adapter,
    get_version,
    get_version_by_alias,
    register_adapter,
    set_alias,
)
from delia.track.runs import Run, TrackConfig, Tracker


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    store = tmp_path_factory.mktemp("store")
    return Tracker(TrackConfig(tracking_uri=f"sqlite:///{store}/mlflow.db"), "/nowhere")


@pytest.fixture
def run(tracker: Tracker) -> Iterator[Run]:
    with tracker.run("train") as run:
        yield run


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "adapter_config.json").write_text('{"r": 8}')
    (directory / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    (directory / "tokenizer" / "tokenizer.json").write_text("{}")
    return directory


def test_an_adapter_comes_back_byte_for_byte_by_version_and_by_alias(
    tracker: Tracker, run: Run, adapter: Path, tmp_path: Path
):
    made = register_adapter(tracker, run, adapter, name="whole", tags={"mixture_root": "abc", "api_key": "k"})
    assert (made.name, made.version, made.uri) == ("whole", "1", "models:/whole/1")
    assert made.run_id == run.run_id
    found = get_version(tracker, "models:/whole/1")
    assert found == made
    assert found.tags == {
        "mixture_root": "abc",
        "api_key": "(masked)",
        DIGEST_TAG: digest_directory(adapter),
    }
    set_alias(tracker, "whole", "champion", made.version)
    assert get_version(tracker, "models:/whole@champion") == made
    for uri in ("models:/whole/1", "models:/whole@champion"):
        local = fetch_adapter(tracker, uri, tmp_path / uri[-1])
        assert local == tmp_path / uri[-1] / "whole-1" / "adapter"
        assert (local / "adapter_model.safetensors").read_bytes() == bytes(range(256))
        assert digest_directory(local) == digest_directory(adapter)


def test_registering_a_run_twice_returns_the_first_version(tracker: Tracker, run: Run, adapter: Path):
    first = register_adapter(tracker, run, adapter, name="twice", tags={"a": "1"})
    assert register_adapter(tracker, run, adapter, name="twice", tags={"a": "1"}) == first
    assert len(tracker.client.search_model_versions("name='twice'")) == 1


def test_one_run_registers_under_two_names_and_two_runs_under_one(tracker: Tracker, run: Run, adapter: Path):
    first = register_adapter(tracker, run, adapter, name="shared", tags={})
    assert register_adapter(tracker, run, adapter, name="elsewhere", tags={}).uri == "models:/elsewhere/1"
    with tracker.run("train") as second_run:
        second = register_adapter(tracker, second_run, adapter, name="shared", tags={})
    assert (first.version, second.version) == ("1", "2")


def test_a_changed_adapter_can_not_replace_what_its_run_registered(
    tracker: Tracker, run: Run, adapter: Path, tmp_path: Path
):
    before = digest_directory(adapter)
    register_adapter(tracker, run, adapter, name="changed", tags={})
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    for name in ("changed", "changed_elsewhere"):
        with pytest.raises(StoreError, match="from a new run"):
            register_adapter(tracker, run, adapter, name=name, tags={})
    assert digest_directory(fetch_adapter(tracker, "models:/changed/1", tmp_path / "got")) == before


def test_what_full_tuning_left_is_registered_as_an_adapter_is(
    tracker: Tracker, run: Run, adapter: Path, tmp_path: Path
):
    (adapter / "adapter_config.json").rename(adapter / "config.json")
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    made = register_adapter(tracker, run, adapter, name="tuned", tags={})
    assert digest_directory(fetch_adapter(tracker, made.uri, tmp_path / "got")) == digest_directory(adapter)


def test_a_directory_that_is_no_adapter_is_refused(tracker: Tracker, run: Run, tmp_path: Path):
    with pytest.raises(StoreError, match=r"no adapter_config\.json"):
        register_adapter(tracker, run, tmp_path, name="empty", tags={})
    assert get_version_by_alias(tracker, "empty", "champion") is None
    assert tracker.client.list_artifacts(run.run_id) == []


def test_weights_that_changed_in_the_store_are_not_handed_out(
    tracker: Tracker, run: Run, adapter: Path, tmp_path: Path
):
    register_adapter(tracker, run, adapter, name="tampered", tags={})
    stored = Path(tracker.client.get_run(run.run_id).info.artifact_uri) / "adapter"
    (stored / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(StoreError, match="was registered with digest"):
        fetch_adapter(tracker, "models:/tampered/1", tmp_path / "got")


def test_a_fetched_adapter_is_kept_and_a_damaged_one_is_fetched_again(
    tracker: Tracker, run: Run, adapter: Path, tmp_path: Path
):
    register_adapter(tracker, run, adapter, name="kept", tags={})
    first = fetch_adapter(tracker, "models:/kept/1", tmp_path / "got")
    weights = first / "adapter_model.safetensors"
    stored = Path(tracker.client.get_run(run.run_id).info.artifact_uri) / "adapter"
    stored.rename(tmp_path / "aside")  # a second download would fail
    assert fetch_adapter(tracker, "models:/kept/1", tmp_path / "got") == first
    (tmp_path / "aside").rename(stored)
    weights.write_bytes(b"half")
    fetch_adapter(tracker, "models:/kept/1", tmp_path / "got")
    assert weights.read_bytes() == bytes(range(256))


def test_an_alias_moves_and_a_missing_one_is_none(tracker: Tracker, run: Run, adapter: Path):
    register_adapter(tracker, run, adapter, name="moving", tags={})
    with tracker.run("train") as second_run:
        register_adapter(tracker, second_run, adapter, name="moving", tags={})
    assert get_version_by_alias(tracker, "moving", "champion") is None
    assert get_version_by_alias(tracker, "no_such_model", "champion") is None
    for version in ("1", "2"):
        set_alias(tracker, "moving", "champion", version)
        found = get_version_by_alias(tracker, "moving", "champion")
        assert found is not None
        assert found.version == version


@pytest.mark.parametrize("uri", ["models:/missing/1", "models:/missing@champion"])
def test_a_version_that_is_not_there_is_named(tracker: Tracker, uri: str, tmp_path: Path):
    with pytest.raises(StoreError, match=f"no version at '{uri}'"):
        fetch_adapter(tracker, uri, tmp_path)


@pytest.mark.parametrize("uri", ["models:/name", "name@champion", "runs:/1/adapter", "models:/a/Production"])
def test_an_address_that_is_not_the_registrys_is_refused(tracker: Tracker, uri: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="models:/NAME/3 or models:/NAME@alias"):
        fetch_adapter(tracker, uri, tmp_path)


def test_the_digest_sees_content_and_names_and_not_the_place(adapter: Path, tmp_path: Path):
    before = digest_directory(adapter)
    moved = adapter.rename(tmp_path / "moved")
    assert digest_directory(moved) == before
    weights = (moved / "adapter_model.safetensors").rename(moved / "adapter_other.safetensors")
    assert digest_directory(moved) != before  # though the order of the contents is the same
    weights.rename(moved / "adapter_model.safetensors").write_bytes(b"other")
    assert digest_directory(moved) != before
