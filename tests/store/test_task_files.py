"""Wrong files: each gives one TaskFileError that names the file and the line or row."""

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from delia.errors import TaskFileError
from delia.store.task_files import read_raw_rows

MAX_LINE_BYTES = 1 << 20
GOOD = b'{"a": 1}\n'


def read(path, *, max_line_bytes=MAX_LINE_BYTES):
    return read_raw_rows(str(path), max_line_bytes=max_line_bytes)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1} {"b": 2}', "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[1, 2]", "list where an object is needed"),
        (b'"text"', "str where an object is needed"),
        (b"null", "NoneType where an object is needed"),
        (b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nests too deep"),
        (b'{"a": ' * 20_000 + b"1" + b"}" * 20_000, "nests too deep"),
        (b'{"a": "\xff"}', r"not UTF-8 at byte 7 \(0xff\)"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8 at byte 7"),
        (b'{"a": "\0"}', "NUL bytes"),
        (b"\x89PNG\r\0\0", "NUL bytes"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused_with_its_number(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)

    with pytest.raises(TaskFileError, match=rf"^{path}: line 3: .*{reason}"):
        read(path)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-16", "UTF-16"), ("utf-32", "UTF-32")],
)
def test_a_file_with_the_mark_of_another_encoding_is_refused_with_its_name(tmp_path, encoding, name):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": 1}\n'.encode(encoding))

    with pytest.raises(TaskFileError, match=rf"^{path}: line 1 begins with the mark of {name}; .*UTF-8"):
        read(path)


def test_big_endian_utf_16_is_named_too_and_without_a_mark_it_is_suspected(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xfe\xff" + '{"a": 1}\n'.encode("utf-16-be"))
    with pytest.raises(TaskFileError, match="mark of UTF-16"):
        read(path)

    path.write_bytes('{"a": 1}'.encode("utf-16-le"))
    with pytest.raises(TaskFileError, match=r"line 1: NUL bytes, .* UTF-16 without its mark"):
        read(path)


def test_a_utf_8_mark_windows_line_ends_and_blank_lines_are_accepted(tmp_path):
    path = tmp_path / "rows.json-lines"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2}')

    rows = read(path)

    assert [row.fields for row in rows] == [{"a": 1}, {"a": 2}]
    assert [row.place for row in rows] == [f"{path}: line 1", f"{path}: line 4"]


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    text = "one\u2028two\u0085three\u000bfour"
    path.write_text(json.dumps({"a": text}, ensure_ascii=False) + "\n" + '{"a": 2}\n', encoding="utf-8")

    assert [row.fields["a"] for row in read(path)] == [text, 2]


def test_lines_that_span_many_pieces_are_joined(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["x" * (3 << 20), "y", "z" * (1 << 20)]
    path.write_text("".join(json.dumps({"a": text}) + "\n" for text in texts))

    assert [row.fields["a"] for row in read(path, max_line_bytes=4 << 20)] == texts


def test_a_line_of_sixty_megabytes_is_refused_without_being_held(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"a": "')
        for _ in range(60):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')
    tracemalloc.start()
    try:
        with pytest.raises(TaskFileError, match=rf"^{path}: line 2 is longer than max_line_bytes={1 << 20}"):
            read(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10 << 20
    with pytest.raises(TaskFileError, match=f"line 2 is longer than max_line_bytes={32 << 20}"):
        read(path, max_line_bytes=32 << 20)


def test_a_line_may_be_as_long_as_the_limit_and_not_a_byte_longer(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)

    assert len(read(path, max_line_bytes=len(GOOD) - 1)) == 1
    with pytest.raises(TaskFileError, match=f"line 1 is longer than max_line_bytes={len(GOOD) - 2}"):
        read(path, max_line_bytes=len(GOOD) - 2)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)

    with pytest.raises(TaskFileError, match=f"^{path}: 0 rows"):
        read(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_missing_file_is_refused_with_its_name(tmp_path, name):
    with pytest.raises(TaskFileError, match=rf"^{tmp_path / name}: can't be read"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows"])
def test_a_file_of_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(GOOD)

    with pytest.raises(TaskFileError, match=rf"^{path}: no format is known .*\.jsonl.*\.parquet"):
        read(path)


def test_rows_of_parquet_are_objects_placed_by_their_number(tmp_path):
    path = tmp_path / "rows.parquet"
    fields = [{"a": str(number), "b": [{"c": number}], "d": None} for number in range(3000)]
    pq.write_table(pa.Table.from_pylist(fields), path, row_group_size=700)

    rows = read(path)

    assert [row.fields for row in rows] == fields
    assert [rows[0].place, rows[2999].place] == [f"{path}: row 1", f"{path}: row 3000"]


def test_parquet_without_rows_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)

    with pytest.raises(TaskFileError, match=f"^{path}: 0 rows"):
        read(path)


def test_a_file_that_is_not_parquet_is_refused_with_its_name(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(GOOD)

    with pytest.raises(TaskFileError, match=f"^{path}: can't be read as Parquet"):
        read(path)


def test_text_in_parquet_that_is_not_utf_8_is_refused_with_its_row(tmp_path):
    path = tmp_path / "rows.parquet"
    broken = pa.array([b"good", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": broken}), path)

    with pytest.raises(TaskFileError, match=rf"^{path}: row 2: text is not UTF-8"):
        read(path)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("{", "not JSON"),
        ("{}", "lists no data files"),
        ('{"_data_files": [1]}', "lists no data files"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"gone\.arrow: can't be read as Arrow"),
        ('{"_data_files": [{"filename": "state.json"}]}', r"state\.json: can't be read as Arrow"),
    ],
)
def test_a_saved_dataset_with_a_broken_state_is_refused(tmp_path, state, reason):
    (tmp_path / "state.json").write_text(state)

    with pytest.raises(TaskFileError, match=rf"^{tmp_path}.*{reason}"):
        read(tmp_path)
