"""A job's command line: which recipes there are, and what the arguments make of one."""

import importlib
import sys

import pytest

from delia.config import FrozenConfig, dump_yaml
from delia.errors import ConfigError, StoppedError, StoreError
from delia.recipes.command_line import list_recipes, load_recipe, parse_job, run_job

FIRST = '''
from delia.config import FrozenConfig

class Rates(FrozenConfig):
    learning_rate: float = 0.5
    steps: int = 3

class SmallConfig(FrozenConfig):
    name: str
    rates: Rates = Rates()

def tiny():
    """Smallest.

    More words.
    """
    return SmallConfig(name="tiny")

def _hidden():
    return None

def scaled(factor):
    return None
'''
SECOND = "from pretend_room.first import SmallConfig\n\ndef alone():\n    return SmallConfig(name='alone')\n"
OWN = "def not_a_recipe():\n    return None\n"


class OtherConfig(FrozenConfig):
    """Settings of a job that no recipe here is for."""


@pytest.fixture
def room(tmp_path, monkeypatch):
    folder = tmp_path / "pretend_room"
    folder.mkdir()
    for name, text in {"__init__": "", "first": FIRST, "second": SECOND, "command_line": OWN}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("pretend_room")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pretend_room"]:
        del sys.modules[name]


@pytest.fixture
def small(room):
    return importlib.import_module("pretend_room.first").SmallConfig


def parse(room, kind, *argv):
    return parse_job(argv, kind=kind, usage="Do the job.", room=room)


def test_every_public_function_without_arguments_is_a_recipe_and_none_is_imported_to_say_so(room):
    entries = list_recipes(room)

    assert [(entry.name, entry.module, entry.summary) for entry in entries.values()] == [
        ("alone", "pretend_room.second", ""),
        ("tiny", "pretend_room.first", "Smallest."),
    ]
    assert "pretend_room.first" not in sys.modules


def test_a_name_that_two_modules_give_to_a_recipe_is_refused_with_both(room):
    with open(f"{room.__path__[0]}/third.py", "w") as file:
        file.write("def tiny():\n    return None\n")
    with pytest.raises(ConfigError, match=r"'tiny' stands in pretend_room\.first and in pretend_room\.third"):
        list_recipes(room)


def test_an_unknown_recipe_is_refused_with_all_names_and_the_nearest(room):
    with pytest.raises(ConfigError, match=r"no recipe 'tinny': .*\['alone', 'tiny'\]; did you mean 'tiny'\?"):
        load_recipe("tinny", room=room)


def test_a_recipe_alone_gives_its_settings_and_the_defaults_of_the_rest(room, small):
    job = parse(room, small, "tiny")

    assert job.settings == small(name="tiny")
    assert (job.recipe, job.dry_run, job.run_name, job.allowed_modules) == ("tiny", False, None, ())


def test_every_option_arrives(room, small):
    options = ["--run", "mine", "--dry-run", "--allow-module", "a.b", "--allow-module", "c"]
    job = parse(room, small, "tiny", "--set", "rates.steps=7", "--set", "name=x", *options)

    assert job.settings.model_dump() == {"name": "x", "rates": {"learning_rate": 0.5, "steps": 7}}
    assert (job.dry_run, job.run_name, job.allowed_modules) == (True, "mine", ("a.b", "c"))


def test_a_dumped_settings_file_replays_to_equal_settings_and_can_be_changed(room, small, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(parse(room, small, "tiny", "--set", "rates.learning_rate=1e-4").settings))

    replayed = parse(room, small, "--from", str(path), "--set", "rates.steps=9")

    assert replayed.settings.model_dump() == {"name": "tiny", "rates": {"learning_rate": 1e-4, "steps": 9}}
    assert replayed.recipe is None


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], r"a RECIPE or --from FILE, got neither; recipes are \['alone', 'tiny'\]"),
        (["tiny", "--from", "x.yaml"], "got both"),
        (["--from", "gone.yaml"], r"can't read the settings file 'gone\.yaml'"),
        (["tiny", "--set", "rates.step=1"], r"no setting 'rates\.step'.*did you mean 'steps'"),
        (["tiny", "--set", "rates.steps=many"], r"setting 'rates\.steps': .*got 'many'"),
        (["tiny", "--set", "rates.steps"], "--set takes path=value"),
    ],
)
def test_a_mistake_is_refused_before_any_work_and_named(room, small, argv, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(room, small, *argv)


def test_a_recipe_of_another_job_is_refused_with_both_kinds(room):
    with pytest.raises(ConfigError, match="recipe 'tiny' holds SmallConfig, this job takes OtherConfig"):
        parse(room, OtherConfig, "tiny")


@pytest.mark.parametrize("option", ["--dry", "--ru=x"])
def test_a_shortened_option_is_not_guessed_at(room, small, option, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(room, small, "tiny", option)

    assert exit_info.value.code == 2
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_help_shows_the_jobs_own_text_and_every_option(room, small, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(room, small, "--help")

    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert "Do the job." in shown
    options = ["RECIPE", "--set", "--from", "--run", "--dry-run", "--allow-module"]
    assert [option for option in options if option not in shown] == []


def test_an_error_of_the_platform_ends_a_job_with_one_line_and_status_2(monkeypatch, capsys):
    def fail():
        raise StoreError("no file at 'x'")

    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "tiny"])
    with pytest.raises(SystemExit) as exit_info:
        run_job(fail)

    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "train.py: no file at 'x'\n"


def test_a_job_that_ends_well_does_not_exit_by_itself():
    done = []
    run_job(lambda: done.append(1))
    assert done == [1]


def test_an_error_that_nobody_raised_on_purpose_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_job(lambda: 1 // 0)


def test_a_named_run_goes_on_by_its_name_alone(room, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = parse(room, small, "tiny", "--set", "rates.steps=7", "--run", "mine")
    again = parse(room, small, "--run", "mine")
    assert again.settings == first.settings
    assert again.settings.rates.steps == 7


def test_a_name_is_not_given_to_other_settings(room, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse(room, small, "tiny", "--run", "mine")
    with pytest.raises(ConfigError, match="run 'mine' has other settings"):
        parse(room, small, "tiny", "--set", "rates.steps=8", "--run", "mine")


def test_a_dry_run_keeps_no_settings(room, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse(room, small, "tiny", "--run", "mine", "--dry-run")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", ""])
def test_a_run_name_is_no_path(room, small, name):
    with pytest.raises(ConfigError, match="--run takes a name"):
        parse(room, small, "tiny", "--run", name)


def test_a_job_that_was_asked_to_stop_has_a_status_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/train.py"])

    def stop() -> None:
        raise StoppedError("after step 4 of 60")

    with pytest.raises(SystemExit) as caught:
        run_job(stop)
    assert caught.value.code == StoppedError.STATUS == 75
    assert capsys.readouterr().err == "train.py: after step 4 of 60\n"


def test_a_preview_is_a_number_of_rows_of_the_job_that_has_one_and_keeps_no_run(
    room, small, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    job = parse_job(["tiny", "--preview", "3", "--run", "x"], kind=small, usage="", room=room, previews=True)
    assert (job.preview, list(tmp_path.glob("runs/**/*.yaml"))) == (3, [])
    assert parse_job(["tiny"], kind=small, usage="", room=room, previews=True).preview is None
    with pytest.raises(ConfigError, match="--preview takes a number of rows, got -1"):
        parse_job(["tiny", "--preview", "-1"], kind=small, usage="", room=room, previews=True)
    with pytest.raises(SystemExit):
        parse_job(["tiny", "--preview", "3"], kind=small, usage="", room=room)
