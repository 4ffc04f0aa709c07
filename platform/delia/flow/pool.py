"""Synthesise until enough rows are accepted: candidates in index order -> Pool.

    round of sources: Synthesis --chunks--> Screeners --> Acceptance --> closed; the next round feeds on it
    all rounds --> rows.parquet, rejected.parquet, manifest

The driver plans chunks, stores each as it comes and passes on its address: it keeps no row, but those of imported
files and those that a source feeds on.

A source of N accepted rows is the accepted part of candidates 0..m, m the smallest index that reaches N or
the stop rule: neither replicas, nor the order of chunks, nor restarts change it.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from delia.config import FrozenConfig
from delia.curate.overlap import read_eval_rows
from delia.curate.settings import CurateConfig
from delia.curate.stopping import StopConfig
from delia.errors import ConfigError, PoolError
from delia.flow.acceptance import Acceptance, AcceptanceLostError, host_acceptance
from delia.flow.naming import name_pool
from delia.flow.screening import Screeners, host_screeners
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig
from delia.schema import SeedTask
from delia.store.pools import Pool, read_pool
from delia.store.tables import is_finished, leave_mark
from delia.store.tasks import Imported
from delia.synthesize.dialogue import Dialogue
from delia.synthesize.pipeline import (
    Batch,
    StoredChunk,
    Synthesis,
    batch_imported,
    plan_rounds,
    read_imports,
)
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
"""How often a curating process may die in a row and get no further, before it ends the job."""

LogMetrics = Callable[[dict[str, float], int], None]


class PoolConfig(FrozenConfig):
    """How a pool is made: what is synthesised, what is kept of it, and when a source ends early."""

    synthesize: SynthesizeConfig
    curate: CurateConfig = CurateConfig()
    stop: StopConfig = StopConfig()

    def count_accepted(self, source: SourceConfig) -> int:
        """Return how many rows of a source are accepted, to keep those that it is to give."""
        select = self.curate.select
        return select.count_accepted(source.num_rows) if select else source.num_rows

    def count_candidates(self, source: SourceConfig) -> int:
        """Return how many candidates of a source are tried."""
        return source.count_candidates(self.count_accepted(source))


def pool_fingerprint(config: PoolConfig, space: Workspace, *, allowed_modules: tuple[str, ...] = ()) -> str:
    """Return the name of the pool: everything that decides its rows, nothing that does not (`flow.naming`).

    Raises:
        ConfigError: See `name_pool`.
        TaskFileError: See `read_eval_rows` and `read_imports`.
    """
    eval_rows, imports = read_eval_rows(config.curate.decontaminate), read_imports(config.synthesize)
    return name_pool(config, space, eval_rows, imports, allowed_modules=allowed_modules)


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
        PoolError: A source ran out of candidates before it had enough rows, with the numbers; or the process that
            curates died again and again.
        ConfigError: The engine admits fewer ids than `max_length`, or a rule of `curate` names nothing.
        EngineError: No engine can start, or it fails on everything.
        StoreError: `output_dir` can't be written or is not shared by all nodes, or a stored chunk was damaged.
        TaskFileError: A set of `curate.decontaminate` is missing or malformed, or a source's file can't be read.
    """
    eval_rows = read_eval_rows(config.curate.decontaminate)
    imports = read_imports(config.synthesize)  # once: what names the pool is what goes into it
    name = name_pool(config, space, eval_rows, imports, allowed_modules=allowed_modules)
    address = space.address("pools", name)
    if is_finished(address):
        return read_pool(address)
    if engine is not None:
        check_room(config, engine)
    started = time.monotonic()
    forward, num_lost, reached = _Forward(log), 0, 0
    while True:
        try:
            metrics, num_seen = _make_pool(
                config,
                space,
                name,
                eval_rows=eval_rows,
                imports=imports,
                engine=engine,
                log=forward,
                allowed_modules=allowed_modules,
            )
            break
        except AcceptanceLostError as error:
            num_lost = 1 if forward.reached > reached else num_lost + 1
            reached = forward.reached
            if num_lost == MAX_LOSSES:
                raise PoolError(
                    f"a process that curates died {MAX_LOSSES} times after {reached} candidates (last: {error}); see"
                    " whether its node has memory for accepted texts or screening models, and run the job again"
                ) from error
            logger.warning("a process that curates died; it starts anew from the stored chunks: %s", error)
    log({"synthesize/seconds": time.monotonic() - started, **metrics}, num_seen)
    return read_pool(address)


def _make_pool(
    config: PoolConfig,
    space: Workspace,
    name: str,
    *,
    eval_rows: Sequence[SeedTask],
    imports: Mapping[str, Imported],
    engine: EngineConfig | None,
    log: LogMetrics,
    allowed_modules: tuple[str, ...],
) -> tuple[dict[str, float], int]:
    """Run all rounds and write the pool; return what is logged of it, and the number of candidates."""
    targets = {source.name: source.num_rows for source in config.synthesize.sources}
    with host_acceptance(
        config.curate,
        config.stop,
        space,
        num_rows=targets,
        eval_rows=eval_rows,
        allowed_modules=allowed_modules,
    ) as acceptance:
        with leave_mark(space.output_dir) as mark:
            acceptance.begin(mark)
        # they end before the pool is described, for which models are loaded once more
        with host_screeners(config.curate, space, eval_rows=eval_rows) as screeners:
            for sources in plan_rounds(config.synthesize):
                _Round(config, space, sources, acceptance, screeners, log).run(
                    imports, engine=engine, allowed_modules=allowed_modules
                )
        return acceptance.write(space.address("pools", name), fingerprint=name)


@dataclass
class _Round:
    """A round of sources; `ended` are those that have what they are to give."""

    config: PoolConfig
    space: Workspace
    sources: tuple[SourceConfig, ...]
    acceptance: Acceptance
    screeners: Screeners
    log: LogMetrics
    ended: set[str] = field(default_factory=set)

    def run(
        self,
        imports: Mapping[str, Imported],
        *,
        engine: EngineConfig | None,
        allowed_modules: tuple[str, ...],
    ) -> None:
        """Accept of files, of stored candidates and of new ones until each source has ended."""
        synthesize = self.config.synthesize
        self.acceptance.open([source.name for source in self.sources])
        for name in (source.name for source in self.sources if source.rows is not None):
            self._take(batch_imported(name, imports[name], size=synthesize.chunk_size), name)
            self.acceptance.check_supply(name)
        written = tuple(
            source.model_copy(update={"max_candidates": self.config.count_candidates(source)})
            for source in self.sources
            if source.rows is None
        )
        drawn: list[str] = []
        if written:
            names = [source.name for source in written]
            dialogue = self._open_dialogue(written, allowed_modules)
            drawn = [name for name in names if dialogue.asks_alike(name)]
            synthesis = Synthesis(
                dialogue,
                chunk_size=synthesize.chunk_size,
                address=self.space.address("candidates", ""),
                ended=self.ended,
            )
            self._take(synthesis.read_stored(), *names)
            if engine is not None and not self.ended.issuperset(names):
                with closing(synthesis.generate(engine)) as chunks:
                    self._take(chunks, *names)
        self.acceptance.close(drawn=drawn)

    def _take(self, items: Iterable[StoredChunk | Batch], *names: str) -> None:
        """Accept of the items until the named sources have ended."""
        for item in self.screeners.screen_ahead(items, self.ended):
            progress = self.acceptance.take(item)
            self.log(progress.to_metrics(), progress.num_seen)
            self.ended.update(progress.ended)
            if self.ended.issuperset(names):
                return

    def _open_dialogue(self, sources: tuple[SourceConfig, ...], allowed_modules: tuple[str, ...]) -> Dialogue:
        """Return how the round's methods write."""
        tokens = dict(self.space.chat.token_ids)
        feed = dict.fromkeys(name for source in sources for name in source.feeds_on)
        return Dialogue(
            sources=sources,
            sampling=self.config.synthesize.sampling,
            model=sources[0].model or self.space.model,
            max_length=self.config.synthesize.max_length,
            task_tokens={} if sources[0].model else tokens,  # another model has no rows for them
            tokens=tuple(tokens),
            seed_tasks=self.space.task.rows_by_split["train"],
            long_instruction=self.space.task.long_instruction,
            closed={name: self.acceptance.read_rows(name) for name in feed},
            allowed_modules=allowed_modules,
        )


class _Forward:
    """Logs what goes beyond what was logged before: a pool that is begun again repeats itself."""

    def __init__(self, log: LogMetrics) -> None:
        self.reached = 0
        self._log = log

    def __call__(self, metrics: dict[str, float], num_seen: int) -> None:
        if num_seen > self.reached:
            self.reached = num_seen
            self._log(metrics, num_seen)


def check_room(config: PoolConfig, engine: EngineConfig) -> None:
    """Refuse an engine that admits fewer ids than candidates may have, or no adapter where one answers.

    Raises:
        ConfigError: With both limits, or the sources that name an adapter.
    """
    max_length = config.synthesize.max_length
    if engine.max_model_len < max_length:
        raise ConfigError(
            f"pool.synthesize.max_length={max_length} is over engine.max_model_len={engine.max_model_len};"
            " raise engine.max_model_len, as far as the model goes, or lower max_length"
        )
    sources = config.synthesize.sources
    adapted = [
        item.name for item in sources if item.synthesizer and item.synthesizer.knobs.get("answered_by")
    ]
    if adapted and engine.lora_rank is None:
        raise ConfigError(
            f"sources {adapted} are answered by an adapter (answered_by), engine.lora_rank=None admits none; set it to"
            " the adapter's rank"
        )
