"""The `delia` command: what it prints, how it fails, and what it must not import."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from delia.cli import main
from delia.recipes.command_line import list_recipes, load_recipe

HEAVY = {"torch", "ray", "vllm", "mlflow", "transformers", "pandas", "pyarrow", "numpy", "pydantic", "rich"}


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom delia.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, _, modules = result.stdout.partition("MODULES")

    assert set(modules.split()) & HEAVY == set()
    assert "delia" in modules.split()
    commands = ["recipes", "show", "ask", "export", "task", "version"]
    assert [name for name in commands if f"    {name}" not in shown] == []


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "required: COMMAND" in capsys.readouterr().err


def test_recipes_are_listed_with_their_first_line(capsys):
    assert main(["recipes"]) == 0

    lines = capsys.readouterr().out.splitlines()
    entries = list(list_recipes().values())
    assert [line.split(maxsplit=1) for line in lines] == [[entry.name, entry.summary] for entry in entries]
    assert "starter_sep" in [entry.name for entry in entries]


def test_show_prints_the_whole_settings_with_the_overrides(capsys):
    assert main(["show", "starter_sep", "--set", "arm.mix.diverse_ratio=20"]) == 0

    shown = yaml.safe_load(capsys.readouterr().out)
    expected = load_recipe("starter_sep").model_dump(mode="json")
    assert expected["arm"]["mix"]["diverse_ratio"] != 20
    expected["arm"]["mix"]["diverse_ratio"] = 20.0
    assert shown == expected


def test_a_mistake_is_one_line_on_stderr_and_status_2(capsys):
    assert main(["show", "starter_seep"]) == 2

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("delia: no recipe 'starter_seep'")
    assert captured.err.endswith("did you mean 'starter_sep'?\n")
    assert captured.err.count("\n") == 1


def test_ask_prints_what_the_adapter_answers(monkeypatch, capsys):
    pretend = ModuleType("delia.flow.ask")
    pretend.ask = lambda adapter, text: f"{adapter} says {text.upper()}"
    monkeypatch.setitem(sys.modules, "delia.flow.ask", pretend)

    assert main(["ask", "runs/adapter", "yes ?"]) == 0

    assert capsys.readouterr().out == "runs/adapter says YES ?\n"


def test_a_checked_task_is_counted_by_split(tmp_path, capsys):
    rows = [{"prompt": f"add {number} and 1", "completion": str(number + 1)} for number in range(5)]
    (tmp_path / "task.yaml").write_text("name: sums\n")
    for split, part in {"train": rows[:3], "dev": rows[3:4], "test": rows[4:]}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    assert main(["task", "check", str(tmp_path)]) == 0

    first, *counts = capsys.readouterr().out.splitlines()
    assert first.split()[:2] == ["task", "sums"]
    assert [line.split() for line in counts] == [
        ["train", "3", "rows"],
        ["dev", "1", "rows"],
        ["test", "1", "rows"],
    ]


def test_a_malformed_task_is_refused_with_its_file_and_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')

    assert main(["task", "check", str(path)]) == 2

    assert capsys.readouterr().err.startswith(f"delia: {path}: line 2: ")


def test_version_is_that_of_the_project(capsys):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

    assert main(["version"]) == 0

    assert capsys.readouterr().out == f"{project['version']}\n"
