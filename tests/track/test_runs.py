"""Runs against a real MLflow store on SQLite; nothing is mocked."""

import json
import logging
from pathlib import Path

import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from delia.errors import ConfigError
from delia.track.masking import MASK, MAX_VALUE_LENGTH, hide_secrets, is_secret_name, render_value
from delia.track.runs import CHANGED_TAG, ERROR_TAG, PARENT_TAG, Run, TrackConfig, Tracker

SLOW = {"max_buffered": 10_000, "flush_seconds": 3600.0}


@pytest.fixture
def tracker(store: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Tracker(TrackConfig(), str(store / "mlflow.db"))


def read(tracker: Tracker, run: Run) -> MlflowRun:
    return tracker.client.get_run(run.run_id)


def read_steps(tracker: Tracker, run: Run, name: str) -> list[tuple[int, float]]:
    return [(item.step, item.value) for item in tracker.client.get_metric_history(run.run_id, name)]


def test_a_run_that_ends_well_is_finished_and_holds_what_was_logged(tracker: Tracker, store: Path):
    with tracker.run("train", params={"train.seed": 7}, tags={"pool": "abc"}) as run:
        run.log_metrics({"train/loss": 2.5, "train/learning_rate": 1e-4}, 0)
        run.log_metrics({"train/loss": 1.5}, 1)
        run.log_text("seed: 7\n", "config.yaml")
    found = read(tracker, run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "train"
    assert found.data.params == {"train.seed": "7"}
    assert found.data.tags["pool"] == "abc"
    assert read_steps(tracker, run, "train/loss") == [(0, 2.5), (1, 1.5)]
    assert (store / "artifacts" / run.run_id / "artifacts" / "config.yaml").read_text() == "seed: 7\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("hf_abcdefghijklmnopqrst"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(3), "KILLED"),
    ],
)
def test_an_exception_passes_and_closes_the_run_with_its_type_alone(
    tracker: Tracker, error: BaseException, status: str
):
    with pytest.raises(type(error)) as caught, tracker.run("train") as run:
        run.log_metrics({"train/loss": 3.0}, 4)
        raise error
    assert caught.value is error
    found = read(tracker, run)
    assert found.info.status == status
    assert found.data.tags[ERROR_TAG] == type(error).__name__
    assert "hf_abc" not in json.dumps(found.to_dictionary())
    assert read_steps(tracker, run, "train/loss") == [(4, 3.0)]


def test_metrics_wait_in_the_buffer_until_it_is_full(store: Path):
    tracker = Tracker(TrackConfig(max_buffered=3, flush_seconds=3600), str(store / "mlflow.db"))
    with tracker.run("train") as run:
        run.log_metrics({"train/loss": 1.0}, 0)
        run.log_metrics({"train/loss": 2.0}, 1)
        assert read_steps(tracker, run, "train/loss") == []
        run.log_metrics({"train/loss": 3.0}, 2)
        assert read_steps(tracker, run, "train/loss") == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_metrics_leave_when_their_time_is_up(store: Path):
    tracker = Tracker(TrackConfig(max_buffered=10_000, flush_seconds=0), str(store / "mlflow.db"))
    with tracker.run("train") as run:
        run.log_metrics({"train/loss": 1.0}, 0)
        assert read_steps(tracker, run, "train/loss") == [(0, 1.0)]


def test_more_metrics_than_one_request_takes_all_arrive(store: Path):
    tracker = Tracker(TrackConfig(**SLOW), str(store / "mlflow.db"))
    with tracker.run("train") as run:
        for step in range(1203):
            run.log_metrics({"train/loss": step / 2}, step)
        assert read_steps(tracker, run, "train/loss") == []
    assert read_steps(tracker, run, "train/loss") == [(step, step / 2) for step in range(1203)]


def test_a_refusing_store_delays_metrics_and_does_not_end_the_training(
    store: Path, caplog: pytest.LogCaptureFixture
):
    """A deleted run refuses values as a server that is away does."""
    tracker = Tracker(TrackConfig(max_buffered=2, flush_seconds=3600), str(store / "mlflow.db"))
    with tracker.run("train") as run:
        tracker.client.delete_run(run.run_id)
        run.log_metrics({"train/loss": 1.0, "train/learning_rate": 0.1}, 0)
        assert "metrics are kept" in caplog.text
        with pytest.raises(MlflowException, match="deleted"):
            run.flush()
        tracker.client.restore_run(run.run_id)
        run.log_metrics({"train/loss": 2.0}, 1)
        assert read_steps(tracker, run, "train/loss") == []  # twice as patient after a failure
        run.log_metrics({"train/loss": 3.0}, 2)
        assert read_steps(tracker, run, "train/loss") == [(0, 1.0), (1, 2.0), (2, 3.0)]
        run.log_metrics({"train/loss": 4.0, "train/learning_rate": 0.1}, 3)
        assert read_steps(tracker, run, "train/loss")[-1] == (3, 4.0)  # and patient no longer


def test_the_first_error_passes_where_the_run_can_not_be_closed(
    tracker: Tracker, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(ValueError, match="the real reason"), tracker.run("train") as run:
        tracker.client.delete_run(run.run_id)
        raise ValueError("the real reason")
    assert "could not be closed as FAILED" in caplog.text


def test_an_unknown_metric_is_refused_and_nothing_of_its_step_is_kept(tracker: Tracker):
    with tracker.run("train") as run:
        with pytest.raises(ConfigError, match="did you mean 'train/loss'"):
            run.log_metrics({"train/learning_rate": 0.1, "train/los": 1.0}, 0)
        run.flush()
        assert read(tracker, run).data.metrics == {}


def test_a_child_names_its_parent(tracker: Tracker):
    with tracker.run("search") as parent, tracker.run("trial", parent=parent.run_id) as child:
        assert read(tracker, parent).info.status == "RUNNING"
    assert read(tracker, child).data.tags[PARENT_TAG] == parent.run_id
    assert read(tracker, parent).info.status == "FINISHED"


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_an_unfinished_run_of_the_same_fingerprint_goes_on(tracker: Tracker, error: BaseException):
    fingerprint = f"resume-{type(error).__name__}"
    with pytest.raises(type(error)), tracker.run("train", fingerprint=fingerprint) as first:
        first.log_metrics({"train/loss": 2.0}, 0)
        raise error
    with tracker.run("train", fingerprint=fingerprint) as second:
        assert second.run_id == first.run_id
        assert read(tracker, second).info.status == "RUNNING"
        second.log_metrics({"train/loss": 1.0}, 1)
    assert read(tracker, second).info.status == "FINISHED"
    assert read_steps(tracker, second, "train/loss") == [(0, 2.0), (1, 1.0)]


def test_a_run_whose_process_was_killed_hard_goes_on(tracker: Tracker):
    """SIGKILL leaves a run RUNNING for ever; a run that was never closed looks the same."""
    with (
        tracker.run("train", fingerprint="hard") as first,
        tracker.run("train", fingerprint="hard") as second,
    ):
        assert second.run_id == first.run_id


def test_a_finished_run_and_runs_of_another_kind_are_not_reopened(tracker: Tracker):
    with tracker.run("train", fingerprint="done") as finished:
        pass
    with pytest.raises(RuntimeError), tracker.run("train", fingerprint="half") as failed:
        raise RuntimeError
    with (
        tracker.run("train", fingerprint="done") as again,
        tracker.run("train", fingerprint="other") as other_fingerprint,
        tracker.run("evaluate", fingerprint="half") as other_name,
        tracker.run("train", fingerprint="half", parent=again.run_id) as other_parent,
    ):
        runs = [finished, failed, again, other_fingerprint, other_name, other_parent]
        assert len({run.run_id for run in runs}) == len(runs)


def test_a_run_is_reopened_by_its_id(tracker: Tracker):
    with tracker.run("train", params={"seed": 1}) as first:
        pass
    with tracker.resume(first.run_id) as second:
        assert read(tracker, second).info.status == "RUNNING"
        second.log_params({"seed": 1, "rank": 8})
    assert read(tracker, second).data.params == {"seed": "1", "rank": "8"}
    assert read(tracker, second).info.status == "FINISHED"


def test_a_fingerprint_that_could_break_the_query_is_refused(tracker: Tracker):
    with pytest.raises(ConfigError, match="fingerprint"), tracker.run("train", fingerprint="a' or '1"):
        pass


def test_a_parameter_that_changed_on_resume_is_kept_in_a_tag_and_told(
    tracker: Tracker, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(RuntimeError), tracker.run("train", params={"output": "/a"}, fingerprint="moved"):
        raise RuntimeError
    with (
        caplog.at_level(logging.WARNING),
        tracker.run("train", params={"output": "/b"}, fingerprint="moved") as run,
    ):
        pass
    assert read(tracker, run).data.params == {"output": "/a"}
    assert read(tracker, run).data.tags[f"{CHANGED_TAG}.output"] == "/b"
    assert "goes on with other parameters: ['output']" in caplog.text


def test_many_and_long_parameters_arrive(tracker: Tracker):
    params: dict[str, object] = {f"knob.{i}": i for i in range(205)}
    with tracker.run("train", params={**params, "text": "a" * 6001, "fits": "b" * 6000}) as run:
        pass
    found = read(tracker, run).data.params
    assert {name: found[name] for name in params} == {name: str(value) for name, value in params.items()}
    assert found["fits"] == "b" * 6000
    assert found["text"].startswith("aaaa")
    assert "6001 characters, hash " in found["text"]
    assert len(found["text"]) == MAX_VALUE_LENGTH


def test_long_values_that_differ_at_the_end_stay_apart():
    assert render_value("text", "a" * 9000 + "1") != render_value("text", "a" * 9000 + "2")


@pytest.mark.parametrize(
    "name",
    [
        "password", "db.password", "hub_token", "track.hf_token", "token", "api_key", "provider.apiKey",
        "access_key", "client_secret", "secrets.name", "auth-token", "AWS_SECRET_ACCESS_KEY",
    ],
)  # fmt: skip
def test_a_credential_is_masked(name: str):
    assert is_secret_name(name)
    assert render_value(name, "s3cr3t") == MASK


@pytest.mark.parametrize(
    "name",
    [
        "tokens", "task.tokens", "max_tokens", "max_new_tokens", "eos_token", "token_weighter", "tokenizer",
        "trained_tokens", "token_row", "keys", "key", "secretary", "sort_key", "train.tokens_per_step",
        "token_api_calls",
    ],
)  # fmt: skip
def test_a_setting_about_tokens_is_no_secret(name: str):
    assert not is_secret_name(name)
    assert render_value(name, "512") == "512"


def test_a_vocabulary_token_and_an_unset_secret_are_shown():
    assert render_value("condense.token", "<sep>") == "<sep>"
    assert render_value("hub.token", None) == "None"


def test_a_password_inside_a_uri_is_masked_under_any_name(tracker: Tracker):
    uri = "postgresql://me:p@ss@db.local:5432/mlflow"
    assert hide_secrets(uri) == f"postgresql://{MASK}@db.local:5432/mlflow"
    assert hide_secrets("http://db.local:5000/a@b") == "http://db.local:5000/a@b"
    with tracker.run("train", params={"track.uri": uri}, tags={"place": uri, "api_key": "k"}) as run:
        pass
    found = read(tracker, run).data
    assert found.params["track.uri"] == hide_secrets(uri)
    assert (found.tags["place"], found.tags["api_key"]) == (hide_secrets(uri), MASK)


def test_a_dataset_is_named_by_its_root(tracker: Tracker):
    root = "0123456789abcdef" * 2
    with tracker.run("train") as run:
        run.log_dataset("pool", digest=root, source="s3://bucket/pool", context="training")
        with pytest.raises(ConfigError, match="1 to 36 characters"):
            run.log_dataset("pool", digest=root * 2, source="/pool", context="training")
    (logged,) = read(tracker, run).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("pool", root)
    assert json.loads(logged.dataset.source) == {"uri": "s3://bucket/pool"}
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]


def test_a_directory_is_logged_with_its_content(tracker: Tracker, tmp_path: Path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("x")
    with tracker.run("train") as run:
        run.log_artifacts(tmp_path, "report")
    logged = tracker.client.list_artifacts(run.run_id, "report/deep")
    assert [item.path for item in logged] == ["report/deep/a.txt"]
