"""Rows of a task together: places, ids, leaks, tokens, and the split of one file."""

import json

import pytest
import yaml

from delia.config import ConfigError, validate
from delia.errors import TaskFileError
from delia.schema import SPLITS, Message, hash_messages
from delia.store.task_columns import ColumnMapping
from delia.store.tasks import TaskConfig, read_task


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


def test_a_row_without_an_assistant_turn_is_refused_with_its_line(tmp_path):
    open_row = {"messages": chat("b")["messages"][:1]}
    write_directory(tmp_path, train=[chat("a"), open_row])

    with pytest.raises(TaskFileError, match=rf"^{tmp_path}/train.jsonl: line 2: no assistant turn"):
        read(tmp_path)


def test_a_dev_row_without_an_answer_needs_base_messages(tmp_path):
    open_row = {"messages": chat("b")["messages"][:1]}
    base = [{"role": "user", "content": "the long way to say b"}]
    write_directory(tmp_path, train=[chat("a")], dev=[open_row | {"base_messages": base}])
    [row] = read(tmp_path).rows_by_split["dev"]
    assert row.reference is None
    assert row.base_messages == (Message(role="user", content="the long way to say b"),)

    write_lines(tmp_path / "dev.jsonl", [open_row])
    with pytest.raises(TaskFileError, match=rf"^{tmp_path}/dev.jsonl: line 1: no assistant turn .*base_mess"):
        read(tmp_path)


def test_the_layout_that_train_shows_holds_for_every_split(tmp_path):
    pair = {"prompt": "a", "completion": "b"}
    write_directory(tmp_path, train=[pair], dev=[chat("c")])

    with pytest.raises(TaskFileError, match=rf"^{tmp_path}/dev.jsonl: line 1: no column \['prompt'"):
        read(tmp_path)


def test_columns_of_no_layout_are_refused_with_the_place(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}])

    with pytest.raises(TaskFileError, match=rf"^{path}: line 1: the columns .* fit no layout"):
        read(path)


def test_a_renamed_column_that_no_row_has_is_refused(tmp_path):
    write_directory(tmp_path, train=[chat("a")], dev=[chat("b", kind="negated")])

    task = read(tmp_path, columns=ColumnMapping(suite="kind"))
    assert [task.rows_by_split[split][0].suite for split in ("train", "dev")] == ["task", "negated"]
    with pytest.raises(TaskFileError, match=r"no row has the column 'knd' that columns\.suite names; found"):
        read(tmp_path, columns=ColumnMapping(suite="knd"))


def test_two_rows_of_one_id_are_refused_with_both_places(tmp_path):
    write_directory(tmp_path, train=[chat("a", id="x"), chat("b", id="y")], dev=[chat("c", id="x")])

    with pytest.raises(TaskFileError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path}/dev.jsonl: line 1: the id 'x' is that of {tmp_path}/train.jsonl: line 1 too"
    )


def test_a_row_without_an_id_gets_its_content_hash_and_equal_rows_get_two(tmp_path):
    write_directory(tmp_path, train=[chat("a"), chat("b"), chat("a"), chat("a")])

    rows = read(tmp_path).rows_by_split["train"]

    assert rows[0].task_id == hash_messages(rows[0].messages)
    assert len({row.task_id for row in rows}) == 4
    assert rows == read(tmp_path).rows_by_split["train"]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_prompt_that_was_trained_on_is_refused_with_both_places(tmp_path, split):
    write_directory(tmp_path, train=[chat("a"), chat("b")], **{split: [chat("c"), chat("b", "another")]})

    with pytest.raises(TaskFileError) as caught:
        read(tmp_path)
    assert str(caught.value).startswith(
        f"{tmp_path}/{split}.jsonl: line 2: this {split} row has the prompt of the train row"
        f" {tmp_path}/train.jsonl: line 2;"
    )


@pytest.mark.parametrize("token", ["<sep>", "", " "])
def test_a_token_that_no_train_row_holds_is_refused(tmp_path, token):
    write_directory(tmp_path, train=[chat("a b <sop>")], dev=[chat("c <sep>")])

    with pytest.raises(TaskFileError, match=rf"^{tmp_path}: the token '{token}' occurs nowhere in the 1"):
        read(tmp_path, tokens=("<sop>", token))


def test_a_lone_surrogate_in_the_settings_is_refused(tmp_path):
    write_directory(tmp_path, header={"long_instruction": "\ud800"}, train=[chat("a")])

    with pytest.raises(TaskFileError, match=r"task\.yaml or of the settings holds a lone surrogate"):
        read(tmp_path)


def test_rows_keep_their_split_when_the_file_grows_or_is_shuffled(tmp_path):
    rows = [chat(f"prompt {number}") for number in range(400)]
    small = read(write_lines(tmp_path / "small.jsonl", rows[:200]))
    grown = read(write_lines(tmp_path / "grown.jsonl", rows[::-1]))

    for split in SPLITS:
        assert set(prompts(small, split)) == set(prompts(grown, split)) & {f"prompt {n}" for n in range(200)}
    assert [len(grown.rows_by_split[split]) for split in ("dev", "test")] == [
        pytest.approx(40, abs=15),
        pytest.approx(40, abs=15),
    ]


def test_rows_of_one_prompt_stay_together_and_in_order(tmp_path):
    rows = [chat(f"prompt {number % 50}", f"answer {number}") for number in range(150)]
    rows += rows[:50]

    task = read(write_lines(tmp_path / "rows.jsonl", rows))

    sets = [set(prompts(task, split)) for split in SPLITS]
    assert all(sets)
    assert sum(len(each) for each in sets) == 50
    assert sum(len(rows) for rows in task.rows_by_split.values()) == 200
    train = [row.reference for row in task.rows_by_split["train"]]
    assert train == [row["messages"][1]["content"] for row in rows if row["messages"][1]["content"] in train]


def test_the_seed_and_the_fractions_set_the_split(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [chat(f"prompt {number}") for number in range(300)])

    first, second = read(path, seed=0), read(path, seed=1)
    third = read(path, dev_fraction=0.5, test_fraction=0)

    assert set(prompts(first, "dev")) != set(prompts(second, "dev"))
    assert len(third.rows_by_split["dev"]) == pytest.approx(150, abs=40)
    assert third.rows_by_split["test"] == ()


def test_a_split_that_gets_no_row_is_refused_with_the_ways_out(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [chat("a")] * 9)

    with pytest.raises(TaskFileError, match=rf"^{path}: splitting 9 rows leaves \[.*0\.1.*seed"):
        read(path)
    assert len(read(path, dev_fraction=0, test_fraction=0).rows_by_split["train"]) == 9


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (-0.1, 0.1), (1.0, 0.0)])
def test_fractions_that_leave_nothing_to_train_are_refused(fractions):
    with pytest.raises(ConfigError, match="fraction"):
        validate(TaskConfig, {"path": "x", "dev_fraction": fractions[0], "test_fraction": fractions[1]})
