"""Tables and manifests: whole or absent, on a local disk and on an object store."""

import json
import os
import signal

import pyarrow as pa
import pytest

from delia.errors import StoreError
from delia.store import tables
from delia.store.directories import upload_directory
from delia.store.tables import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    commit,
    exists,
    is_finished,
    join,
    leave_mark,
    list_names,
    open_filesystem,
    open_table,
    read_bytes,
    read_manifest,
    read_table,
    write_bytes,
    write_table,
)

TABLE = pa.table({"text": ["a", "ä\n", None], "ids": [[1, 2], [], None]})
MADE = Manifest(kind="pool", fingerprint="f" * 16, root="ab", counts={"accepted": 3}, parents={"task": "t"})


@pytest.fixture(params=["path", "file", "s3"])
def address(request, tmp_path):
    """A directory that does not exist yet: a path, a file URI and an object store's URI."""
    if request.param != "s3":
        return str(tmp_path / "new" / "run") if request.param == "path" else (tmp_path / "new/run").as_uri()
    request.getfixturevalue("object_store").create_bucket(Bucket="bucket")
    return f"s3://bucket/{tmp_path.name}/run"  # what is in a bucket outlives its server


def test_what_is_written_is_read_back_from_any_storage(address):
    assert not exists(address)
    write_table(join(address, "parts", "0.parquet"), TABLE)
    write_bytes(join(address, "note.txt"), b"\x00\xff")
    assert not is_finished(address)
    commit(address, MADE)

    assert read_table(join(address, "parts", "0.parquet")).equals(TABLE)
    assert read_bytes(join(address, "note.txt")) == b"\x00\xff"
    assert read_manifest(address, kind="pool") == MADE
    assert is_finished(address)
    assert list_names(address) == ["manifest.json", "note.txt", "parts"]
    assert list_names(join(address, "none")) == []


def test_a_directory_is_copied_with_all_that_is_below_it(address, tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "deep" / "b.txt").write_text("b")
    write_bytes(join(address, "kept.txt"), b"c")
    upload_directory(source, address)
    assert [read_bytes(join(address, name)) for name in ("a.txt", "deep/b.txt", "kept.txt")] == [
        b"a",
        b"b",
        b"c",
    ]


def test_a_file_is_replaced_and_nothing_is_left_beside_it(address):
    for data in (b"first, and longer", b"second"):
        write_bytes(join(address, "note.txt"), data)

    assert read_bytes(join(address, "note.txt")) == b"second"
    assert list_names(address) == ["note.txt"]


def test_a_write_that_breaks_off_leaves_the_old_file_whole(tmp_path, monkeypatch):
    address = str(tmp_path / "note.txt")
    write_bytes(address, b"old")

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(StoreError, match=r"can't write .*note\.txt'.*no space.*; free space there"):
        write_bytes(address, b"new")
    assert read_bytes(address) == b"old"
    assert list_names(str(tmp_path)) == ["note.txt"]


def test_two_writers_of_one_file_on_hosts_with_equal_process_ids_leave_a_whole_one(tmp_path, monkeypatch):
    address = str(tmp_path / "note.txt")

    def write_too(descriptor):
        monkeypatch.setattr("os.fsync", lambda descriptor: None)
        write_bytes(address, b"other")

    monkeypatch.setattr("os.fsync", write_too)
    write_bytes(address, b"mine")
    assert read_bytes(address) == b"mine"
    assert list_names(str(tmp_path)) == ["note.txt"]


def test_a_directory_is_probed_without_a_trace_and_what_is_below_a_file_is_refused(address, tmp_path):
    with leave_mark(address) as mark:
        assert exists(mark)
    assert list_names(address) == []
    (tmp_path / "file").write_text("")
    below = leave_mark(str(tmp_path / "file" / "x"))
    with (
        pytest.raises(StoreError, match=r"can't write .*file/x/.*; free space there or allow writing"),
        below,
    ):
        pass


def test_a_missing_file_is_named(address):
    with pytest.raises(StoreError, match=r"no file at .*none\.txt"):
        read_bytes(join(address, "none.txt"))


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    write_bytes(str(tmp_path / "rows.parquet"), b"PAR1 half a file")

    with pytest.raises(StoreError, match=r"rows\.parquet.* is not a Parquet file"):
        read_table(str(tmp_path / "rows.parquet"))


def test_a_table_or_a_manifest_that_was_cut_or_changed_is_named_with_the_way_out(tmp_path):
    rows, manifest = tmp_path / "rows.parquet", tmp_path / MANIFEST
    write_table(str(rows), TABLE)
    commit(str(tmp_path), MADE)
    whole = rows.read_bytes()
    for data in (b"", whole[:-1], whole[: len(whole) // 2], whole[:40] + bytes(40) + whole[80:]):
        rows.write_bytes(data)
        with pytest.raises(StoreError, match=r"rows\.parquet' is not .*; remove it and run its job again"):
            read_table(str(rows))
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(StoreError, match=r"manifest\.json' was damaged: .*; remove it and run its job again"):
        read_manifest(str(tmp_path), kind="pool")


@pytest.mark.parametrize("address", ["gopher://host/x", "package://no_such_package/x"])
def test_an_address_that_can_not_be_opened_is_refused_with_the_ways_out(address):
    with pytest.raises(StoreError, match=f"can't open '{address}'.*use a local path, s3:// or gs://"):
        open_filesystem(address)


def test_a_package_address_is_a_directory_inside_the_installed_package():
    assert {"dev.jsonl", "task.yaml"} <= set(list_names("package://delia.starter/tasks/sep"))


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("/a/", "b", "c"), "/a/b/c"),
        (("s3://a", "b", ""), "s3://a/b"),
        (("a", ""), "a"),
        (("s3://a/b?region=eu-west-1&scheme=http", "c"), "s3://a/b/c?region=eu-west-1&scheme=http"),
        (("/is it?", "a"), "/is it?/a"),
    ],
)
def test_names_are_joined_by_one_slash_and_empty_ones_left_out(parts, joined):
    assert join(*parts) == joined


def test_a_directory_without_a_manifest_is_unfinished_and_is_resumed_by_its_job(tmp_path):
    write_table(str(tmp_path / "rows.parquet"), TABLE)

    assert not is_finished(str(tmp_path))
    with pytest.raises(StoreError, match=r"has no manifest\.json: it is unfinished; run its job again"):
        read_manifest(str(tmp_path), kind="pool")


def test_a_directory_of_another_kind_is_refused_with_both_kinds(tmp_path):
    commit(str(tmp_path), MADE)

    with pytest.raises(StoreError, match="holds a 'pool', a 'mixture' is needed here"):
        read_manifest(str(tmp_path), kind="mixture")


def test_a_newer_format_is_refused_before_its_fields_are_looked_at(tmp_path):
    tree = {"format_version": FORMAT_VERSION + 1, "new_field": 1}
    write_bytes(str(tmp_path / MANIFEST), json.dumps(tree).encode())

    with pytest.raises(StoreError, match=f"version {FORMAT_VERSION + 1}.* up to {FORMAT_VERSION}; upgrade"):
        read_manifest(str(tmp_path), kind="pool")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no network"), RuntimeError])
def test_a_table_whose_writing_is_broken_off_is_not_there(address, error):
    """On an object store too, where what was written appears when it is closed, whatever has happened."""
    path = join(address, "rows.parquet")
    with (
        pytest.raises((KeyboardInterrupt, StoreError, RuntimeError)),
        open_table(path, TABLE.schema) as writer,
    ):
        writer.write_table(TABLE)
        raise error

    assert not exists(path)
    assert "rows.parquet" not in list_names(address)


def test_an_interrupt_while_an_object_is_sent_leaves_it_whole(object_store, tmp_path, monkeypatch):
    object_store.create_bucket(Bucket="bucket")
    path = f"s3://bucket/{tmp_path.name}/interrupted"

    def send_interrupted(file, stream):
        stream.write(file.read(9))
        os.kill(os.getpid(), signal.SIGINT)
        stream.write(file.read())

    monkeypatch.setattr(tables.shutil, "copyfileobj", send_interrupted)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts what is in its background deaf
    try:
        with pytest.raises(KeyboardInterrupt):
            write_bytes(path, b"the whole text")
    finally:
        signal.signal(signal.SIGINT, before)
    assert read_bytes(path) == b"the whole text"
