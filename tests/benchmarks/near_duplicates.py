"""Near-duplicates beside datasketch and text-dedup: rows a second, and what is found of what there is.

    texts, 30 % of them near copies --each tool--> which are dropped --near pairs--> recall, precision

Near is a Jaccard similarity of at least 0.8 of sets of word trigrams. Recall is the share of near pairs of which a tool
does not keep both, precision the share of what it drops that is near to some text. Near pairs are found by measuring
all that share a trigram up to 10^4 texts, and by a prefix filter up to 10^5: of two sets that are so similar, the rarest
few members of both have one in common (Chaudhuri, Ganti and Kaushik 2006). For more texts only planted pairs are known.

How a tool grows is the exponent of seconds in texts over all numbers that were measured: 1 is linear, 2 compares all with all.

Neither peer measures a pair: what datasketch proposes is believed here, as its users do, and text-dedup merges all that it
proposes into clusters and keeps one text of each.
"""

import importlib.metadata
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from delia.curate.dedup import SeenInstructions, make_shingles, measure_jaccard

SIZES = (10**4, 10**5, 10**6)
MAX_ALL_PAIRS, MAX_PREFIX = 10**4, 10**5
THRESHOLD, NUM_PERM, NGRAM = 0.8, 128, 3
NUM_WORDS = 20_000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One tool on one number of texts: seconds, and the places of the texts that it drops."""

    name: str
    seconds: float
    dropped: frozenset[int]


Pair = tuple[int, int]


def make_texts(num_texts: int) -> tuple[list[str], list[Pair]]:
    """Return texts of 12 to 40 words of Zipf's frequencies, and the pairs of a copy and its original that are near."""
    rng = random.Random(0)
    words = [f"w{number}" for number in range(NUM_WORDS)]
    cumulative = list(accumulate(1 / (rank + 10) for rank in range(NUM_WORDS)))
    texts: list[str] = []
    planted: list[Pair] = []
    originals: list[int] = []
    for place in range(num_texts):
        if originals and rng.random() < 0.3:
            original = rng.choice(originals)
            copy = texts[original].split()
            spots = [0, len(copy) - 1, rng.randrange(len(copy))][rng.randrange(3) :]
            for spot in spots[: rng.choice((0, 1, 1, 2))]:
                copy[spot] = rng.choice(words)
            texts.append(" ".join(copy))
            if (
                measure_jaccard(make_shingles(texts[-1], NGRAM), make_shingles(texts[original], NGRAM))
                >= THRESHOLD
            ):
                planted.append((original, place))
        else:
            texts.append(" ".join(rng.choices(words, cum_weights=cumulative, k=rng.randint(12, 40))))
            originals.append(place)
    return texts, planted


def find_pairs(texts: Sequence[str], *, by_prefix: bool) -> list[Pair]:
    """Return all near pairs; every pair that can be near is measured."""
    sets = [make_shingles(text, NGRAM) for text in texts]
    counts = Counter(shingle for shingles in sets for shingle in shingles)
    index: dict[str, list[int]] = defaultdict(list)
    pairs: list[Pair] = []
    for place, shingles in enumerate(sets):
        rarest = sorted(shingles, key=lambda shingle: (counts[shingle], shingle))
        looked_at = rarest[: len(rarest) - math.ceil(THRESHOLD * len(rarest)) + 1] if by_prefix else rarest
        near = {other for shingle in looked_at for other in index[shingle]}
        pairs += [(other, place) for other in near if measure_jaccard(shingles, sets[other]) >= THRESHOLD]
        for shingle in looked_at:
            index[shingle].append(place)
    return pairs


def rate(dropped: frozenset[int], pairs: Sequence[Pair]) -> tuple[float, float]:
    """Return recall and precision of what was dropped."""
    found = sum(one in dropped or other in dropped for one, other in pairs)
    near = {place for pair in pairs for place in pair}
    return found / len(pairs), len(dropped & near) / max(1, len(dropped))


def run_ours(texts: Sequence[str]) -> Measured:
    """Decide on texts one after the other, as a curator does."""
    started = time.perf_counter()
    seen, dropped = SeenInstructions(threshold=THRESHOLD, num_perm=NUM_PERM, ngram=NGRAM), set()
    for place, text in enumerate(texts):
        if seen.compare(text, text) is None:
            seen.remember(text, text)
        else:
            dropped.add(place)
    return Measured(name="delia", seconds=time.perf_counter() - started, dropped=frozenset(dropped))


def run_datasketch(texts: Sequence[str]) -> Measured:
    """Decide likewise by datasketch's MinHash and LSH at its own choice of bands."""
    from datasketch import MinHash, MinHashLSH

    started = time.perf_counter()
    lsh, dropped = MinHashLSH(threshold=THRESHOLD, num_perm=NUM_PERM), set()
    for place, text in enumerate(texts):
        sketch = MinHash(num_perm=NUM_PERM)
        sketch.update_batch([shingle.encode() for shingle in make_shingles(text, NGRAM)])
        if lsh.query(sketch):
            dropped.add(place)
        else:
            lsh.insert(place, sketch)
    return Measured(name="datasketch", seconds=time.perf_counter() - started, dropped=frozenset(dropped))


def run_text_dedup(texts: Sequence[str]) -> Measured:
    """Run text-dedup's script on one process, its reading and writing of files left out of the time."""
    from datasets import load_from_disk

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.jsonl")
        with source.open("w") as file:
            for place, text in enumerate(texts):
                file.write(json.dumps({"place": place, "text": text}) + "\n")
        command = [sys.executable, "-m", "text_dedup.minhash", "--path", "json", "--data_files", str(source)]
        command += ["--split", "train", "--cache_dir", f"{folder}/cache", "--output", f"{folder}/kept"]
        command += ["--column", "text", "--batch_size", "10000", "--num_proc", "1", "--ngram", str(NGRAM)]
        command += ["--threshold", str(THRESHOLD), "--num_perm", str(NUM_PERM), "--min_length", "1"]
        wide = os.environ | {"COLUMNS": "200"}  # its log breaks lines at the width of a terminal
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=wide)
        kept = set(load_from_disk(f"{folder}/kept")["place"])
    return Measured(
        name="text-dedup",
        seconds=_read_seconds(result.stdout + result.stderr),
        dropped=frozenset(range(len(texts))) - kept,
    )


def _read_seconds(log: str) -> float:
    """Add up the steps that a script of text-dedup reports, but for loading and saving."""
    steps = dict(re.findall(r"(MinHashing|Clustering|Filtering) +: ([0-9.]+)s", log))
    return sum(float(steps[name]) for name in ("MinHashing", "Clustering", "Filtering"))


def measure_growth(seconds_by_size: Mapping[int, float]) -> float:
    """Return the exponent of seconds in texts: the slope of its logarithm on theirs, by least squares.

    Raises:
        ValueError: Fewer than two numbers of texts were measured.
    """
    if len(seconds_by_size) < 2:
        raise ValueError(
            f"growth wants two numbers of texts or more, got {sorted(seconds_by_size)}; name others"
        )
    texts = [math.log(size) for size in seconds_by_size]
    seconds = [math.log(value) for value in seconds_by_size.values()]
    return statistics.linear_regression(texts, seconds).slope


def _describe_growth(seconds: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Return a table of exponents, a tool each; nothing of a single number of texts."""
    if any(len(by_size) < 2 for by_size in seconds.values()):
        return []
    lines = [f"| {name} | {measure_growth(by_size):.2f} |" for name, by_size in seconds.items()]
    return ["", "Seconds grow with texts to the power of", "", "| tool | exponent |", "|---|---|", *lines]


def describe_near_duplicates(sizes: Sequence[int] = SIZES) -> str:
    """Measure every tool on every number of texts; return what was found, and how each grows."""
    versions = {name: importlib.metadata.version(name) for name in ("datasketch", "text-dedup")}
    lines: list[str] = []
    seconds: dict[str, dict[int, float]] = defaultdict(dict)
    for size in sizes:
        texts, planted = make_texts(size)
        is_known = size <= MAX_PREFIX
        pairs = find_pairs(texts, by_prefix=size > MAX_ALL_PAIRS) if is_known else planted
        for run in (run_ours, run_datasketch, run_text_dedup):
            measured = run(texts)
            seconds[measured.name][size] = measured.seconds
            recall, precision = rate(measured.dropped, pairs)
            shown = f"{precision:.4f}" if is_known else "-"
            lines.append(
                f"| {size:,} | {measured.name} | {size / measured.seconds:,.0f} | {recall:.4f} | {shown} |"
            )
            print(lines[-1], flush=True)
    growth = _describe_growth(seconds)
    print("\n".join(growth), flush=True)
    return "\n".join(
        (
            f"Texts of 12 to 40 words, 30 % of them copies of others with up to two words changed; Jaccard {THRESHOLD}"
            f" on word trigrams, {NUM_PERM} permutations, one process ({', '.join(map(' '.join, versions.items()))})."
            f" All near pairs are known up to {MAX_PREFIX:,} texts, beyond it the planted ones.",
            "",
            "| texts | tool | rows/s | recall | precision |",
            "|---|---|---|---|---|",
            *lines,
            *growth,
        )
    )
