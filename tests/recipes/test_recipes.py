"""Every committed recipe is whole, and equals its flattened copy under tests/golden/recipes."""

from pathlib import Path

import pytest

from delia.config import flatten
from delia.recipes.command_line import list_recipes, load_recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "recipes"


def test_every_recipe_has_its_golden_copy_and_no_copy_is_left_over():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(list_recipes())


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_a_recipe_equals_its_golden_copy(name):
    """After a wanted change: python tests/golden/write_recipes.py."""
    lines = [f"{path}: {value!r}" for path, value in flatten(load_recipe(name)).items()]
    assert lines == (GOLDEN / f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_a_recipe_says_what_it_is_for(name):
    assert len(list_recipes()[name].summary) > 20
