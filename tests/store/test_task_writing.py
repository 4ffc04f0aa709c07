"""The digest, and the way back: what is written is read back equal, or is not written."""

import dataclasses
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delia.errors import TaskFileError
from delia.schema import SPLITS, Message, SeedTask, Task
from delia.store.tables import write_bytes
from delia.store.tasks import TaskConfig, digest_task, read_task, write_task


def read(path, **fields):
    return read_task(TaskConfig(path=str(path), **fields))


def prompts(task, split):
    return [row.prompt[-1].content for row in task.rows_by_split[split]]


def make_row(prompt, answer="yes", **fields):
    turns = [Message(role="user", content=prompt)]
    turns += [Message(role="assistant", content=answer)] if answer is not None else []
    return SeedTask(**{"task_id": f"id of {prompt}", "messages": tuple(turns)} | fields)


def make_task(*, tokens=(), long_instruction="", **rows_by_split):
    rows = {split: tuple(rows_by_split.get(split, ())) for split in SPLITS}
    digest = digest_task(rows, tokens, long_instruction)
    return Task(
        name="sums", digest=digest, rows_by_split=rows, tokens=tokens, long_instruction=long_instruction
    )


def test_a_task_is_written_to_and_read_from_an_object_store(object_store):
    object_store.create_bucket(Bucket="tasks")
    task = make_task(train=[make_row("a")], dev=[make_row("b")])

    write_task("s3://tasks/x/sums", make_task(train=[make_row("old")], test=[make_row("older")]))
    write_task("s3://tasks/x/sums", task)

    assert read("s3://tasks/x/sums") == task
    assert prompts(read("s3://tasks/x/sums/dev.jsonl", dev_fraction=0, test_fraction=0), "train") == ["b"]
    with pytest.raises(TaskFileError, match=r"^s3://tasks/x/gone\.jsonl: no such file or directory"):
        read("s3://tasks/x/gone.jsonl")


def test_the_digest_covers_every_field_of_every_row_and_their_order(tmp_path):
    rows = [make_row("a"), make_row("b <sep>")]
    task = make_task(train=rows, dev=[make_row("c")])
    changes = {
        "task_id": "other",
        "suite": "other",
        "phrasing": "other",
        "licence": "other",
        "messages": make_row("other").messages,
        "base_messages": make_row("other", None).messages,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(SeedTask)}

    digests = [
        make_task(train=[dataclasses.replace(rows[0], **{name: value}), rows[1]], dev=[make_row("c")]).digest
        for name, value in changes.items()
    ]
    digests += [
        make_task(train=rows[::-1], dev=[make_row("c")]).digest,
        make_task(train=rows, test=[make_row("c")]).digest,
        make_task(train=rows[:1], dev=[make_row("c")]).digest,
        make_task(train=rows, dev=[make_row("c")], tokens=("<sep>",)).digest,
        make_task(train=rows, dev=[make_row("c")], long_instruction="Do.").digest,
        task.digest,
    ]

    assert len(set(digests)) == len(digests)


def test_a_written_task_is_read_back_whole(tmp_path):
    base = (Message(role="system", content="Be long."), Message(role="user", content="b"))
    task = make_task(
        tokens=("<sep>",),
        long_instruction="Add:\n  both \u2028 'numbers' \U0001f40d",
        train=[make_row("a <sep>"), make_row("a <sep>", task_id="again", licence="MIT")],
        test=[make_row("b", None, suite="transfer", phrasing="p1", base_messages=base)],
    )
    task = dataclasses.replace(task, metrics=("b", "a"), licence="one\x85two")

    write_task(f"{tmp_path}/sums/", task)

    assert read(tmp_path / "sums") == task
    assert sorted(file.name for file in (tmp_path / "sums").iterdir()) == [
        "task.yaml",
        "test.jsonl",
        "train.jsonl",
    ]


def test_writing_replaces_the_files_of_an_earlier_task(tmp_path):
    for name in ("task.yaml", "train.jsonl", "validation.jsonl", "test.parquet"):
        (tmp_path / name).write_text("stale")
    (tmp_path / "notes.txt").write_text("kept")
    task = make_task(train=[make_row("a")], dev=[make_row("b")])

    write_task(str(tmp_path), task)

    assert read(tmp_path) == task
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_a_write_that_breaks_off_leaves_no_task_to_read(tmp_path, monkeypatch):
    old, new = (make_task(train=[make_row(text)], dev=[make_row(f"{text} too")]) for text in ("old", "new"))
    write_task(str(tmp_path), old)

    def break_at_dev(address, data):
        if address.endswith("dev.jsonl"):
            raise OSError("disk full")
        write_bytes(address, data)

    monkeypatch.setattr("delia.store.tasks.write_bytes", break_at_dev)
    with pytest.raises(OSError, match="disk full"):
        write_task(str(tmp_path), new)

    assert (tmp_path / "train.jsonl").exists()
    with pytest.raises(TaskFileError, match="no form of a task"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (make_task(train=[make_row("a"), make_row(" ")]), r"train\.jsonl: line 2: .*empty"),
        (make_task(train=[make_row("a", None)]), r"train\.jsonl: line 1: no assistant turn"),
        (make_task(train=[make_row("a\ud800", task_id="x")]), r"train\.jsonl: line 1: .*lone surrogate"),
        (make_task(train=[make_row("a", task_id="")]), r"train\.jsonl: line 1: id is empty"),
        (make_task(train=[make_row("a")], dev=[make_row("a", task_id="x")]), r"dev\.jsonl: line 1: .*prompt"),
        (make_task(train=[make_row("a")], tokens=("<sep>",)), "the token '<sep>' occurs nowhere"),
        (make_task(dev=[make_row("a")]), "train has 0 rows"),
        (dataclasses.replace(make_task(train=[make_row("a")]), digest="0"), "digest '0' is not that of"),
    ],
)
def test_a_task_that_could_not_be_read_back_is_not_written(tmp_path, task, reason):
    with pytest.raises(TaskFileError, match=reason):
        write_task(str(tmp_path / "sums"), task)
    assert not (tmp_path / "sums").exists()


CONTENTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
TURNS = CONTENTS.filter(str.strip)


@st.composite
def random_chats(draw, *, key):
    num_rounds = draw(st.integers(1, 3))
    texts = [draw(TURNS) for _ in range(2 * num_rounds)]
    turns = [
        Message(role=("user", "assistant")[position % 2], content=text) for position, text in enumerate(texts)
    ]
    turns[0] = Message(role="user", content=f"{key}{texts[0]}")
    system = [Message(role="system", content=draw(TURNS))] if draw(st.booleans()) else []
    return (*system, *turns)


@st.composite
def random_tasks(draw):
    rows = {}
    for split in SPLITS:
        rows[split] = []
        for number in range(draw(st.integers(1 if split == "train" else 0, 3))):
            messages = draw(random_chats(key=f"{split} {number}"))
            base = draw(random_chats(key="base"))[:-1] if draw(st.booleans()) else ()
            row = SeedTask(
                task_id=f"{split}/{number}/{draw(CONTENTS)}",
                messages=messages[:-1] if base and split != "train" and draw(st.booleans()) else messages,
                suite=draw(CONTENTS),
                phrasing=draw(CONTENTS),
                licence=draw(CONTENTS),
                base_messages=base,
            )
            rows[split].append(row)
    word = rows["train"][0].messages[-1].content
    task = make_task(tokens=(word,), long_instruction=draw(CONTENTS), **rows)
    names = draw(st.lists(CONTENTS, min_size=1, max_size=2).map(tuple))
    return dataclasses.replace(task, name=f"n{draw(CONTENTS)}", metrics=names, licence=draw(CONTENTS))


@settings(max_examples=60, deadline=None)
@given(task=random_tasks())
def test_any_task_that_is_written_is_read_back_equal(task):
    with tempfile.TemporaryDirectory() as directory:
        write_task(directory, task)

        assert read(directory) == task
