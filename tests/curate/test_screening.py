"""Screening apart from deciding changes nothing, however candidates are cut."""

import random

import numpy as np
import pytest

from delia.curate.embedding import embed_hashed
from delia.curate.pipeline import Curator
from delia.curate.screening import Candidate, Screened, Screener
from delia.curate.settings import CurateConfig
from delia.curate.stopping import StopConfig, StopRule
from delia.schema import Message, Rejection, Row

CONFIG = CurateConfig(
    embedder="base", semantic_threshold=0.6, near_duplicate_threshold=None, max_output_tokens=20
)


def make_candidates(count: int = 700) -> list[Candidate]:
    """Return rows of few words, so that many are alike; some too long, some already rejected."""
    rng = random.Random(5)
    words = [f"w{i}" for i in range(14)]
    candidates: list[Candidate] = []
    for index in range(count):
        if rng.random() < 0.1:
            candidates.append(
                Rejection(row_id=str(index), index=index, source="s", reason="no_answer", text="t")
            )
            continue
        question = " ".join(rng.choices(words, k=7))
        candidates.append(
            Row(
                row_id=str(index),
                index=index,
                source="s",
                messages=(Message(role="user", content=question), Message(role="assistant", content="yes")),
                num_output_tokens=rng.choice((3, 3, 3, 30)),
            )
        )
    return candidates


@pytest.mark.parametrize("num_rows", [None, 120])
@pytest.mark.parametrize("size", [700, 300, 37])
def test_candidates_screened_elsewhere_in_parts_are_decided_on_as_those_screened_here(size, num_rows):
    candidates = make_candidates()
    screener = Screener(CONFIG, embed=embed_hashed)
    here, elsewhere = (Curator(Screener(CONFIG, embed=embed_hashed)) for _ in range(2))
    rules = [StopRule(StopConfig(), num_rows=num_rows) if num_rows else None for _ in range(2)]
    parts = [candidates[start : start + size] for start in range(0, len(candidates), size)]
    expected = here.feed(candidates, rule=rules[0])
    # in any order: what is shown depends on no other part
    shown = {place: screener.screen(parts[place]) for place in reversed(range(len(parts)))}
    decided = [
        item
        for place, part in enumerate(parts)
        for item in elsewhere.feed(part, rule=rules[1], screened=shown[place])
    ]

    assert decided == expected
    assert elsewhere.counts == here.counts
    assert {"too_long", "no_answer", "semantic_duplicate"} <= set(here.counts)
    assert (elsewhere.num_accepted, elsewhere.novelty.report()) == (here.num_accepted, here.novelty.report())


def test_only_rows_without_a_fault_are_embedded():
    embedded: list[str] = []

    def embed(texts):
        embedded.extend(texts)
        return embed_hashed(texts)

    candidates = make_candidates(200)
    screened = Screener(CONFIG, embed=embed).screen(candidates)
    faultless = [place for place, fault in enumerate(screened.faults) if fault is None]

    assert embedded == [candidates[place].user_text for place in faultless]
    assert np.flatnonzero(screened.vectors_ND.any(1)).tolist() == faultless
    assert {screened.faults[i] for i in range(200) if i not in faultless} == {"too_long", "no_answer"}


def test_nothing_is_embedded_where_no_rule_asks_for_it_or_no_row_is_without_a_fault():
    plain = Screener(CurateConfig(), embed=embed_hashed)
    rejected = [item for item in make_candidates() if isinstance(item, Rejection)]

    assert plain.screen(make_candidates(20)).vectors_ND is None
    assert Screener(CONFIG, embed=embed_hashed).screen(rejected).vectors_ND is None


def test_a_cut_takes_faults_and_vectors_of_the_same_places():
    screened = Screened(faults=["a", None, "b"], vectors_ND=np.arange(6, dtype=np.float32).reshape(3, 2))
    cut = screened.cut(1, 9)

    assert list(cut.faults) == [None, "b"]
    assert cut.vectors_ND.tolist() == [[2, 3], [4, 5]]
    assert Screened(faults=[None], vectors_ND=None).cut(0, 1).vectors_ND is None
