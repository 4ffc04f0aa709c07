"""A search campaign on Ray Tune: many (mix, train, evaluate) on one pool, scored on dev.

    arms -> Tune trials, each with Ray Train and vLLM inside -> trade-off of task against forgetting

The driver alone writes to MLflow: when the campaign has ended, a nested run a trial, closed with the
state in which the trial really ended; a killed driver leaves none behind that seems to run. Started
again, Tune restores the campaign, and finished adapters and scores are found in `output_dir`.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from delia.config import dump_yaml, fingerprint, flatten
from delia.errors import ConfigError, DeliaError
from delia.evaluate.harness import EvalReport
from delia.flow.adapt import AdaptConfig, log_report, open_job
from delia.flow.evaluation import eval_address, evaluate_adapters
from delia.flow.stages import make_pool, tracked_stage
from delia.flow.supply import check_ratios
from delia.flow.trial import ArmConfig, plan_arm, train_arms
from delia.flow.workspace import Workspace
from delia.schema import Split
from delia.search.space import SearchConfig, plan_trials, shorten
from delia.search.surface import Tradeoff, choose, summarise
from delia.store.pools import Pool, read_pool
from delia.store.tables import is_finished, join, write_bytes
from delia.track.runs import Run, Tracker

SEARCH_SPLIT: Split = "dev"
TRIAL = "trial"
Say = Callable[[str], None]


class TrialStoppedError(DeliaError):
    """A trial did not run to its end; its MLflow run is closed as FAILED."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a campaign found; `config_address` holds the chosen settings for `jobs/adapt.py --from`."""

    tradeoffs: dict[str, Tradeoff]
    chosen: str
    config_address: str


def open_search(config: SearchConfig) -> Workspace:
    """Read and check all that the trials will need, before any work; the recipe's baselines play no part.

    Raises:
        ConfigError: A trial's ratio is over the pool, or a suite is not on dev.
    """
    space = open_job(_without_baselines(config.recipe))
    rows = space.task.rows_by_split
    check_ratios(config.recipe.pool, plan_trials(config), num_task_rows=len(rows["train"]))
    present = {row.suite for row in rows[SEARCH_SPLIT]}
    missing = sorted({*config.task_suites, *config.kept_suites} - present)
    if missing:
        raise ConfigError(
            f"task_suites and kept_suites name {missing}; {SEARCH_SPLIT} has the suites {sorted(present)}"
        )
    return space


def _without_baselines(recipe: AdaptConfig) -> AdaptConfig:
    """Return the recipe with nothing to compare with: the trials are its comparison."""
    return recipe.model_copy(update={"baselines": {}})


def run_trial(config: AdaptConfig, arm_config: ArmConfig, space: Workspace, pool: Pool | None) -> EvalReport:
    """Train one arm on the stored pool and score it on dev; finished steps are found again."""
    arm = plan_arm(arm_config, space, pool)
    quiet = {TRIAL: lambda metrics, step: None}
    adapter = train_arms({TRIAL: arm}, space, pool, logs=quiet, max_concurrent=1)[TRIAL]
    rows = space.task.rows_by_split[SEARCH_SPLIT]
    return evaluate_adapters(config.evaluate, space, {TRIAL: adapter.path}, rows, engine=config.engine)[TRIAL]


def _trainable(params: dict[str, Any]) -> None:
    """Run inside a Tune trial: score each rung, the last being the whole training."""
    config = SearchConfig.model_validate(params["search"])
    space = open_job(config.recipe)
    pool = read_pool(params["pool"]) if params["pool"] else None
    arm = plan_trials(config)[params["name"]]
    for rung, share in enumerate(config.rungs, start=1):
        report = run_trial(config.recipe, shorten(arm, share), space, pool)
        tradeoff = summarise({TRIAL: report}, config)[TRIAL]
        tune.report({"score": tradeoff.task.estimate + tradeoff.kept.estimate, "rung": rung})


def name_campaign(config: SearchConfig, space: Workspace) -> str:
    """Return the name of a campaign: another task or base under equal settings is another one."""
    return f"search-{fingerprint(config, space.task.digest, space.model_id)}"


def _build_tuner(config: SearchConfig, name: str, pool_address: str) -> tune.Tuner:
    """Return a fresh tuner, or the one of a killed driver, restored."""
    output_dir = config.recipe.output_dir
    # a trial holds almost nothing itself: its trainer and its engine ask for their own CPUs
    trainable = tune.with_resources(_trainable, {"CPU": 0.01})
    path = join(output_dir, name)
    if tune.Tuner.can_restore(path):
        return tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=True)
    scheduler = None
    if config.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="rung", max_t=len(config.rungs), grace_period=1, reduction_factor=2
        )
    return tune.Tuner(
        trainable,
        param_space={
            "search": config.model_dump(mode="json"),
            "pool": pool_address,
            "name": tune.grid_search(list(plan_trials(config))),
        },
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            scheduler=scheduler,
            max_concurrent_trials=config.max_concurrent_trials,
        ),
        run_config=tune.RunConfig(name=name, storage_path=output_dir, verbose=0),
    )


def _record_trials(
    results: tune.ResultGrid, tracker: Tracker, parent: Run, arms: dict[str, ArmConfig]
) -> None:
    """Write one nested run a trial; one that broke is closed as FAILED."""
    for result in (results[index] for index in range(len(results))):
        name = (result.config or {})["name"]
        arm = arms[name]
        with (
            suppress(TrialStoppedError),
            tracker.run(f"trial {name}", parent=parent.run_id, params=flatten(arm)) as run,
        ):
            history = result.metrics_dataframe
            for row in history.to_dict("records") if history is not None else ():
                run.log_metrics({"search/best_score": float(row["score"])}, step=int(row["rung"]))
            if result.error is not None:
                raise TrialStoppedError(f"trial {name}: {type(result.error).__name__}")


def search(config: SearchConfig, *, say: Say) -> Outcome:
    """Run or resume a campaign; never opens the test rows.

    Raises:
        TrialStoppedError: No trial ran to its end.
    """
    space = open_search(config)
    recipe = _without_baselines(config.recipe).model_copy(update={"output_dir": space.output_dir})
    config = config.model_copy(update={"recipe": recipe})
    arms = plan_trials(config)
    with tracked_stage("search", config.recipe, space) as run:
        tracker = Tracker(config.recipe.track, default_store=join(space.output_dir, "mlflow.db"))
        pool = make_pool(config.recipe, space, run)
        pool_address = space.address("pools", pool.manifest.fingerprint) if pool else ""
        say(f"search: {len(arms)} trials: {', '.join(arms)}")
        name = name_campaign(config, space)
        results = _build_tuner(config, name, pool_address).fit()
        _record_trials(results, tracker, run, arms)
        reports = _read_finished(config, space, pool, arms)
        if not reports:
            raise TrialStoppedError(
                f"none of {len(arms)} trials ran to its end; see {config.recipe.output_dir}"
            )
        tradeoffs, chosen = summarise(reports, config), choose(reports, config)
        _log(run, reports[chosen], tradeoffs[chosen], num_trials=len(reports))
    best = config.recipe.model_copy(update={"arm": arms[chosen], "name": f"{config.recipe.name}_searched"})
    address = join(space.output_dir, name, "chosen.yaml")
    write_bytes(address, dump_yaml(best).encode())
    return Outcome(tradeoffs=tradeoffs, chosen=chosen, config_address=address)


def _read_finished(
    config: SearchConfig, space: Workspace, pool: Pool | None, arms: dict[str, ArmConfig]
) -> dict[str, EvalReport]:
    """Return the reports of the trials that ran to their last rung, read from storage."""
    reports, recipe = {}, config.recipe
    for name, arm in arms.items():
        final = shorten(arm, config.rungs[-1])
        adapter, rows = plan_arm(final, space, pool).address, space.task.rows_by_split[SEARCH_SPLIT]
        if is_finished(adapter) and is_finished(
            eval_address(recipe.evaluate, space, adapter, rows, engine=recipe.engine)
        ):
            reports[name] = run_trial(recipe, final, space, pool)
    return reports


def _log(run: Run, report: EvalReport, tradeoff: Tradeoff, *, num_trials: int) -> None:
    best = tradeoff.task.estimate + tradeoff.kept.estimate
    run.log_metrics({"search/trials": num_trials, "search/best_score": best}, step=0)
    log_report(run, report, None)
