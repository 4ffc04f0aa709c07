"""Promote a registered version: fetch it, verify its export, compare it with the champion, move the alias.

    models:/NAME/VERSION --verify, evaluate on test--> Decision --gate--> champion

The test split is read here, by the gate, and by `make reproduce` alone.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

from delia.config import FrozenConfig
from delia.errors import GateError
from delia.evaluate.harness import BASE, EvalReport
from delia.flow.adapt import AdaptConfig, open_job
from delia.flow.evaluation import evaluate_adapters
from delia.flow.gate import CHAMPION, Decision, GateConfig, check_lock_dir, decide, promote
from delia.flow.preflight import check_split
from delia.flow.stages import tracked_stage
from delia.flow.table import compare, format_scores
from delia.flow.verify import verify_export
from delia.flow.workspace import Workspace
from delia.schema import Split
from delia.store.directories import upload_directory
from delia.store.tables import join
from delia.track.registry import ModelVersionInfo, fetch_adapter, get_version, get_version_by_alias
from delia.track.runs import Tracker

TEST: Split = "test"


class PromoteConfig(FrozenConfig):
    """Which version is to become champion of which recipe's model, and what it must hold.

    `lock_dir` is a local or mounted directory that every promoting process sees; None: `output_dir`.
    """

    recipe: AdaptConfig
    alias: str = "candidate"
    gate: GateConfig = GateConfig()
    lock_dir: str | None = None


def promote_version(config: PromoteConfig, *, say: Callable[[str], None]) -> ModelVersionInfo:
    """Verify and compare the version that has the alias, and make it champion if the gate lets it.

    Raises:
        ConfigError: The gate's lock would lie in a bucket.
        GateError: The gate refuses, with its reasons, or a version belongs to another base model or
            chat format than the recipe's; the alias stays where it was.
        ExportError: The adapter does not do in vLLM what it does in HF + PEFT.
    """
    recipe = config.recipe
    lock_dir = config.lock_dir or recipe.output_dir
    check_lock_dir(lock_dir)
    space = open_job(recipe)
    check_split(space.task, TEST)
    name = recipe.track.registered_name or recipe.name.replace("_", "-")
    with tracked_stage("promote", recipe, space):
        tracker = Tracker(recipe.track, default_store=join(space.output_dir, "mlflow.db"))
        candidate = get_version(tracker, f"models:/{name}@{config.alias}")
        champion = get_version_by_alias(tracker, name, CHAMPION)
        versions = {"candidate": candidate, **({"champion": champion} if champion else {})}
        for found in versions.values():
            _check_base(found, space)
        addresses = {
            label: _fetch(tracker, found, join(space.output_dir, "registry"))
            for label, found in versions.items()
        }
        rows = space.task.rows_by_split[TEST]
        reports = evaluate_adapters(
            recipe.evaluate, space, {"base": BASE, **addresses}, rows, engine=recipe.engine
        )
        verify_export(
            addresses["candidate"],
            reports["candidate"],
            rows,
            space,
            num_rows=recipe.evaluate.num_verify_rows,
            max_tokens=recipe.evaluate.max_tokens,
        )
        say(format_scores(reports, metrics=space.task.metrics, drift={}))
        decision = _decide(reports, config, space.task.metrics[0], champion)
        for reason in decision.reasons:
            say(f"gate: {reason}")
        return promote(tracker, name, candidate.version, decision, lock_dir)


def _fetch(tracker: Tracker, version: ModelVersionInfo, address: str) -> str:
    """Bring a version to where every node can read it; return its address there."""
    if "://" not in address:
        return str(fetch_adapter(tracker, version.uri, Path(address)))
    target = join(address, f"{version.name}-{version.version}")
    with tempfile.TemporaryDirectory() as folder:
        upload_directory(fetch_adapter(tracker, version.uri, Path(folder)), target)
    return target


def _check_base(version: ModelVersionInfo, space: Workspace) -> None:
    """Refuse an adapter of another base: its scores on this one would mean nothing."""
    expected = {"delia.base_commit": space.model_id, "delia.template_hash": space.chat.template_hash}
    for tag, value in expected.items():
        if version.tags.get(tag) != value:
            raise GateError(
                f"{version.uri} has {tag}={version.tags.get(tag)}, the recipe's model {value}; give the model that"
                " it was trained on (recipe.model), or take another registered name"
            )


def _decide(
    reports: dict[str, EvalReport], config: PromoteConfig, metric: str, champion: ModelVersionInfo | None
) -> Decision:
    report = reports["candidate"]
    scores = {suite: report.interval(suite, metric) for suite in report.suite_names()}
    if champion is None:
        return decide(scores, None, config.gate)
    differences = {}
    for suite in scores:
        interval = compare([report], [reports["champion"]], suite, metric)
        differences[suite] = (interval.estimate, interval.low, interval.high)
    return decide(scores, differences, config.gate, champion=champion.version)
