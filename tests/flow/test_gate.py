"""The gate: the rule by hand, and promotion against MLflow on SQLite and on a real server."""

import math
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from delia.errors import ConfigError, GateError, StoreError
from delia.evaluate.intervals import Interval
from delia.flow.gate import CHAMPION, PREVIOUS_CHAMPION, Decision, GateConfig, decide, promote
from delia.track.connection import lock_file
from delia.track.registry import fetch_adapter, get_version_by_alias, register_adapter, set_alias
from delia.track.runs import TrackConfig, Tracker

FIRST = Decision(promote=True, reasons=(), champion=None)
GOOD = Interval(estimate=0.9, low=0.88, high=0.92)


def over(champion: str | None) -> Decision:
    return Decision(promote=True, reasons=(), champion=champion)


def test_a_candidate_that_is_surely_not_worse_is_promoted_with_the_numbers():
    decision = decide({"follow": GOOD}, {"follow": (0.01, -0.015, 0.03)}, GateConfig(), champion="3")
    assert decision == Decision(
        promote=True,
        reasons=("follow: difference +0.0100 [-0.0150, +0.0300], must lie above -0.0200",),
        champion="3",
    )


def test_a_small_suite_with_a_wide_interval_does_not_pass():
    """Better on average and not significantly worse: an "inside its interval" rule would pass it."""
    decision = decide({"follow": GOOD}, {"follow": (0.05, -0.10, 0.20)}, GateConfig(), champion="3")
    assert not decision.promote
    assert decision.reasons == ("follow: difference +0.0500 [-0.1000, +0.2000], must lie above -0.0200",)


@pytest.mark.parametrize(
    ("low", "promoted"), [(-0.0201, False), (-0.02, False), (-0.0199, True), (math.nan, False)]
)
def test_the_lower_bound_must_lie_above_minus_the_margin(low: float, promoted: bool):  # noqa: FBT001
    decision = decide({"follow": GOOD}, {"follow": (0.0, low, 0.02)}, GateConfig(margin=0.02), champion="3")
    assert decision.promote is promoted


def test_every_suite_must_pass_and_only_the_failed_ones_are_reasons():
    decision = decide(
        {"follow": GOOD, "absent": GOOD, "general": GOOD},
        {"follow": (0.1, 0.05, 0.2), "absent": (-0.1, -0.2, 0.0), "general": (0.0, -0.04, 0.04)},
        GateConfig(margins={"general": 0.05}),
        champion="3",
    )
    assert not decision.promote
    assert [reason.split(":")[0] for reason in decision.reasons] == ["absent"]


def test_the_first_champion_only_holds_its_floors():
    assert decide({"follow": GOOD}, None, GateConfig()).reasons == ("first champion: only floors apply",)
    assert decide({"follow": GOOD}, None, GateConfig(floors={"follow": 0.88})).promote
    refused = decide({"follow": GOOD}, None, GateConfig(floors={"follow": 0.89}))
    assert not refused.promote
    assert refused.reasons == ("follow: lower bound 0.8800 of 0.9000, floor 0.8900",)


def test_a_floor_holds_against_a_champion_too():
    config = GateConfig(floors={"follow": 0.95})
    assert not decide({"follow": GOOD}, {"follow": (0.1, 0.05, 0.2)}, config, champion="3").promote


@pytest.mark.parametrize(
    ("differences", "config", "reason"),
    [
        ({}, GateConfig(), "follow: not compared with champion 3"),
        ({"follow": (0, 0, 0), "absent": (0, 0, 0)}, GateConfig(), "absent: a margin, a floor or"),
        ({"follow": (0, 0, 0)}, GateConfig(floors={"folow": 0.5}), "folow: a margin, a floor or"),
        ({"follow": (0, 0, 0)}, GateConfig(margins={"folow": 0.5}), "folow: a margin, a floor or"),
    ],
)
def test_a_suite_that_was_not_scored_or_not_compared_refuses(
    differences: dict[str, tuple[float, float, float]], config: GateConfig, reason: str
):
    decision = decide({"follow": GOOD}, differences, config, champion="3")
    assert not decision.promote
    assert len(decision.reasons) == 1
    assert decision.reasons[0].startswith(reason)


def test_no_scores_are_no_champion():
    assert decide({}, None, GateConfig()).reasons == ("no suite was scored",)


def test_differences_need_the_version_that_they_compare_with():
    with pytest.raises(ConfigError, match="pass both or neither"):
        decide({"follow": GOOD}, {"follow": (0.0, 0.0, 0.0)}, GateConfig())
    with pytest.raises(ConfigError, match="pass both or neither"):
        decide({"follow": GOOD}, None, GateConfig(), champion="3")


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    store = tmp_path_factory.mktemp("store")
    return Tracker(TrackConfig(tracking_uri=f"sqlite:///{store}/mlflow.db"), "/nowhere")


def write_adapter(directory: Path) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    return directory


def register_versions(tracker: Tracker, name: str, directory: Path, num_versions: int) -> None:
    adapter = write_adapter(directory / "adapter")
    for _ in range(num_versions):
        with tracker.run("train") as run:
            register_adapter(tracker, run, adapter, name=name, tags={})


def read_aliases(tracker: Tracker, name: str) -> tuple[str | None, str | None]:
    found = [get_version_by_alias(tracker, name, alias) for alias in (CHAMPION, PREVIOUS_CHAMPION)]
    champion, previous = (version.version if version else None for version in found)
    return champion, previous


def test_promotion_moves_the_champion_and_keeps_the_previous_one(tracker: Tracker, tmp_path: Path):
    register_versions(tracker, "moves", tmp_path, 2)
    assert promote(tracker, "moves", "1", FIRST, str(tmp_path)).uri == "models:/moves/1"
    assert read_aliases(tracker, "moves") == ("1", None)
    promote(tracker, "moves", "2", over("1"), str(tmp_path))
    assert read_aliases(tracker, "moves") == ("2", "1")


def test_promoting_again_changes_nothing(tracker: Tracker, tmp_path: Path):
    """A job that died after the promotion is run again with the decision that it had."""
    register_versions(tracker, "again", tmp_path, 2)
    promote(tracker, "again", "1", FIRST, str(tmp_path))
    for _ in range(2):
        promote(tracker, "again", "2", over("1"), str(tmp_path))
        assert read_aliases(tracker, "again") == ("2", "1")


def test_a_negative_decision_is_refused_with_its_reasons(tracker: Tracker, tmp_path: Path):
    register_versions(tracker, "refused", tmp_path, 1)
    decision = decide({"follow": GOOD}, None, GateConfig(floors={"follow": 0.95}))
    with pytest.raises(GateError, match=r"follow: lower bound 0\.8800 of 0\.9000, floor 0\.9500"):
        promote(tracker, "refused", "1", decision, str(tmp_path))
    assert read_aliases(tracker, "refused") == (None, None)


def test_a_champion_that_changed_since_the_comparison_is_not_replaced(tracker: Tracker, tmp_path: Path):
    register_versions(tracker, "stale", tmp_path, 3)
    set_alias(tracker, "stale", CHAMPION, "2")
    for decision in (FIRST, over("1")):
        with pytest.raises(GateError, match="now it is 2; evaluate against that one"):
            promote(tracker, "stale", "3", decision, str(tmp_path))
    assert read_aliases(tracker, "stale") == ("2", None)


def test_a_version_that_does_not_exist_is_named(tracker: Tracker, tmp_path: Path):
    with pytest.raises(StoreError, match="models:/nothing/1"):
        promote(tracker, "nothing", "1", FIRST, str(tmp_path))


def test_a_lock_on_a_bucket_is_refused(tracker: Tracker):
    with pytest.raises(ConfigError, match="local or mounted directory"):
        promote(tracker, "any", "1", FIRST, "s3://bucket/locks")


def test_promotion_waits_for_the_lock_and_sees_what_its_holder_did(tracker: Tracker, tmp_path: Path):
    register_versions(tracker, "org model", tmp_path, 2)
    outcome: list[BaseException] = []

    def promote_second() -> None:
        with pytest.raises(GateError) as caught:
            promote(tracker, "org model", "2", FIRST, str(tmp_path))
        outcome.append(caught.value)

    waiting = threading.Thread(target=promote_second)
    with lock_file(tmp_path / "org%20model.gate.lock"):
        waiting.start()
        waiting.join(timeout=1)  # without a lock it would be done by now
        assert waiting.is_alive()
        set_alias(tracker, "org model", CHAMPION, "1")
    waiting.join()
    assert "now it is 1" in str(outcome[0])
    assert read_aliases(tracker, "org model") == ("1", None)


def test_of_many_that_promote_at_once_one_wins(tracker: Tracker, tmp_path: Path):
    register_versions(tracker, "crowd", tmp_path, 4)

    def try_promote(version: str) -> str | None:
        try:
            return promote(tracker, "crowd", version, FIRST, str(tmp_path)).version
        except GateError:
            return None

    with ThreadPoolExecutor(4) as pool:
        winners = [version for version in pool.map(try_promote, "1234") if version]
    assert len(winners) == 1
    assert read_aliases(tracker, "crowd") == (winners[0], None)


@pytest.fixture
def server_uri(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = tmp_path / "server"
    store.mkdir()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{store}/mlflow.db",
        "--artifacts-destination", f"{store}/artifacts",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # four more processes
    }
    with (tmp_path / "server.log").open("w") as output:
        server = subprocess.Popen(command, cwd=store, env=environment, stdout=output, stderr=output)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300  # 11 s on an idle machine, 91 s seen on a busy one
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"mlflow server did not start:\n{log.read_text()[-3000:]}")


def test_a_server_takes_an_adapter_from_its_run_to_champion_and_back(server_uri: str, tmp_path: Path):
    tracker = Tracker(TrackConfig(tracking_uri=server_uri), "/nowhere")
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(RuntimeError), tracker.run("train", params={"seed": 1}, fingerprint="f") as first:
        first.log_metrics({"train/loss": 2.0}, 0)
        raise RuntimeError
    with tracker.run("train", params={"seed": 1}, fingerprint="f") as run:
        assert run.run_id == first.run_id
        run.log_metrics({"train/loss": 1.0}, 1)
        run.log_dataset("pool", digest="ab" * 16, source="/pool", context="training")
        for _ in range(2):
            made = register_adapter(tracker, run, adapter, name="served", tags={"mixture_root": "abc"})
        assert made.uri == "models:/served/1"
    promote(tracker, "served", made.version, FIRST, str(tmp_path / "locks"))
    local = fetch_adapter(tracker, "models:/served@champion", tmp_path / "fetched")
    assert (local / "adapter_model.safetensors").read_bytes() == bytes(range(256))
    found = tracker.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.artifact_uri.startswith("mlflow-artifacts:")
    history = tracker.client.get_metric_history(run.run_id, "train/loss")
    assert [(item.step, item.value) for item in history] == [(0, 2.0), (1, 1.0)]
    assert get_version_by_alias(tracker, "served", "nobody") is None
