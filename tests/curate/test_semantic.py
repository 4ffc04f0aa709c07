"""Duplicates by meaning: greedy in index order, against brute force and in the curator."""

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from delia.chat import load_chat
from delia.curate import semantic
from delia.curate.embedding import BASE, Embedder, Vectors, embed_hashed, load_embedder, scale_to_unit
from delia.curate.pipeline import Candidate, Curator
from delia.curate.screening import Screener
from delia.curate.semantic import SEMANTIC_DUPLICATE, SeenMeanings, find_directions, sketch
from delia.curate.settings import CurateConfig
from delia.curate.stopping import StopConfig, StopRule
from delia.errors import ConfigError
from delia.schema import Message, Rejection, Row
from delia.starter.world import draw_item
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")
BY_MEANING = CurateConfig(
    near_duplicate_threshold=None, overlap_ngram=None, embedder=BASE, semantic_threshold=0.6
)


def make_row(index: int, instruction: str, *, answer: str = "yes") -> Row:
    messages = (Message(role="user", content=instruction), Message(role="assistant", content=answer))
    return Row(row_id=f"r{index}", index=index, source="s", messages=messages)


def read_reasons(results: list[Candidate]) -> list[str]:
    return [item.reason if isinstance(item, Rejection) else "" for item in results]


def draw_vectors(num_rows: int, num_dimensions: int = 6) -> Vectors:
    """Rows in few dimensions, many of them near each other; one of zeros."""
    vectors_ND = np.random.default_rng(0).standard_normal((num_rows, num_dimensions))
    vectors_ND[num_rows // 2] = 0
    return scale_to_unit(vectors_ND)


def accept_by_hand(vectors_ND: Vectors, threshold: float) -> list[int]:
    """Every row against every accepted one, one at a time."""
    accepted: list[int] = []
    cosines = vectors_ND @ vectors_ND.T
    for place in range(len(vectors_ND)):
        if not (cosines[place, accepted] >= threshold).any():
            accepted.append(place)
    return accepted


def accept(vectors_ND: Vectors, threshold: float, cuts: Sequence[int]) -> list[int]:
    seen, accepted = SeenMeanings(threshold), []
    for start, stop in pairwise([0, *cuts, len(vectors_ND)]):
        seen.open(vectors_ND[start:stop])
        for place in range(start, stop):
            if not seen.is_near(place - start):
                seen.remember(place - start)
                accepted.append(place)
    return accepted


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("cuts", [(), (1,), (300, 301, 800), tuple(range(100, 1100, 100))])
def test_any_cut_into_blocks_accepts_what_the_rule_says(threshold: float, cuts: tuple[int, ...]):
    vectors_ND = draw_vectors(1100)
    accepted = accept(vectors_ND, threshold, cuts)

    assert accepted == accept_by_hand(vectors_ND, threshold)
    assert 10 < len(accepted) < 1050


def test_accepted_rows_are_searched_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch):
    vectors_ND = draw_vectors(1100)
    monkeypatch.setattr(semantic, "_ROWS_AT_A_TIME", 7)

    assert accept(vectors_ND, 0.9, range(100, 1100, 100)) == accept_by_hand(vectors_ND, 0.9)


def test_a_pair_on_the_threshold_is_near_and_a_refused_row_is_not_remembered():
    """Cosines worked by hand: rows 1 and 2 are at 0.8 to the one before, row 2 at 0.28 to row 0."""
    vectors_ND = np.array([[1, 0], [0.8, 0.6], [0.28, 0.96]], dtype=np.float32)

    for cuts in ((), (1,), (1, 2)):
        assert accept(vectors_ND, float(np.float32(0.8)), cuts) == [0, 2]
        assert accept(vectors_ND, 0.81, cuts) == [0, 1, 2]


@pytest.mark.parametrize(("num_dimensions", "threshold"), [(6, 0.99), (64, 0.9), (2, 0.99999)])
@pytest.mark.parametrize("spread", [1.0, 0.3, 0.02])
def test_thousands_of_accepted_rows_are_all_remembered(
    monkeypatch: pytest.MonkeyPatch, num_dimensions: int, threshold: float, spread: float
):
    """Whether they have leading directions (a small spread of the others) or none, and in few dimensions."""
    monkeypatch.setattr(semantic, "_ROWS_AT_A_TIME", 500)
    monkeypatch.setattr(semantic, "_NUM_SAMPLED", 200)
    scales_D = np.where(np.arange(num_dimensions) < max(2, num_dimensions // 8), 1, spread)
    vectors_ND = scale_to_unit(draw_vectors(3000, num_dimensions) * scales_D)
    rng = np.random.default_rng(1)
    twins = rng.permutation(3000)
    noise_ND = rng.normal(0, 0.02, (900, num_dimensions)) * scales_D
    vectors_ND[twins[:900]] = scale_to_unit(vectors_ND[twins[900:1800]] + noise_ND)
    accepted = accept(vectors_ND, threshold, range(100, 3000, 100))

    assert accepted == accept_by_hand(vectors_ND, threshold)
    assert 100 < len(accepted) < 2990


@pytest.mark.parametrize(("spread", "most"), [(0.02, 0.02), (1.0, 1.0)])
def test_most_accepted_rows_are_ruled_out_without_their_cosine(
    monkeypatch: pytest.MonkeyPatch, spread: float, most: float
):
    """Where vectors lie along few directions; of all pairs, those before the directions are known included."""
    monkeypatch.setattr(semantic, "_NUM_SAMPLED", 100)
    scales_D = np.where(np.arange(64) < 8, 1, spread)
    vectors_ND = scale_to_unit(draw_vectors(3000, 64) * scales_D)
    seen = SeenMeanings(0.95)
    num_accepted = num_pairs = 0
    for start in range(0, 3000, 100):
        block_ND = vectors_ND[start : start + 100]
        num_pairs += num_accepted * len(block_ND)
        seen.open(block_ND)
        for place in range(len(block_ND)):
            if not seen.is_near(place):
                seen.remember(place)
                num_accepted += 1

    assert num_accepted > 1000
    assert 0 < seen.num_measured < most * num_pairs


@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_a_product_of_sketches_bounds_a_cosine_and_is_near_it_where_vectors_lie_along_few_directions(
    spread: float,
):
    scales_D = np.where(np.arange(64) < 8, 1, spread)
    vectors_ND = scale_to_unit(draw_vectors(500, 64) * scales_D)
    sketches_NK = sketch(vectors_ND, find_directions(vectors_ND[:200]))
    above = sketches_NK @ sketches_NK.T - vectors_ND @ vectors_ND.T

    assert sketches_NK.shape == (500, 17)
    assert sketches_NK.dtype == np.float32
    assert above.min() > -1e-6
    assert (above.max() < 0.02) == (spread < 1)


def test_bounds_of_wide_vectors_are_no_smaller_than_their_cosines_but_for_the_slack():
    """As wide as the states of a base of billions; a third lie on the directions alone, where a bound has no room."""
    vectors_ND = draw_vectors(600, 4096)
    vectors_ND[::3, 32:] = 0
    vectors_ND = scale_to_unit(vectors_ND * np.where(np.arange(4096) < 32, 1, 0.05))
    sketches_NK = sketch(vectors_ND, find_directions(vectors_ND))
    above = sketches_NK @ sketches_NK.T - vectors_ND @ vectors_ND.T

    assert above.min() > -semantic._SLACK / 2


def test_vectors_that_are_not_finite_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"not finite; .* set model\.dtype to bfloat16 or float32"):
        scale_to_unit(np.array([[1.0, 0.0], [np.inf, 1.0]]))


# ---- in the curator


def embed_by_first_word(texts: Sequence[str]) -> Vectors:
    """A meaning is the first word: any two texts that begin alike mean the same."""
    return embed_hashed([text.split()[0] for text in texts])


def test_the_curator_refuses_the_later_of_two_instructions_of_one_meaning():
    rows = [
        make_row(0, "sum of 1"),
        make_row(3, "list all"),
        make_row(5, "sum of 2"),
        make_row(6, "sum of 1"),
    ]
    curator = Curator(Screener(BY_MEANING, embed=embed_by_first_word))

    assert read_reasons(curator.feed(rows)) == ["", "", SEMANTIC_DUPLICATE, "duplicate"]
    assert curator.counts == {"semantic_duplicate": 1, "duplicate": 1}


def test_a_row_that_is_refused_for_another_reason_leaves_no_meaning_behind():
    rows = [make_row(0, "sum of 1", answer=""), make_row(1, "sum of 2"), make_row(2, "sum of 1")]
    results = Curator(Screener(BY_MEANING, embed=embed_by_first_word)).feed(rows)

    assert read_reasons(results) == ["empty", "", SEMANTIC_DUPLICATE]


def test_a_refused_meaning_leaves_no_text_behind():
    """The text of row 1 was refused for its meaning; the same text later is refused for that, not as seen."""
    rows = [make_row(0, "sum of 1"), make_row(1, "sum of 2"), make_row(2, "sum of 2")]
    results = Curator(Screener(BY_MEANING, embed=embed_by_first_word)).feed(rows)

    assert read_reasons(results) == ["", SEMANTIC_DUPLICATE, SEMANTIC_DUPLICATE]


def test_answers_are_never_embedded_and_rows_with_a_fault_are_not_either():
    embedded: list[str] = []

    def embed(texts: Sequence[str]) -> Vectors:
        embedded.extend(texts)
        return embed_hashed(texts)

    Curator(Screener(BY_MEANING, embed=embed)).feed(
        [make_row(0, "one", answer=""), make_row(1, "two"), make_row(2, "six")]
    )

    assert embedded == ["two", "six"]


@pytest.fixture(scope="module")
def embed_by_base() -> Embedder:
    return load_embedder(BASE, model=STARTER, chat=load_chat(str(resolve_model(STARTER))))


@pytest.mark.parametrize("size", [1, 100, 1000])
def test_how_candidates_are_batched_changes_nothing_with_the_base_model(embed_by_base: Embedder, size: int):
    """600 questions of the starter's world, more than a block; one in five is said again."""
    rng = random.Random(2)
    texts = [draw_item(rng).prompt()[-1]["content"] for _ in range(600)]
    rows = [make_row(i, texts[i // 2 if i % 5 == 0 else i]) for i in range(600)]
    config = BY_MEANING.model_copy(update={"semantic_threshold": 0.985})
    at_once, in_parts = (Curator(Screener(config, embed=embed_by_base)) for _ in range(2))
    rule, other = (StopRule(StopConfig(), num_rows=260) for _ in range(2))
    whole = at_once.feed(rows, rule=rule)
    parts = [
        item
        for start in range(0, len(rows), size)
        for item in in_parts.feed(rows[start : start + size], rule=other)
    ]

    assert parts == whole
    assert at_once.num_accepted == 260
    assert 300 < len(whole) < 600
    assert set(at_once.counts) == {SEMANTIC_DUPLICATE, "duplicate"}


def test_an_embedder_of_words_does_not_compare_meanings():
    with pytest.raises(ValidationError, match="embedder='hashed' knows words only; set embedder to 'base'"):
        CurateConfig(semantic_threshold=0.9)
    with pytest.raises(ConfigError, match="semantic_threshold needs an embedder"):
        Curator(Screener(BY_MEANING))
