"""What a job would fail of after hours is refused before it starts."""

import dataclasses

import pytest

from delia.config import MethodConfig
from delia.errors import ChatError, ConfigError, MixtureError, TaskFileError, TrainError
from delia.evaluate.harness import EvaluateConfig
from delia.flow.adapt import open_job
from delia.flow.preflight import (
    check_lengths,
    check_memory,
    check_metrics,
    check_split,
    check_stages,
)
from delia.flow.supply import check_pool_lengths, check_ratios, check_sources
from delia.flow.trial import ArmConfig
from delia.flow.workspace import open_workspace
from delia.generate.engine import EngineConfig
from delia.mix.mixture import MixConfig
from delia.recipes.starter import STARTER, sep_hallucination, starter_sep
from delia.schema import Message, SeedTask, Task
from delia.store.models import ModelConfig
from delia.store.tasks import TaskConfig
from delia.train.settings import StageConfig, TrainConfig

STAGES = (StageConfig(max_steps=1),)


def make_row(question: str, answer: str = "yes", base: str = "") -> SeedTask:
    turns = [Message(role="user", content=question)]
    turns += [Message(role="assistant", content=answer)] if answer else []
    return SeedTask(
        task_id=question[:8],
        messages=tuple(turns),
        base_messages=(Message(role="user", content=base),) if base else (),
    )


def open_with(folder, *, train=(), dev=(), test=()):
    rows = {"train": tuple(train), "dev": tuple(dev), "test": tuple(test)}
    return open_workspace(str(folder), STARTER, Task(name="t", digest="d", rows_by_split=rows))


def make_arm(ratio: float = 1.0, *, max_length: int = 64, on_long: str = "error", **mix) -> ArmConfig:
    train = TrainConfig(stages=STAGES, max_length=max_length, on_long=on_long)
    return ArmConfig(mix=MixConfig(diverse_ratio=ratio, **mix), train=train)


# ---- metrics


def make_task(**changes) -> Task:
    rows = {"train": (), "dev": (make_row("a"),), "test": ()}
    return Task(**{"name": "t", "digest": "d", "rows_by_split": rows, **changes})


def test_a_metric_that_nothing_computes_is_refused_with_those_that_there_are():
    check_metrics(make_task(metrics=("exact_match", "chrf")))
    with pytest.raises(
        ConfigError, match=r"\['bleurt'\]: no such metric; there are \['chrf', 'exact_match'\]"
    ):
        check_metrics(make_task(metrics=("exact_match", "bleurt")))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_suite_whose_score_has_no_name_is_refused(split):
    rows = {"train": (), "dev": (), "test": ()}
    rows[split] = (dataclasses.replace(make_row("a"), suite="negated-same"),)
    with pytest.raises(ConfigError, match="got 'negated-same'; rename it in the task file"):
        check_metrics(make_task(rows_by_split=rows))


# ---- splits


def test_a_split_without_rows_is_refused():
    check_split(make_task(), "dev")
    with pytest.raises(ConfigError, match="split 'test' of task 't' has no rows"):
        check_split(make_task(), "test")


# ---- stages


def make_stages(*stages: StageConfig, **settings) -> dict[str, ArmConfig]:
    return {"arm": ArmConfig(mix=MixConfig(), train=TrainConfig(stages=stages, **settings))}


BOTH = StageConfig(max_steps=1)
ROWS = StageConfig(max_steps=1, parts=("token_rows",))
ON_TOKEN_ROWS = StageConfig(max_steps=1, parts=("lora",), rows="token")


def test_a_stage_that_would_move_nothing_is_refused():
    with_token = make_task(tokens=("<sep>",))
    check_stages(with_token, make_stages(ROWS, BOTH, ON_TOKEN_ROWS))
    check_stages(with_token, make_stages(ROWS, lora=None))
    check_stages(make_task(), make_stages(BOTH))
    check_stages(make_task(), make_stages(StageConfig(max_steps=1, parts=("base",)), lora=None))
    for task, arms in (
        (make_task(), make_stages(BOTH, ROWS)),
        (make_task(), make_stages(ON_TOKEN_ROWS)),
        (make_task(), make_stages(BOTH, lora=None)),
        (with_token, make_stages(StageConfig(max_steps=1, parts=("lora",)), lora=None)),
    ):
        with pytest.raises(ConfigError, match=r"arm: stage . moves"):
            check_stages(task, arms)


def test_a_start_at_the_instruction_needs_an_instruction():
    arms = make_stages(BOTH, token_init="mean_instruction")
    check_stages(make_task(), arms)
    check_stages(make_task(tokens=("<sep>",), long_instruction="say it"), arms)
    with pytest.raises(
        ConfigError, match=r"arm: train.token_init=mean_instruction needs the task's long_instr"
    ):
        check_stages(make_task(tokens=("<sep>",)), arms)


# ---- lengths


def test_a_train_row_over_the_limit_is_refused_unless_the_arm_shortens_or_drops_it(tmp_path):
    space = open_with(tmp_path, train=[make_row("the fox " * 40)])
    settings = {"engine": EngineConfig(), "evaluate": EvaluateConfig()}
    with pytest.raises(ChatError, match="max_length is 64"):
        check_lengths(space, {"fits": make_arm(max_length=512), "does not": make_arm()}, **settings)
    for way in ("drop", "truncate_prompt_left"):
        check_lengths(space, {"arm": make_arm(on_long=way)}, **settings)


def test_a_train_row_without_an_answer_is_refused(tmp_path):
    space = open_with(tmp_path, train=[make_row("the fox", answer="")])
    with pytest.raises((ChatError, TrainError)):
        check_lengths(space, {"arm": make_arm()}, engine=EngineConfig(), evaluate=EvaluateConfig())


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(tmp_path, split):
    space = open_with(tmp_path, **{split: [make_row("short"), make_row("the fox " * 40)]})
    engine = EngineConfig(max_model_len=128)
    num_ids = len(space.chat.encode_prompt(make_row("the fox " * 40).prompt))
    room = 128 - num_ids
    check_lengths(space, {}, engine=engine, evaluate=EvaluateConfig(max_tokens=room))
    with pytest.raises(ConfigError, match=f"row the fox  has {num_ids} ids; engine.max_model_len=128"):
        check_lengths(space, {}, engine=engine, evaluate=EvaluateConfig(max_tokens=room + 1))


def test_the_bases_own_prompt_counts_where_its_answer_is_the_reference(tmp_path):
    long = "the fox " * 60
    engine, evaluate = EngineConfig(max_model_len=128), EvaluateConfig(max_tokens=64)
    with_reference = open_with(tmp_path, dev=[make_row("short", answer="yes", base=long)])
    check_lengths(with_reference, {}, engine=engine, evaluate=evaluate)
    without = open_with(tmp_path, dev=[make_row("short", answer="", base=long)])
    with pytest.raises(ConfigError, match="the prompt of row short"):
        check_lengths(without, {}, engine=engine, evaluate=evaluate)


def test_a_diverse_row_that_could_be_too_long_is_refused(tmp_path):
    space, pool = open_with(tmp_path), starter_sep().pool  # 96 tokens a turn
    overhead = len(space.chat.encode_chat(make_row("a", "a").messages).input_ids)
    fits = make_arm(1.0, max_length=overhead + 192)
    check_pool_lengths(space, {"arm": fits}, pool)
    short = overhead + 191
    with pytest.raises(
        ConfigError, match=f"arm: a diverse row may have {overhead + 192} ids .* {short}: raise"
    ):
        check_pool_lengths(space, {"arm": make_arm(1.0, max_length=short)}, pool)
    for arm in (make_arm(0.0, max_length=short), make_arm(1.0, max_length=short, on_long="drop")):
        check_pool_lengths(space, {"arm": arm}, pool)
    check_pool_lengths(space, {"arm": make_arm(1.0, max_length=short)}, None)


# ---- ratios


def test_a_ratio_over_the_pool_is_refused_before_the_pool_is_made():
    pool = starter_sep().pool  # 1,200 rows of magpie
    check_ratios(pool, {"arm": make_arm(12.0)}, num_task_rows=100)
    with pytest.raises(ConfigError, match=r"much: diverse_ratio 12.01 x 100 task rows asks for 1201 rows of"):
        check_ratios(pool, {"arm": make_arm(12.0), "much": make_arm(12.01)}, num_task_rows=100)


def test_repeated_rows_need_only_the_distinct_ones():
    check_ratios(starter_sep().pool, {"arm": make_arm(100.0, num_distinct=1200)}, num_task_rows=100)


def test_a_share_of_a_source_that_is_not_made_is_refused():
    arm = make_arm(1.0, shares={"magpie": 0.5, "rewriting": 0.5})
    with pytest.raises(ConfigError, match=r"50 rows of source 'rewriting', pool.synthesize makes 0"):
        check_ratios(starter_sep().pool, {"arm": arm}, num_task_rows=100)
    with pytest.raises(MixtureError, match=r"sum to 1, got \{'magpie': 0.5\}"):
        check_ratios(starter_sep().pool, {"arm": make_arm(shares={"magpie": 0.5})}, num_task_rows=100)


def test_without_a_pool_only_ratio_0_is_possible():
    check_ratios(None, {"arm": make_arm(0.0)}, num_task_rows=100)
    with pytest.raises(
        ConfigError, match=r"asks for 100 rows of source 'of any name', pool.synthesize makes 0"
    ):
        check_ratios(None, {"arm": make_arm(1.0)}, num_task_rows=100)


# ---- whole jobs


@pytest.mark.parametrize(
    ("fields", "error", "reason"),
    [
        (
            {"synthesizer": MethodConfig(method="delia.methods.synthesizer.magpi.Magpie")},
            ConfigError,
            "no method",
        ),
        ({"synthesizer": None, "rows": TaskConfig(path="/none.jsonl")}, TaskFileError, "no such file"),
        ({"model": ModelConfig(path="/no/teacher")}, ConfigError, "/no/teacher"),
    ],
)
def test_a_source_whose_method_file_or_teacher_is_missing_is_refused_before_any_round(fields, error, reason):
    pool = starter_sep().pool
    source = pool.synthesize.sources[0].model_copy(update=fields)
    synthesize = pool.synthesize.model_copy(update={"sources": (source,)})
    with pytest.raises(error, match=reason):
        check_sources(pool.model_copy(update={"synthesize": synthesize}), ())


@pytest.mark.parametrize("recipe", [starter_sep(), sep_hallucination()], ids=lambda recipe: recipe.name)
def test_the_shipped_recipes_pass(recipe, tmp_path):
    open_job(recipe.model_copy(update={"output_dir": str(tmp_path)}))


def test_a_job_is_refused_for_each_of_the_three(tmp_path):
    recipe = starter_sep().model_copy(update={"output_dir": str(tmp_path)})
    bad_metric = recipe.task.model_copy(update={"metrics": ("bleu",)})
    with pytest.raises(ConfigError, match="no such metric"):
        open_job(recipe.model_copy(update={"task": bad_metric}))
    with pytest.raises(ConfigError, match="adapter: diverse_ratio 50"):
        open_job(recipe.model_copy(update={"arm": make_arm(50.0)}))
    with pytest.raises(ConfigError, match="leaves 0"):
        open_job(recipe.model_copy(update={"evaluate": EvaluateConfig(max_tokens=512)}))
    assert not list(tmp_path.iterdir()), "work was done before the job was refused"


# ---- what curation names


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"embedder": "no/such/model"}, "curate.embedder is .* no directory"),
        ({"languages": ("xx",)}, "ISO 639-1"),
    ],
)
def test_an_embedder_or_a_language_that_there_is_not_is_refused(setting, reason):
    recipe = starter_sep()
    assert recipe.pool is not None
    curate = recipe.pool.curate.model_copy(update=setting)
    pool = recipe.pool.model_copy(update={"curate": curate})

    with pytest.raises(ConfigError, match=reason):
        open_job(recipe.model_copy(update={"pool": pool}))


# ---- memory


def test_an_arm_that_no_device_here_can_hold_is_refused_before_any_work(tmp_path, monkeypatch):
    space = open_with(tmp_path)
    monkeypatch.setattr("delia.flow.preflight.read_device_bytes", lambda config, num_sharing: 1 << 30)
    with pytest.raises(
        ConfigError, match=r"main: training needs about .* GiB a worker .* set more than train"
    ):
        check_memory(space, {"main": make_arm()}, is_here=True)
    check_memory(space, {"main": make_arm()}, is_here=False)
    monkeypatch.undo()
    check_memory(space, {"main": make_arm()}, is_here=True)
