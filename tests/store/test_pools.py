"""Pools and chunks of candidates: round trips, order, and what a reader refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from delia.errors import StoreError
from delia.schema import Message, Rejection, Row
from delia.store.candidates import (
    Cost,
    from_candidate_table,
    sum_cost,
    to_candidate_table,
    to_rejection_table,
    to_row_table,
)
from delia.store.merkle import merkle_root
from delia.store.pools import Pool, read_pool, read_rejections, write_pool
from delia.store.tables import FORMAT_VERSION, MANIFEST, read_table, write_table


def make_row(index: int, *, source: str = "self", answer: str = "été \n 🙂") -> Row:
    messages = (
        Message(role="system", content=""),
        Message(role="user", content=f"question {index}"),
        Message(role="assistant", content=answer),
    )
    return Row(
        row_id=f"{source}-{index}",
        index=index,
        source=source,
        messages=messages,
        finish_reason="length" if index == 2 else "stop",
        num_prompt_tokens=10 + index,
        num_output_tokens=20 + index,
    )


def make_rejection(index: int, reason: str = "empty") -> Rejection:
    return Rejection(
        row_id=f"x-{index}", index=index, source="self", reason=reason, text="why ?", num_output_tokens=3
    )


ROWS = [make_row(0), make_row(2), make_row(5)]
REJECTIONS = [make_rejection(1), make_rejection(3, "duplicate"), make_rejection(4)]


def write(address: str, *, rows: list[Row], rejections: list[Rejection] = REJECTIONS) -> Pool:
    return write_pool(
        address,
        rows=[to_row_table(rows[:1]), to_row_table(rows[1:])],
        rejections=[to_rejection_table(rejections)],
        fingerprint="f0",
        parents={"task": "t0"},
        details={"seconds": 1.5},
    )


@pytest.fixture
def address(tmp_path: Path) -> str:
    address = str(tmp_path / "pool")
    write(address, rows=ROWS)
    return address


def change_rows(address: str, change) -> None:
    """Write the rows' table again after a change to its list of records."""
    path = f"{address}/rows.parquet"
    table = read_table(path)
    write_table(path, pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema))


def test_a_pool_is_read_as_it_was_written(address: str):
    pool = read_pool(address)

    assert pool.rows == tuple(ROWS)
    assert read_rejections(address) == REJECTIONS
    assert pool.manifest.root == merkle_root([row.leaf for row in ROWS])
    assert pool.manifest.counts == {"accepted": 3, "rejected_duplicate": 1, "rejected_empty": 2}
    assert pool.manifest.parents == {"task": "t0"}
    assert pool.manifest.details == {"seconds": 1.5}
    assert pool.manifest.fingerprint == "f0"


def test_writing_returns_what_reading_would(tmp_path: Path):
    address = str(tmp_path / "pool")

    assert write(address, rows=ROWS) == read_pool(address)


def test_the_manifest_names_every_column_of_both_tables(address: str):
    schema = read_pool(address).manifest.schema

    assert schema["rows.parquet"][3] == "messages: list<item: struct<role: string, content: string>>"
    assert schema["rejected.parquet"] == [
        "row_id: string",
        "index: int64",
        "source: string",
        "reason: string",
        "text: string",
        "num_output_tokens: int64",
    ]


def test_a_pool_without_rows_or_rejections_is_a_pool(tmp_path: Path):
    address = str(tmp_path / "pool")
    write(address, rows=[], rejections=[])

    assert read_pool(address).rows == ()
    assert read_rejections(address) == []
    assert read_pool(address).manifest.counts == {"accepted": 0}


def test_a_pool_and_a_chunk_that_have_no_column_of_licences_are_read(address: str):
    path = f"{address}/rows.parquet"
    older = read_table(path).drop_columns("licence")
    write_table(path, older)

    assert read_pool(address).rows == tuple(ROWS)
    assert from_candidate_table(older.append_column("reason", [[None] * 3])) == ROWS


def set_answer(records: list[dict], text: str) -> list[dict]:
    records[1]["messages"][2]["content"] = text
    return records


def test_a_changed_answer_is_seen_and_its_row_named(address: str):
    change_rows(address, lambda records: set_answer(records, "forged"))

    with pytest.raises(StoreError, match=r"row self-2 was changed, .* restore the file, or make it again"):
        _ = read_pool(address).rows


def test_a_changed_answer_with_a_leaf_to_match_is_seen_by_the_root(address: str):
    def forge(records: list[dict]) -> list[dict]:
        row = ROWS[1]
        forged = replace(row, messages=(*row.messages[:2], Message(role="assistant", content="forged")))
        records = set_answer(records, "forged")
        records[1]["leaf"] = forged.leaf
        return records

    change_rows(address, forge)
    with pytest.raises(StoreError, match=r"3 rows have root \w+, but 3 rows with root \w+ were committed"):
        _ = read_pool(address).rows


@pytest.mark.parametrize(
    ("change", "num_rows"),
    [
        (lambda records: records[:2], 2),
        (lambda records: [*records, records[-1]], 4),
        (lambda records: records[::-1], 3),
    ],
    ids=["a row is missing", "the last row is said twice, which leaves the root as it was", "another order"],
)
def test_rows_that_were_not_committed_are_refused(address: str, change, num_rows: int):
    change_rows(address, change)

    with pytest.raises(StoreError, match=f"{num_rows} rows have root .* but 3 rows with root"):
        _ = read_pool(address).rows


def change_manifest(address: str, **fields: object) -> None:
    path = Path(address) / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("read", [read_pool, read_rejections])
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format_version": FORMAT_VERSION + 1}, f"has format version {FORMAT_VERSION + 1}"),
        ({"kind": "mixture"}, "holds a 'mixture', a 'pool' is needed here"),
    ],
)
def test_a_newer_or_foreign_directory_is_refused(address: str, read, fields: dict, reason: str):
    change_manifest(address, **fields)

    with pytest.raises(StoreError, match=reason):
        read(address)


@pytest.mark.parametrize("read", [read_pool, read_rejections])
def test_a_directory_without_a_manifest_is_unfinished(address: str, read):
    (Path(address) / MANIFEST).unlink()

    with pytest.raises(StoreError, match="it is unfinished"):
        read(address)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([make_row(2), make_row(0)], r"got \('self', 0\) after \('self', 2\); sort the rows"),
        ([make_row(2), make_row(2)], r"got \('self', 2\) after \('self', 2\)"),
        ([make_row(0, source="z"), make_row(1, source="a")], r"got \('a', 1\) after \('z', 0\)"),
        ([make_row(0), replace(make_row(1), row_id="self-0")], "got self-0 2 times"),
    ],
)
def test_rows_out_of_order_or_with_one_id_are_not_written(tmp_path: Path, rows: list[Row], reason: str):
    with pytest.raises(StoreError, match=reason):
        write(str(tmp_path / "pool"), rows=rows)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_several_sources_each_start_at_their_own_index(tmp_path: Path):
    rows = [make_row(7, source="a"), make_row(0, source="b")]

    assert write(str(tmp_path / "pool"), rows=rows).rows == tuple(rows)


def test_a_finished_pool_is_not_overwritten_with_other_rows(address: str):
    with pytest.raises(StoreError, match=r"holds a finished pool with root \w{32}, this one has \w{32}"):
        write(address, rows=ROWS[:2])
    assert read_pool(address).rows == tuple(ROWS)


def test_writing_the_same_pool_again_is_no_fault_and_leaves_its_files(address: str):
    before = {path: path.stat().st_ino for path in Path(address).iterdir()}

    assert write(address, rows=ROWS) == read_pool(address)
    assert {path: path.stat().st_ino for path in Path(address).iterdir()} == before


def write_candidates(path: str, candidates: list[Row | Rejection]) -> None:
    write_table(path, to_candidate_table(candidates))


def read_candidates(path: str) -> list[Row | Rejection]:
    return from_candidate_table(read_table(path), address=path)


def test_the_parts_of_a_pool_in_the_making_are_left_alone(tmp_path: Path):
    address = str(tmp_path / "pool")
    write_candidates(f"{address}/parts/one.parquet", [ROWS[0]])
    write(address, rows=ROWS)

    assert read_candidates(f"{address}/parts/one.parquet") == [ROWS[0]]


@pytest.mark.parametrize(
    "candidates",
    [[ROWS[0], REJECTIONS[0], ROWS[1], REJECTIONS[1], REJECTIONS[2], ROWS[2]], [REJECTIONS[0]], []],
)
def test_a_chunk_of_candidates_is_read_in_its_order(tmp_path: Path, candidates: list[Row | Rejection]):
    path = str(tmp_path / "parts" / "chunk.parquet")
    write_candidates(path, candidates)

    assert read_candidates(path) == candidates


def test_a_changed_candidate_is_seen(tmp_path: Path):
    path = f"{tmp_path}/rows.parquet"
    write_candidates(path, [REJECTIONS[0], ROWS[1]])
    change_rows(str(tmp_path), lambda records: set_answer(records, "forged"))

    with pytest.raises(StoreError, match="row self-2 was changed"):
        read_candidates(path)


def test_what_candidates_cost_is_summed_and_is_no_part_of_them(tmp_path: Path):
    candidates = [ROWS[0], REJECTIONS[0]]
    table = to_candidate_table(candidates)
    columns = {
        "spent_prompt_tokens": [3, 4],
        "spent_output_tokens": [5, 6],
        "engine_seconds": [0.25, 0.5],
        "device_seconds": [2.0, 4.0],
    }
    for name, values in columns.items():
        table = table.append_column(name, [values])
    write_table(f"{tmp_path}/chunk.parquet", table)

    stored = read_table(f"{tmp_path}/chunk.parquet")
    total = Cost(prompt_tokens=7, output_tokens=11, engine_seconds=0.75, device_seconds=6.0)
    assert sum_cost(stored) == total
    assert from_candidate_table(stored) == candidates
    assert sum_cost(to_candidate_table(candidates)) == Cost()
    unknown = sum_cost(stored.drop_columns("device_seconds")) + total
    assert (unknown.engine_seconds, math.isnan(unknown.device_seconds)) == (1.5, True)


def test_a_chunk_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(StoreError, match="no file at"):
        read_candidates(str(tmp_path / "none.parquet"))


def test_rows_that_can_be_iterated_once_only_are_refused_before_anything_is_committed(tmp_path: Path):
    address = str(tmp_path / "pool")
    once = iter([to_row_table(ROWS)])

    with pytest.raises(StoreError, match="rows are iterated twice, and were 3 and then 0"):
        write_pool(address, rows=once, rejections=[], fingerprint="f", parents={}, details={})
    assert not (tmp_path / "pool" / MANIFEST).exists()
