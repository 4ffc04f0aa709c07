"""What would fail late, found before any work: from the settings, the task's rows and the vocabulary alone.

metrics known?  every task row and prompt short enough?  pool large enough for every ratio?
"""

from collections.abc import Mapping

from delia.errors import ConfigError
from delia.evaluate.harness import EvaluateConfig
from delia.evaluate.scoring import METRICS
from delia.flow.pool import PoolConfig
from delia.flow.trial import ArmConfig, encode_rows
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig
from delia.mix.mixture import MixConfig, count_rows


def check_metrics(names: tuple[str, ...]) -> None:
    """Refuse a metric that nothing computes.

    Raises:
        ConfigError: With the names that there are.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ConfigError(f"task metrics {unknown}: no such metric; there are {sorted(METRICS)}")


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


def check_ratios(pool: PoolConfig | None, arms: Mapping[str, ArmConfig], *, num_task_rows: int) -> None:
    """Refuse a ratio that the pool will not supply once it is made.

    Raises:
        ConfigError: With the rows that are asked of a source and those it will have.
        MixtureError: Shares that are negative or do not sum to 1.
    """
    sources = pool.synthesize.sources if pool else ()
    supplied = {source.name: source.num_rows for source in sources}
    for name, arm in arms.items():
        for source, needed in _count_needed(arm.mix, supplied, num_task_rows).items():
            if needed > supplied.get(source, 0):
                raise ConfigError(
                    f"{name}: diverse_ratio {arm.mix.diverse_ratio:g} x {num_task_rows} task rows asks for"
                    f" {needed} rows of source {source!r}, pool.synthesize makes {supplied.get(source, 0)};"
                    " raise the source's num_rows, or lower mix.diverse_ratio or the share"
                )


def _count_needed(mix: MixConfig, supplied: Mapping[str, int], num_task_rows: int) -> dict[str, int]:
    """Return the distinct rows that a mixture takes of each source."""
    total = round(num_task_rows * mix.diverse_ratio)
    if not total:
        return {}
    if not supplied and not mix.shares:
        return {"of any name": total}
    shares = mix.shares or {name: count / sum(supplied.values()) for name, count in supplied.items()}
    return {name: min(count, mix.num_distinct or count) for name, count in count_rows(total, shares).items()}
