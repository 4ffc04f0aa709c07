"""The whole path: task -> pool -> mixtures -> adapters -> scores -> verified, registered version.

adapt(config) trains the recipe's own arm and its baselines on one pool, scores them together
on one split, verifies the export and registers it with its lineage.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from delia.config import FrozenConfig, dump_yaml, fingerprint, flatten
from delia.evaluate.harness import BASE, EvalReport, EvaluateConfig
from delia.flow.evaluation import evaluate_adapters, measure_pool_drift
from delia.flow.pool import LogMetrics, PoolConfig, build_pool
from delia.flow.preflight import check_memory, check_rows, check_settings, check_split
from delia.flow.trial import Arm, ArmConfig, plan_arm, train_arms
from delia.flow.verify import Verification, verify_export
from delia.flow.workspace import RayConfig, Workspace, connect, open_workspace, starts_cluster
from delia.generate.engine import EngineConfig
from delia.schema import Adapter, Split
from delia.store.adapters import fetch_adapter
from delia.store.models import ModelConfig
from delia.store.pools import Pool, join_licences
from delia.store.tables import join
from delia.store.tasks import TaskConfig, read_task
from delia.track.registry import ModelVersionInfo, register_adapter, set_alias
from delia.track.runs import Run, TrackConfig, Tracker

MAIN = "adapter"
"""The label of the recipe's own arm."""
CANDIDATE_ALIAS = "candidate"


class AdaptConfig(FrozenConfig):
    """Everything that a job of the whole path needs; every other job reads a part of it."""

    name: str
    model: ModelConfig
    task: TaskConfig
    pool: PoolConfig | None
    arm: ArmConfig
    baselines: dict[str, ArmConfig] = {}
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    split: Split = "dev"
    track: TrackConfig = TrackConfig()
    ray: RayConfig = RayConfig()
    output_dir: str = "runs"
    max_concurrent_arms: int = 1


@dataclass
class AdaptResult:
    """What the path made; `reports` and `drift` are by label, `BASE`'s label being `base`."""

    adapters: dict[str, Adapter]
    reports: dict[str, EvalReport]
    drift: dict[str, float]
    verification: Verification
    version: ModelVersionInfo
    run_id: str
    seconds: dict[str, float] = field(default_factory=dict)


class Progress:
    """Prints one line a stage and keeps the seconds that each took; `log` also gets them, once there is one."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Start with no stage."""
        self.say = say
        self.log: LogMetrics = lambda metrics, step: None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        """Time a stage; what is finished already takes no time."""
        self.say(f"{name}: {detail}" if detail else name)
        started, number = time.monotonic(), len(self.seconds) + 1
        self.log({"adapt/stage": number}, number)
        yield
        self.seconds[name] = time.monotonic() - started
        self.log({"adapt/stage_seconds": self.seconds[name]}, number)
        self.say(f"{name}: done in {self.seconds[name]:.0f} s")


def open_job(config: AdaptConfig) -> Workspace:
    """Read and check the task, the base model and what the settings ask of both, before any work."""
    task, arms = read_task(config.task), {**config.baselines, MAIN: config.arm}
    check_settings(task, arms, config.pool)
    space = open_workspace(config.output_dir, config.model, task)
    check_rows(space, arms, config.pool, engine=config.engine, evaluate=config.evaluate)
    check_memory(space, arms, is_here=starts_cluster(config.ray))
    return space


def adapt(
    config: AdaptConfig, *, say: Callable[[str], None], allowed_modules: tuple[str, ...] = ()
) -> AdaptResult:
    """Run the whole path; finished steps are taken from `output_dir`.

    Args:
        config: The recipe's settings.
        say: Called with lines of progress.
        allowed_modules: Modules outside `delia.methods` that settings may name; a replayed settings
            file can't grant this to itself.

    Returns:
        Scores of the base, the baselines and the adapter, and the registered version.
    """
    space = open_job(config)
    check_split(space.task, config.split)
    progress = Progress(say)
    with progress.stage("ray", "connecting"):
        connect(config.ray)
    tracker = Tracker(config.track, default_store=join(space.output_dir, "mlflow.db"))
    with tracker.run(
        "adapt", params=flatten(config), tags={"delia.recipe": config.name}, fingerprint=fingerprint(config)
    ) as run:
        run.log_text(dump_yaml(config), "config.yaml")
        progress.log = run.log_metrics
        pool = _build_pool_stage(config, space, tracker, run, progress, allowed_modules)
        plan = partial(plan_arm, space=space, pool=pool, allowed_modules=allowed_modules)
        arms = {name: plan(arm) for name, arm in {**config.baselines, MAIN: config.arm}.items()}
        adapters = _train_stage(config, space, pool, arms, tracker, run, progress, allowed_modules)
        rows = space.task.rows_by_split[config.split]
        with progress.stage("evaluate", f"{len(arms) + 1} models x {len(rows)} {config.split} rows"):
            addresses = {name: adapter.path for name, adapter in adapters.items()}
            reports = evaluate_adapters(
                config.evaluate,
                space,
                {"base": BASE, **addresses},
                rows,
                engine=config.engine,
                on_done=lambda label: progress.say(f"evaluate: {label} is scored"),
            )
            drift = measure_pool_drift(
                addresses, space, pool, train=config.arm.train, num_rows=config.evaluate.num_kl_rows
            )
            _log_scores(config, tracker, run, reports, drift)
        with progress.stage("verify", "HF + PEFT against vLLM"):
            verified = verify_export(
                adapters[MAIN].path,
                reports[MAIN],
                rows,
                space,
                num_rows=config.evaluate.num_verify_rows,
                max_tokens=config.evaluate.max_tokens,
            )
        with progress.stage("register"):
            version = _register(config, space, pool, tracker, run, adapters[MAIN], reports[MAIN], verified)
    return AdaptResult(adapters, reports, drift, verified, version, run.run_id, progress.seconds)


def _build_pool_stage(
    config: AdaptConfig,
    space: Workspace,
    tracker: Tracker,
    parent: Run,
    progress: Progress,
    allowed_modules: tuple[str, ...],
) -> Pool | None:
    if config.pool is None:
        return None
    wanted = sum(source.num_rows for source in config.pool.synthesize.sources)
    with (
        progress.stage("synthesize", f"{wanted} diverse rows"),
        tracker.run("synthesize", parent=parent.run_id) as run,
    ):
        pool = build_pool(
            config.pool,
            space,
            engine=config.engine,
            log=run.log_metrics,
            allowed_modules=allowed_modules,
        )
        log_pool(run, space, pool)
        progress.say(f"synthesize: {describe_counts(pool.manifest.counts)}")
    return pool


def log_pool(run: Run, space: Workspace, pool: Pool) -> None:
    """Enter a pool as the dataset of a run; its digest is the pool's root."""
    address = space.address("pools", pool.manifest.fingerprint)
    run.log_dataset("pool", digest=pool.manifest.root, source=address, context="training")


def log_mixture(run: Run, arm: Arm) -> None:
    """Enter a mixture as the dataset of a run; its digest is the mixture's root."""
    run.log_dataset("mixture", digest=arm.mixture.root, source=arm.address, context="training")
    num_task = sum(arm.mixture.is_task)
    run.log_metrics(
        {
            "mix/task_rows": num_task,
            "mix/diverse_rows": len(arm.mixture.row_ids) - num_task,
            "mix/diverse_ratio": arm.mixture.diverse_ratio,
        },
        step=0,
    )


def describe_counts(counts: dict[str, int]) -> str:
    """Return counts as text, the largest first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name.removeprefix('rejected_')}" for name, count in ordered)


def _train_stage(
    config: AdaptConfig,
    space: Workspace,
    pool: Pool | None,
    arms: dict[str, Arm],
    tracker: Tracker,
    parent: Run,
    progress: Progress,
    allowed_modules: tuple[str, ...],
) -> dict[str, Adapter]:
    steps = ", ".join(f"{name} {arm.config.train.max_steps} steps" for name, arm in arms.items())
    with progress.stage("train", steps), ExitStack() as stack:
        runs = {
            name: stack.enter_context(
                tracker.run(
                    f"train {name}",
                    parent=parent.run_id,
                    params=flatten(arm.config),
                    fingerprint=arm.fingerprint,
                )
            )
            for name, arm in arms.items()
        }
        for name, run in runs.items():
            log_mixture(run, arms[name])
        return train_arms(
            arms,
            space,
            pool,
            logs={name: run.log_metrics for name, run in runs.items()},
            max_concurrent=config.max_concurrent_arms,
            allowed_modules=allowed_modules,
            on_done=lambda name, seconds: progress.say(f"train: {name} took {seconds:.0f} s"),
        )


def _log_scores(
    config: AdaptConfig,
    tracker: Tracker,
    parent: Run,
    reports: dict[str, EvalReport],
    drift: dict[str, float],
) -> None:
    """Log each model's scores in a run of its own, and the adapter's in the job's too."""
    for label, report in reports.items():
        with tracker.run(f"evaluate {label}", parent=parent.run_id, fingerprint=fingerprint(config)) as run:
            log_report(run, report, drift.get(label))
    log_report(parent, reports[MAIN], drift.get(MAIN))


def log_report(run: Run, report: EvalReport, drift: float | None) -> None:
    """Log every suite's scores, and the off-task KL where it was measured."""
    run.log_scores(
        {
            (suite, metric): report.interval(suite, metric).estimate
            for suite in report.suite_names()
            for metric in report.scores
        }
    )
    if drift is not None:
        run.log_metrics({"evaluate/off_task_kl": drift}, step=0)


def _register(
    config: AdaptConfig,
    space: Workspace,
    pool: Pool | None,
    tracker: Tracker,
    run: Run,
    adapter: Adapter,
    report: EvalReport,
    verification: Verification,
) -> ModelVersionInfo:
    name = config.track.registered_name or config.name.replace("_", "-")
    tags = {
        "delia.base_model": space.model.path,
        "delia.base_commit": space.model_id,
        "delia.template_hash": adapter.template_hash,
        "delia.mixture_root": adapter.mixture_root,
        "delia.adapter_fingerprint": adapter.fingerprint,
        "delia.task_digest": space.task.digest,
        "delia.licence": join_licences(space.task, pool),
        "delia.split": config.split,
        "delia.form": verification.form,
        "delia.verified": f"{verification.num_equal}/{verification.num_prompts} equal greedy completions,"
        f" {verification.mean_gap_nats:.1e} nats a token apart in {verification.dtype}",
    }
    for suite in report.suite_names():
        tags[f"delia.score.{suite}"] = f"{report.interval(suite, space.task.metrics[0]).estimate:.4f}"
    version = register_adapter(tracker, run, fetch_adapter(adapter.path), name=name, tags=tags)
    set_alias(tracker, version.name, CANDIDATE_ALIAS, version.version)
    return version
