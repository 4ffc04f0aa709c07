"""A campaign on real Ray Tune, Ray Train and MLflow, with a scripted engine: what is kept of each trial."""

from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.entities import Run

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


def open_tracker(config: SearchConfig) -> Tracker:
    return Tracker(TrackConfig(), default_store=f"{config.recipe.output_dir}/mlflow.db")


def read_runs(config: SearchConfig) -> dict[str, Run]:
    client = open_tracker(config).client
    experiment = client.get_experiment_by_name("delia")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_a_campaign_leaves_a_run_a_trial_and_settings_to_adapt_with(cluster, config):
    """A trial breaks: at its rate the second step's loss is no number. ASHA scores the others at every rung."""
    with pytest.raises(ConfigError, match="delia: diverse_ratio 10"):
        open_job(config.recipe)
    train = config.recipe.arm.train.model_copy(update={"max_failures": 0})
    arm = config.recipe.arm.model_copy(update={"train": train})
    recipe = config.recipe.model_copy(update={"arm": arm})
    settings = {"learning_rate_factors": (1.0, 1e36), "scheduler": "asha", "rungs": (0.5, 1.0)}
    config = config.model_copy(update={"recipe": recipe, **settings})
    said: list[str] = []
    outcome = search(config, say=said.append)

    assert set(outcome.tradeoffs) == {"ratio-0-rate-1", "rows-only"}
    assert outcome.chosen in outcome.tradeoffs
    assert said == ["search: 3 trials: ratio-0-rate-1, ratio-0-rate-1e+36, rows-only"]
    runs = read_runs(config)
    assert {name: run.info.status for name, run in runs.items()} == {
        "search": "FINISHED",
        "trial ratio-0-rate-1": "FINISHED",
        "trial ratio-0-rate-1e+36": "FAILED",
        "trial rows-only": "FINISHED",
    }
    filesystem, path = open_filesystem(outcome.config_address)
    with filesystem.open_input_stream(path) as stream:
        chosen = load_yaml(AdaptConfig, stream.read().decode())
    assert chosen.name == "starter_sep_searched"
    assert chosen.arm == plan_trials(config)[outcome.chosen]
    assert chosen.baselines == {}

    tracker = open_tracker(config)
    for name in ("trial ratio-0-rate-1", "trial rows-only"):
        history = tracker.client.get_metric_history(runs[name].info.run_id, "search/best_score")
        assert [item.step for item in history] == [1, 2]
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


def test_a_corrected_task_or_another_base_is_another_campaign(config):
    """Its trials would be found ended, and their adapters nowhere."""
    space = open_search(config)
    corrected = replace(space, task=replace(space.task, digest="another"))
    names = [
        campaign.name_campaign(config, item) for item in (space, corrected, replace(space, model_id="b"))
    ]
    assert len(set(names)) == 3
    assert names[0] == campaign.name_campaign(config, space)
