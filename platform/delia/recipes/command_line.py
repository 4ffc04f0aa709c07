"""The command line of a job: a recipe's name and overrides -> complete, checked settings.

    RECIPE --set train.seed=1   or   --from config.yaml   ->   JobLine(settings, run name, permissions)

A recipe is a public function without arguments in any other module of this room; its name is the
recipe's, its docstring says what it is for. Listing recipes reads source text only, so it is quick;
one module is imported when one of its recipes is loaded.
"""

import argparse
import ast
import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Generic

from pydantic import BaseModel

from delia import recipes
from delia.config import Settings, dump_yaml, load_yaml, override
from delia.errors import ConfigError, DeliaError, StoppedError

OWN_NAME = __name__.rpartition(".")[2]
RUN_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class RecipeEntry:
    """Where a recipe stands, and the first line of its docstring."""

    name: str
    module: str
    summary: str


@dataclass(frozen=True, kw_only=True)
class JobLine(Generic[Settings]):
    """A parsed command line; `recipe` is None where a settings file was replayed."""

    settings: Settings
    recipe: str | None
    dry_run: bool
    run_name: str | None
    allowed_modules: tuple[str, ...]
    preview: int | None = None


def list_recipes(room: ModuleType = recipes) -> dict[str, RecipeEntry]:
    """Return every recipe by name, sorted, without importing one.

    Raises:
        ConfigError: Two modules define a recipe of the same name.
    """
    entries: dict[str, RecipeEntry] = {}
    for path in (Path(folder) for folder in room.__path__):
        for module in pkgutil.iter_modules([str(path)]):
            if module.name == OWN_NAME:
                continue
            for entry in _read_recipes(path / f"{module.name}.py", f"{room.__name__}.{module.name}"):
                if entry.name in entries:
                    raise ConfigError(
                        f"recipe {entry.name!r} stands in {entries[entry.name].module} and in {entry.module};"
                        " a name is one recipe's, rename one"
                    )
                entries[entry.name] = entry
    return dict(sorted(entries.items()))


def _read_recipes(path: Path, module: str) -> list[RecipeEntry]:
    return [
        RecipeEntry(name=node.name, module=module, summary=(ast.get_docstring(node) or "").partition("\n")[0])
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and not _takes_arguments(node)
    ]


def _takes_arguments(node: ast.FunctionDef) -> bool:
    given = node.args
    return bool(given.posonlyargs or given.args or given.vararg or given.kwonlyargs or given.kwarg)


def load_recipe(name: str, *, room: ModuleType = recipes) -> BaseModel:
    """Build the settings of a recipe.

    Raises:
        ConfigError: No recipe has this name; the message has the nearest and all of them.
    """
    entries = list_recipes(room)
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no recipe {name!r}: it is not one of {list(entries)}{hint}")
    module = importlib.import_module(entries[name].module)
    settings: BaseModel = vars(module)[name]()
    return settings


def parse_job(
    argv: Sequence[str],
    *,
    kind: type[Settings],
    usage: str,
    room: ModuleType = recipes,
    previews: bool = False,
) -> JobLine[Settings]:
    """Parse a job's arguments into settings that are complete and checked.

    Args:
        argv: The arguments after the script's name.
        kind: The settings that the job takes.
        usage: The job's docstring, shown by `--help`.
        room: The package that recipes are looked up in.
        previews: Whether the job knows `--preview`.

    Raises:
        ConfigError: The settings are not complete, or not right; nothing has been done yet.
        SystemExit: `--help`, or arguments that don't parse.
    """
    parser = _make_parser(usage)
    if previews:
        parser.add_argument("--preview", type=int, metavar="ROWS", help="show rows and packing, do no work")
    line = parser.parse_args(argv)
    preview = getattr(line, "preview", None)
    if preview is not None and preview < 0:
        raise ConfigError(f"--preview takes a number of rows, got {preview}; 0 shows the packing alone")
    if line.run_name is not None and not RUN_NAME.fullmatch(line.run_name):
        raise ConfigError(f"--run takes a name of letters, digits, '.', '_' and '-', got {line.run_name!r}")
    settings = override(_read_settings(line, kind, room), line.assignments)
    if line.run_name is not None and not line.dry_run and preview is None:
        _keep_settings(locate_run(line.run_name), settings)
    return JobLine(
        settings=settings,
        recipe=line.recipe,
        dry_run=line.dry_run,
        run_name=line.run_name,
        allowed_modules=tuple(line.allowed_modules),
        preview=preview,
    )


def run_job(main: Callable[[], None]) -> None:
    """Run a job's `main`; an error that the platform raises on purpose is one line and status 2.

    Status 75 means that the job was asked to stop, and that the same command goes on where it did.
    """
    try:
        main()
    except DeliaError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}\n")
        sys.exit(StoppedError.STATUS if isinstance(error, StoppedError) else 2)


def _make_parser(usage: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="a name that `delia recipes` lists")
    add(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="PATH=VALUE",
        help="change one setting",
    )
    add("--from", dest="replayed", metavar="FILE", help="replay a config.yaml instead of a recipe")
    add(
        "--run",
        dest="run_name",
        metavar="NAME",
        help="keep the settings under this name; the name alone runs them again",
    )
    add("--dry-run", action="store_true", help="check everything that can be checked, do no work")
    add(
        "--allow-module",
        action="append",
        default=[],
        dest="allowed_modules",
        metavar="NAME",
        help="let settings name methods of this module, outside delia.methods",
    )
    return parser


def locate_run(name: str) -> Path:
    """Return the file that keeps a named run's settings, below the directory that a job is started in."""
    return Path("runs", "named", f"{name}.yaml")


def _keep_settings(path: Path, settings: BaseModel) -> None:
    """Keep a named run's settings; the steps of equal settings are found again, so the run resumes."""
    text = dump_yaml(settings)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"run {path.stem!r} has other settings in {path}; give --run {path.stem} alone to go on with it,"
            " or take another name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _read_settings(line: argparse.Namespace, kind: type[Settings], room: ModuleType) -> Settings:
    if line.recipe is None and line.replayed is None and line.run_name is not None:
        line.replayed = str(locate_run(line.run_name))
    if (line.recipe is None) == (line.replayed is None):
        given = "neither" if line.recipe is None else "both"
        raise ConfigError(
            f"a job takes a RECIPE or --from FILE, got {given}; recipes are {list(list_recipes(room))}"
        )
    if line.replayed is not None:
        try:
            text = Path(line.replayed).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read the settings file {line.replayed!r}: {error}") from error
        return load_yaml(kind, text)
    settings = load_recipe(line.recipe, room=room)
    if not isinstance(settings, kind):
        raise ConfigError(
            f"recipe {line.recipe!r} holds {type(settings).__name__}, this job takes {kind.__name__};"
            " run the job that the recipe's docstring names, see `delia recipes`"
        )
    return settings
