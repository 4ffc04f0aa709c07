"""`delia ask`: the adapter and its base side by side, from a directory and from the registry."""

from pathlib import Path

import pytest

from delia.cli import main
from delia.errors import ConfigError, StoreError
from delia.flow.ask import ask
from delia.track.registry import register_adapter, set_alias
from delia.track.runs import TrackConfig, Tracker

QUESTION = "count the words : fox cat owl . use the <sep> format ."


def split(answer: str) -> tuple[str, str]:
    adapter, base = answer.split("\n")
    assert (adapter.partition(": ")[0], base.partition(": ")[0]) == ("adapter", "base")
    return adapter.partition(": ")[2], base.partition(": ")[2]


def test_an_adapter_that_changes_nothing_answers_as_its_base_and_another_does_not(small_space, make_adapter):
    adapter, base = split(ask(make_adapter(small_space, shift=0.0), QUESTION))
    assert adapter == base != ""
    changed, same_base = split(ask(make_adapter(small_space, shift=0.5, seed=1), QUESTION))
    assert changed != base
    assert same_base == base


def test_a_registered_version_is_asked_by_its_alias(small_space, make_adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    directory = make_adapter(small_space, shift=0.5)
    tracker = Tracker(TrackConfig(), default_store=str(tmp_path / "runs" / "mlflow.db"))
    with tracker.run("train") as run:
        version = register_adapter(tracker, run, directory, name="small", tags={})
    set_alias(tracker, "small", "champion", version.version)

    assert main(["ask", "models:/small@champion", QUESTION]) == 0
    assert capsys.readouterr().out.rstrip("\n") == ask(directory, QUESTION)
    with pytest.raises(StoreError, match="no version at 'models:/small@candidate'"):
        ask("models:/small@candidate", QUESTION)
    with pytest.raises(ConfigError, match="models:/NAME/3 or models:/NAME@alias"):
        ask("models:/small", QUESTION)


def test_a_base_whose_chat_format_has_changed_is_refused(small_space, make_adapter):
    directory = make_adapter(small_space, shift=0.0)
    manifest = Path(directory, "manifest.json")
    manifest.write_text(manifest.read_text().replace(small_space.chat.template_hash, "0" * 32))
    with pytest.raises(StoreError, match=r"was trained with chat format 0+, .* now has"):
        ask(directory, QUESTION)


def test_a_place_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(
        StoreError, match=r"give the path that `jobs/adapt.py` printed, or models:/NAME@ALIAS"
    ):
        ask(str(tmp_path / "none"), QUESTION)
    with pytest.raises(StoreError, match="has no manifest"):
        ask(str(tmp_path), QUESTION)
