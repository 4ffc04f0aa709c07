"""Duplicates among accepted instructions: exact ones, and near ones by word n-grams.

    instruction, user turns --SeenInstructions.compare-->  "duplicate" | "near_duplicate" | None, then remembered

Duplicates say the same in every turn before the answer. Near-duplicates are pairs whose user turns have sets of word
n-grams with a Jaccard similarity at or above a threshold: a system turn that all rows share makes none, and of one
question under two system turns the later goes as a near-duplicate (to keep both, switch the rule off). MinHash only
proposes pairs; each is then measured exactly, so nothing is rejected on an estimate. An answer never matters.

The threshold acts on short texts in steps. "what is the capital of france ?" and "... of spain ?" share
3 of 7 trigrams (0.43) and both stay at 0.8; but of two instructions of 40 words that differ in one inner
word, 35 of 41 trigrams are shared (0.85) and the later goes. Templated instructions with a long fixed
part want a higher threshold, or None: pairs such as the first two are also proposed in vain one time in nine, and the
work grows with the square of their number. Of other texts hardly any are, and it grows with the number.
"""

from rensa import RMinHash, RMinHashLSH

from delia.curate.ngrams import list_ngrams, normalise
from delia.rng import hash_text

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

_MINHASH_SEED = 1
_MIN_RECALL = 0.99  # of pairs that lie exactly on the threshold; those above are found more surely


def make_shingles(text: str, ngram: int) -> frozenset[str]:
    """Return the set of word n-grams of a normalised text; of a shorter one, its words."""
    words = text.split()
    return frozenset(list_ngrams(words, ngram) or words)


def measure_jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the size of the intersection over that of the union; 0 if both are empty."""
    shared = len(a & b)
    return shared / max(1, len(a) + len(b) - shared)


def choose_bands(*, threshold: float, num_perm: int) -> tuple[int, int]:
    """Return the fewest bands that propose a pair on the threshold with probability 0.99, and the values of each.

    With b bands of r values each, a pair of similarity s is proposed with probability
    1 - (1 - s^r)^b (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4.2). Fewer bands
    propose fewer pairs in vain. b r permutations are used, `num_perm` at most.

    Raises:
        ValueError: Even one value a band finds too few; more permutations or a higher threshold would.
    """
    for num_bands in range(1, num_perm + 1):
        band_size = num_perm // num_bands
        if 1 - (1 - threshold**band_size) ** num_bands >= _MIN_RECALL:
            return num_bands, band_size
    raise ValueError(
        f"{num_perm} permutations find less than {_MIN_RECALL:g} of the pairs at similarity {threshold:g};"
        " raise num_perm or near_duplicate_threshold"
    )


class SeenInstructions:
    """The instructions accepted so far; a new one is compared with these and no others."""

    def __init__(self, *, threshold: float | None, num_perm: int = 128, ngram: int = 3) -> None:
        """Start empty; a threshold of None looks for exact duplicates only."""
        self._threshold = threshold
        self._num_perm = num_perm
        self._ngram = ngram
        self._whole: set[str] = set()
        self._texts: list[str] = []
        self._latest: tuple[str | None, RMinHash] = (None, None)
        self._index: RMinHashLSH | None = None
        if threshold is not None:
            num_bands, band_size = choose_bands(threshold=threshold, num_perm=num_perm)
            self._num_perm = num_bands * band_size
            self._index = RMinHashLSH(threshold=threshold, num_perm=self._num_perm, num_bands=num_bands)

    def compare(self, instruction: str, user_text: str) -> str | None:
        """Return why an instruction is refused, or None; nothing is remembered.

        Args:
            instruction: All turns before the answer.
            user_text: The user turns among them.
        """
        if hash_text(normalise(instruction)) in self._whole:
            return DUPLICATE
        if self._index is None or self._threshold is None:
            return None
        text = normalise(user_text)
        shingles = make_shingles(text, self._ngram)
        for number in self._index.query(self._sketch(text)):
            # shingles are made again: sets would fill the memory
            if measure_jaccard(shingles, make_shingles(self._texts[number], self._ngram)) >= self._threshold:
                return NEAR_DUPLICATE
        return None

    def remember(self, instruction: str, user_text: str) -> None:
        """Accept an instruction that `compare` let pass."""
        self._whole.add(hash_text(normalise(instruction)))
        if self._index is not None:
            text = normalise(user_text)
            self._index.insert(len(self._texts), self._sketch(text))
            self._texts.append(text)

    def _sketch(self, text: str) -> RMinHash:
        if self._latest[0] != text:  # `remember` mostly follows `compare` of the same text
            sketch = RMinHash(num_perm=self._num_perm, seed=_MINHASH_SEED)
            sketch.update(list(make_shingles(text, self._ngram)))
            self._latest = (text, sketch)
        return self._latest[1]
