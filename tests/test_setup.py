"""Set-up: what `make` does on machines good and bad, with pip scripted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTED_PYTHON = """\
#!/bin/bash
# python3.11 and .venv/bin/python: notes what it is asked for, and fails where $FAIL_ON matches
echo "$(basename "$(dirname "$0")"): ${*:1:12}" | head -n 1 >> "$CALLS"
if [[ -n "${FAIL_ON:-}" && "$*" == *$FAIL_ON* ]]; then echo "scripted failure" >&2; exit 1; fi
if [[ "$1 $2" == "-m venv" ]]; then
  [[ "$3" == --clear ]] && rm -rf .venv
  mkdir -p .venv/bin && cp "$0" .venv/bin/python
fi
"""


@pytest.fixture
def clone(tmp_path):
    """A clone with the files that set-up reads, and a scripted Python and uname before the real ones."""
    for name in (
        "Makefile",
        "pyproject.toml",
        "requirements/cpu.lock",
        "requirements/gpu.lock",
        "requirements/apt.txt",
    ):
        target = tmp_path / "clone" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((ROOT / name).read_text())
    write_script(tmp_path / "tools" / "python3.11", SCRIPTED_PYTHON)
    return tmp_path / "clone"


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make(clone: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    tools = clone.parent / "tools"
    own = ("MAKE", "MFLAGS", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=clone,
        env=kept | {"PATH": f"{tools}:{kept['PATH']}", "CALLS": str(clone.parent / "calls")} | environment,
        capture_output=True,
        text=True,
    )


def take_calls(clone: Path) -> list[str]:
    path = clone.parent / "calls"
    calls = path.read_text().splitlines() if path.exists() else []
    path.write_text("")
    return calls


def list_stamps(clone: Path) -> list[str]:
    return sorted(path.name for path in (clone / ".venv").glob(".install*"))


def test_set_up_installs_the_lock_without_resolving_and_then_the_package(clone, read_lock):
    result = make(clone, "setup")

    assert result.returncode == 0, result.stderr
    pip = "bin: -m pip --disable-pip-version-check install"
    check, venv, *installs, build_check = take_calls(clone)
    assert check.startswith("tools: -c import platform")
    assert venv == "tools: -m venv .venv"
    torch = read_lock("cpu")["torch"]
    assert installs == [
        f"{pip} -q --no-deps torch=={torch}",
        f"{pip} --progress-bar off --no-deps -r requirements/cpu.lock",
        f"{pip} -q --no-deps --no-build-isolation -e .",
    ]
    assert build_check.startswith("bin: -c import sys")
    steps = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("setup ")]
    assert steps == ["1/4", "2/4", "3/4", "4/4", "done:"]


def test_a_second_set_up_does_nothing(clone):
    make(clone, "setup")
    stamps, _ = list_stamps(clone), take_calls(clone)

    assert make(clone, "setup").returncode == 0
    assert take_calls(clone) == []
    assert list_stamps(clone) == stamps
    assert [bool(re.fullmatch(r"\.installed-cpu-[0-9a-f]{16}", stamp)) for stamp in stamps] == [True]


@pytest.mark.parametrize("name", ["requirements/cpu.lock", "pyproject.toml"])
def test_a_changed_lock_or_project_is_installed_into_the_environment_that_is_there(clone, name):
    make(clone, "setup")
    stamps, _ = list_stamps(clone), take_calls(clone)
    (clone / name).write_text((clone / name).read_text() + "\n")

    assert make(clone, "setup").returncode == 0
    calls = take_calls(clone)
    assert "tools: -m venv .venv" in calls
    assert sum("pip" in call for call in calls) == 3
    assert len(list_stamps(clone)) == 1
    assert list_stamps(clone) != stamps


@pytest.mark.parametrize("step", ["torch==", "-r requirements", "-e .", "import sys"])
def test_an_interrupted_set_up_is_not_taken_for_a_finished_one_and_starts_from_nothing(clone, step):
    assert make(clone, "setup", FAIL_ON=step).returncode != 0
    assert list_stamps(clone) == [".installing"]
    take_calls(clone)

    assert make(clone, "setup").returncode == 0
    assert "tools: -m venv --clear .venv" in take_calls(clone)
    assert ".installing" not in list_stamps(clone)


def test_the_other_accelerator_starts_from_nothing_and_is_kept_by_later_targets(clone):
    """pip takes 2.13.0+cpu for 2.13.0: over a CPU environment the GPU lock would leave torch as it is."""
    make(clone, "setup")
    take_calls(clone)

    assert make(clone, "setup", "ACCEL=gpu").returncode == 0
    calls = take_calls(clone)
    assert "tools: -m venv --clear .venv" in calls
    assert any(call.endswith("-r requirements/gpu.lock") for call in calls)
    assert make(clone, "setup").returncode == 0
    assert take_calls(clone) == []


def test_an_index_of_torch_builds_is_searched_besides_the_configured_one(clone):
    make(clone, "setup", "TORCH_INDEX=file:cpu-builds")
    named = [call for call in take_calls(clone) if "--extra-index-url file:cpu-builds" in call]
    assert [call.rpartition(" ")[2].startswith("torch==") for call in named] == [True]


def test_an_index_without_the_torch_build_is_told_with_the_way_out(clone):
    result = make(clone, "setup", FAIL_ON="torch==")
    assert result.returncode != 0
    assert "make setup TORCH_INDEX=<address>" in result.stderr


@pytest.mark.parametrize(
    ("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("MINGW64_NT-10.0", "x86_64")]
)
def test_another_kind_of_machine_is_refused_with_a_container_as_the_way_out(clone, system, machine):
    script = f'#!/bin/bash\n[ "$1" = -s ] && echo {system} || echo {machine}\n'
    write_script(clone.parent / "tools" / "uname", script)

    result = make(clone, "setup")

    assert result.returncode != 0
    assert (
        f"Linux on x86-64 is needed (vLLM's wheels are built for it), this is {system} {machine};"
        in result.stderr
    )
    assert "docker run --platform linux/amd64" in result.stderr
    assert take_calls(clone) == []


def test_a_missing_python_is_told_with_the_ways_to_one(clone):
    result = make(clone, "setup", "PYTHON=python3.11-that-is-not-there")
    assert result.returncode != 0
    assert "no python3.11-that-is-not-there on the PATH" in result.stderr
    assert "make setup PYTHON=/path/to/python3.11" in result.stderr


def test_another_version_of_python_is_refused_with_its_number(clone):
    """The check itself runs here, told that it is 3.12 by a line before it."""
    claimed = "import sys; sys.version_info = (3, 12, 1); exec('''$2''')"
    script = f'#!/bin/bash\nexec "{sys.executable}" -c "{claimed}"\n'
    write_script(clone.parent / "tools" / "other", script)

    result = make(clone, "setup", "PYTHON=other")

    assert result.returncode != 0
    assert re.search(r"setup: Python 3\.11 is needed, \S+ is 3\.12; install it .* PYTHON=", result.stderr)


def test_an_unknown_accelerator_is_refused(clone):
    result = make(clone, "setup", "ACCEL=tpu")
    assert result.returncode != 0
    assert "ACCEL is cpu or gpu, got 'tpu'" in result.stderr


@pytest.mark.parametrize(
    ("accel", "installed", "reason"),
    [
        ("cpu", {"torch": "2.13.0+cpu"}, None),
        ("gpu", {"torch": "2.13.0", "torchvision": "0.28.0"}, None),
        ("cpu", {"torch": "2.13.0"}, "torch 2.13.0 is not the cpu build; run `make clean`"),
        ("gpu", {"torch": "2.13.0+cpu"}, "torch 2.13.0+cpu is not the gpu build; run `make clean`"),
        ("cpu", {}, "torch missing is not the cpu build"),
        (
            "cpu",
            {"torch": "2.13.0+cpu", "torchvision": "1", "torchcodec": "1"},
            "torchcodec, torchvision must be",
        ),
    ],
)
def test_the_installed_torch_is_checked_and_so_is_what_breaks_it(tmp_path, accel, installed, reason):
    for name, version in installed.items():
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    makefile = (ROOT / "Makefile").read_text()
    check = makefile.partition("define CHECK_TORCH\n")[2].partition("endef")[0]
    code = f"import sys; sys.path[:] = [{str(tmp_path)!r}, *sys.path]\n" + check
    code = code.replace("distributions()", f"distributions(path=[{str(tmp_path)!r}])")

    result = subprocess.run([sys.executable, "-c", code, accel], capture_output=True, text=True)

    assert (result.returncode == 0) is (reason is None), result.stderr
    assert (reason or "") in result.stderr


def test_tests_run_offline_on_one_thread_and_leave_out_what_needs_more(clone):
    write_script(
        clone.parent / "tools" / "python3.11",
        SCRIPTED_PYTHON + 'echo "$OMP_NUM_THREADS ${HF_HUB_OFFLINE:-online}" >> "$CALLS"\n',
    )
    assert make(clone, "test").returncode == 0

    *_, call, environment = take_calls(clone)
    assert call == "bin: -m pytest -m not system and not soak and not gpu"
    assert environment == "1 1"


def test_system_packages_that_are_there_are_not_installed_again(clone):
    write_script(clone.parent / "tools" / "dpkg-query", "#!/bin/bash\necho -n installed\n")
    write_script(clone.parent / "tools" / "apt-get", '#!/bin/bash\necho "apt-get $*" >> "$CALLS"\n')

    assert make(clone, "test-system").returncode == 0

    calls = take_calls(clone)
    assert [call for call in calls if "apt-get" in call] == []
    assert calls[-1] == "bin: -m pytest -m system"


def test_a_missing_system_package_is_installed_after_an_update(clone):
    script = '#!/bin/bash\n[[ "$*" == *prometheus* ]] && exit 1\necho -n installed\n'
    write_script(clone.parent / "tools" / "dpkg-query", script)
    write_script(clone.parent / "tools" / "apt-get", '#!/bin/bash\necho "apt-get $*" >> "$CALLS"\n')
    write_script(clone.parent / "tools" / "sudo", '#!/bin/bash\nexec "$@"\n')

    assert make(clone, "test-system").returncode == 0

    assert [call for call in take_calls(clone) if "apt-get" in call] == [
        "apt-get update -q",
        "apt-get install -qy --no-install-recommends prometheus",
    ]


def test_help_is_the_default_and_lists_every_target_that_users_run(clone):
    result = make(clone)
    targets = [
        "setup",
        "quickstart",
        "test",
        "test-system",
        "soak",
        "lint",
        "bench",
        "reproduce",
        "lock",
        "clean",
    ]
    listed = [line.split()[1] for line in result.stdout.splitlines()]
    assert [name for name in targets if name not in listed] == []
