"""Facility location: keep rows so that every row has a similar one among them.

    f(S) = sum over all rows of the largest similarity to a row of S;  similarity = max(0, cosine)

Source: as an objective for choosing training data, Wei, Iyer and Bilmes 2015, "Submodularity in Data Subset
Selection and Active Learning", ICML. The greedy choice reaches 1 - 1/e of the best (Nemhauser, Wolsey and
Fisher 1978); it is made lazily (Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set
functions"). Unlike k-center it does not go for outliers.
"""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delia.curate.selection import Columns, find_column

_GAINS_AT_A_TIME = 256
_DIGITS = 5  # of a gain: two rows that cover each other gain equally but for the last bits of a float


@dataclass(frozen=True, kw_only=True)
class FacilityLocation:
    """Lazy greedy; nothing is random, and of equal gains the first row's is taken.

    A gain costs N D products and is measured 256 rows at a time: all of them before the first choice, and
    later those of the rows that may be next. Memory is N x 256 similarities.
    """

    column: str = "embedding"

    def __call__(self, columns: Columns, *, num_rows: int, seed: int) -> list[str]:
        """Return ids in the order of choice: a smaller choice is the beginning of a larger one."""
        vectors_ND = find_column(columns, self.column)
        ids = columns["row_id"]
        covered_N = np.zeros(len(ids), dtype=np.float32)
        heap = [(-np.inf, place, -1) for place in range(len(ids))]
        chosen: list[int] = []
        while len(chosen) < num_rows:
            if heap[0][2] < len(chosen):  # a gain only shrinks, so an old one is an upper bound
                places = [heapq.heappop(heap)[1] for _ in range(min(_GAINS_AT_A_TIME, len(heap)))]
                gains = _measure_gains(vectors_ND, places, covered_N)
                for place, gain in zip(places, gains, strict=True):
                    heapq.heappush(heap, (-round(gain, _DIGITS), place, len(chosen)))
                continue
            _, place, _ = heapq.heappop(heap)
            covered_N = np.maximum(covered_N, vectors_ND @ vectors_ND[place])
            chosen.append(place)
        return [str(ids[place]) for place in chosen]


def _measure_gains(
    vectors_ND: NDArray[Any], places: list[int], covered_N: NDArray[np.float32]
) -> list[float]:
    """Return by how much the objective grows with each of the rows at `places`."""
    gains_NP = vectors_ND @ vectors_ND[places].T
    gains_NP -= covered_N[:, None]
    gains: list[float] = np.maximum(gains_NP, 0).sum(0, dtype=np.float64).tolist()
    return gains
