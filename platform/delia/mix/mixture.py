"""A task and a pool -> an index view of both: ordered row ids, no text copied.

`diverse_ratio` counts diverse rows a task row; 0 is plain tuning. Each source of the pool is put in
one seeded order, and a mixture takes its prefix: growing ratios are nested, so that trials differ by
what a ratio adds and by nothing else.
"""

import heapq
import math
from collections.abc import Mapping, Sequence

from pydantic import Field

from delia.config import FrozenConfig
from delia.errors import MixtureError
from delia.rng import hash_text, make_random
from delia.schema import Mixture, SeedTask


class MixConfig(FrozenConfig):
    """How much diverse data, from which sources.

    `shares` are parts of the diverse rows by source and sum to 1; empty means every source of the
    pool in proportion to its rows. `num_distinct` repeats only that many rows of each source: a
    control, not a way to save synthesis.
    """

    diverse_ratio: float = Field(default=10.0, ge=0.0)
    shares: dict[str, float] = {}
    num_distinct: int | None = Field(default=None, gt=0)
    seed: int = 42


def count_rows(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split a total by shares, one row after the other to the source that lies furthest behind.

    Counts sum to the total, and none falls when the total grows: largest remainders would take a row
    from a source now and then (Balinski and Young, "Fair Representation": the Alabama paradox). The
    divisor is Sainte-Lague's, so a count is the nearest integer wherever those sum to the total.

    Raises:
        MixtureError: A share is negative, or they do not sum to 1.
    """
    if not all(share >= 0 for share in shares.values()) or not abs(sum(shares.values()) - 1.0) <= 1e-6:
        raise MixtureError(f"mix.shares must be >= 0 and sum to 1, got {dict(shares)}")
    counts = dict.fromkeys(shares, 0)
    behind = [(0.5 / share, name) for name, share in shares.items() if share > 0]
    heapq.heapify(behind)
    for _ in range(total):
        name = behind[0][1]
        counts[name] += 1
        heapq.heapreplace(behind, ((counts[name] + 0.5) / shares[name], name))
    return counts


def _draw_source(name: str, row_ids: Sequence[str], needed: int, config: MixConfig) -> list[str]:
    ordered = sorted(row_ids)  # whatever order the pool was read in
    make_random(config.seed, "mix", name).shuffle(ordered)
    num_distinct = min(needed, config.num_distinct or needed)
    if len(ordered) < num_distinct:
        return ordered
    return [ordered[place % num_distinct] for place in range(needed)]


def mix(
    task_rows: Sequence[SeedTask],
    pool_ids: Mapping[str, Sequence[str]],
    config: MixConfig,
    *,
    pool_root: str,
    task_digest: str,
) -> Mixture:
    """Return the mixture of all task rows, which come first, with `diverse_ratio` diverse rows each.

    Args:
        task_rows: The task's rows to train on.
        pool_ids: Source -> the row ids of the pool.
        config: How much, from which sources.
        pool_root: What the ids stand for.
        task_digest: What the task rows are.

    Raises:
        MixtureError: The pool can't supply a source's part, with the numbers and the ways out.
    """
    total = round(len(task_rows) * config.diverse_ratio)
    held = sum(map(len, pool_ids.values()))
    shares = config.shares or {name: len(ids) / held for name, ids in pool_ids.items()}
    diverse: list[str] = []
    for name, needed in sorted(count_rows(total, shares).items()) if total else ():
        drawn = _draw_source(name, pool_ids.get(name, ()), needed, config)
        if len(drawn) < needed:
            largest = math.floor(1000 * len(drawn) / (len(task_rows) * shares[name])) / 1000
            raise MixtureError(
                f"source {name!r} must supply {needed} rows (ratio {config.diverse_ratio:g} x {len(task_rows)}"
                f" task rows x share {shares[name]:g}) but the pool holds {len(drawn)}; lower mix.diverse_ratio"
                f" to at most {largest:g}, lower the share, or synthesise more rows"
            )
        diverse += drawn
    row_ids = (*(row.task_id for row in task_rows), *diverse)
    return Mixture(
        root=hash_text("mixture", pool_root, task_digest, *row_ids),
        row_ids=row_ids,
        is_task=(True,) * len(task_rows) + (False,) * len(diverse),
        diverse_ratio=config.diverse_ratio,
        shares=dict(shares),
    )
