"""Semantic duplicates among accepted instructions: cosines of their user turns' embeddings, measured exactly.

    vectors of a block --SeenMeanings.open--> is_near(place), remember(place) in index order

An instruction is refused if its cosine with an accepted one of lower index reaches a threshold. Most accepted ones are
ruled out without that cosine. Vectors of one source lie mostly along a few directions; what two of them share there,
and the lengths of what is left of each, bound their cosine from above (Cauchy and Schwarz):

    x . y  <=  x' . y'  +  |x - x'| |y - y'|       x' the part of x along the leading directions

The bounds of a block are one product of matrices with `_NUM_LEADING` + 1 columns. Pairs that reach the threshold there
are measured whole, so that the directions change the work and no result. Where vectors have no leading directions, or
the threshold is low, much is measured and the bounds are computed in vain. Li et al. 2017, "FEXIPRO: Fast and Exact
Inner Product Retrieval" (https://doi.org/10.1145/3035918.3064009), search for the largest products by such bounds.

An accepted row takes 4 bytes a dimension and a quarter of that or less for its bounds, three times as much while its
matrix grows.

Whether a pair that lies on the threshold is near can change with the machine or with how candidates are cut into
batches, because a product's last bits (about 1e-6) do; no other pair's can.
"""

import numpy as np

from delia.curate.embedding import Vectors

SEMANTIC_DUPLICATE = "semantic_duplicate"

_ROWS_AT_A_TIME = 4096
"""Accepted rows that a block is compared with at a time."""
_NUM_LEADING = 32
_NUM_SAMPLED = 1024
"""Accepted rows that the leading directions are taken from."""
_SLACK = 1e-5
"""More than rounding can take off a bound."""


class SeenMeanings:
    """The vectors accepted so far; those of a block are compared with these and with each other.

    Attributes:
        num_measured: Cosines with accepted rows that were computed.
    """

    def __init__(self, threshold: float) -> None:
        """Start empty; `threshold` is a cosine, and a pair on it is near."""
        self.num_measured = 0
        self._threshold = threshold
        self._accepted, self._accepted_sketches = _Rows(), _Rows()
        self._directions_DK: Vectors | None = None
        self._block = self._block_sketches = np.empty((0, 0), dtype=np.float32)
        self._is_near = np.empty(0, dtype=bool)
        self._is_pair = np.empty((0, 0), dtype=bool)

    def open(self, vectors_ND: Vectors) -> None:
        """Take the next block, rows of length 1 or 0, in index order."""
        if self._directions_DK is None and len(self._accepted) >= _NUM_SAMPLED:
            self._directions_DK = find_directions(self._accepted[:_NUM_SAMPLED])
            self._accepted_sketches.extend(sketch(self._accepted[:], self._directions_DK))
        self._block = vectors_ND
        if self._directions_DK is not None:
            self._block_sketches = sketch(vectors_ND, self._directions_DK)
        self._is_near = np.zeros(len(vectors_ND), dtype=bool)
        for start in range(0, len(self._accepted), _ROWS_AT_A_TIME):
            self._compare(slice(start, start + _ROWS_AT_A_TIME))
        self._is_pair = vectors_ND @ vectors_ND.T >= self._threshold

    def _compare(self, part: slice) -> None:
        """Compare those of the block that are near none so far with a part of the accepted rows."""
        places, accepted_MD = np.flatnonzero(~self._is_near), self._accepted[part]
        if self._directions_DK is not None:
            bounds = self._block_sketches[places] @ self._accepted_sketches[part].T
            is_open = bounds >= self._threshold - _SLACK
            places, accepted_MD = places[is_open.any(1)], accepted_MD[is_open.any(0)]
        self.num_measured += len(places) * len(accepted_MD)
        self._is_near[places] = (self._block[places] @ accepted_MD.T >= self._threshold).any(1)

    def is_near(self, place: int) -> bool:
        """Tell whether a row of the block is near an accepted one."""
        return bool(self._is_near[place])

    def remember(self, place: int) -> None:
        """Accept a row of the block: later ones are compared with it too."""
        self._accepted.extend(self._block[place : place + 1])
        if self._directions_DK is not None:
            self._accepted_sketches.extend(self._block_sketches[place : place + 1])
        self._is_near |= self._is_pair[place]


def find_directions(vectors_ND: Vectors) -> Vectors:
    """Return orthonormal directions [D, K] along which most of the vectors' squares lie, K a quarter of D at most."""
    wide_ND = vectors_ND.astype(np.float64)
    num_leading = min(_NUM_LEADING, wide_ND.shape[1] // 4)
    _, ascending_NN = np.linalg.eigh(wide_ND @ wide_ND.T)
    leading_NK = ascending_NN[:, len(wide_ND) - num_leading :]
    return np.linalg.qr(wide_ND.T @ leading_NK)[0].astype(np.float32)


def sketch(vectors_ND: Vectors, directions_DK: Vectors) -> Vectors:
    """Return vectors [N, K + 1] whose products are no smaller than those of the vectors, but for rounding."""
    along_NK = vectors_ND @ directions_DK
    rest_N = np.linalg.norm(vectors_ND - along_NK @ directions_DK.T, axis=1)
    return np.column_stack((along_NK, rest_N))


class _Rows:
    """A matrix that grows at its end."""

    def __init__(self) -> None:
        self._space = np.empty((0, 0), dtype=np.float32)
        self._number = 0

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, part: slice) -> Vectors:
        return self._space[: self._number][part]

    def extend(self, rows_ND: Vectors) -> None:
        wanted = self._number + len(rows_ND)
        if wanted > len(self._space):
            grown = np.empty((max(1024, 2 * wanted), rows_ND.shape[1]), dtype=np.float32)
            if self._number:
                grown[: self._number] = self[:]
            self._space = grown
        self._space[self._number : wanted] = rows_ND
        self._number = wanted
