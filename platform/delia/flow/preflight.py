"""What would fail late, found before any work: from the settings, the task's rows and the vocabulary alone.

metrics known?  every task row and prompt short enough?  pool large enough for every ratio?
"""

from collections.abc import Iterable, Mapping

from delia.curate.embedding import check_embedder
from delia.curate.language import find_languages
from delia.curate.overlap import read_eval_rows
from delia.errors import ConfigError
from delia.evaluate.harness import EvaluateConfig
from delia.evaluate.scoring import METRICS
from delia.flow.encoding import encode_rows
from delia.flow.pool import PoolConfig, check_room
from delia.flow.supply import check_pool_lengths, check_ratios, check_sources
from delia.flow.trial import ArmConfig
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig
from delia.metrics import score_name
from delia.model.loading import check_precision, check_quantisation, count_heads, load_shapes
from delia.model.lora import STARTS_ELSEWHERE
from delia.schema import Split, Task
from delia.store.models import ModelConfig
from delia.train.export import check_storable
from delia.train.memory import describe_shortage, read_device_bytes
from delia.train.methods import check_methods


def check_settings(task: Task, arms: Mapping[str, ArmConfig], pool: PoolConfig | None) -> None:
    """Check what needs no model of the task's: metrics and suites, stages, ratios, sources and curation.

    Raises:
        ConfigError, TaskFileError: See the single checks.
    """
    check_metrics(task)
    check_stages(task, arms)
    check_train_methods(arms)
    check_ratios(pool, arms, num_task_rows=len(task.rows_by_split["train"]))
    if pool is not None:
        check_sources(pool, task.rows_by_split["train"])
        check_embedder(pool.curate.embedder)
        find_languages(pool.curate.languages or ())
        read_eval_rows(pool.curate.decontaminate)


def check_train_methods(arms: Mapping[str, ArmConfig]) -> None:
    """Refuse an arm whose methods can't be built, and a penalty that no row would have.

    Raises:
        ConfigError: With the arm and the way out.
    """
    for name, arm in arms.items():
        check_methods(arm.train)
        if arm.train.kl_weight is not None and arm.mix.diverse_ratio == 0:
            raise ConfigError(
                f"{name}: train.kl_weight={arm.train.kl_weight:g} holds diverse rows to the base, and mix.diverse_ratio"
                " is 0; raise the ratio, or unset kl_weight"
            )
        if arm.train.kl_weight is not None and arm.train.lora and arm.train.lora.init in STARTS_ELSEWHERE:
            raise ConfigError(
                f"{name}: train.kl_weight needs the base as it was, and train.lora.init={arm.train.lora.init} starts"
                " over another weight; take init=default or eva, or unset kl_weight"
            )


def check_rows(
    space: Workspace,
    arms: Mapping[str, ArmConfig],
    pool: PoolConfig | None,
    *,
    engine: EngineConfig,
    evaluate: EvaluateConfig,
) -> None:
    """Check what needs the model: its precision and its files, and the lengths of rows, prompts and diverse rows.

    Raises:
        ChatError, TrainError, ConfigError: See the single checks.
    """
    if arms:
        check_precision(space.model)
    for train in (arm.train for arm in arms.values()):
        check_quantisation(
            space.model,
            train.lora,
            trains_base=train.trains_base,
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            offload=train.offload,
        )
    if any(arm.train.trains_base for arm in arms.values()):
        check_storable(load_shapes(space.model), space.model)
    check_shards([space.model, *list_teachers(pool)], engine)
    check_lengths(space, arms, engine=engine, evaluate=evaluate)
    check_pool_lengths(space, arms, pool)
    if pool is not None:
        check_room(pool, engine)


def list_teachers(pool: PoolConfig | None) -> list[ModelConfig]:
    """Return the models beside the base that write a pool."""
    return [source.model for source in pool.synthesize.sources if source.model] if pool else []


def check_shards(models: Iterable[ModelConfig], engine: EngineConfig) -> None:
    """Refuse a number of shards by which the attention heads of a model can't be dealt out: vLLM cuts between heads.

    Raises:
        ConfigError: With the model's heads and the numbers that fit them.
    """
    size = engine.tensor_parallel_size
    for model in models if size > 1 else ():
        num_heads, num_key_heads = count_heads(model)
        fitting = [
            number
            for number in range(1, num_heads + 1)  # keys are repeated where there are fewer than shards
            if num_heads % number == 0 and (num_key_heads % number == 0 or number % num_key_heads == 0)
        ]
        if fitting and size not in fitting:
            raise ConfigError(
                f"engine.tensor_parallel_size={size} must deal out the heads of a model evenly, and {model.path!r}"
                f" has {num_heads} of queries and {num_key_heads} of keys; take one of {fitting}, and with GPUs the"
                " same engine.num_gpus_per_replica"
            )


def check_metrics(task: Task) -> None:
    """Refuse a metric that nothing computes, and a suite whose score could not be logged.

    Raises:
        ConfigError: With the names that there are, or the rule of names.
    """
    unknown = [name for name in task.metrics if name not in METRICS]
    if unknown:
        raise ConfigError(f"task metrics {unknown}: no such metric; there are {sorted(METRICS)}")
    suites = {row.suite for split in ("dev", "test") for row in task.rows_by_split[split]}
    for suite in sorted(suites):
        score_name(suite, task.metrics[0])


def check_split(task: Task, split: Split) -> None:
    """Refuse to score on a split without rows.

    Raises:
        ConfigError: With the splits that have some.
    """
    if not task.rows_by_split[split]:
        counts = {name: len(rows) for name, rows in task.rows_by_split.items()}
        raise ConfigError(
            f"split {split!r} of task {task.name!r} has no rows ({counts}); add some, or set split"
        )


def check_stages(task: Task, arms: Mapping[str, ArmConfig]) -> None:
    """Refuse a stage that would move nothing, and a start that the task can't give.

    Raises:
        ConfigError: With the arm and the way out.
    """
    for name, arm in arms.items():
        train = arm.train
        attached = {"lora"} if train.lora else set()
        attached |= {"token_rows"} if task.tokens else set()
        attached |= {"base"} if train.trains_base else set()
        for number, stage in enumerate(train.stages):
            if not attached & set(stage.parts) or (stage.rows == "token" and not task.tokens):
                raise ConfigError(
                    f"{name}: stage {number} moves {list(stage.parts)} on the rows of the {stage.rows}, and there"
                    f" is only {sorted(attached) or 'nothing'}: declare task.tokens, set train.lora, name"
                    " base in the stage's parts, or take a recipe without token rows, such as starter_lingo"
                )
        moves_rows = any("token_rows" in stage.parts for stage in train.stages)
        starts_at_mean = train.token_init == "mean_instruction"
        if starts_at_mean and moves_rows and task.tokens and not task.long_instruction:
            raise ConfigError(
                f"{name}: train.token_init=mean_instruction needs the task's long_instruction; set it in"
                " task.yaml or task.long_instruction, or take token_init=stand_in"
            )


def check_memory(space: Workspace, arms: Mapping[str, ArmConfig], *, is_here: bool) -> None:
    """Refuse an arm that a worker's device can't hold, as far as the devices are known here.

    Args:
        space: Has the base model and the tokens.
        arms: What is trained.
        is_here: Whether workers run on this machine; elsewhere each asks its own device before it loads.

    Raises:
        ConfigError: With the estimate and the ways out.
    """
    for name, arm in arms.items() if is_here else ():
        available = read_device_bytes(arm.train, num_sharing=arm.train.num_workers)
        shortage = describe_shortage(
            space.model, arm.train, num_tokens=len(space.chat.token_ids), available=available
        )
        if shortage:
            raise ConfigError(f"{name}: {shortage}")


def check_lengths(
    space: Workspace, arms: Mapping[str, ArmConfig], *, engine: EngineConfig, evaluate: EvaluateConfig
) -> None:
    """Refuse rows that no arm could train on, and prompts that the engine could not answer.

    Raises:
        ChatError: A train row is over an arm's `max_length` and its `on_long` is `error`.
        TrainError: A train row has no trained token.
        ConfigError: A prompt of dev or test leaves the engine no room for an answer.
    """
    splits = space.task.rows_by_split
    for settings in {
        (arm.train.max_length, arm.train.on_long, arm.train.train_on): arm.train for arm in arms.values()
    }.values():
        encode_rows([row.messages for row in splits["train"]], settings, space.chat)
    room = engine.max_model_len - evaluate.max_tokens
    for row in (*splits["dev"], *splits["test"]):
        prompts = [row.prompt] if row.reference is not None else [row.prompt, row.base_messages]
        num_ids = max(len(space.chat.encode_prompt(prompt)) for prompt in prompts)
        if num_ids > room:
            raise ConfigError(
                f"the prompt of row {row.task_id} has {num_ids} ids; engine.max_model_len="
                f"{engine.max_model_len} less evaluate.max_tokens={evaluate.max_tokens} leaves {room}; raise"
                " engine.max_model_len, as far as the model goes, or shorten the row"
            )
