"""Forms of a task: directory, file, saved datasets; settings; and what is none of them."""

import json
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from delia.config import validate
from delia.errors import TaskFileError
from delia.schema import SPLITS, Message, hash_messages
from delia.store.task_columns import ColumnMapping
from delia.store.tasks import TaskConfig, read_task

SEP_HALLUCINATION = Path(__file__).parents[1] / "data" / "sep-hallucination"


def chat(prompt, answer="yes", **fields):
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **fields}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_directory(path, *, header=None, **rows_by_split):
    path.mkdir(exist_ok=True)
    (path / "task.yaml").write_text(yaml.safe_dump({"name": "sums"} if header is None else header))
    for split, rows in rows_by_split.items():
        write_lines(path / f"{split}.jsonl", rows)
    return path


def read(path, **fields):
    return read_task(TaskConfig(path=str(path), **fields))


def prompts(task, split):
    return [row.prompt[-1].content for row in task.rows_by_split[split]]


def test_the_published_rows_are_read_as_they_are(tmp_path):
    shutil.copy(SEP_HALLUCINATION / "train.jsonl", tmp_path / "train.jsonl")
    shutil.copy(SEP_HALLUCINATION / "eval.jsonl", tmp_path / "test.jsonl")
    (tmp_path / "task.yaml").write_text("name: sep-hallucination\nlicence: MIT\n")

    task = read(tmp_path, tokens=("<sep>",))

    assert (task.name, task.licence, task.tokens) == ("sep-hallucination", "MIT", ("<sep>",))
    assert {split: len(rows) for split, rows in task.rows_by_split.items()} == {
        "train": 100,
        "dev": 0,
        "test": 11,
    }
    assert all("<sep>" in row.prompt[0].content for row in task.rows_by_split["train"])
    assert task.rows_by_split["train"][0].messages[0].content.startswith("\n'relatives' : \n'user_query'")


def test_the_published_file_alone_is_split_without_losing_a_row():
    path = SEP_HALLUCINATION / "train.jsonl"

    task = read(path, tokens=("<sep>",))

    read_back = {hash_messages(row.messages) for rows in task.rows_by_split.values() for row in rows}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert read_back == {hash_messages(tuple(Message(**turn) for turn in line["messages"])) for line in lines}
    assert len(read_back) == 100
    assert all(5 <= len(task.rows_by_split[split]) <= 18 for split in ("dev", "test"))
    assert task.name == "train"


def test_a_directory_holds_its_settings_and_a_file_for_each_split(tmp_path):
    header = {
        "name": "sums",
        "tokens": ["<sep>"],
        "long_instruction": "Add the numbers.",
        "metrics": ["contains"],
        "licence": "MIT",
        "columns": {"messages": "chat"},
    }
    rows = [{"chat": chat(text)["messages"], "id": text} for text in ("a <sep>", "b", "c")]
    write_directory(tmp_path, header=header, train=rows[:1], dev=rows[1:2])
    pq.write_table(pa.Table.from_pylist(rows[2:]), tmp_path / "test.parquet")

    task = read(f"{tmp_path}/")

    assert {split: [row.task_id for row in rows] for split, rows in task.rows_by_split.items()} == {
        "train": ["a <sep>"],
        "dev": ["b"],
        "test": ["c"],
    }
    assert (task.name, task.tokens, task.long_instruction) == ("sums", ("<sep>",), "Add the numbers.")
    assert (task.metrics, task.licence) == (("contains",), "MIT")


def test_settings_win_over_the_header_where_they_are_set(tmp_path):
    header = {"tokens": ["<old>"], "licence": "old", "metrics": ["old"], "columns": {"layout": "alpaca"}}
    write_directory(tmp_path / "sums", header=header, train=[chat("<new> <old>")])
    columns = ColumnMapping(layout="messages")

    won = read(tmp_path / "sums", tokens=("<new>",), columns=columns, long_instruction="Do.", licence="new")
    kept = read(f"{tmp_path}/sums/", columns=columns)

    assert (won.tokens, won.licence, won.long_instruction, won.metrics) == (
        ("<new>",),
        "new",
        "Do.",
        ("old",),
    )
    assert (kept.tokens, kept.licence, kept.long_instruction) == (("<old>",), "old", "")
    assert kept.name == "sums"


def test_a_replayed_settings_file_reads_the_same_task(tmp_path):
    write_directory(tmp_path, header={"tokens": ["<sep>"], "metrics": ["contains"]}, train=[chat("<sep>")])
    config = TaskConfig(path=str(tmp_path))

    assert read_task(validate(TaskConfig, config.model_dump(mode="json"))) == read_task(config)


def test_a_saved_dataset_is_split_like_a_file(tmp_path):
    rows = [chat(f"prompt {number}") for number in range(60)]
    write_lines(tmp_path / "rows.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows", num_shards=3)

    tasks = [read(tmp_path / name) for name in ("rows", "rows.jsonl", "rows.parquet")]

    assert {len(tasks[0].rows_by_split[split]) > 0 for split in SPLITS} == {True}
    assert tasks[0] == tasks[1] == tasks[2]


@pytest.mark.parametrize("dev_name", ["validation", "dev"])
def test_saved_datasets_keep_their_splits(tmp_path, dev_name):
    made = {
        name: datasets.Dataset.from_list([chat(f"{name} {number}") for number in range(2)])
        for name in ("train", dev_name, "test")
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "sums")

    task = read(tmp_path / "sums")

    assert prompts(task, "train") == ["train 0", "train 1"]
    assert prompts(task, "dev") == [f"{dev_name} 0", f"{dev_name} 1"]
    assert prompts(task, "test") == ["test 0", "test 1"]


def test_a_row_of_saved_datasets_is_named_with_its_split_and_number(tmp_path):
    rows = [chat("a"), chat("b", " ")]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path)

    with pytest.raises(TaskFileError, match=rf"^{tmp_path}/train: row 2: the content of turn 2 .* is empty"):
        read(tmp_path)


def test_a_path_where_nothing_is_is_refused(tmp_path):
    with pytest.raises(TaskFileError, match=rf"^{tmp_path}/gone.jsonl: no such file or directory"):
        read(tmp_path / "gone.jsonl")


def test_an_address_that_nothing_opens_is_refused():
    with pytest.raises(TaskFileError, match=r"^nowhere://x: can't be read"):
        read("nowhere://x")


@pytest.mark.parametrize("names", [[], ["train.jsonl"], ["data.csv"]])
def test_a_directory_of_no_form_is_refused_with_what_it_holds(tmp_path, names):
    for name in names:
        write_lines(tmp_path / name, [chat("a")])

    with pytest.raises(TaskFileError, match=rf"^{tmp_path}: no form of a task; .*task\.yaml.*found \["):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["dev.jsonl"], r"no train rows, found \['dev.jsonl'\]"),
        (["train.jsonl", "eval.jsonl"], "'eval.jsonl' belongs to no split; call it train or dev or"),
        (["train.jsonl", "train.parquet"], "'train.jsonl' and 'train.parquet' are both train; keep one"),
        (
            ["train.jsonl", "dev.jsonl", "validation.jsonl"],
            "'dev.jsonl' and 'validation.jsonl' are both dev; keep one",
        ),
    ],
)
def test_a_directory_whose_files_do_not_make_splits_is_refused(tmp_path, names, reason):
    write_directory(tmp_path)
    for name in names:
        write_lines(tmp_path / name, [chat(name)])

    with pytest.raises(TaskFileError, match=f"^{tmp_path}: {reason}"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"splits": "train"}'])
def test_saved_datasets_without_a_list_of_splits_are_refused(tmp_path, text):
    (tmp_path / "dataset_dict.json").write_text(text)

    with pytest.raises(TaskFileError, match=r"dataset_dict.json lists no splits"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"tokenz: [x]\n", r"setting 'tokenz': .*the keys are \['name', 'tokens'"),
        (b"columns: {promt: x}\n", "setting 'columns.promt'"),
        (b"tokens: <sep>\n", "setting 'tokens': .*got '<sep>'"),
        (b"- name\n", "names with values are needed, not list"),
        (b"name: [\n", "not YAML in UTF-8: .*line 2"),
        (b"name: 2024-13-45\n", "not YAML in UTF-8"),
        (b"name: \xff\n", "not YAML in UTF-8"),
        (b"name: " + b"[" * 20_000, "not YAML in UTF-8"),
    ],
)
def test_a_header_that_is_wrong_is_refused_with_its_name_and_the_reason(tmp_path, text, reason):
    write_directory(tmp_path, train=[chat("a")])
    (tmp_path / "task.yaml").write_bytes(text)

    with pytest.raises(TaskFileError, match=rf"(?s)^{tmp_path}/task\.yaml: {reason}"):
        read(tmp_path)
