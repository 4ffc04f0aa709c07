"""Foreign rows as a source reads them: a malformed one costs itself alone, where a task is refused as a whole."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delia.errors import TaskFileError
from delia.store.task_columns import ColumnMapping
from delia.store.tasks import TaskConfig, read_import, read_task


def make_chat(prompt, **fields):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "yes"}]
    return {"messages": turns, **fields}


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return TaskConfig(path=str(path), dev_fraction=0.0, test_fraction=0.0)


def read_outcomes(config):
    """Return the prompts of rows, and the messages of what is none."""
    return [
        str(item) if isinstance(item, TaskFileError) else item.prompt[-1].content
        for item in read_import(config).items
    ]


MALFORMED = [
    ({"messages": "hi"}, "messages must be a list of turns, not str"),
    ({"messages": []}, "no user turn"),
    ({"messages": None}, "messages must be a list of turns, not NoneType"),
    ({"messages": [{"role": "user", "content": 3}]}, "must be text, not int"),
    ({"messages": [{"role": "user"}]}, "has no 'content'"),
    ({"messages": make_chat("b")["messages"][:1]}, "no assistant turn at the end"),
    ({"text": "b"}, "no column ['messages']"),
    ({}, "no column ['messages']"),
    ('{"messages": [', "not JSON"),
    ("[1]", "list where an object is needed"),
]


@pytest.mark.parametrize(("row", "reason"), MALFORMED)
def test_a_malformed_row_is_named_with_its_place_and_costs_no_other(tmp_path, row, reason):
    config = write_lines(tmp_path / "rows.jsonl", make_chat("a"), row, make_chat("c"))
    first, fault, last = read_outcomes(config)

    assert (first, last) == ("a", "c")
    assert fault.startswith(f"{config.path}: line 2: ")
    assert reason in fault


@pytest.mark.parametrize(("row", "reason"), MALFORMED)
def test_a_task_with_that_row_is_refused_as_a_whole(tmp_path, row, reason):
    config = write_lines(tmp_path / "rows.jsonl", make_chat("a"), row, make_chat("c"))

    with pytest.raises(TaskFileError) as refused:
        read_task(config)
    assert str(refused.value).startswith(f"{config.path}: line 2: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize("first", [{"text": "b"}, {}, "{"])
def test_a_malformed_first_row_does_not_decide_the_layout(tmp_path, first):
    fault, second = read_outcomes(write_lines(tmp_path / "rows.jsonl", first, make_chat("a")))

    assert second == "a"
    assert "line 1: " in fault


def test_a_text_of_a_parquet_file_that_is_not_utf_8_costs_its_row_alone(tmp_path):
    texts = pa.array([b"a", b"\xff", b"c"], pa.binary()).cast(pa.string(), safe=False)
    table = pa.table({"prompt": texts, "completion": ["yes"] * 3})
    pq.write_table(table, tmp_path / "rows.parquet")
    config = TaskConfig(path=str(tmp_path / "rows.parquet"), dev_fraction=0.0, test_fraction=0.0)
    first, fault, last = read_outcomes(config)

    assert (first, last) == ("a", "c")
    assert fault.startswith(f"{config.path}: row 2: text is not UTF-8")
    with pytest.raises(TaskFileError, match="row 2: text is not UTF-8"):
        read_task(config)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (ColumnMapping(messages="chat"), r"line 1: .* fit no layout.*none of the 3 rows"),
        (ColumnMapping(layout="alpaca"), r"line 1: no column \['instruction'.*none of the 3 rows"),
        (ColumnMapping(content="text"), r"line 1: .* has no 'text'.*none of the 3 rows"),
        (ColumnMapping(licence="license"), r"line 1: no row has the column 'license'"),
    ],
)
def test_columns_that_no_row_has_are_refused_with_the_first_error(tmp_path, columns, reason):
    config = write_lines(tmp_path / "rows.jsonl", *map(make_chat, "abc"))

    with pytest.raises(TaskFileError, match=reason):
        read_import(config.model_copy(update={"columns": columns}))


def test_rows_that_state_no_licence_have_that_of_the_settings_else_of_the_header(tmp_path):
    write_lines(tmp_path / "train.jsonl", make_chat("a", licence="CC0"), make_chat("b"))
    (tmp_path / "task.yaml").write_text("licence: MIT")
    directory = TaskConfig(path=str(tmp_path))
    imported = read_import(directory)

    assert imported.licence == "MIT"
    assert [item.licence for item in imported.items] == ["CC0", ""]
    assert read_import(directory.model_copy(update={"licence": "cc-by-4.0"})).licence == "cc-by-4.0"


def test_a_licence_that_is_no_text_is_refused(tmp_path):
    config = write_lines(tmp_path / "rows.jsonl", make_chat("a")).model_copy(update={"licence": "\ud800"})

    with pytest.raises(TaskFileError, match=r"rows\.jsonl: the licence of .* lone surrogate"):
        read_import(config)


def test_ids_and_splits_of_foreign_rows_cost_nothing(tmp_path):
    """Two rows of one id, a file too small to be split, and a test row with a prompt of train."""
    (tmp_path / "task.yaml").write_text("name: x")
    config = write_lines(tmp_path / "train.jsonl", make_chat("a", id="1"), make_chat("b", id="1"))
    write_lines(tmp_path / "test.jsonl", make_chat("a"), "{")

    assert read_outcomes(TaskConfig(path=config.path)) == ["a", "b"]
    assert read_outcomes(TaskConfig(path=str(tmp_path))) == ["a", "b"]
