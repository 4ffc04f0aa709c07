"""A cluster whose nodes differ: engines sit where there is room for them, and a slow one holds back no other."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

NUM_REQUESTS = 32
DONE_BY_OTHERS = 24
"""How many of them the driver lets others answer before its slow engine answers one."""


@pytest.fixture(scope="module")
def read_line(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Return a function of a line's title: its words, as the driver printed them."""
    driver = Path(__file__).with_name("mixed_nodes_driver.py")
    folder = str(tmp_path_factory.mktemp("mixed"))
    command = [sys.executable, str(driver), folder]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    def read(title: str) -> list[str]:
        (line,) = [line for line in lines if line.startswith(f"{title} ")]
        return line.removeprefix(title).split()

    return read


def test_a_slow_engine_and_a_node_that_holds_none_hold_back_no_other(read_line):
    answers, plain, special = read_line("anywhere")
    num_plain, num_special = (int(item.partition("=")[2]) for item in (plain, special))

    assert answers == "equal"
    assert (plain.partition("=")[0], special.partition("=")[0]) == ("plain", "special")
    assert num_plain >= 1
    assert num_special >= DONE_BY_OTHERS
    assert num_plain + num_special == NUM_REQUESTS


def test_engines_that_ask_for_a_resource_sit_on_the_nodes_that_have_it(read_line):
    assert read_line("special") == ["equal", f"special={NUM_REQUESTS}"]


def test_engines_that_ask_for_a_gpu_sit_where_there_is_one(read_line):
    assert read_line("gpu") == ["equal", f"special={NUM_REQUESTS}"]


def test_all_that_engines_took_is_free_again_gpus_too(read_line):
    assert read_line("free again") == ["True", "1.0"]
