"""Scores of single rows and of whole suites."""

import pytest

from delia.evaluate.scoring import METRICS, chrf, corpus_chrf, exact_match


@pytest.mark.parametrize(
    ("completion", "reference", "score"),
    [
        ("the answer is paris .", "the answer is paris .", 1.0),
        ("  the  answer\tis paris .\n", "the answer is paris .", 1.0),
        ("The answer is paris .", "the answer is paris .", 0.0),
        ("the answer is paris", "the answer is paris .", 0.0),
        ("theanswer", "the answer", 0.0),
        ("", "paris", 0.0),
        ("\n", "", 1.0),
    ],
)
def test_an_exact_match_forgives_white_space_alone(completion: str, reference: str, score: float):
    assert exact_match(completion, reference) == score


def test_chrf_of_a_case_worked_by_hand():
    """`abc` against `abcd`, beta 2, so that F = 5PR / (4P + R), by order:

    1-grams P 3/3, R 3/4: F = 3.75 / 4.75; 2-grams P 2/2, R 2/3; 3-grams P 1/1, R 1/2; the completion has
    no 4-grams, so higher orders are left out. chrF2 averages P and R before F: P = 1, R = 23/36.
    """
    recall = (3 / 4 + 2 / 3 + 1 / 2) / 3
    assert chrf("abc", "abcd") == pytest.approx(5 * recall / (4 + recall), abs=1e-9)


@pytest.mark.parametrize(
    ("completion", "reference", "score"),
    [
        ("a b", "a b", 1.0),
        ("ab", "a b", 1.0),
        ("", "abc", 0.0),
        ("xyz", "abc", 0.0),
        ("", " ", 1.0),
        ("a", "", 0.0),
    ],
)
def test_chrf_lies_between_0_and_1_and_two_blank_texts_agree(completion: str, reference: str, score: float):
    assert chrf(completion, reference) == score


def test_corpus_chrf_weighs_long_rows_more_than_short_ones():
    """One long row right and one short row wrong: far above the mean of the rows, one half."""
    completions = ["the red cat sees the small dog near the old house", "no"]
    references = ["the red cat sees the small dog near the old house", "hi"]

    rows = [chrf(a, b) for a, b in zip(completions, references, strict=True)]
    assert rows == [1.0, 0.0]
    assert corpus_chrf(completions, references) == pytest.approx(0.98, abs=0.015)


def test_corpus_chrf_of_one_row_is_that_rows_chrf():
    assert corpus_chrf(["abc"], ["abcd"]) == pytest.approx(chrf("abc", "abcd"))


@pytest.mark.parametrize(("completions", "references"), [([], []), (["a", "b"], ["a"])])
def test_corpus_chrf_refuses_rows_without_partner(completions: list[str], references: list[str]):
    with pytest.raises(
        ValueError, match=f"got {len(completions)} completions and {len(references)} references"
    ):
        corpus_chrf(completions, references)


def test_every_metric_is_a_full_mark_for_the_reference_itself():
    assert {name: metric("a b c d", "a b c d") for name, metric in METRICS.items()} == {
        "exact_match": 1.0,
        "chrf": 1.0,
    }
