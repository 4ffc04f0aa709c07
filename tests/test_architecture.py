"""The shape of the source: sizes, names, who may import what, and what is never written."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "delia"
MODULES = sorted(PACKAGE.rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 60
MAX_JOB_LINES = 60
FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "misc", "base", "core"}
ROOM_BY_LIBRARY = {"mlflow": "track", "vllm": "generate", "peft": "model"}
HEAVY = {"torch", "ray", "vllm", "mlflow", "transformers", "pandas", "pyarrow"}
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLING_CALLS = {"torch.load", "numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle"}
PRINTERS = {"cli.py", "starter/pretrain.py"}
MACHINE_PATH = re.compile(r"""(?:^|[\s"'`(=:])/(?:home|Users|root|work|workspace|mnt|opt|scratch|data)/""")


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def imported_libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(path)}


def called_names(path: Path) -> set[str]:
    """The dotted names that a file calls or decorates with, such as `torch.load`."""
    return {ast.unparse(node.func) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)}


def test_the_rules_below_are_not_about_an_empty_list():
    assert [len(files) > 3 for files in (MODULES, JOBS, TESTS)] == [True, True, True]


@pytest.mark.parametrize(
    ("files", "limit"), [(MODULES, MAX_MODULE_LINES), (JOBS, MAX_JOB_LINES)], ids=["modules", "jobs"]
)
def test_no_file_is_too_long(files, limit):
    length_by_place = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in length_by_place.items() if length > limit} == {}


def test_no_function_is_too_long():
    too_long = {
        f"{place(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in MODULES + JOBS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert too_long == {}


def test_no_module_or_room_has_a_name_that_says_nothing():
    parts = {place(path): set(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES + JOBS}
    assert {name: found & FORBIDDEN_NAMES for name, found in parts.items() if found & FORBIDDEN_NAMES} == {}


def test_the_source_root_is_no_package_since_it_would_shadow_the_standard_librarys_platform():
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_every_room_is_a_package_and_every_init_is_empty():
    folders = {path.parent for path in MODULES}
    assert [place(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    assert [place(path) for path in MODULES if path.name == "__init__.py" and path.read_text()] == []


@pytest.mark.parametrize(("library", "room"), ROOM_BY_LIBRARY.items())
def test_a_library_is_imported_by_its_one_room(library, room):
    importers = {path for path in MODULES + JOBS if library in imported_libraries(path)}

    assert [place(path) for path in importers if not path.is_relative_to(PACKAGE / room)] == []
    assert importers, f"nothing imports {library}: the rule is about another name"


def test_the_package_never_imports_a_job_or_a_test():
    assert [place(path) for path in MODULES if imported_libraries(path) & {"jobs", "tests", "conftest"}] == []


@pytest.mark.parametrize("module", ["delia", "delia.cli"])
def test_importing_the_package_or_its_command_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = set(result.stdout.split())
    assert "delia" in loaded
    assert loaded & HEAVY == set()


def test_search_never_names_the_test_split():
    """Test rows are for the gate and the published table; a search that reads them chooses by them."""
    namers = [
        f"{place(path)}:{node.lineno}"
        for path in sorted((PACKAGE / "search").rglob("*.py"))
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and node.value == "test"
    ]
    assert namers == []


def test_no_downloaded_code_is_ever_trusted():
    trusting = [
        f"{place(path)}:{node.value.lineno}"
        for path in MODULES + JOBS
        for node in ast.walk(parse(path))
        if isinstance(node, ast.keyword)
        and node.arg == "trust_remote_code"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert trusting == []


def test_nothing_stored_is_read_by_unpickling():
    assert {place(path) for path in MODULES + JOBS if imported_libraries(path) & UNPICKLERS} == set()
    found = {place(path): called_names(path) & UNPICKLING_CALLS for path in MODULES + JOBS}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_only_the_command_and_the_starters_training_print():
    printers = {str(path.relative_to(PACKAGE)) for path in MODULES if "print" in called_names(path)}
    assert printers - PRINTERS == set()


@pytest.mark.parametrize(
    ("text", "is_machine_path"),
    [
        ('path = "/home/ann/model"', True),
        ("/".join(("see ", "work", "x")), True),
        ('"s3://data/x"', False),
        ("a relative opt/x", False),
        ("runs/data/x", False),
    ],
)
def test_a_path_of_one_machine_is_told_from_an_address(text, is_machine_path):
    assert bool(MACHINE_PATH.search(text)) is is_machine_path


def test_no_path_of_one_machine_is_written_down():
    shared = [path for path in TESTS if path != Path(__file__)] + MODULES + JOBS
    configuration = [ROOT / name for name in ("Makefile", "pyproject.toml", "cluster.yaml", ".ci/run")]
    found = [
        f"{place(path)}:{number}: {line.strip()}"
        for path in shared + configuration
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


def test_no_test_is_skipped_or_expected_to_fail():
    evading = {"skip", "skipif", "xfail", "importorskip", "skipTest", "expectedFailure"}
    found = [
        f"{place(path)}:{node.lineno}"
        for path in TESTS
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr in evading)
        or (isinstance(node, ast.alias) and node.name in evading)
    ]
    assert found == []


def test_every_test_file_has_a_name_of_its_own():
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
