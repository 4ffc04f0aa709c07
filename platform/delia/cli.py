"""The `delia` command: a thin reader; work is submitted through `jobs/`.

Heavy libraries are imported inside the command that needs them, so `delia --help` answers at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from delia.errors import DeliaError

FORMS = ("lora", "patched_base", "merged")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error that the platform raises on purpose is one line and status 2."""
    line = _make_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = line.run
    try:
        run(line)
    except DeliaError as error:
        print(f"delia: {error}", file=sys.stderr)
        return 2
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="delia", description="Mix a task with diverse self-sampled rows and tune a LoRA adapter on it."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    recipes = commands.add_parser("recipes", help="list the recipes")
    recipes.set_defaults(run=_list_recipes)

    show = commands.add_parser("show", help="print a recipe's whole settings, as config.yaml")
    show.add_argument("recipe", metavar="RECIPE")
    show.add_argument("--set", action="append", default=[], dest="assignments", metavar="PATH=VALUE")
    show.set_defaults(run=_show_recipe)

    ask = commands.add_parser("ask", help="answer one text with an adapter")
    ask.add_argument("adapter", metavar="ADAPTER", help="an adapter's directory or models:/NAME@champion")
    ask.add_argument("text", metavar="TEXT")
    ask.set_defaults(run=_ask)

    export = commands.add_parser(
        "export",
        help="write an adapter as vLLM serves it: LoRA, a patched base, or merged",
        description="Write an adapter in a form that vLLM serves, and hold it to what HF + PEFT computes.",
    )
    export.add_argument("adapter", metavar="ADAPTER", help="an adapter's directory or models:/NAME@champion")
    export.add_argument("--output", required=True, metavar="DIR")
    export.add_argument("--form", choices=FORMS, help="default: the lightest that vLLM serves over its base")
    export.add_argument(
        "--copy", action="store_true", help="copy the base's files instead of linking to them"
    )
    export.add_argument("--no-check", action="store_true", help="don't load it to compare it with HF + PEFT")
    export.set_defaults(run=_export)

    task = commands.add_parser("task", help="look at task files").add_subparsers(
        required=True, metavar="ACTION"
    )
    check = task.add_parser("check", help="read a task as a job would, and count its rows")
    check.add_argument("path", metavar="PATH")
    check.set_defaults(run=_check_task)

    shown = commands.add_parser("version", help="print the version")
    shown.set_defaults(run=_print_version)
    return parser


def _list_recipes(line: argparse.Namespace) -> None:
    from delia.recipes.command_line import list_recipes

    entries = list_recipes()
    width = max(map(len, entries), default=0)
    for entry in entries.values():
        print(f"{entry.name:{width}}  {entry.summary}")


def _show_recipe(line: argparse.Namespace) -> None:
    from delia.config import dump_yaml, override
    from delia.recipes.command_line import load_recipe

    print(dump_yaml(override(load_recipe(line.recipe), line.assignments)), end="")


def _ask(line: argparse.Namespace) -> None:
    from delia.flow.ask import ask

    print(ask(line.adapter, line.text))


def _export(line: argparse.Namespace) -> None:
    from delia.flow.export import export_adapter

    export = export_adapter(
        line.adapter, line.output, form=line.form, copy=line.copy, is_checked=not line.no_check
    )
    print(f"form     {export.files.form}: {export.reason}")
    print(f"model    {export.files.model or 'the base as it is'}")
    print(f"adapter  {export.files.adapter or 'none, it is in the model'}")
    gap = export.gap_nats
    print(f"checked  {'no' if gap is None else f'{gap:.1e} nats from HF + PEFT'}")
    print(f"serve    {export.command}")


def _check_task(line: argparse.Namespace) -> None:
    from delia.store.tasks import TaskConfig, read_task

    task = read_task(TaskConfig(path=line.path))
    print(f"task   {task.name}  {task.digest}")
    for split, rows in task.rows_by_split.items():
        print(f"{split:5}  {len(rows)} rows")


def _print_version(line: argparse.Namespace) -> None:
    print(version("delia"))


if __name__ == "__main__":
    sys.exit(main())
