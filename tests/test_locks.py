"""The locks of both accelerators: what they hold, what they leave out, and that it is installed here."""

import re
import sysconfig
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"extra": "", "python_version": "3.11", "python_full_version": "3.11.0"}
BREAKS_CPU_TORCH = {"torchvision", "torchaudio", "torchcodec"}
LEFT_OUT_ON_CPU = BREAKS_CPU_TORCH | {"triton"}


def installed_distributions():
    """Return what is installed here; setuptools, once imported, lends its vendored packages to the path."""
    return distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])


def read_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("accel", ["cpu", "gpu"])
def test_a_lock_holds_exact_versions_and_names_no_host_path_or_option(accel):
    lines = (ROOT / "requirements" / f"{accel}.lock").read_text().splitlines()

    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][a-z0-9.+]*", line)] == []
    assert lines == sorted(set(lines), key=lambda line: line.partition("==")[0])


@pytest.mark.parametrize("accel", ["cpu", "gpu"])
def test_a_lock_holds_what_the_project_asks_for(accel, read_lock):
    project, lock = read_project(), read_lock(accel)
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in project["dependencies"] + extras[accel] + extras["dev"]]

    unmet = [str(item) for item in wanted if lock[canonicalize_name(item.name)] not in item.specifier]
    assert unmet == []


def test_the_cpu_lock_has_the_cpu_torch_and_not_what_breaks_it(read_lock):
    lock = read_lock("cpu")
    assert lock["torch"].local == "cpu"
    assert LEFT_OUT_ON_CPU & set(lock) == set()
    assert [name for name in lock if name.startswith("nvidia-")] == []


def test_the_gpu_lock_has_the_torch_with_cuda_and_the_builds_that_match_it(read_lock):
    lock = read_lock("gpu")
    assert lock["torch"].local is None
    assert lock["torch"].public == read_lock("cpu")["torch"].public
    assert (BREAKS_CPU_TORCH | {"triton", "nvidia-nccl-cu13"}) - set(lock) == set()


def test_set_up_can_build_the_package_from_the_lock_alone(read_lock):
    system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    (needed,) = [Requirement(text) for text in system["requires"]]
    assert [read_lock(accel)[needed.name] in needed.specifier for accel in ("cpu", "gpu")] == [True, True]


def test_what_the_cpu_lock_installs_misses_only_what_was_left_out(read_lock):
    """`pip install --no-deps` checks nothing, so this does: every requirement of every locked package."""
    lock = read_lock("cpu")
    unmet = set()
    for item in installed_distributions():
        if canonicalize_name(item.metadata["Name"]) not in lock:
            continue
        for requirement in map(Requirement, item.requires or ()):
            name = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate(ENVIRONMENT):
                continue
            if name not in lock or not requirement.specifier.contains(lock[name], prereleases=True):
                unmet.add(name)
    assert unmet == LEFT_OUT_ON_CPU


def test_what_is_installed_here_is_what_the_lock_says(read_lock):
    installed = {
        canonicalize_name(item.metadata["Name"]): Version(item.version) for item in installed_distributions()
    }
    accel = "cpu" if installed["torch"].local == "cpu" else "gpu"
    differing = {
        name: (str(version), str(installed.get(name)))
        for name, version in read_lock(accel).items()
        if installed.get(name) != version
    }
    assert differing == {}


def test_no_registry_is_named_in_a_committed_file():
    hosts = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|index-url[ =]+http|file://", re.IGNORECASE)
    names = ["Makefile", "pyproject.toml", "cluster.yaml", ".ci/run", "requirements/apt.txt"]
    assert [name for name in names if hosts.search((ROOT / name).read_text())] == []
