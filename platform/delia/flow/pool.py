"""Synthesise until enough rows are accepted: candidates in index order -> Pool.

    synthesize --chunks--> a Curator a source --> rows.parquet, rejected.parquet, manifest

A pool of N accepted rows is the accepted part of candidates 0..m, m the smallest index that reaches
N: neither replicas, nor the order of chunks, nor restarts change it.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing

from delia.config import FrozenConfig, fingerprint
from delia.curate.pipeline import CurateConfig
from delia.errors import PoolError
from delia.flow.curation import Curation, open_curation
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig
from delia.schema import Rejection, Row
from delia.store.pools import Candidate, Pool, read_pool, write_pool
from delia.store.tables import is_finished
from delia.synthesize.pipeline import SynthesizeConfig, synthesize

LogMetrics = Callable[[dict[str, float], int], None]


class PoolConfig(FrozenConfig):
    """How a pool is made: what is synthesised, and what is kept of it."""

    synthesize: SynthesizeConfig
    curate: CurateConfig = CurateConfig()


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
        config: What is synthesised and what is kept.
        space: Model, chat format and task.
        engine: How the model is served; None curates stored candidates and generates nothing.
        log: Called with metrics and the number of candidates seen.
        allowed_modules: Modules outside `delia.methods` that settings may name.

    Raises:
        PoolError: A source ran out of candidates before it had enough rows, with the numbers.
    """
    name = pool_fingerprint(config, space)
    address = space.address("pools", name)
    if is_finished(address):
        return read_pool(address)
    started = time.monotonic()
    num_rows = {source.name: source.num_rows for source in config.synthesize.sources}
    curation = open_curation(config.curate, space, num_rows=num_rows, allowed_modules=allowed_modules)
    candidates = synthesize(
        config.synthesize,
        model=space.model,
        engine=engine,
        task=space.task,
        task_tokens=dict(space.chat.token_ids),
        address=space.address("candidates", ""),
        allowed_modules=allowed_modules,
    )
    with closing(candidates):
        rows, rejections = _accept(curation, candidates, log)
    num_tokens = sum(row.num_output_tokens for row in rows)
    num_tokens += sum(rejection.num_output_tokens for rejection in rejections)
    details, metrics = curation.describe(rows)
    curation.score(address, rows)
    write_pool(
        address,
        rows=rows,
        rejections=rejections,
        fingerprint=name,
        parents={"model": space.model_id, "task": space.task.digest},
        details={"template_hash": space.chat.template_hash, "output_tokens": num_tokens, **details},
    )
    seconds = time.monotonic() - started
    log({"synthesize/seconds": seconds, **metrics}, len(rows) + len(rejections))
    return read_pool(address)


def _accept(
    curation: Curation, candidates: Iterable[list[Candidate]], log: LogMetrics
) -> tuple[list[Row], list[Rejection]]:
    """Feed candidates to a curator a source until every source has its rows; both in (source, index) order."""
    curators, targets = curation.curators, curation.targets
    rows: list[Row] = []
    rejections: list[Rejection] = []
    num_tokens = 0
    for chunk in candidates:
        source = chunk[0].source
        for result in curators[source].feed(chunk, target=targets[source]):
            num_tokens += result.num_output_tokens
            if isinstance(result, Row):
                rows.append(result)
            else:
                rejections.append(result)
        num_seen = len(rows) + len(rejections)
        log(
            {
                "synthesize/candidates": num_seen,
                "synthesize/accepted": len(rows),
                "synthesize/rejected": len(rejections),
                "synthesize/output_tokens": num_tokens,
                "curate/new_unique_rate": curation.measure_new_unique_rate(),
            },
            num_seen,
        )
        if all(curators[name].num_accepted >= target for name, target in targets.items()):
            break
    for source, target in targets.items():
        if curators[source].num_accepted < target:
            reasons = Counter(item.reason for item in rejections if item.source == source)
            raise PoolError(
                f"source {source!r} gave {curators[source].num_accepted} of {target} rows before its"
                f" candidates ran out (rejected: {dict(reasons)}); raise max_candidates, loosen curate, or"
                " ask for fewer rows"
            )
    rows, dropped = curation.select(rows)
    rejections += dropped
    rows.sort(key=lambda row: (row.source, row.index))
    rejections.sort(key=lambda item: (item.source, item.index))
    return rows, rejections
