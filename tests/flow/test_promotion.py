"""Promotion on a real registry: who becomes champion, who is refused, and where the alias then stands.

Scores come from a table here: the engine, the export's check and the gate's rule have tests of their own,
and tests/system/test_jobs.py promotes on the real components.
"""

import pytest

from delia.errors import ExportError, GateError
from delia.evaluate.harness import BASE, EvalReport
from delia.flow import promotion
from delia.flow.gate import GateConfig
from delia.flow.promotion import PromoteConfig, promote_version
from delia.recipes.starter import starter_sep
from delia.store.tables import join
from delia.track.registry import get_version_by_alias, register_adapter, set_alias
from delia.track.runs import TrackConfig, Tracker


class Desk:
    """A registry with candidates of known scores, and the wish to promote one."""

    def __init__(self, space, make_adapter) -> None:
        self.space = space
        self.make_adapter = make_adapter
        self.tracker = Tracker(TrackConfig(), default_store=join(space.output_dir, "mlflow.db"))
        self.num_right: dict[str, int] = {}
        self.compared: list[dict[str, str]] = []

    def enter(self, num_right: int, **tags: str) -> str:
        """Register a candidate that has this many of the test rows right; return its version."""
        space, number = self.space, len(self.num_right) + 1
        directory = self.make_adapter(space, shift=0.1, seed=number)
        lineage = {"delia.base_commit": space.model_id, "delia.template_hash": space.chat.template_hash}
        with self.tracker.run(f"train {number}") as run:
            made = register_adapter(self.tracker, run, directory, name="small", tags={**lineage, **tags})
        set_alias(self.tracker, "small", "candidate", made.version)
        self.num_right[f"small-{made.version}"] = num_right
        return made.version

    def score(self, config, space, addresses, rows, *, engine) -> dict[str, EvalReport]:
        """Stand in for the evaluation: a version is known by the folder that it was fetched to."""
        self.compared.append(dict(addresses))
        right = {
            label: self.num_right[address.split("/")[-2]] if address != BASE else 0
            for label, address in addresses.items()
        }
        ids = tuple(row.task_id for row in rows)
        return {
            label: EvalReport(
                task_ids=ids,
                suites=tuple(row.suite for row in rows),
                phrasings=ids,
                completions=ids,
                token_ids=((),) * len(ids),
                logprobs=((),) * len(ids),
                scores={"exact_match": tuple(float(i % 4 < count) for i in range(len(ids)))},
            )
            for label, count in right.items()
        }

    def promote(self, said: list[str] | None = None, **gate):
        recipe = starter_sep()
        recipe = recipe.model_copy(
            update={
                "output_dir": self.space.output_dir,
                "track": recipe.track.model_copy(update={"registered_name": "small"}),
            }
        )
        lines = [] if said is None else said
        return promote_version(PromoteConfig(recipe=recipe, gate=GateConfig(**gate)), say=lines.append)

    def champion(self) -> str | None:
        found = get_version_by_alias(self.tracker, "small", "champion")
        return found.version if found else None


@pytest.fixture
def desk(cluster, small_space, make_adapter, monkeypatch) -> Desk:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    desk = Desk(small_space, make_adapter)
    monkeypatch.setattr(promotion, "open_job", lambda recipe: small_space)
    monkeypatch.setattr(promotion, "evaluate_adapters", desk.score)
    monkeypatch.setattr(promotion, "verify_export", lambda *args, **settings: None)
    return desk


def test_the_first_version_becomes_champion_and_a_better_one_replaces_it(desk):
    first = desk.enter(2)
    assert desk.promote().version == first == desk.champion()
    assert list(desk.compared[-1]) == ["base", "candidate"]

    better = desk.enter(4)
    said: list[str] = []
    assert desk.promote(said, margin=0.02).version == better == desk.champion()
    assert list(desk.compared[-1]) == ["base", "candidate", "champion"]
    assert get_version_by_alias(desk.tracker, "small", "previous_champion").version == first
    assert any(line.startswith("gate: follow: difference +0.5000") for line in said)


def test_a_worse_version_is_refused_and_the_champion_stays(desk):
    first = desk.enter(4)
    desk.promote()
    desk.enter(2)
    with pytest.raises(GateError, match=r"follow: difference -0.5000"):
        desk.promote()
    assert desk.champion() == first
    runs = desk.tracker.client.search_runs(
        [desk.tracker.client.get_experiment_by_name("delia").experiment_id]
    )
    assert sorted(run.info.status for run in runs if run.info.run_name == "promote") == ["FAILED", "FINISHED"]


def test_a_floor_that_the_first_version_misses_refuses_it(desk):
    desk.enter(2)
    with pytest.raises(GateError, match=r"floor 0.9000"):
        desk.promote(floors={"follow": 0.9})
    assert desk.champion() is None


def test_an_export_that_is_not_verified_is_never_champion(desk, monkeypatch):
    def refuse(*args, **settings):
        raise ExportError("completions differ")

    monkeypatch.setattr(promotion, "verify_export", refuse)
    desk.enter(4)
    with pytest.raises(ExportError, match="completions differ"):
        desk.promote()
    assert desk.champion() is None


@pytest.mark.parametrize("tag", ["delia.base_commit", "delia.template_hash"])
def test_an_adapter_of_another_base_or_chat_format_is_refused_before_it_is_scored(desk, tag):
    desk.enter(4, **{tag: "another"})
    with pytest.raises(GateError, match=f"has {tag}=another, the recipe's model"):
        desk.promote()
    assert desk.compared == []


def test_promoting_the_champion_again_changes_nothing(desk):
    version = desk.enter(4)
    desk.promote()
    assert desk.promote().version == version == desk.champion()
