"""A campaign on real Ray Tune, Ray Train and MLflow, with a scripted engine: what is kept of each trial."""

from pathlib import Path

import pytest

from delia.config import load_yaml
from delia.errors import ConfigError
from delia.flow.adapt import AdaptConfig, open_job
from delia.generate.engine import EngineConfig
from delia.mix.mixture import MixConfig
from delia.model.adapted import LoraConfig
from delia.recipes.starter import search_starter_sep
from delia.schema import Message, SeedTask, Task
from delia.search import campaign
from delia.search.campaign import TrialStoppedError, open_search, search
from delia.search.space import SearchConfig, plan_trials
from delia.store.tables import open_filesystem, read_manifest
from delia.store.tasks import digest_task, write_task
from delia.track.runs import TrackConfig, Tracker
from delia.train.settings import StageConfig, TrainConfig


def make_rows(suite: str, first: int) -> tuple[SeedTask, ...]:
    return tuple(
        SeedTask(
            task_id=f"{suite}-{i}",
            messages=(
                Message(role="user", content=f"{suite} {i} <sep>"),
                Message(role="assistant", content=f"it {i}"),
            ),
            suite=suite,
            phrasing=f"wording {i}",
        )
        for i in range(first, first + 4)
    )


@pytest.fixture
def config(tmp_path, monkeypatch) -> SearchConfig:
    """Ratio 0 alone and its anchors on a task of four rows: no pool is needed.

    The recipe's one baseline does ask for a pool: a search trains no baselines, so they must not stop it.
    """
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    rows = {
        "train": make_rows("follow", 0),
        "dev": make_rows("follow", 4) + make_rows("general", 4),
        "test": (),
    }
    task = Task(name="small", digest=digest_task(rows, ("<sep>",), ""), rows_by_split=rows, tokens=("<sep>",))
    write_task(str(tmp_path / "task"), task)
    whole = search_starter_sep()
    train = TrainConfig(lora=LoraConfig(rank=2, alpha=2), stages=(StageConfig(max_steps=2, warmup_steps=0),))
    arm = whole.recipe.arm.model_copy(update={"train": train, "mix": MixConfig(diverse_ratio=0.0)})
    recipe = whole.recipe.model_copy(
        update={
            "task": whole.recipe.task.model_copy(update={"path": str(tmp_path / "task")}),
            "pool": None,
            "arm": arm,
            "baselines": {"delia": arm.model_copy(update={"mix": MixConfig(diverse_ratio=10.0)})},
            "engine": EngineConfig(kind="scripted"),
            "output_dir": str(tmp_path / "runs"),
        }
    )
    return whole.model_copy(
        update={
            "recipe": recipe,
            "ratios": (0.0,),
            "num_anchor_seeds": 1,
            "task_suites": ("follow",),
            "kept_suites": ("general",),
        }
    )


def read_runs(config: SearchConfig) -> dict[str, str]:
    tracker = Tracker(TrackConfig(), default_store=f"{config.recipe.output_dir}/mlflow.db")
    experiment = tracker.client.get_experiment_by_name("delia")
    return {
        run.info.run_name: run.info.status for run in tracker.client.search_runs([experiment.experiment_id])
    }


def test_a_campaign_leaves_a_run_a_trial_and_settings_to_adapt_with(cluster, config):
    with pytest.raises(ConfigError, match="delia: diverse_ratio 10"):
        open_job(config.recipe)
    said: list[str] = []
    outcome = search(config, say=said.append)

    assert set(outcome.tradeoffs) == {"ratio-0-rate-1", "rows-only"}
    assert outcome.chosen in outcome.tradeoffs
    assert said == ["search: 2 trials: ratio-0-rate-1, rows-only"]
    assert read_runs(config) == {
        "search": "FINISHED",
        "trial ratio-0-rate-1": "FINISHED",
        "trial rows-only": "FINISHED",
    }
    filesystem, path = open_filesystem(outcome.config_address)
    with filesystem.open_input_stream(path) as stream:
        chosen = load_yaml(AdaptConfig, stream.read().decode())
    assert chosen.name == "starter_sep_searched"
    assert chosen.arm == plan_trials(config)[outcome.chosen]
    assert chosen.baselines == {}


def test_a_trial_that_breaks_is_closed_as_failed_and_the_others_are_kept(cluster, config):
    """At such a rate the second step's loss is no number."""
    train = config.recipe.arm.train.model_copy(update={"max_failures": 0})
    arm = config.recipe.arm.model_copy(update={"train": train})
    recipe = config.recipe.model_copy(update={"arm": arm})
    outcome = search(
        config.model_copy(update={"recipe": recipe, "learning_rate_factors": (1e36,)}),
        say=lambda text: None,
    )
    assert set(outcome.tradeoffs) == {"rows-only"}
    assert read_runs(config) == {
        "search": "FINISHED",
        "trial ratio-0-rate-1e+36": "FAILED",
        "trial rows-only": "FINISHED",
    }


def test_asha_scores_every_rung_and_the_last_is_the_whole_training(cluster, config):
    settings = {"scheduler": "asha", "rungs": (0.5, 1.0)}
    outcome = search(config.model_copy(update=settings), say=lambda text: None)
    assert set(outcome.tradeoffs) == {"ratio-0-rate-1", "rows-only"}

    tracker = Tracker(TrackConfig(), default_store=f"{config.recipe.output_dir}/mlflow.db")
    experiment = tracker.client.get_experiment_by_name("delia")
    trials = [
        run
        for run in tracker.client.search_runs([experiment.experiment_id])
        if run.info.run_name.startswith("trial")
    ]
    histories = [
        [item.step for item in tracker.client.get_metric_history(run.info.run_id, "search/best_score")]
        for run in trials
    ]
    assert histories == [[1, 2], [1, 2]]
    steps = {
        read_manifest(str(path.parent), kind="adapter").details["train"]["stages"][0]["max_steps"]
        for path in Path(config.recipe.output_dir).glob("adapters/*/manifest.json")
    }
    assert steps == {1, 2}


# ---- before any work


def test_a_suite_that_dev_does_not_have_is_refused(config):
    with pytest.raises(ConfigError, match=r"\['absent'\]; dev has the suites \['follow', 'general'\]"):
        open_search(config.model_copy(update={"kept_suites": ("general", "absent")}))


def test_a_ratio_over_the_pool_is_refused():
    config = search_starter_sep().model_copy(update={"ratios": (0.0, 30.0)})
    with pytest.raises(ConfigError, match="ratio-30-rate-1: diverse_ratio 30 x 100 task rows asks for 3000"):
        open_search(config)
    open_search(search_starter_sep())


def test_no_finished_trial_is_an_error(cluster, config, monkeypatch):
    monkeypatch.setattr(campaign, "_read_finished", lambda *args: {})
    monkeypatch.setattr(campaign, "_build_tuner", lambda *args: type("T", (), {"fit": lambda self: []})())
    with pytest.raises(TrialStoppedError, match="none of 2 trials ran to its end"):
        search(config, say=lambda text: None)
