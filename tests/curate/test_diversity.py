"""Figures of diversity: worked by hand, and a narrow pool told from a wide one."""

import json
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from delia.chat import load_chat
from delia.curate.diversity import (
    DiversityReport,
    assign_cells,
    assign_clusters,
    choose_sample,
    measure_distinct,
    measure_diversity,
    measure_entropy,
    measure_nearest,
    measure_vendi,
)
from delia.curate.embedding import BASE, HASHED, Embedder, Vectors, embed_hashed, load_embedder, scale_to_unit
from delia.curate.novelty import Novelty
from delia.schema import Message, Row
from delia.starter.kinds import KIND_BY_NAME, KINDS, Kind
from delia.starter.world import draw_item
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")
NARROW = (KIND_BY_NAME["capital"],)


def make_row(index: int, instruction: str, *, source: str = "s", answer: str = "yes") -> Row:
    messages = (
        Message(role="system", content=f"system {index}"),
        Message(role="user", content=instruction),
        Message(role="assistant", content=answer),
    )
    return Row(row_id=f"{source}{index}", index=index, source=source, messages=messages)


def draw_pool(kinds: tuple[Kind, ...], *, num_rows: int = 400, source: str = "s") -> list[Row]:
    """Different instructions of some kinds, in all their wordings and formats."""
    rng, texts = random.Random(1), {}
    while len(texts) < num_rows:
        item = draw_item(rng, kinds=kinds)
        texts.setdefault(item.prompt()[-1]["content"], None)
    return [make_row(index, text, source=source) for index, text in enumerate(texts)]


def measure(
    rows: Sequence[Row], embed: Embedder = embed_hashed, *, seed: int = 0, **options: int
) -> DiversityReport:
    sample = [rows[place] for place in choose_sample(len(rows), seed=seed, **options)]
    return measure_diversity(sample, embed, num_rows=len(rows), embedder=HASHED, seed=seed)


# ---- single figures


def test_distinct_n_worked_by_hand():
    texts = ["a b a b", "A b c"]

    assert [measure_distinct(texts, n) for n in (1, 2, 3)] == [3 / 7, 3 / 5, 1.0]
    assert measure_distinct(["a"], 2) == 0


def test_entropy_worked_by_hand():
    assert measure_entropy("aabb") == pytest.approx(math.log(2))
    assert measure_entropy("aaab") == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert measure_entropy("a") == 0


def test_the_vendi_score_worked_by_hand():
    """Equal rows have 1, rows at right angles N; two at cosine 0.6: eigenvalues of K/2 are 0.8 and 0.2."""
    assert measure_vendi(np.array([[1, 0, 0]] * 4)) == pytest.approx(1)
    assert measure_vendi(np.eye(3)) == pytest.approx(3)
    expected = math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert measure_vendi(np.array([[1, 0], [0.6, 0.8]])) == pytest.approx(expected)


def test_the_smaller_of_both_kernels_gives_the_score_of_the_larger():
    """20 rows in 5 dimensions and the same in 60, where the other kernel is taken: zeros add nothing."""
    vectors_ND = scale_to_unit(np.random.default_rng(0).standard_normal((20, 5)))
    wide_ND = np.concatenate([vectors_ND, np.zeros((20, 55))], axis=1)
    values = np.linalg.eigvalsh(vectors_ND @ vectors_ND.T / 20)
    values = values[values > 1e-9]

    assert measure_vendi(vectors_ND) == pytest.approx(measure_vendi(wide_ND))
    assert measure_vendi(vectors_ND) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-5)


def test_nearest_distances_worked_by_hand():
    vectors_ND = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], dtype=np.float32)

    np.testing.assert_allclose(measure_nearest(vectors_ND), [0.4, 0.2, 0.2, 1.0], atol=1e-6)
    assert measure_nearest(vectors_ND[:1]).tolist() == [0]


def test_cells_are_fixed_by_the_seed_alone_and_opposite_rows_never_share_one():
    vectors_ND = scale_to_unit(np.random.default_rng(0).standard_normal((50, 16)))
    cells = assign_cells(vectors_ND)

    assert assign_cells(vectors_ND[::-1])[::-1] == cells
    assert assign_cells(2 * vectors_ND) == cells
    assert assign_cells(vectors_ND, seed=1) != cells
    assert all(a == 255 - b for a, b in zip(cells, assign_cells(-vectors_ND), strict=True))
    assert len(set(cells)) > 20


def test_clusters_hold_what_lies_together_and_are_the_same_every_time():
    rng = np.random.default_rng(0)
    centres_KD = 10 * np.eye(4)
    places = [index % 4 for index in range(80)]
    vectors_ND = (centres_KD[places] + 0.1 * rng.standard_normal((80, 4))).astype(np.float32)
    clusters = assign_clusters(vectors_ND, 4, seed=2)

    assert len(set(zip(places, clusters, strict=True))) == 4 == len(set(clusters))
    assert assign_clusters(vectors_ND, 4, seed=2) == clusters
    assert set(assign_clusters(np.ones((3, 2), dtype=np.float32))) == {0}


# ---- the report


@pytest.mark.parametrize("embedder", [HASHED, BASE])
def test_a_narrow_pool_is_told_from_a_wide_one(embedder: str):
    """400 questions for capitals in all wordings and formats, and 400 of every kind."""
    chat = load_chat(str(resolve_model(STARTER)))
    embed = load_embedder(embedder, model=STARTER, chat=chat)
    narrow, wide = (measure(draw_pool(kinds), embed) for kinds in (NARROW, KINDS))

    assert wide.vendi_score > 1.5 * narrow.vendi_score
    assert wide.cell_entropy > narrow.cell_entropy + 0.3
    assert wide.cell_coverage > 1.5 * narrow.cell_coverage
    assert all(a > 1.5 * b for a, b in zip(wide.distinct, narrow.distinct, strict=True))
    assert wide.nearest_mean > 1.5 * narrow.nearest_mean
    assert wide.nearest_p05 > narrow.nearest_p05
    assert wide.num_openings > 2 * narrow.num_openings
    assert wide.opening_entropy > narrow.opening_entropy + 1


def test_clusters_tell_a_narrow_source_of_a_pool_from_a_wide_one():
    rows = [*draw_pool(NARROW, source="narrow"), *draw_pool(KINDS, source="wide")]
    report = measure(rows)

    assert report.cluster_coverage["narrow"] < 0.75 < 0.9 < report.cluster_coverage["wide"]
    assert report.cluster_entropy["narrow"] < report.cluster_entropy["wide"] - 0.3


def test_of_a_large_pool_a_seeded_sample_is_measured_and_the_report_says_so():
    rows = draw_pool(KINDS, num_rows=300)
    embedded: list[int] = []

    def embed(texts: Sequence[str]) -> Vectors:
        embedded.append(len(texts))
        return embed_hashed(texts)

    report = measure(rows, embed, sample_rows=100)

    assert (report.num_rows, report.num_sampled, embedded) == (300, 100, [100])
    assert report.to_details() == measure(rows, sample_rows=100).to_details()
    assert report.to_details() != measure(rows, sample_rows=100, seed=1).to_details()
    assert measure(rows, sample_rows=300).num_sampled == 300


def test_answers_and_system_turns_never_count():
    rows = draw_pool(KINDS, num_rows=50)
    plain = [
        Row(
            row_id=row.row_id,
            index=row.index,
            source="s",
            messages=(row.messages[1], Message(role="assistant", content=str(row.index))),
        )
        for row in rows
    ]

    assert measure(plain).to_details() == measure(rows).to_details()


def test_the_most_frequent_openings_are_named_with_their_shares():
    texts = ["write a poem", "write the poem now", "name a cat", "write poem 3"]
    report = measure([make_row(index, text) for index, text in enumerate(texts)])

    assert report.top_openings == (("write poem", 0.75), ("name cat", 0.25))
    assert report.num_openings == 2
    assert report.opening_entropy == pytest.approx(measure_entropy("aaab"))


def test_a_pool_of_one_row_has_a_report():
    report = measure([make_row(0, "a")])

    assert (report.vendi_score, report.nearest_mean, report.cell_entropy) == (pytest.approx(1), 0, 0)


def test_what_a_manifest_keeps_is_json_and_holds_no_clock():
    novelty = Novelty()
    novelty.add("a")
    rows = [make_row(0, "a b"), make_row(1, "c d")]
    report = measure_diversity(
        rows, embed_hashed, num_rows=2, embedder=HASHED, novelty={"s": novelty.report()}
    )
    details = report.to_details()

    assert json.loads(json.dumps(details)) == details
    assert "seconds" not in details
    assert report.seconds > 0
    assert details["novelty"]["s"]["num_candidates"] == 1
    assert (details["embedder"], details["num_rows"]) == (HASHED, 2)
