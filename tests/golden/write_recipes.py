"""Write every recipe flattened, one `path: value` a line: a changed default shows up as a diff.

python tests/golden/write_recipes.py
"""

from pathlib import Path

from delia.config import flatten
from delia.recipes.command_line import list_recipes, load_recipe

FOLDER = Path(__file__).with_name("recipes")


def render(name: str) -> str:
    """Return a recipe as text."""
    return "".join(f"{path}: {value!r}\n" for path, value in flatten(load_recipe(name)).items())


if __name__ == "__main__":
    for name in list_recipes():
        (FOLDER / f"{name}.txt").write_text(render(name))
