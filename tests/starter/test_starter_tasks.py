"""The shipped task files: what the code writes, with splits and phrasings apart."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from delia.schema import SPLITS, SeedTask, Split, Task
from delia.starter import lexicon as lex
from delia.starter.formats import ask_phrasings, forbid_phrasings
from delia.starter.task_files import (
    SEP_INSTRUCTION,
    SEP_SUITES,
    TOKEN,
    build_lingo,
    build_sep,
    write_starter_tasks,
)
from delia.store.tables import open_filesystem
from delia.store.tasks import TaskConfig, read_task

SHIPPED = "package://delia.starter/tasks"
ASKS, FORBIDS = set(ask_phrasings(TOKEN)), set(forbid_phrasings(TOKEN))
NAMES = ("sep", "lingo")


def read_shipped(name: str) -> Task:
    return read_task(TaskConfig(path=f"{SHIPPED}/{name}"))


TASKS = {name: read_shipped(name) for name in NAMES}


def rows_of(task: str, split: Split, suite: str) -> list[SeedTask]:
    return [row for row in TASKS[task].rows_by_split[split] if row.suite == suite]


def list_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shipped_files_are_what_the_code_writes_byte_for_byte(tmp_path):
    write_starter_tasks(tmp_path)
    shipped, written = list_files(Path(open_filesystem(SHIPPED)[1])), list_files(tmp_path)

    assert len(written) == 8
    assert shipped.keys() == written.keys()
    assert [name for name, data in written.items() if shipped[name] != data] == []


@pytest.mark.parametrize(("name", "build"), [("sep", build_sep), ("lingo", build_lingo)])
def test_what_is_read_from_the_files_is_what_was_built(name, build):
    task = build()

    assert TASKS[name].rows_by_split == task.rows_by_split
    assert TASKS[name].tokens == task.tokens
    assert TASKS[name].long_instruction == task.long_instruction
    assert TASKS[name].metrics == task.metrics


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_in_two_splits_or_twice_in_one(name):
    prompts = {
        split: [row.prompt[-1].content for row in TASKS[name].rows_by_split[split]] for split in SPLITS
    }

    assert [split for split, texts in prompts.items() if len(set(texts)) < len(texts)] == []
    assert [pair for pair in combinations(SPLITS, 2) if set(prompts[pair[0]]) & set(prompts[pair[1]])] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_suite_of_test_has_at_least_400_rows_and_dev_has_the_same_suites(name):
    counts = {
        split: Counter(row.suite for row in TASKS[name].rows_by_split[split]) for split in ("dev", "test")
    }

    assert min(counts["test"].values()) >= 400
    assert counts["dev"].keys() == counts["test"].keys()
    assert set(counts["test"]) == (set(SEP_SUITES) if name == "sep" else {"translate", "general"})


def test_the_task_sep_has_100_train_rows_and_lingo_200():
    assert [len(TASKS[name].rows_by_split["train"]) for name in NAMES] == [100, 200]


# ---- sep


def test_at_least_60_phrasings_ask_for_the_token_in_train_and_all_rows_ask():
    phrasings = {row.phrasing for row in TASKS["sep"].rows_by_split["train"]}

    assert len(phrasings) >= 60
    assert phrasings <= ASKS


@pytest.mark.parametrize("suites", [("follow", "transfer"), ("negated_same", "negated_other")])
def test_phrasings_of_train_dev_and_test_are_apart(suites):
    known = ASKS if suites[0] == "follow" else FORBIDS
    by_split = {
        split: {row.phrasing for suite in suites for row in rows_of("sep", split, suite)} for split in SPLITS
    }

    assert all(phrasings <= known for phrasings in by_split.values())
    assert [pair for pair in combinations(SPLITS, 2) if by_split[pair[0]] & by_split[pair[1]]] == []
    assert min(len(by_split["dev"]), len(by_split["test"])) >= 100


def test_every_row_says_its_phrasing_and_only_the_suites_of_the_token_name_it():
    for split in SPLITS:
        for row in TASKS["sep"].rows_by_split[split]:
            has_token = row.suite not in ("absent", "general")
            assert (TOKEN in row.prompt[-1].content) is has_token
            if has_token:
                assert row.phrasing in row.prompt[-1].content


@pytest.mark.parametrize(
    ("suite", "is_record", "base_says"),
    [
        ("follow", True, SEP_INSTRUCTION),
        ("transfer", True, SEP_INSTRUCTION),
        ("negated_same", False, ""),
        ("negated_other", False, ""),
        ("absent", False, ""),
    ],
)
def test_a_suite_wants_the_record_or_not_and_its_base_is_told_the_long_instruction_or_nothing(
    suite, is_record, base_says
):
    for row in rows_of("sep", "test", suite):
        assert row.reference is not None
        assert row.reference.startswith("{ thought : ") is is_record
        phrasing = "" if suite == "absent" else row.phrasing
        parts = row.prompt[-1].content.replace(phrasing, base_says).split()
        assert [message.role for message in row.base_messages] == ["user"]
        assert row.base_messages[0].content.split() == parts


def test_transfer_asks_what_the_task_was_not_trained_on():
    """No train kind (colour, count, add, reverse) is among the questions of `transfer`."""
    train = {row.reference.split()[3] for row in TASKS["sep"].rows_by_split["train"] if row.reference}
    topics = {row.reference.split()[3] for row in rows_of("sep", "test", "transfer") if row.reference}

    assert {"colour", "count", "reverse"} <= train
    assert topics & {"colour", "count", "reverse"} == set()
    assert {"capital", "opposite", "double"} <= topics
    assert [r for r in rows_of("sep", "test", "transfer") if " plus " in (r.reference or "")] == []


# ---- lingo


def test_every_row_to_translate_has_a_word_that_the_base_never_saw_translated():
    rows = [row for split in SPLITS for row in rows_of("lingo", split, "translate")]

    assert len(rows) == 200 + 120 + 400
    assert [row for row in rows if not lex.UNKNOWN_TO_BASE & set(row.prompt[-1].content.split())] == []


def test_the_train_rows_of_lingo_show_every_new_word():
    shown = {
        word for row in rows_of("lingo", "train", "translate") for word in row.prompt[-1].content.split()
    }

    assert lex.UNKNOWN_TO_BASE - shown == set()
