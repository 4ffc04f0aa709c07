"""How diverse a pool is: figures of its instructions that tell a narrow pool from a wide one.

    rows --seeded sample--> user turns --words, embeddings--> DiversityReport --to_details--> manifest

All figures but novelty's are of one seeded sample of at most `SAMPLE_ROWS` rows, also those that would be
cheap for all: distinct-n, distances and coverage change with the number of rows, so pools are comparable
where `num_sampled` and `embedder` are equal. Answers never count.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from delia.curate.embedding import Embedder, Vectors
from delia.curate.ngrams import list_ngrams, normalise
from delia.curate.novelty import NoveltyReport
from delia.curate.openings import find_opening
from delia.rng import make_random
from delia.schema import Row

SAMPLE_ROWS = 2000
NUM_PLANES = 8
NUM_CLUSTERS = 50
NUM_TOP_OPENINGS = 10

_DIGITS = 5  # what is stored: below it, machines differ


@dataclass(frozen=True, kw_only=True)
class DiversityReport:
    """Figures of a pool's instructions; larger is more diverse in all of them.

    Attributes:
        num_rows: Rows of the pool.
        num_sampled: Rows that the figures are of.
        embedder: The setting that made the embeddings.
        distinct: Different word n-grams over all, for n = 1, 2, 3, in 0..1 (Li et al. 2016,
            https://arxiv.org/abs/1510.03055, there of answers).
        vendi_score: Effective number of different instructions, 1..num_sampled (`measure_vendi`).
        nearest_mean: Mean over the rows of the cosine distance to the nearest other row, in 0..2.
        nearest_p05: 5th percentile of the same: how near the nearest pairs are.
        cell_coverage: Share of 256 fixed cells of the space that hold a row (`assign_cells`).
        cell_entropy: Entropy of the rows over those cells, in nats, up to ln 256 = 5.55.
        cluster_coverage: Source -> share of the pool's k-means clusters that hold a row of it.
        cluster_entropy: Source -> entropy of its rows over those clusters, in nats.
        num_openings: Different pairs of an opening word and its content word (`openings`).
        opening_entropy: Entropy of the rows over those pairs, in nats.
        top_openings: The most frequent pairs and their shares of the rows.
        novelty: Source -> figures of its candidates; empty where none were given.
        seconds: What the report took, embeddings included.
    """

    num_rows: int
    num_sampled: int
    embedder: str
    distinct: tuple[float, float, float]
    vendi_score: float
    nearest_mean: float
    nearest_p05: float
    cell_coverage: float
    cell_entropy: float
    cluster_coverage: dict[str, float]
    cluster_entropy: dict[str, float]
    num_openings: int
    opening_entropy: float
    top_openings: tuple[tuple[str, float], ...]
    novelty: Mapping[str, NoveltyReport]
    seconds: float

    def to_details(self) -> dict[str, Any]:
        """Return what a manifest keeps: all but the seconds, which differ from run to run, rounded."""
        tree = asdict(replace(self, novelty=dict(self.novelty)))
        del tree["seconds"]
        rounded: dict[str, Any] = _round(tree)
        return rounded


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_round(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value


def measure_distinct(texts: Sequence[str], n: int) -> float:
    """Return the number of different word n-grams over the number of all, 0 if there are none."""
    ngrams = [ngram for text in texts for ngram in list_ngrams(normalise(text).split(), n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def measure_entropy(labels: Sequence[Any]) -> float:
    """Return the entropy of the labels' shares, in nats."""
    return -sum(k / len(labels) * math.log(k / len(labels)) for k in Counter(labels).values())


def measure_vendi(vectors_ND: NDArray[Any]) -> float:
    """Return the Vendi score of order 1 under the cosine kernel: exp of the entropy of K/N's eigenvalues.

    N rows that share nothing have N, equal ones 1. X X^T / N and X^T X / N have the same eigenvalues but for
    zeros, so the smaller is taken: N rows cost N D^2. Source: Friedman and Dieng 2023,
    https://arxiv.org/abs/2210.02410.

    Args:
        vectors_ND: Rows of length 1, or 0, which count for nothing.
    """
    wide_ND = vectors_ND.astype(np.float64)
    kernel = wide_ND.T @ wide_ND if wide_ND.shape[1] < len(wide_ND) else wide_ND @ wide_ND.T
    values = np.linalg.eigvalsh(kernel)
    values = values[values > 1e-12 * max(1, len(wide_ND))]
    shares = values / values.sum() if len(values) else np.ones(1)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def measure_nearest(vectors_ND: Vectors) -> NDArray[np.float64]:
    """Return each row's cosine distance to the nearest other row, [N]; 0 for a row alone."""
    if len(vectors_ND) < 2:
        return np.zeros(len(vectors_ND))
    cosines = vectors_ND @ vectors_ND.T
    np.fill_diagonal(cosines, -np.inf)
    return np.asarray(np.maximum(1 - cosines.max(1).astype(np.float64), 0))


def assign_cells(vectors_ND: Vectors, *, seed: int = 0) -> list[int]:
    """Return the cell of each row: on which sides of 8 fixed random planes it lies, in 0..255.

    Rows at a small angle share a cell (Charikar 2002, "Similarity Estimation Techniques from Rounding
    Algorithms"). The cells don't depend on the pool. Those of k-means do: fitted to a narrow pool they
    divide it as evenly as a wide one, so coverage and entropy over them tell only parts of one pool apart.
    """
    rng = make_random("diversity", "planes", seed)
    signs = [1.0 if rng.random() < 0.5 else -1.0 for _ in range(vectors_ND.shape[1] * NUM_PLANES)]
    planes_DP = np.array(signs, dtype=np.float32).reshape(-1, NUM_PLANES)
    bits_NP = vectors_ND @ planes_DP > 0
    return [int(cell) for cell in bits_NP @ (1 << np.arange(NUM_PLANES))]


def assign_clusters(vectors_ND: Vectors, num_clusters: int = NUM_CLUSTERS, *, seed: int = 0) -> list[int]:
    """Return the k-means cluster of each row, k-means++ from a seed; fewer clusters for few rows."""
    from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]  # late: half a second

    num_different = len(np.unique(vectors_ND, axis=0))
    num_clusters = max(1, min(num_clusters, num_different // 4))
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a cluster may end empty: then there are fewer
        labels = kmeans2(vectors_ND.astype(np.float64), num_clusters, iter=20, minit="++", rng=rng)[1]
    return [int(label) for label in labels]


def choose_sample(num_rows: int, *, sample_rows: int = SAMPLE_ROWS, seed: int = 0) -> list[int]:
    """Return the places of the rows that are measured, ascending: all, or of more a seeded sample."""
    if num_rows <= sample_rows:
        return list(range(num_rows))
    return sorted(make_random("diversity", "sample", seed).sample(range(num_rows), sample_rows))


def measure_diversity(
    sample: Sequence[Row],
    embed: Embedder,
    *,
    num_rows: int,
    embedder: str,
    novelty: Mapping[str, NoveltyReport] | None = None,
    seed: int = 0,
) -> DiversityReport:
    """Measure a pool's instructions, their user turns.

    Args:
        sample: The accepted rows at the places of `choose_sample`, at least one.
        embed: Embeds texts; quadratic parts take the sample's square.
        num_rows: Rows of the pool.
        embedder: The setting's name for it.
        novelty: Source -> figures of the candidates that the rows were accepted from.
        seed: Of the cells and the clusters.
    """
    started = time.perf_counter()
    sources = [row.source for row in sample]
    texts = [row.user_text for row in sample]
    vectors_ND = embed(texts)
    nearest_N = measure_nearest(vectors_ND)
    cells = assign_cells(vectors_ND, seed=seed)
    clusters = assign_clusters(vectors_ND, seed=seed)
    by_source = {
        name: [cluster for cluster, source in zip(clusters, sources, strict=True) if source == name]
        for name in sorted(set(sources))
    }
    openings = [" ".join(find_opening(text)).strip() for text in texts]
    counts = sorted(Counter(openings).items(), key=lambda item: (-item[1], item[0]))
    return DiversityReport(
        num_rows=num_rows,
        num_sampled=len(texts),
        embedder=embedder,
        distinct=(measure_distinct(texts, 1), measure_distinct(texts, 2), measure_distinct(texts, 3)),
        vendi_score=measure_vendi(vectors_ND),
        nearest_mean=float(nearest_N.mean()),
        nearest_p05=float(np.percentile(nearest_N, 5)),
        cell_coverage=len(set(cells)) / 2**NUM_PLANES,
        cell_entropy=measure_entropy(cells),
        cluster_coverage={name: len(set(own)) / len(set(clusters)) for name, own in by_source.items()},
        cluster_entropy={name: measure_entropy(own) for name, own in by_source.items()},
        num_openings=len(counts),
        opening_entropy=measure_entropy(openings),
        top_openings=tuple((name, count / len(texts)) for name, count in counts[:NUM_TOP_OPENINGS]),
        novelty=novelty or {},
        seconds=time.perf_counter() - started,
    )
