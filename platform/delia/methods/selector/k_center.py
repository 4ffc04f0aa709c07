"""k-center: keep rows so that none lies far from a kept one.

Source: Gonzalez 1985, "Clustering to minimize the maximum intercluster distance", Theoretical Computer
Science 38; as core-set selection: Sener and Savarese 2018, https://arxiv.org/abs/1708.00489. The greedy choice of
the farthest row is within a factor of two of the best radius in a metric; distances here are Euclidean
between unit vectors.
"""

from dataclasses import dataclass

import numpy as np

from delia.curate.selection import Columns, find_column
from delia.rng import make_random


@dataclass(frozen=True, kw_only=True)
class KCenter:
    """Greedy farthest-first order from a seeded start; of equally far rows the first."""

    column: str = "embedding"

    def __call__(self, columns: Columns, *, num_rows: int, seed: int) -> list[str]:
        """Return ids in the order of choice: a smaller choice is the beginning of a larger one."""
        vectors_ND = find_column(columns, self.column)
        ids = columns["row_id"]
        place = make_random("k_center", seed).randrange(len(ids))
        chosen = [place]
        farness_N = np.full(len(ids), np.inf)
        while len(chosen) < num_rows:
            # for unit vectors the squared distance is 2 - 2 cosines
            farness_N = np.minimum(farness_N, 2 - 2 * (vectors_ND @ vectors_ND[place]))
            farness_N[place] = -np.inf
            place = int(farness_N.argmax())
            chosen.append(place)
        return [str(ids[place]) for place in chosen]
