"""What a pool's sources can give, held against what is asked of them before any work.

enough candidates, chats and file rows for `num_rows`?  rows short enough to train on?  enough rows for every ratio?
"""

from collections.abc import Mapping, Sequence

from delia.chat import ChatEncoder, load_chat
from delia.config import build_method
from delia.curate.filters import FILTERS, TOO_LONG
from delia.curate.settings import CurateConfig
from delia.errors import ChatError, ConfigError
from delia.flow.pool import PoolConfig
from delia.flow.trial import ArmConfig
from delia.flow.workspace import Workspace
from delia.mix.mixture import MixConfig, count_rows
from delia.schema import Message, Row, SeedTask
from delia.store.models import resolve_model
from delia.store.tasks import TaskConfig, read_import
from delia.synthesize.socket import Bounded, measure_row
from delia.synthesize.sources import SourceConfig


def check_sources(pool: PoolConfig, train_rows: Sequence[SeedTask]) -> None:
    """Refuse a source whose method, file or model is not there, or that can't give its rows; a round may be hours away.

    A method outside `delia.methods` is found only when the job, which knows what is allowed, begins. Under a rule of
    `stop` that may end a source early, fewer candidates than rows are no fault.

    Args:
        pool: What is made.
        train_rows: The task's, which methods answer that feed on no source.

    Raises:
        ConfigError, TaskFileError, ChatError: With what is wrong.
    """
    supplied = {source.name: source.num_rows for source in pool.synthesize.sources}
    may_end_early = pool.stop.max_output_tokens is not None or pool.stop.min_new_share is not None
    num_answered = sum(row.reference is not None for row in train_rows)
    for source in pool.synthesize.sources:
        if source.model is not None:
            load_chat(str(resolve_model(source.model)), chat_template=source.model.chat_template)
        num_chats = sum(supplied[name] for name in source.feeds_on) if source.feeds_on else num_answered
        most, reason = _bound_candidates(pool, source, num_chats)
        needed = pool.count_accepted(source)
        if needed > most and not may_end_early:
            chosen = f" chosen from {needed} (curate.select.oversample)" if pool.curate.select else ""
            raise ConfigError(
                f"source {source.name!r} is to give {source.num_rows} rows{chosen}, and has at most {most} candidates:"
                f" {reason}, or lower its num_rows"
            )


def _bound_candidates(pool: PoolConfig, source: SourceConfig, num_chats: int) -> tuple[int, str]:
    """Return how many candidates a source has at most, and why with the way to more."""
    if source.rows is not None:
        read = (item for item in read_import(source.rows).items if isinstance(item, SeedTask))
        return sum(
            item.reference is not None for item in read
        ), f"the rows of {source.rows.path!r}; give a file with more"
    size = pool.synthesize.chunk_size
    most = -(-pool.count_candidates(source) // size) * size
    reason = f"max_candidates={source.max_candidates} in whole chunks of {size}; raise it"
    if source.synthesizer is not None and source.synthesizer.method.startswith("delia.methods."):
        method = build_method(source.synthesizer)
        if isinstance(method, Bounded) and method.count_candidates(num_chats) < most:
            most = method.count_candidates(num_chats)
            fed = f"of {list(source.feeds_on)}" if source.feeds_on else "of the task that have answers"
            reason = f"the {num_chats} rows {fed}, each once; let it feed on more"
    return most, reason


def check_pool_lengths(space: Workspace, arms: Mapping[str, ArmConfig], pool: PoolConfig | None) -> None:
    """Refuse an arm that a long diverse row would stop: two turns of the engine and the template, or a file's row.

    Raises:
        ConfigError: With the longest row and the arm's limit.
    """
    if pool is None:
        return
    turns = (Message(role="user", content="a"), Message(role="assistant", content="a"))
    written = len(space.chat.encode_chat(turns).input_ids) + 2 * pool.synthesize.sampling.max_tokens
    longest_by_file: dict[str, int] = {}
    for name, arm in arms.items():
        train = arm.train
        if arm.mix.diverse_ratio == 0 or train.on_long != "error":
            continue
        shares = arm.mix.shares
        drawn = [item for item in pool.synthesize.sources if not shares or shares.get(item.name)]
        if written > train.max_length and any(source.synthesizer for source in drawn):
            raise ConfigError(
                f"{name}: a diverse row may have {written} ids (twice sampling.max_tokens="
                f"{pool.synthesize.sampling.max_tokens} and the template), train.max_length is {train.max_length}:"
                " raise it, lower sampling.max_tokens, or set train.on_long=drop"
            )
        for source in drawn:
            if source.rows is None:
                continue
            if source.name not in longest_by_file:
                longest_by_file[source.name] = _find_longest(source.rows, pool.curate, space.chat)
            longest = longest_by_file[source.name]
            if longest > train.max_length:
                raise ConfigError(
                    f"{name}: a row of {source.rows.path!r} has {longest} ids, train.max_length is {train.max_length}:"
                    " raise it, lower curate.max_prompt_tokens or curate.max_output_tokens, or set"
                    " train.on_long=drop"
                )


def _find_longest(file: TaskConfig, curate: CurateConfig, chat: ChatEncoder) -> int:
    """Return the ids of the longest row of a file that curation may accept."""
    longest = 0
    for item in read_import(file).items:
        if isinstance(item, SeedTask):
            try:
                encoded = chat.encode_chat(item.messages)
            except ChatError:  # no row of the pool
                continue
            row = measure_row(Row(row_id="", index=0, source="", messages=item.messages), encoded)
            if not FILTERS[TOO_LONG](row, curate):
                longest = max(longest, row.num_prompt_tokens + row.num_output_tokens)
    return longest


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
