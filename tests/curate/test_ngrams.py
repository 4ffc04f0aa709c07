"""Words and word n-grams."""

import pytest

from delia.curate.ngrams import list_ngrams, normalise


def test_normalised_texts_differ_by_neither_case_nor_white_space():
    assert normalise("  Was  heißt\n\tDAS ? ") == "was heisst das ?"


@pytest.mark.parametrize(
    ("size", "ngrams"), [(1, ["a", "b", "a"]), (2, ["a b", "b a"]), (3, ["a b a"]), (4, [])]
)
def test_ngrams_come_in_order_and_a_short_text_has_none(size: int, ngrams: list[str]):
    assert list_ngrams(["a", "b", "a"], size) == ngrams
