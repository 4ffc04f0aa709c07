"""The claims of the README measured again: seeds, baselines and controls on the test split.

Every arm is trained under each seed; scores of seeds are shown apart and compared in pairs. The
controls of DELIA's two claims: other answers than the model's own (foreign), little diversity (one
narrow topic, a few prompts repeated), and a task whose instruction has one wording only.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from delia.config import FrozenConfig
from delia.errors import ConfigError
from delia.evaluate.harness import BASE, EvalReport
from delia.evaluate.intervals import Interval
from delia.flow.adapt import AdaptConfig, open_job
from delia.flow.evaluation import evaluate_adapters, measure_pool_drift
from delia.flow.pool import build_pool
from delia.flow.preflight import check_split
from delia.flow.table import compare
from delia.flow.trial import ArmConfig, plan_arm, train_arms
from delia.flow.workspace import Workspace, connect
from delia.schema import Split
from delia.store.pools import Pool, index_rows
from delia.synthesize.sources import SourceConfig

Say = Callable[[str], None]
TEST: Split = "test"
DEV: Split = "dev"
RECIPE = "recipe"
TUNED = "plain, best on dev"
TUNED_ON_TASK = "plain, best on its task's dev"


class ReproduceConfig(FrozenConfig):
    """A recipe, its arms and controls, and the seeds.

    `tuned` are variants of plain tuning; the one that is best over all suites of dev is reported as `TUNED`, and
    what those would choose who measure the task alone, best over the suites of the train rows, as
    `TUNED_ON_TASK`; of equal ones the first. Controls change the pool or the task of the arm `control_arm`:
    `foreign` is a recipe whose baseline `plain`, tuned on another task, answers instead of the base;
    `narrow_word` is in every instruction of the narrow pool; `num_few` prompts are repeated; `one_wording`
    gives all task rows one phrasing.
    """

    recipe: AdaptConfig
    seeds: tuple[int, ...] = (0, 1, 2)
    extra_arms: dict[str, ArmConfig] = {}
    tuned: dict[str, ArmConfig] = {}
    control_arm: str = "delia"
    foreign: AdaptConfig | None = None
    narrow_word: str = ""
    num_few: int | None = Field(default=None, gt=0)
    one_wording: bool = False


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """Reports by arm, one a seed, and the drift of each; the base has one report.

    `tuned` is the variant of plain tuning that each arm chosen on dev stands for.
    """

    reports: Mapping[str, tuple[EvalReport, ...]]
    drift: Mapping[str, tuple[float, ...]]
    tuned: Mapping[str, str]
    metric: str

    def difference(self, ours: str, theirs: str, suite: str) -> Interval:
        """Return ours minus theirs on a suite over all seeds, paired and clustered by wording."""
        return compare(self.reports[ours], self.reports[theirs], suite, self.metric)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """An arm with the pool and the task rows that it draws from."""

    config: ArmConfig
    pool: Pool | None
    space: Workspace


def reproduce(config: ReproduceConfig, *, say: Say) -> Reproduction:
    """Train and score every arm under every seed; what is finished already is taken from storage."""
    recipe = config.recipe
    space = open_job(recipe)
    for split in (TEST, *([DEV] if config.tuned else [])):
        check_split(space.task, split)
    connect(recipe.ray)
    pool = _make_pool(recipe, space)
    named = {**recipe.baselines, **config.extra_arms, RECIPE: recipe.arm}
    plans = {name: _Plan(config=arm, pool=pool, space=space) for name, arm in named.items()}
    if pool is not None and config.control_arm in named:
        plans.update(_plan_controls(config, named[config.control_arm], space, pool, say))
    tuned = _choose_on_dev(config, space, say) if config.tuned else {}
    plans |= {name: _Plan(config=config.tuned[tuned[name]], pool=None, space=space) for name in tuned}
    trained = _train(config, plans, config.seeds, say)
    rows = space.task.rows_by_split[TEST]
    say(f"evaluate: {len(trained) + 1} models x {len(rows)} test rows")
    reports = evaluate_adapters(
        recipe.evaluate,
        space,
        {"base": BASE, **trained},
        rows,
        engine=recipe.engine,
        on_done=lambda label: say(f"evaluate: {label} is scored"),
    )
    drift = measure_pool_drift(
        trained, space, pool, train=recipe.arm.train, num_rows=recipe.evaluate.num_kl_rows
    )
    return Reproduction(
        reports={"base": (reports["base"],)}
        | {name: tuple(reports[f"{name}/{seed}"] for seed in config.seeds) for name in plans},
        drift={name: tuple(drift[f"{name}/{seed}"] for seed in config.seeds) for name in plans if drift},
        tuned=tuned,
        metric=space.task.metrics[0],
    )


def _make_pool(recipe: AdaptConfig, space: Workspace) -> Pool | None:
    if recipe.pool is None:
        return None
    return build_pool(recipe.pool, space, engine=recipe.engine, log=lambda metrics, step: None)


def _train(
    config: ReproduceConfig, plans: Mapping[str, _Plan], seeds: tuple[int, ...], say: Say
) -> dict[str, str]:
    """Train every plan under every seed; return the adapters' addresses by `name/seed`."""
    groups: dict[tuple[int, int], list[str]] = {}  # arms on one pool wait for each other at the end only
    for name, plan in plans.items():
        groups.setdefault((id(plan.space), id(plan.pool)), []).append(name)
    addresses: dict[str, str] = {}
    for names in groups.values():
        space, pool = plans[names[0]].space, plans[names[0]].pool
        arms = {
            f"{name}/{seed}": plan_arm(_reseed(plans[name].config, seed), space, pool)
            for name in names
            for seed in seeds
        }
        adapters = train_arms(
            arms,
            space,
            pool,
            logs=dict.fromkeys(arms, lambda metrics, step: None),
            max_concurrent=config.recipe.max_concurrent_arms,
            on_done=lambda label, seconds: say(f"train: {label} took {seconds:.0f} s"),
        )
        addresses |= {label: adapter.path for label, adapter in adapters.items()}
    return addresses


def _reseed(arm: ArmConfig, seed: int) -> ArmConfig:
    return ArmConfig(
        mix=arm.mix.model_copy(update={"seed": arm.mix.seed + seed}),
        train=arm.train.model_copy(update={"seed": arm.train.seed + seed}),
    )


def _repeat(arm: ArmConfig, num_distinct: int) -> ArmConfig:
    return arm.model_copy(update={"mix": arm.mix.model_copy(update={"num_distinct": num_distinct})})


def _plan_controls(
    config: ReproduceConfig, arm: ArmConfig, space: Workspace, pool: Pool, say: Say
) -> dict[str, _Plan]:
    """Return the controls of both claims: diversity, and answers of the model's own."""
    label, plans = config.control_arm, {}
    if config.narrow_word:
        rows = tuple(row for row in pool.rows if config.narrow_word in row.instruction)
        narrow = dataclasses.replace(pool, load=lambda: index_rows(rows))
        plans[f"{label}, narrow topic"] = _Plan(config=_repeat(arm, len(rows)), pool=narrow, space=space)
    if config.num_few is not None:
        few = _repeat(arm, config.num_few)
        plans[f"{label}, {config.num_few} prompts"] = _Plan(config=few, pool=pool, space=space)
    if config.one_wording:
        plans[f"{label}, one wording"] = _Plan(config=arm, pool=pool, space=_use_one_wording(space))
    if config.foreign is not None:
        foreign = _answer_by_other(config, config.foreign, space, say)
        plans[f"{label}, foreign answers"] = _Plan(config=arm, pool=foreign, space=space)
    return plans


def _answer_by_other(config: ReproduceConfig, other: AdaptConfig, space: Workspace, say: Say) -> Pool:
    """Make the pool again, answered by the base tuned plainly on another task."""
    recipe = config.recipe
    if recipe.pool is None:
        raise ConfigError("the control of foreign answers needs a recipe with a pool")
    other_space = open_job(other)
    plan = _Plan(config=other.baselines["plain"], pool=None, space=other_space)
    address = _train(config, {"foreign model": plan}, (0,), say)["foreign model/0"]
    sources = tuple(_let_answer(source, address) for source in recipe.pool.synthesize.sources)
    synthesize = recipe.pool.synthesize.model_copy(update={"sources": sources})
    engine = recipe.engine.model_copy(update={"lora_rank": 16})
    pool_config = recipe.pool.model_copy(update={"synthesize": synthesize})
    return build_pool(pool_config, space, engine=engine, log=lambda metrics, step: None)


def _let_answer(source: SourceConfig, adapter: str) -> SourceConfig:
    """Return the source with an adapter in the place of the base where it answers."""
    if source.synthesizer is None:
        raise ConfigError(
            f"source {source.name!r} is a file of rows: nobody answers there; give it a synthesizer"
        )
    knobs = {**source.synthesizer.knobs, "answered_by": adapter}
    return source.model_copy(update={"synthesizer": source.synthesizer.model_copy(update={"knobs": knobs})})


def _use_one_wording(space: Workspace) -> Workspace:
    """Give every train row the first row's wording of the instruction."""
    rows = space.task.rows_by_split["train"]
    wording = rows[0].phrasing
    changed = tuple(
        dataclasses.replace(
            row,
            task_id=f"{row.task_id}-one",
            phrasing=wording,
            messages=tuple(
                dataclasses.replace(turn, content=turn.content.replace(row.phrasing, wording))
                for turn in row.messages
            ),
        )
        for row in rows
    )
    task = dataclasses.replace(space.task, rows_by_split={**space.task.rows_by_split, "train": changed})
    return dataclasses.replace(space, task=task)


def _choose_on_dev(config: ReproduceConfig, space: Workspace, say: Say) -> dict[str, str]:
    """Return the best variant of plain tuning over all suites of dev, and over the task's own, first seed."""
    plans = {name: _Plan(config=arm, pool=None, space=space) for name, arm in config.tuned.items()}
    trained = _train(config, plans, config.seeds[:1], say)
    rows = space.task.rows_by_split[DEV]
    engine = config.recipe.engine
    reports = evaluate_adapters(config.recipe.evaluate, space, trained, rows, engine=engine)
    metric, trained_suites = space.task.metrics[0], {row.suite for row in space.task.rows_by_split["train"]}
    over_all, over_task = {}, {}
    for label, report in reports.items():
        name, scores = label.rpartition("/")[0], np.array(report.scores[metric])
        over_all[name] = float(scores.mean())
        over_task[name] = float(scores[[suite in trained_suites for suite in report.suites]].mean())
        say(
            f"dev: {name}: all suites {over_all[name]:.3f}, {', '.join(sorted(trained_suites))} {over_task[name]:.3f}"
        )
    return {
        TUNED: max(over_all, key=lambda name: over_all[name]),
        TUNED_ON_TASK: max(over_task, key=lambda name: over_task[name]),
    }
