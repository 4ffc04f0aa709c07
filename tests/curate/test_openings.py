"""The opening word of an instruction and its content word."""

import pytest

from delia.curate.openings import find_opening


@pytest.mark.parametrize(
    ("instruction", "opening"),
    [
        ("Write a short poem about rain", ("write", "short")),
        ("what is the capital of peru ?", ("what", "capital")),
        ("  Explain:\n- quantum-mechanics!", ("explain", "quantum-mechanics")),
        ("Don't panic", ("don't", "panic")),
        ("the", ("the", "")),
        ("is it so ?", ("is", "")),
        ("?!", ("", "")),
        ("", ("", "")),
        ("Schreibe ein Gedicht", ("schreibe", "ein")),
    ],
)
def test_an_opening_is_the_first_word_and_the_next_that_is_no_function_word(
    instruction: str, opening: tuple[str, str]
):
    assert find_opening(instruction) == opening
