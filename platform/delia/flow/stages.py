"""The single stages of the path, one tracked run each: what `jobs/*.py` other than `adapt` start.

A stage that needs an earlier one takes it from `output_dir`, or does it first.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from delia.config import dump_yaml, fingerprint, flatten
from delia.errors import ConfigError
from delia.evaluate.harness import BASE
from delia.flow.adapt import (
    MAIN,
    AdaptConfig,
    describe_counts,
    log_mixture,
    log_pool,
    log_report,
    open_job,
)
from delia.flow.evaluation import evaluate_adapters
from delia.flow.pool import build_pool, pool_fingerprint
from delia.flow.preflight import check_split
from delia.flow.table import format_scores
from delia.flow.trial import Arm, build_input, plan_arm, train_arms
from delia.flow.workspace import Workspace, connect
from delia.schema import Adapter
from delia.store.adapters import fetch_adapter
from delia.store.pools import Pool, read_pool
from delia.store.tables import is_finished, join
from delia.track.runs import Run, Tracker
from delia.train.preview import describe_packing, preview_rows

Say = Callable[[str], None]


@contextmanager
def tracked_stage(name: str, config: AdaptConfig, space: Workspace) -> Iterator[Run]:
    """Open the run of a stage that is a job of its own."""
    connect(config.ray)
    tracker = Tracker(config.track, default_store=join(space.output_dir, "mlflow.db"))
    with tracker.run(
        name, params=flatten(config), tags={"delia.recipe": config.name}, fingerprint=fingerprint(config)
    ) as run:
        run.log_text(dump_yaml(config), "config.yaml")
        yield run


def make_pool(
    config: AdaptConfig,
    space: Workspace,
    run: Run,
    *,
    stored_only: bool = False,
    allowed_modules: tuple[str, ...] = (),
) -> Pool | None:
    """Return the recipe's pool; with `stored_only` from stored candidates alone."""
    if config.pool is None:
        return None
    pool = build_pool(
        config.pool,
        space,
        engine=None if stored_only else config.engine,
        log=run.log_metrics,
        allowed_modules=allowed_modules,
    )
    log_pool(run, space, pool)
    return pool


def synthesize_pool(
    config: AdaptConfig, *, say: Say, stored_only: bool = False, allowed_modules: tuple[str, ...] = ()
) -> Pool:
    """Make the recipe's pool; with `stored_only` curate stored candidates and generate nothing."""
    space = open_job(config)
    name = "curate" if stored_only else "synthesize"
    with tracked_stage(name, config, space) as run:
        pool = make_pool(config, space, run, stored_only=stored_only, allowed_modules=allowed_modules)
    if pool is None:
        raise ConfigError(f"recipe {config.name!r} has no pool; set pool to make one")
    say(f"{name}: {describe_counts(pool.manifest.counts)}")
    say(f"pool: {space.address('pools', pool.manifest.fingerprint)}, root {pool.manifest.root}")
    return pool


def _train(
    config: AdaptConfig, space: Workspace, run: Run, say: Say, allowed_modules: tuple[str, ...]
) -> tuple[Arm, Adapter]:
    pool = make_pool(config, space, run, allowed_modules=allowed_modules)
    arm = plan_arm(config.arm, space, pool, allowed_modules=allowed_modules)
    say(f"train: {len(arm.mixture.row_ids)} rows, {config.arm.train.max_steps} steps")
    adapters = train_arms(
        {MAIN: arm},
        space,
        pool,
        logs={MAIN: run.log_metrics},
        max_concurrent=1,
        allowed_modules=allowed_modules,
    )
    log_mixture(run, arm)
    return arm, adapters[MAIN]


def train_adapter(config: AdaptConfig, *, say: Say, allowed_modules: tuple[str, ...] = ()) -> Adapter:
    """Train the recipe's adapter."""
    space = open_job(config)
    with tracked_stage("train", config, space) as run:
        _, adapter = _train(config, space, run, say, allowed_modules)
        run.log_artifacts(fetch_adapter(adapter.path), "adapter")
    say(f"adapter: {adapter.path}")
    return adapter


def preview_training(
    config: AdaptConfig,
    *,
    num_rows: int,
    is_coloured: bool,
    say: Say,
    allowed_modules: tuple[str, ...] = (),
) -> None:
    """Show what the recipe's adapter would be trained on: no Ray, no run, nothing generated or trained.

    Diverse rows are shown where the pool is finished; else those of the task alone, and that is said.
    """
    space, mixed = open_job(config), config.arm
    pool = None
    if config.pool is not None:
        address = space.address(
            "pools", pool_fingerprint(config.pool, space, allowed_modules=allowed_modules)
        )
        if is_finished(address):
            pool = read_pool(address)
        else:
            say(f"the pool is not made yet ({address}): task rows alone; jobs/synthesize.py makes it\n")
            mixed = config.arm.model_copy(
                update={"mix": config.arm.mix.model_copy(update={"diverse_ratio": 0.0})}
            )
    arm = plan_arm(mixed, space, pool, allowed_modules=allowed_modules)
    task, counts = build_input(arm, space, pool)
    lines = preview_rows(
        task.rows,
        num_rows=num_rows,
        decode=space.chat.table.spell,
        is_coloured=is_coloured,
    )
    for line in (*lines, *describe_packing(task)):
        say(line)
    say(f"long rows: {counts['dropped_long']} dropped, {counts['truncated_long']} truncated")


def evaluate_adapter(config: AdaptConfig, *, say: Say, allowed_modules: tuple[str, ...] = ()) -> str:
    """Score the base and the recipe's adapter; return the table."""
    space = open_job(config)
    check_split(space.task, config.split)
    rows = space.task.rows_by_split[config.split]
    with tracked_stage("evaluate", config, space) as run:
        _, adapter = _train(config, space, run, say, allowed_modules)
        say(f"evaluate: 2 models x {len(rows)} {config.split} rows")
        reports = evaluate_adapters(
            config.evaluate, space, {"base": BASE, MAIN: adapter.path}, rows, engine=config.engine
        )
        log_report(run, reports[MAIN], None)
    return format_scores(reports, metrics=space.task.metrics, drift={})
