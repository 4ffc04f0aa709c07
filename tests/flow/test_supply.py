"""What no source could give is refused before work; what it could, if just so, is not."""

import json
from pathlib import Path

import pytest

from delia.config import MethodConfig
from delia.curate.selection import SelectConfig
from delia.curate.settings import CurateConfig
from delia.curate.stopping import StopConfig
from delia.errors import ConfigError, PoolError
from delia.flow import stages
from delia.flow.pool import PoolConfig, check_room
from delia.flow.supply import check_pool_lengths, check_sources
from delia.flow.trial import ArmConfig
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.mix.mixture import MixConfig
from delia.recipes.starter import STARTER, starter_sep
from delia.schema import Message, SeedTask
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig
from delia.train.settings import StageConfig, TrainConfig

LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)
ANSWERED = SeedTask(
    task_id="t", messages=(Message(role="user", content="a"), Message(role="assistant", content="b"))
)


def make_source(name: str, method: str | None = None, **fields: object) -> SourceConfig:
    path = f"delia.methods.synthesizer.{method}"
    return SourceConfig(
        name=name,
        synthesizer=MethodConfig(method=path) if method else None,
        **{"num_rows": 1000, **fields},
    )


def make_pool(*sources: SourceConfig, curate: CurateConfig = LOOSE, **fields: object) -> PoolConfig:
    sampling = SamplingConfig(max_tokens=16)
    synthesize = SynthesizeConfig(sources=sources, sampling=sampling, chunk_size=8)
    return PoolConfig(synthesize=synthesize, curate=curate, **fields)


def select(oversample: float) -> CurateConfig:
    method = "delia.methods.selector.k_center.KCenter"
    return LOOSE.model_copy(update={"select": SelectConfig(method=method, oversample=oversample)})


def write_rows(path: Path, *questions: str) -> TaskConfig:
    turns = [[("user", text), ("assistant", "yes")] for text in questions]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    path.write_text("\n".join(map(json.dumps, rows)))
    return TaskConfig(path=str(path))


MAGPIE = make_source("web", "magpie.Magpie")


# ---- enough candidates


@pytest.mark.parametrize(
    ("sources", "curate", "reason"),
    [
        (
            (MAGPIE.model_copy(update={"max_candidates": 990}),),
            LOOSE,
            r"'web' is to give 1000 rows, and has at most 992 candidates: max_candidates=990 in whole chunks of 8",
        ),
        (
            (MAGPIE.model_copy(update={"max_candidates": 4999}),),
            select(5.1),
            r"1000 rows chosen from 5100 \(curate.select.oversample\), and has at most 5000",
        ),
        (
            (MAGPIE, make_source("own", "answering.Answering", feeds_on=("web",), num_rows=1001)),
            LOOSE,
            r"'own' is to give 1001 .* at most 1000 candidates: the 1000 rows of \['web'\], each once",
        ),
        (
            (make_source("own", "s3ft.S3FT", num_rows=3),),
            LOOSE,
            "at most 2 candidates: the 2 rows of the task that have answers, each once",
        ),
    ],
)
def test_a_source_that_has_too_few_candidates_is_refused(sources, curate, reason):
    pool = make_pool(*sources, curate=curate)
    with pytest.raises(ConfigError, match=reason):
        check_sources(pool, (ANSWERED, ANSWERED))
    check_sources(pool.model_copy(update={"stop": StopConfig(max_output_tokens=1)}), (ANSWERED, ANSWERED))


@pytest.mark.parametrize(
    ("sources", "curate"),
    [
        ((MAGPIE.model_copy(update={"max_candidates": 993}),), LOOSE),
        ((MAGPIE,), select(50)),
        ((MAGPIE, make_source("own", "answering.Answering", feeds_on=("web",))), LOOSE),
        ((make_source("own", "s3ft.S3FT", num_rows=2),), LOOSE),
    ],
)
def test_a_source_that_has_just_enough_candidates_is_not_refused(sources, curate):
    check_sources(make_pool(*sources, curate=curate), (ANSWERED, ANSWERED))


def test_a_file_that_has_too_few_rows_is_refused(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", "the fox", "the owl")
    check_sources(make_pool(make_source("file", rows=rows, num_rows=2)), ())
    with pytest.raises(
        ConfigError, match="'file' is to give 3 rows, and has at most 2 candidates: the rows of"
    ):
        check_sources(make_pool(make_source("file", rows=rows, num_rows=3)), ())


def test_a_selection_of_many_is_given_candidates_to_choose_from(space, local_stage, build, make_config):
    """Four candidates a row would not do: 20 rows are to be accepted, for 4."""
    local_stage()
    web = make_config().synthesize.sources[0].model_copy(update={"num_rows": 4})
    assert len(build(space, make_pool(web, curate=select(5))).rows) == 4


def test_a_file_is_read_before_a_teacher_is_asked(space, local_stage, build, tmp_path):
    """It has rows enough, but two of them are one."""
    stage = local_stage()
    rows = write_rows(tmp_path / "rows.jsonl", "the fox", "the fox")
    teacher = make_source("web", "magpie.Magpie", num_rows=4, model=STARTER)
    config = make_pool(teacher, make_source("file", rows=rows, num_rows=2))

    with pytest.raises(PoolError, match="'file' gave 1 of 2 rows"):
        build(space, config)
    assert stage.answered == []


# ---- lengths


def test_a_long_row_of_a_file_stops_no_arm_after_synthesis(space, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", "the fox", "the owl " * 60)
    sources = (MAGPIE, make_source("file", rows=rows, num_rows=2))
    pool = make_pool(*sources)
    ids = len(space.chat.encode_prompt((Message(role="user", content="the owl " * 60),))) + 2

    def check(curate: CurateConfig = LOOSE, **fields: object) -> None:
        shares = fields.pop("shares", {})
        train = TrainConfig(stages=(StageConfig(max_steps=1),), **{"max_length": ids - 1, **fields})
        arm = ArmConfig(mix=MixConfig(diverse_ratio=1.0, shares=shares), train=train)
        check_pool_lengths(space, {"arm": arm}, pool.model_copy(update={"curate": curate}))

    with pytest.raises(ConfigError, match=f"arm: a row of .* has {ids} ids, train.max_length is {ids - 1}:"):
        check()
    check(max_length=ids)
    check(on_long="drop")
    check(shares={"web": 1.0})
    check(curate=LOOSE.model_copy(update={"max_prompt_tokens": 100}))


# ---- adapters


def test_an_adapter_that_answers_needs_an_engine_that_admits_it():
    method = MAGPIE.synthesizer.model_copy(update={"knobs": {"answered_by": "s3://bucket/adapter"}})
    pool = make_pool(MAGPIE.model_copy(update={"synthesizer": method}))
    check_room(pool, EngineConfig(lora_rank=8))
    with pytest.raises(ConfigError, match=r"sources \['web'\] are answered by .*engine.lora_rank=None"):
        check_room(pool, EngineConfig())


def test_the_engines_that_write_a_pool_admit_the_adapters_that_settings_say(space, monkeypatch):
    asked: list[EngineConfig] = []
    monkeypatch.setattr(stages, "build_pool", lambda *args, engine, **options: asked.append(engine))
    monkeypatch.setattr(stages, "log_pool", lambda *args: None)
    recipe = starter_sep()
    engine = recipe.engine.model_copy(update={"lora_rank": 8})

    class Silent:
        log_metrics = None

    stages.make_pool(recipe.model_copy(update={"engine": engine}), space, Silent())
    assert asked == [engine]
