"""Exact and near duplicates, and the search for them against brute force."""

import math
import random
from collections import Counter
from collections.abc import Callable

import near_duplicates
import numpy as np
import pytest
from rensa import RMinHashLSH
from scipy.sparse import csr_array

from delia.curate.dedup import (
    DUPLICATE,
    NEAR_DUPLICATE,
    SeenInstructions,
    choose_bands,
    make_shingles,
    measure_jaccard,
)

LONG = [f"w{i}" for i in range(40)]


def admit(seen: SeenInstructions, instruction: str) -> str | None:
    """Compare an instruction, and remember it where nothing speaks against it."""
    reason = seen.compare(instruction, instruction)
    if reason is None:
        seen.remember(instruction, instruction)
    return reason


def change_word(words: list[str], place: int, word: str = "other") -> str:
    return " ".join([*words[:place], word, *words[place + 1 :]])


def test_short_texts_have_their_words_for_shingles():
    assert make_shingles("a b c a b c", 3) == {"a b c", "b c a", "c a b"}
    assert make_shingles("a b", 3) == {"a", "b"}
    assert make_shingles("", 3) == frozenset()


@pytest.mark.parametrize(
    ("a", "b", "similarity"), [("ab", "bc", 1 / 3), ("ab", "ab", 1.0), ("ab", "cd", 0.0), ("", "", 0.0)]
)
def test_jaccard_of_sets_worked_by_hand(a: str, b: str, similarity: float):
    assert measure_jaccard(frozenset(a), frozenset(b)) == similarity


def test_an_instruction_comes_in_once_whatever_its_case_and_white_space():
    seen = SeenInstructions(threshold=None)

    assert admit(seen, "What is  the capital ?") is None
    assert admit(seen, "what is the CAPITAL\n?") == DUPLICATE
    assert admit(seen, "what is a capital ?") is None


def test_the_numbers_of_the_module_header_hold():
    france, spain = (make_shingles(f"what is the capital of {name} ?", 3) for name in ("france", "spain"))
    long, changed = make_shingles(" ".join(LONG), 3), make_shingles(change_word(LONG, 20), 3)

    assert measure_jaccard(france, spain) == 3 / 7
    assert measure_jaccard(long, changed) == 35 / 41
    num_bands, band_size = choose_bands(threshold=0.8, num_perm=128)
    assert 1 / 9.5 < 1 - (1 - (3 / 7) ** band_size) ** num_bands < 1 / 8.5


@pytest.mark.parametrize(
    ("threshold", "reason"),
    [(35 / 41, NEAR_DUPLICATE), (35 / 41 + 1e-9, None), (0.8, NEAR_DUPLICATE), (None, None)],
)
def test_a_pair_on_the_threshold_is_a_near_duplicate_and_below_it_is_not(
    threshold: float | None, reason: str | None
):
    seen = SeenInstructions(threshold=threshold)
    admit(seen, " ".join(LONG))

    assert admit(seen, change_word(LONG, 20)) == reason


def test_a_refused_instruction_is_not_remembered():
    """c resembles b and not a; b was refused because of a, so c stays."""
    a, b, c = " ".join(LONG), change_word(LONG, 12), change_word(change_word(LONG, 12).split(), 28)
    seen = SeenInstructions(threshold=0.8)

    assert [admit(seen, text) for text in (a, b, c)] == [None, NEAR_DUPLICATE, None]
    fresh = SeenInstructions(threshold=0.8)
    assert [admit(fresh, text) for text in (b, c)] == [None, NEAR_DUPLICATE]


def test_the_size_of_the_word_ngrams_decides_what_is_near():
    """A changed inner word costs 3 of 38 trigrams, but 1 of 40 words: 39 of 41 are shared."""
    by_word = SeenInstructions(threshold=0.95, ngram=1)
    by_trigram = SeenInstructions(threshold=0.95, ngram=3)

    assert [admit(seen, " ".join(LONG)) for seen in (by_word, by_trigram)] == [None, None]
    assert admit(by_word, change_word(LONG, 20)) == NEAR_DUPLICATE
    assert admit(by_trigram, change_word(LONG, 20)) is None


@pytest.mark.parametrize(
    ("threshold", "num_perm", "bands"),
    [(0.8, 128, (19, 6)), (0.9, 128, (12, 10)), (1.0, 128, (1, 128)), (0.3, 16, (13, 1))],
)
def test_bands_are_the_fewest_that_find_a_pair_on_the_threshold(
    threshold: float, num_perm: int, bands: tuple[int, int]
):
    assert choose_bands(threshold=threshold, num_perm=num_perm) == bands


def test_a_threshold_that_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match=r"16 permutations find less than 0\.99 .* similarity 0\.1;"):
        choose_bands(threshold=0.1, num_perm=16)


def make_texts(rng: random.Random, *, num_bases: int) -> list[str]:
    """Return texts of 4-40 words, each with a copy in which 1-3 words are replaced, in mixed order."""
    vocabulary = [f"v{i}" for i in range(60)]
    texts = []
    for _ in range(num_bases):
        words = rng.choices(vocabulary, k=rng.randint(4, 40))
        copy = list(words)
        for _ in range(rng.randint(1, 3)):
            copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
        texts += [" ".join(words), " ".join(copy)]
    rng.shuffle(texts)
    return list(dict.fromkeys(texts))


def measure_all_pairs(texts: list[str], ngram: int) -> np.ndarray:
    """Return exact Jaccard similarities [n, n] by a product of incidence matrices."""
    shingle_sets = [make_shingles(text, ngram) for text in texts]
    numbers = {item: i for i, item in enumerate(sorted(frozenset().union(*shingle_sets)))}
    columns = [numbers[item] for shingles in shingle_sets for item in shingles]
    starts = np.cumsum([0, *(len(shingles) for shingles in shingle_sets)])
    shape = (len(texts), len(numbers))
    incidence = csr_array((np.ones(len(columns)), np.array(columns), starts), shape=shape)
    shared = (incidence @ incidence.T).toarray()
    sizes = np.diff(starts)
    return np.asarray(shared / (sizes[:, None] + sizes[None, :] - shared))


@pytest.mark.parametrize("threshold", [0.8, 0.5])
def test_minhash_finds_what_brute_force_finds_among_2000_instructions(threshold: float):
    """Every refusal is right, because pairs are measured; of those due, nearly all are found."""
    texts = make_texts(random.Random(7), num_bases=1050)
    similarity = measure_all_pairs(texts, 3)
    seen = SeenInstructions(threshold=threshold)
    accepted: list[int] = []
    num_due = num_found = 0
    for number, text in enumerate(texts):
        is_near = bool((similarity[number, accepted] >= threshold).any())
        reason = admit(seen, text)
        assert reason is None or is_near, f"{text!r} resembles no accepted text"
        num_due += is_near
        num_found += reason == NEAR_DUPLICATE
        if reason is None:
            accepted.append(number)

    assert len(texts) >= 2000
    assert num_due > 150
    assert num_found >= 0.99 * num_due


# ---- how the work grows


@pytest.fixture
def count_work(monkeypatch) -> Callable[[list[str]], Counter[str]]:
    """Return a function of texts: how much of each kind of work decides on all of them, and how many are refused."""
    done: Counter[str] = Counter()

    class CountingIndex:
        def __init__(self, **options) -> None:
            self._index = RMinHashLSH(**options)

        def query(self, sketch):
            proposed = self._index.query(sketch)
            done["lookups"] += 1
            done["proposed"] += len(proposed)
            return proposed

        def insert(self, number, sketch) -> None:
            done["insertions"] += 1
            self._index.insert(number, sketch)

    def count(name, function):
        def counted(*args):
            done[name] += 1
            return function(*args)

        return counted

    monkeypatch.setattr("delia.curate.dedup.RMinHashLSH", CountingIndex)
    monkeypatch.setattr("delia.curate.dedup.measure_jaccard", count("measured", measure_jaccard))
    monkeypatch.setattr("delia.curate.dedup.make_shingles", count("shingled", make_shingles))

    def run(texts: list[str]) -> Counter[str]:
        done.clear()
        seen = SeenInstructions(threshold=near_duplicates.THRESHOLD)
        done["refused"] = sum(admit(seen, text) is not None for text in texts)
        return Counter(done)

    return run


def test_work_grows_with_the_number_of_texts_and_no_faster(count_work):
    """Ten times the texts of one distribution: what a text costs grows by 5 % at most, of every kind of work."""
    few, many = 2_000, 20_000
    texts, _ = near_duplicates.make_texts(many)
    small, large = count_work(texts[:few]), count_work(texts)

    assert small["refused"] > 0.15 * few  # the search has something to find
    assert large["proposed"] >= large["measured"] >= 0.15 * many
    for kind, number in large.items():
        assert number / many <= 1.05 * small[kind] / few, (kind, small, large)


def test_the_exponent_of_growth_is_that_of_a_power_of_the_number_of_texts():
    for exponent in (1.0, 1.5, 2.0):
        seconds = {size: 3e-5 * size**exponent for size in (10**4, 10**5, 10**6)}
        assert math.isclose(near_duplicates.measure_growth(seconds), exponent)
    with pytest.raises(ValueError, match=r"two numbers of texts or more, got \[10000\]"):
        near_duplicates.measure_growth({10**4: 1.0})
