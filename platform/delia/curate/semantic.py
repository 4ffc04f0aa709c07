"""Semantic duplicates among accepted instructions: cosines of embeddings, measured exactly.

    vectors of a block --SeenMeanings.open--> is_near(place), remember(place) in index order

An instruction is refused if its cosine with an accepted one of lower index reaches a threshold. The
search compares with every accepted vector in one product of float32 matrices, which is enough below
a million rows: a block of 256 against 10^6 x 384 is 200 GFLOP, seconds of one core. Whether a pair that lies
on the threshold is near can change with the machine or with how candidates are cut into batches, because
a product's last bits (about 1e-6) do; no other pair's can.
"""

import numpy as np

from delia.curate.embedding import Vectors

SEMANTIC_DUPLICATE = "semantic_duplicate"

_ROWS_AT_A_TIME = 65536


class SeenMeanings:
    """The vectors accepted so far; those of a block are compared with these and with each other."""

    def __init__(self, threshold: float) -> None:
        """Start empty; `threshold` is a cosine, and a pair on it is near."""
        self._threshold = threshold
        self._num_accepted = 0
        self._accepted = np.empty((0, 0), dtype=np.float32)
        self._block = np.empty((0, 0), dtype=np.float32)
        self._is_near = np.empty(0, dtype=bool)
        self._is_pair = np.empty((0, 0), dtype=bool)

    def open(self, vectors_ND: Vectors) -> None:
        """Take the next block, rows of length 1 or 0, in index order."""
        self._block = vectors_ND
        self._is_near = np.zeros(len(vectors_ND), dtype=bool)
        for start in range(0, self._num_accepted, _ROWS_AT_A_TIME):
            stop = min(start + _ROWS_AT_A_TIME, self._num_accepted)
            cosines = vectors_ND @ self._accepted[start:stop].T
            self._is_near |= (cosines >= self._threshold).any(1)
        self._is_pair = vectors_ND @ vectors_ND.T >= self._threshold

    def is_near(self, place: int) -> bool:
        """Tell whether a row of the block is near an accepted one."""
        return bool(self._is_near[place])

    def remember(self, place: int) -> None:
        """Accept a row of the block: later ones are compared with it too."""
        if self._num_accepted == len(self._accepted):
            grown = np.empty((max(1024, 2 * len(self._accepted)), self._block.shape[1]), dtype=np.float32)
            if self._num_accepted:
                grown[: self._num_accepted] = self._accepted
            self._accepted = grown
        self._accepted[self._num_accepted] = self._block[place]
        self._num_accepted += 1
        self._is_near |= self._is_pair[place]
