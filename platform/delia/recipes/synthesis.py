"""Recipes of diverse data, one a method: `jobs/synthesize.py RECIPE`, or the whole path with `jobs/adapt.py`.

Each is `starter_sep` with another pool. The starter's small world has no words for most of these requests:
name a chat model, `--set model.path=...`, for rows that are worth tuning on.
"""

from typing import Any

from delia.config import MethodConfig
from delia.flow.adapt import AdaptConfig
from delia.recipes.starter import STARTER, starter_sep
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig

NUM_ROWS = 1000


def _source(name: str, method: str, *, num_rows: int = NUM_ROWS, **fields: Any) -> SourceConfig:
    """Return a source of a method, given as module.Class below `delia.methods.synthesizer`."""
    path = f"delia.methods.synthesizer.{method}"
    return SourceConfig(name=name, synthesizer=MethodConfig(method=path), num_rows=num_rows, **fields)


def _adapt_with(
    name: str, *sources: SourceConfig, shares: dict[str, float], diverse_ratio: float = 10.0
) -> AdaptConfig:
    """Return `starter_sep` without baselines, on a pool of these sources."""
    base = starter_sep()
    assert base.pool is not None  # the quickstart has one
    synthesize = base.pool.synthesize.model_copy(update={"sources": sources})
    mix = base.arm.mix.model_copy(update={"shares": shares, "diverse_ratio": diverse_ratio})
    return base.model_copy(
        update={
            "name": name,
            "pool": base.pool.model_copy(update={"synthesize": synthesize}),
            "arm": base.arm.model_copy(update={"mix": mix}),
            "baselines": {},
            "split": "dev",
        }
    )


def diverse_self_instruct() -> AdaptConfig:
    """Self-Instruct in two rounds: from the task's rows, then from those and the first round's."""
    first = _source("first", "self_instruct.SelfInstruct", num_rows=200)
    second = _source("second", "self_instruct.SelfInstruct", feeds_on=("first",))
    return _adapt_with("diverse_self_instruct", first, second, shares={"second": 1.0})


def diverse_evol_instruct() -> AdaptConfig:
    """Evol-Instruct in two generations from instructions that the model wrote itself."""
    magpie = _source("magpie", "magpie.Magpie")
    once = _source("once", "evol_instruct.EvolInstruct", feeds_on=("magpie",))
    twice = _source("twice", "evol_instruct.EvolInstruct", feeds_on=("once",))
    shares = {"once": 0.5, "twice": 0.5}
    return _adapt_with("diverse_evol_instruct", magpie, once, twice, shares=shares)


def diverse_attribute_grid() -> AdaptConfig:
    """An instruction for each combination of person, topic and kind."""
    return _adapt_with(
        "diverse_attribute_grid", _source("grid", "attribute_grid.AttributeGrid"), shares={"grid": 1.0}
    )


def diverse_rewriting() -> AdaptConfig:
    """Other wordings of the task's instruction beside self-sampled rows.

    The starter rewrites at its own world's request alone, and of words for a format it knows those of its world.
    A chat model takes the method's defaults too: `--set 'pool.synthesize.sources.1.synthesizer.knobs={}'`.
    """
    magpie = _source("magpie", "magpie.Magpie")
    reworded = SourceConfig(
        name="reworded",
        synthesizer=MethodConfig(
            method="delia.methods.synthesizer.rewriting.Rewriting",
            knobs={"request": "write this in another way : {instruction}", "stand_in": "record"},
        ),
        num_rows=100,
    )
    shares = {"magpie": 0.9, "reworded": 0.1}
    return _adapt_with("diverse_rewriting", magpie, reworded, shares=shares)


def diverse_demonstrated() -> AdaptConfig:
    """The answers of the published DELIA code: each reference shown as the model's own, then asked again."""
    given = _source("given", "magpie.Magpie")
    shown = SourceConfig(
        name="shown",
        synthesizer=MethodConfig(
            method="delia.methods.synthesizer.answering.Answering", knobs={"demonstrated": True}
        ),
        feeds_on=("given",),
        num_rows=900,
    )
    return _adapt_with("diverse_demonstrated", given, shown, shares={"shown": 1.0}, diverse_ratio=9.0)


def diverse_teacher() -> AdaptConfig:
    """Self-written instructions that another model answers: `--set pool.synthesize.sources.1.model.path=...`."""
    given = _source("given", "magpie.Magpie")
    taught = _source("taught", "answering.Answering", feeds_on=("given",), num_rows=900, model=STARTER)
    return _adapt_with("diverse_teacher", given, taught, shares={"taught": 1.0}, diverse_ratio=9.0)


def diverse_s3ft() -> AdaptConfig:
    """The task's rows answered by the model itself where a judge finds it equal, beside self-sampled rows."""
    magpie = _source("magpie", "magpie.Magpie")
    own = _source("own", "s3ft.S3FT", num_rows=50, max_candidates=100)
    return _adapt_with("diverse_s3ft", magpie, own, shares={"magpie": 0.95, "own": 0.05})


def diverse_imported() -> AdaptConfig:
    """Instructions of a file, answered by the model itself: `--set pool.synthesize.sources.0.rows.path=...`."""
    given = SourceConfig(
        name="given", rows=TaskConfig(path="package://delia.starter/tasks/lingo"), num_rows=60
    )
    own = _source("own", "answering.Answering", feeds_on=("given",), num_rows=50)
    return _adapt_with("diverse_imported", given, own, shares={"own": 1.0}, diverse_ratio=0.5)
