"""What a reproduction plans and chooses; training and scoring are replaced, they have tests of their own."""

import dataclasses

import pytest

from delia.errors import ConfigError
from delia.evaluate.harness import EvalReport
from delia.flow import reproduction
from delia.flow.reproduction import RECIPE, TUNED, TUNED_ON_TASK, ReproduceConfig, reproduce
from delia.flow.trial import ArmConfig, plan_arm
from delia.mix.mixture import MixConfig
from delia.recipes.starter import reproduce_sep
from delia.schema import Message, Row
from delia.store.pools import Pool, index_rows
from delia.store.tables import Manifest
from delia.train.settings import StageConfig, TrainConfig


def make_arm(ratio: float, rate: float = 1e-3) -> ArmConfig:
    stages = (StageConfig(max_steps=1, learning_rate=rate),)
    return ArmConfig(mix=MixConfig(diverse_ratio=ratio), train=TrainConfig(stages=stages))


def make_pool(*instructions: str) -> Pool:
    rows = tuple(
        Row(
            row_id=f"d{i}",
            index=i,
            source="magpie",
            messages=(Message(role="user", content=text), Message(role="assistant", content="yes")),
        )
        for i, text in enumerate(instructions)
    )
    manifest = Manifest(kind="pool", fingerprint="p", root="r", counts={})
    return Pool(manifest=manifest, load=lambda: index_rows(rows))


class Bench:
    """Notes what is trained on what, and scores an adapter by the learning rate that it was trained with."""

    def __init__(self, space) -> None:
        self.space = space
        self.trained: dict[str, tuple[ArmConfig, tuple[str, ...], tuple[str, ...]]] = {}
        self.scored_on: list[str] = []

    def train(self, arms, space, pool, *, logs, max_concurrent, on_done):
        assert set(logs) == set(arms)
        wordings = tuple(sorted({row.phrasing for row in space.task.rows_by_split["train"]}))
        made = {}
        for label, arm in arms.items():
            self.trained[label] = (arm.config, arm.mixture.row_ids, wordings)
            rate = arm.config.train.stages[0].learning_rate
            made[label] = type("Adapter", (), {"path": f"{label}@{rate}"})()
        return made

    def score(self, config, space, addresses, rows, *, engine, on_done=lambda label: None):
        self.scored_on += [rows[0].task_id]
        ids = tuple(row.task_id for row in rows)
        reports = {}
        for label, address in addresses.items():
            share = float(address.rpartition("@")[2] or 0)
            reports[label] = EvalReport(
                task_ids=ids,
                suites=tuple(row.suite for row in rows),
                phrasings=ids,
                completions=ids,
                token_ids=((),) * len(ids),
                logprobs=((),) * len(ids),
                scores={"exact_match": tuple(float(i < share * len(ids)) for i in range(len(ids)))},
            )
        return reports


@pytest.fixture
def bench(small_space, monkeypatch) -> Bench:
    bench = Bench(small_space)
    pool = make_pool("capital of a", "capital of b", "count", "name a fox", "add", "list", "sort", "say")
    monkeypatch.setattr(reproduction, "open_job", lambda recipe: small_space)
    monkeypatch.setattr(reproduction, "connect", lambda config: None)
    monkeypatch.setattr(reproduction, "build_pool", lambda *args, **settings: pool)
    monkeypatch.setattr(reproduction, "train_arms", bench.train)
    monkeypatch.setattr(reproduction, "evaluate_adapters", bench.score)
    monkeypatch.setattr(reproduction, "measure_pool_drift", lambda *args, **settings: {})
    return bench


@pytest.fixture
def config() -> ReproduceConfig:
    whole = reproduce_sep()
    recipe = whole.recipe.model_copy(
        update={"arm": make_arm(1.0, 0.5), "baselines": {"plain": make_arm(0.0), "delia": make_arm(2.0)}}
    )
    return ReproduceConfig(recipe=recipe, seeds=(0, 3))


def test_every_arm_is_trained_and_scored_under_every_seed(bench, config):
    result = reproduce(config, say=lambda text: None)
    assert set(result.reports) == {"base", "plain", "delia", RECIPE}
    assert {name: len(reports) for name, reports in result.reports.items()} == {
        "base": 1, "plain": 2, "delia": 2, RECIPE: 2,
    }  # fmt: skip
    seeds = {label: (arm.train.seed, arm.mix.seed) for label, (arm, _, _) in bench.trained.items()}
    assert seeds["delia/0"] == (0, 42)
    assert seeds["delia/3"] == (3, 45)
    assert bench.trained["delia/0"][1] != bench.trained["delia/3"][1], "the mixture is drawn by the seed"
    assert result.tuned == {}


def test_the_best_plain_variant_is_chosen_on_dev_and_reported_on_test(bench, config):
    tuned = {"slow": make_arm(0.0, 0.25), "right": make_arm(0.0, 0.75), "fast": make_arm(0.0, 0.5)}
    result = reproduce(config.model_copy(update={"tuned": tuned}), say=lambda text: None)
    assert result.tuned == {TUNED: "right", TUNED_ON_TASK: "right"}
    assert bench.trained[f"{TUNED}/3"][0].train.stages == tuned["right"].train.stages
    splits = bench.space.task.rows_by_split
    assert bench.scored_on == [splits["dev"][0].task_id, splits["test"][0].task_id]
    assert len(result.reports[TUNED]) == 2
    assert "slow" not in result.reports


def test_who_measures_the_task_alone_may_choose_another_variant(bench, config, monkeypatch):
    """One variant is right on half of the task's rows and on all others, the other the opposite."""

    def score(settings, space, addresses, rows, *, engine, on_done=lambda label: None):
        reports = bench.score(settings, space, addresses, rows, engine=engine)
        own = {row.suite for row in space.task.rows_by_split["train"]}
        assert own < {row.suite for row in rows} or rows[0] in space.task.rows_by_split["test"]
        for label, report in reports.items():
            on_task, elsewhere = (1.0, 0.0) if label.startswith("greedy") else (0.5, 1.0)
            values = tuple(on_task if suite in own else elsewhere for suite in report.suites)
            reports[label] = dataclasses.replace(report, scores={"exact_match": values})
        return reports

    monkeypatch.setattr(reproduction, "evaluate_adapters", score)
    tuned = {"careful": make_arm(0.0, 0.25), "greedy": make_arm(0.0, 0.75)}
    result = reproduce(config.model_copy(update={"tuned": tuned}), say=lambda text: None)
    assert result.tuned == {TUNED: "careful", TUNED_ON_TASK: "greedy"}
    assert bench.trained[f"{TUNED_ON_TASK}/0"][0].train.stages == tuned["greedy"].train.stages


def test_the_controls_change_the_pool_or_the_wordings_and_nothing_else(bench, config):
    settings = {"narrow_word": "capital", "num_few": 3, "one_wording": True}
    reproduce(config.model_copy(update=settings), say=lambda text: None)

    def diverse(label: str) -> list[str]:
        return [row_id for row_id in bench.trained[label][1] if row_id.startswith("d")]

    assert len(diverse("delia/0")) == len(set(diverse("delia/0"))) == 8
    assert len(diverse("delia, narrow topic/0")) == 8
    assert set(diverse("delia, narrow topic/0")) == {"d0", "d1"}
    assert len(diverse("delia, 3 prompts/0")) == 8
    assert len(set(diverse("delia, 3 prompts/0"))) == 3
    assert sorted(diverse("delia, one wording/0")) == sorted(diverse("delia/0"))
    assert bench.trained["delia/0"][2] == ("wording 0", "wording 1")
    assert bench.trained["delia, one wording/0"][2] == ("wording 0",)
    stages = {arm.train.stages for label, (arm, _, _) in bench.trained.items() if label.startswith("delia")}
    assert len(stages) == 1


def test_one_wording_is_in_the_rows_text_too(small_space):
    rows = tuple(
        dataclasses.replace(
            row, messages=(Message(role="user", content=f"{i} {row.phrasing} <sep>"), *row.messages[1:])
        )
        for i, row in enumerate(small_space.task.rows_by_split["train"])
    )
    task = dataclasses.replace(
        small_space.task, rows_by_split={**small_space.task.rows_by_split, "train": rows}
    )
    space = dataclasses.replace(small_space, task=task)
    changed = reproduction._use_one_wording(space).task.rows_by_split["train"]
    assert [row.messages[0].content for row in changed] == [f"{i} wording 0 <sep>" for i in range(4)]
    assert {row.task_id for row in changed}.isdisjoint(row.task_id for row in rows)
    assert (
        plan_arm(make_arm(0.0), space, None).address
        != plan_arm(make_arm(0.0), reproduction._use_one_wording(space), None).address
    )


def test_foreign_answers_come_from_an_adapter_of_the_other_task(bench, config, monkeypatch):
    asked = []
    pool = make_pool(*(f"say {i}" for i in range(8)))
    monkeypatch.setattr(
        reproduction, "build_pool", lambda pool_config, *args, **settings: asked.append(pool_config) or pool
    )
    reproduce(config.model_copy(update={"foreign": reproduce_sep().foreign}), say=lambda text: None)
    own, foreign = asked
    assert "answered_by" not in own.synthesize.sources[0].synthesizer.knobs
    assert foreign.synthesize.sources[0].synthesizer.knobs["answered_by"].startswith("foreign model/0@")
    assert "delia, foreign answers/3" in bench.trained


def test_foreign_answers_without_a_pool_are_refused(bench, config):
    recipe = config.recipe.model_copy(update={"pool": None})
    broken = config.model_copy(update={"recipe": recipe, "foreign": reproduce_sep().foreign})
    with pytest.raises(ConfigError, match="needs a recipe with a pool"):
        reproduction._answer_by_other(broken, broken.foreign, bench.space, lambda text: None)
