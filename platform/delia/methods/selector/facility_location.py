"""Facility location: keep rows so that every row has a similar one among them.

    f(S) = sum over all rows of the largest similarity to a row of S;  similarity = max(0, cosine)

Source: as an objective for choosing training data, Wei, Iyer and Bilmes 2015, "Submodularity in Data Subset
Selection and Active Learning", ICML. The greedy choice reaches 1 - 1/e of the best (Nemhauser, Wolsey and
Fisher 1978); it is made lazily (Minoux 1978, "Accelerated greedy algorithms for maximizing submodular set
functions"). Unlike k-center it does not go for outliers.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from delia.curate.selection import Columns, find_column

_ROWS_AT_A_TIME = 1024
_DIGITS = 5  # of a gain: two rows that cover each other gain equally but for the last bits of a float


@dataclass(frozen=True, kw_only=True)
class FacilityLocation:
    """Lazy greedy; nothing is random, and of equal gains the first row's is taken.

    Takes N^2 D products before the first choice and N D for each gain that is measured again, and memory
    for 1024 x N similarities.
    """

    column: str = "embedding"

    def __call__(self, columns: Columns, *, num_rows: int, seed: int) -> list[str]:
        """Return ids in the order of choice: a smaller choice is the beginning of a larger one."""
        vectors_ND = find_column(columns, self.column)
        ids = columns["row_id"]
        gains_N = np.concatenate(
            [
                np.maximum(vectors_ND @ vectors_ND[start : start + _ROWS_AT_A_TIME].T, 0).sum(
                    0, dtype=np.float64
                )
                for start in range(0, len(ids), _ROWS_AT_A_TIME)
            ]
        )
        covered_N = np.zeros(len(ids))
        heap = [(-round(float(gain), _DIGITS), place, 0) for place, gain in enumerate(gains_N)]
        heapq.heapify(heap)
        chosen: list[int] = []
        while len(chosen) < num_rows:
            _, place, measured_at = heapq.heappop(heap)
            similarity_N = np.maximum(vectors_ND @ vectors_ND[place], 0)
            if measured_at < len(chosen):  # a gain only shrinks, so an old one is an upper bound
                gain = float(np.maximum(similarity_N - covered_N, 0).sum())
                heapq.heappush(heap, (-round(gain, _DIGITS), place, len(chosen)))
                continue
            covered_N = np.maximum(covered_N, similarity_N)
            chosen.append(place)
        return [str(ids[place]) for place in chosen]
