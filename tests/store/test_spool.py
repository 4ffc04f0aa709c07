"""Spools: rows on disk come back in order, as often as they are read, and while more are added."""

import errno
import tempfile

import pyarrow as pa
import pytest

from delia.errors import StoreError
from delia.store.spool import Chain, Spool

SCHEMA = pa.schema([("index", pa.int64()), ("text", pa.string())])


def make_table(*indices: int) -> pa.Table:
    return pa.table({"index": indices, "text": [f"été {index}" for index in indices]}, schema=SCHEMA)


def read(tables: Spool | Chain) -> list[int]:
    return [index for table in tables for index in table["index"].to_pylist()]


@pytest.fixture
def spool() -> Spool:
    return Spool(SCHEMA)


def test_an_empty_spool_has_no_rows(spool):
    assert list(spool) == []
    spool.add(make_table())
    assert list(spool) == []


def test_rows_come_back_whole_and_in_order_however_often_they_are_read_between_additions(spool):
    spool.add(make_table(0, 1))
    assert read(spool) == read(spool) == [0, 1]
    spool.add(make_table())
    spool.add(make_table(2))

    assert read(spool) == [0, 1, 2]
    assert spool.num_rows == 3
    assert pa.concat_tables(spool) == make_table(0, 1, 2)


def test_small_additions_are_handed_out_as_few_tables(spool):
    for index in range(10_000):
        spool.add(make_table(index))

    tables = list(spool)
    assert [table.num_rows for table in tables] == [4096, 4096, 10_000 - 8192]
    assert read(spool) == list(range(10_000))


def test_two_readers_do_not_disturb_each_other(spool):
    for index in range(5000):
        spool.add(make_table(index))
    one, other = iter(spool), iter(spool)
    first = next(one)

    assert next(other) == first
    assert next(one)["index"].to_pylist() == list(range(4096, 5000))


def test_a_chain_is_its_parts_one_after_the_other_more_than_once(spool):
    other = Spool(SCHEMA)
    spool.add(make_table(5))
    other.add(make_table(1, 2))
    chain = Chain((other, spool, [make_table(9)]))

    assert read(chain) == read(chain) == [1, 2, 5, 9]


def test_a_spool_leaves_nothing_on_the_disk_even_where_its_process_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool(SCHEMA)
    spool.add(make_table(1, 2))

    assert read(spool) == [1, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_with_the_place_and_the_way_out(spool, monkeypatch):
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = lambda self: None
        closed = False

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **fields: Full())
    with pytest.raises(StoreError, match=r"can't keep rows in '.*' .*: .*No space left.*; free space there"):
        Spool(SCHEMA).add(make_table(1))
