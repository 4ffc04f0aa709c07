"""Synthesise until enough rows are accepted: candidates in index order -> Pool.

    round of sources: synthesize --chunks--> a Curator a source --> closed; the next round feeds on it
    all rounds --> rows.parquet, rejected.parquet, manifest

A source of N accepted rows is the accepted part of candidates 0..m, m the smallest index that reaches N or
the stop rule: neither replicas, nor the order of chunks, nor restarts change it.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain

from delia.config import FrozenConfig, fingerprint
from delia.curate.pipeline import CurateConfig
from delia.curate.stopping import ENOUGH_ROWS, StopConfig, StopRule
from delia.errors import ConfigError, PoolError
from delia.flow.curation import Curation, open_curation
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig
from delia.schema import Rejection, Row
from delia.store.pools import Cost, Pool, read_pool, write_pool
from delia.store.tables import check_writable, is_finished
from delia.synthesize.dialogue import Dialogue
from delia.synthesize.pipeline import Batch, plan_rounds, read_imported, synthesize
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

LogMetrics = Callable[[dict[str, float], int], None]


class PoolConfig(FrozenConfig):
    """How a pool is made: what is synthesised, what is kept of it, and when a source ends early."""

    synthesize: SynthesizeConfig
    curate: CurateConfig = CurateConfig()
    stop: StopConfig = StopConfig()


def pool_fingerprint(config: PoolConfig, space: Workspace) -> str:
    """Return the name of the pool: everything that decides its rows, nothing that does not."""
    return fingerprint(config, space.model_id, space.chat.template_hash, space.task.digest)


@dataclass
class _Growth:
    """What has been decided so far, over all rounds."""

    closed: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)

    @property
    def num_accepted(self) -> int:
        return sum(map(len, self.closed.values()))


def build_pool(
    config: PoolConfig,
    space: Workspace,
    *,
    engine: EngineConfig | None,
    log: LogMetrics,
    allowed_modules: tuple[str, ...] = (),
) -> Pool:
    """Return the pool, from storage where it is finished, else synthesised or resumed.

    Args:
        config: What is synthesised, what is kept, and when a source ends early.
        space: Model, chat format and task.
        engine: How the model is served; None curates stored candidates and generates nothing.
        log: Called with metrics and the number of candidates seen.
        allowed_modules: Modules outside `delia.methods` that settings may name.

    Raises:
        PoolError: A source ran out of candidates before it had enough rows, with the numbers.
        ConfigError: The engine admits fewer ids than `max_length`.
        StoreError: `output_dir` can't be written, or a stored file was damaged.
    """
    name = pool_fingerprint(config, space)
    address = space.address("pools", name)
    if is_finished(address):
        return read_pool(address)
    if engine is not None:
        check_room(config, engine)
    check_writable(space.output_dir)
    started = time.monotonic()
    growth = _Growth()
    targets = {source.name: source.num_rows for source in config.synthesize.sources}
    curation = open_curation(config.curate, space, num_rows=targets, allowed_modules=allowed_modules)
    for sources in plan_rounds(config.synthesize):
        with closing(
            _generate(config, space, sources, growth, engine=engine, allowed_modules=allowed_modules)
        ) as batches:
            _accept(config, curation, sources, batches, growth, log=log)
    num_rows = growth.num_accepted
    rows = sorted(chain.from_iterable(growth.closed.values()), key=lambda row: (row.source, row.index))
    details, metrics = curation.describe(rows)
    details |= {"template_hash": space.chat.template_hash, "cost": account(growth.cost, num_rows, engine)}
    curation.score(address, rows)
    write_pool(
        address,
        rows=rows,
        rejections=sorted(growth.rejections, key=lambda item: (item.source, item.index)),
        fingerprint=name,
        parents={"model": space.model_id, "task": space.task.digest},
        details=details | ({"stopped": growth.stopped} if growth.stopped else {}),
    )
    num_seen = num_rows + len(growth.rejections)
    log({"synthesize/seconds": time.monotonic() - started, **metrics}, num_seen)
    return read_pool(address)


def check_room(config: PoolConfig, engine: EngineConfig) -> None:
    """Refuse an engine that admits fewer ids than candidates may have.

    Raises:
        ConfigError: With both limits.
    """
    max_length = config.synthesize.max_length
    if engine.max_model_len < max_length:
        raise ConfigError(
            f"pool.synthesize.max_length={max_length} is over engine.max_model_len={engine.max_model_len};"
            " raise engine.max_model_len, as far as the model goes, or lower max_length"
        )


def account(cost: Cost, num_rows: int, engine: EngineConfig | None) -> dict[str, float]:
    """Return the ledger of a pool: what was spent, rejected rows included, in all and for each row.

    `device_seconds` are the engine's times the GPUs of a replica, or its CPUs where it has none; unknown,
    and left out, where nothing was generated.
    """
    ledger = {name: float(value) for name, value in asdict(cost).items()}
    if engine is not None:
        num_devices = engine.num_gpus_per_replica or engine.num_cpus_per_replica
        ledger["device_seconds"] = cost.engine_seconds * num_devices
    return ledger | {f"{name}_per_row": value / max(1, num_rows) for name, value in ledger.items()}


def _generate(
    config: PoolConfig,
    space: Workspace,
    sources: Sequence[SourceConfig],
    growth: _Growth,
    *,
    engine: EngineConfig | None,
    allowed_modules: tuple[str, ...],
) -> Generator[Batch, None, None]:
    """Yield the candidates of one round: imported ones, then those that the engine writes."""
    size = config.synthesize.chunk_size
    for source in sources:
        if source.rows is not None:
            yield from read_imported(source.name, source.rows, size=size)
    written = tuple(source for source in sources if source.rows is None)
    if not written:
        return
    tokens = dict(space.chat.token_ids)
    feed = {name for source in written for name in source.feeds_on}
    dialogue = Dialogue(
        sources=written,
        sampling=config.synthesize.sampling,
        model=written[0].model or space.model,
        max_length=config.synthesize.max_length,
        task_tokens={} if written[0].model else tokens,  # another model has no rows for them
        tokens=tuple(tokens),
        seed_tasks=space.task.rows_by_split["train"],
        long_instruction=space.task.long_instruction,
        closed={name: growth.closed[name] for name in feed},
        allowed_modules=allowed_modules,
    )
    batches = synthesize(dialogue, chunk_size=size, engine=engine, address=space.address("candidates", ""))
    with closing(batches):
        yield from batches


def _accept(
    config: PoolConfig,
    curation: Curation,
    sources: Sequence[SourceConfig],
    batches: Iterator[Batch],
    growth: _Growth,
    *,
    log: LogMetrics,
) -> None:
    """Feed a round's candidates to a curator a source until every source has ended; close them."""
    rules = {source.name: StopRule(config.stop, num_rows=curation.targets[source.name]) for source in sources}
    rows: dict[str, list[Row]] = {name: [] for name in rules}
    for batch in batches:
        growth.cost += batch.cost
        for decided in curation.curators[batch.source].feed(batch.candidates, rule=rules[batch.source]):
            if isinstance(decided, Row):
                rows[batch.source].append(decided)
            else:
                growth.rejections.append(decided)
        num_accepted = growth.num_accepted + sum(map(len, rows.values()))
        num_seen = num_accepted + len(growth.rejections)
        log(
            {
                "synthesize/candidates": num_seen,
                "synthesize/accepted": num_accepted,
                "synthesize/rejected": len(growth.rejections),
                "synthesize/prompt_tokens": growth.cost.prompt_tokens,
                "synthesize/output_tokens": growth.cost.output_tokens,
                "synthesize/engine_seconds": growth.cost.engine_seconds,
                "curate/new_unique_rate": curation.measure_new_unique_rate(rules),
            },
            num_seen,
        )
        if all(item.reason for item in rules.values()):
            break
    for source in sources:
        rule = rules[source.name]
        _check_supply(source, rule, growth.rejections)
        kept, dropped = curation.select(source.name, rows[source.name])
        growth.closed[source.name] = tuple(kept)
        growth.rejections += dropped
        if rule.reason != ENOUGH_ROWS:
            growth.stopped[source.name] = (
                f"{rule.reason}: {rule.num_accepted} of {rule.num_rows} rows, {rule.num_output_tokens} output"
                f" tokens, {rule.new_share:.2f} of the last instructions new"
            )


def _check_supply(source: SourceConfig, rule: StopRule, rejections: Sequence[Rejection]) -> None:
    """Refuse a source that ended without reason, or with nothing.

    Raises:
        PoolError: With what it gave, and why not more.
    """
    if rule.reason and rule.num_accepted:
        return
    reasons = Counter(item.reason for item in rejections if item.source == source.name)
    end = f"the stop rule {rule.reason!r} ended it" if rule.reason else "its candidates ran out"
    raise PoolError(
        f"source {source.name!r} gave {rule.num_accepted} of {rule.num_rows} rows before {end}"
        f" (rejected: {dict(reasons)}); raise max_candidates, loosen curate or stop, or ask for fewer rows"
    )
