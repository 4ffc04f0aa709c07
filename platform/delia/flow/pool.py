"""Synthesise until enough rows are accepted: candidates in index order -> Pool.

    round of sources: synthesize --chunks--> Acceptance --> closed; the next round feeds on it
    all rounds --> rows.parquet, rejected.parquet, manifest

The driver plans chunks and passes on their addresses: no row goes through it, but those that a source feeds on.

A source of N accepted rows is the accepted part of candidates 0..m, m the smallest index that reaches N or
the stop rule: neither replicas, nor the order of chunks, nor restarts change it.
"""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing

from ray.exceptions import RayActorError

from delia.config import FrozenConfig, fingerprint
from delia.curate.pipeline import CurateConfig
from delia.curate.stopping import StopConfig
from delia.errors import ConfigError, PoolError
from delia.flow.acceptance import Acceptance, host_acceptance
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig
from delia.store.pools import Pool, read_pool
from delia.store.tables import check_writable, is_finished
from delia.synthesize.dialogue import Dialogue
from delia.synthesize.pipeline import StoredChunk, plan_rounds, synthesize
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

logger = logging.getLogger(__name__)

MAX_STARTS = 3
"""How often a pool is begun before a curating process that dies ends the job."""

LogMetrics = Callable[[dict[str, float], int], None]


class PoolConfig(FrozenConfig):
    """How a pool is made: what is synthesised, what is kept of it, and when a source ends early."""

    synthesize: SynthesizeConfig
    curate: CurateConfig = CurateConfig()
    stop: StopConfig = StopConfig()


def pool_fingerprint(config: PoolConfig, space: Workspace) -> str:
    """Return the name of the pool: everything that decides its rows, nothing that does not."""
    return fingerprint(config, space.model_id, space.chat.template_hash, space.task.digest)


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
    for num_left in reversed(range(MAX_STARTS)):
        try:
            metrics, num_seen = _make_pool(
                config, space, name, engine=engine, log=log, allowed_modules=allowed_modules
            )
            break
        except RayActorError as error:  # engines are restarted by Ray; what died is the acceptance
            reason = str(error).strip().rpartition("\n")[2]
            if not num_left:
                raise PoolError(
                    f"the process that curates died {MAX_STARTS} times (last: {reason}); see whether its node"
                    " has memory for what the pool remembers, and run the job again"
                ) from error
            logger.warning("the process that curates died; it starts anew from the stored chunks: %s", reason)
    log({"synthesize/seconds": time.monotonic() - started, **metrics}, num_seen)
    return read_pool(address)


def _make_pool(
    config: PoolConfig,
    space: Workspace,
    name: str,
    *,
    engine: EngineConfig | None,
    log: LogMetrics,
    allowed_modules: tuple[str, ...],
) -> tuple[dict[str, float], int]:
    """Run all rounds and write the pool; return the metrics of its diversity, and the number of candidates."""
    targets = {source.name: source.num_rows for source in config.synthesize.sources}
    size = config.synthesize.chunk_size
    with host_acceptance(
        config.curate, config.stop, space, num_rows=targets, allowed_modules=allowed_modules
    ) as acceptance:
        acceptance.begin()
        for sources in plan_rounds(config.synthesize):
            acceptance.open([source.name for source in sources])
            progress = None
            for source in sources:
                if source.rows is not None:
                    progress = acceptance.take_file(source.name, source.rows, size=size)
                    log(progress.to_metrics(), progress.num_seen)
            written = tuple(source for source in sources if source.rows is None)
            if written:
                chunks = _generate(
                    config, space, written, acceptance, engine=engine, allowed_modules=allowed_modules
                )
                with closing(chunks):
                    for chunk in chunks:
                        progress = acceptance.take(chunk)
                        log(progress.to_metrics(), progress.num_seen)
                        if progress.has_ended:
                            break
            acceptance.close()
        return acceptance.write(space.address("pools", name), fingerprint=name, engine=engine)


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


def _generate(
    config: PoolConfig,
    space: Workspace,
    sources: tuple[SourceConfig, ...],
    acceptance: Acceptance,
    *,
    engine: EngineConfig | None,
    allowed_modules: tuple[str, ...],
) -> Generator[StoredChunk, None, None]:
    """Return the candidates that a round's methods write, stored ones first."""
    tokens = dict(space.chat.token_ids)
    feed = dict.fromkeys(name for source in sources for name in source.feeds_on)
    dialogue = Dialogue(
        sources=sources,
        sampling=config.synthesize.sampling,
        model=sources[0].model or space.model,
        max_length=config.synthesize.max_length,
        task_tokens={} if sources[0].model else tokens,  # another model has no rows for them
        tokens=tuple(tokens),
        seed_tasks=space.task.rows_by_split["train"],
        long_instruction=space.task.long_instruction,
        closed={name: acceptance.read_rows(name) for name in feed},
        allowed_modules=allowed_modules,
    )
    return synthesize(
        dialogue,
        chunk_size=config.synthesize.chunk_size,
        engine=engine,
        address=space.address("candidates", ""),
    )
