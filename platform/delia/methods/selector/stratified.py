"""Stratified sampling: so many rows of each value of a column, drawn at random within it.

Source: Neyman 1934, "On the two different aspects of the representative method", J. R. Stat. Soc. 97, for
proportional allocation; equal allocation gives rare strata as many rows as common ones, as far as they have
them.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from delia.curate.selection import Columns, find_column
from delia.errors import ConfigError
from delia.rng import make_random


@dataclass(frozen=True, kw_only=True)
class Stratified:
    """Draw without replacement from the strata of `column`.

    `proportional` keeps the shares of the strata, rounded by largest remainders; `equal` fills all strata
    alike, and what a small one can't give goes to the others.
    """

    column: str = "opening"
    allocation: Literal["proportional", "equal"] = "proportional"

    def __post_init__(self) -> None:
        """Refuse an allocation that there is not.

        Raises:
            ConfigError: With those that there are.
        """
        if self.allocation not in ("proportional", "equal"):
            raise ConfigError(
                f"Stratified.allocation is 'proportional' or 'equal', got {self.allocation!r}; set one of them"
            )

    def __call__(self, columns: Columns, *, num_rows: int, seed: int) -> list[str]:
        """Return ids stratum by stratum, in the order of the strata's names."""
        ids_by_stratum: dict[str, list[str]] = defaultdict(list)
        for row_id, value in zip(columns["row_id"], find_column(columns, self.column), strict=True):
            ids_by_stratum[str(value)].append(str(row_id))
        sizes = {name: len(ids_by_stratum[name]) for name in sorted(ids_by_stratum)}
        allocate = _allocate_proportionally if self.allocation == "proportional" else _allocate_equally
        counts = allocate(sizes, num_rows)
        return [
            row_id
            for name, count in counts.items()
            for row_id in make_random("stratified", seed, name).sample(ids_by_stratum[name], count)
        ]


def _allocate_proportionally(sizes: dict[str, int], num_rows: int) -> dict[str, int]:
    total = sum(sizes.values())
    counts = {name: size * num_rows // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(sizes[name] * num_rows % total), name))
    for name in by_remainder[: num_rows - sum(counts.values())]:
        counts[name] += 1
    return counts


def _allocate_equally(sizes: dict[str, int], num_rows: int) -> dict[str, int]:
    """Fill the strata from the smallest on; the last rows that can't be shared go to the larger ones."""
    counts = dict.fromkeys(sizes, 0)
    left = num_rows
    smallest_first = sorted(sizes, key=lambda name: (sizes[name], name))
    for place, name in enumerate(smallest_first):
        counts[name] = min(sizes[name], left // (len(sizes) - place))
        left -= counts[name]
    return counts
