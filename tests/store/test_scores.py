"""Columns beside a pool: by row id, of all its rows, and never in the way of reading it."""

import math
from pathlib import Path

import pytest

from delia.errors import StoreError
from delia.schema import Message, Row
from delia.store.candidates import to_row_table
from delia.store.pools import read_pool, write_pool
from delia.store.scores import SCORES, read_scores, write_scores
from delia.store.tables import join

IDS = ["r0", "r1", "r2"]


def make_row(index: int) -> Row:
    messages = (Message(role="user", content="a"), Message(role="assistant", content="b"))
    return Row(row_id=f"r{index}", index=index, source="s", messages=messages)


def test_columns_come_back_in_the_order_of_the_rows_that_are_asked_for(tmp_path: Path):
    write_scores(str(tmp_path), IDS, {"likelihood": [-1.0, -2.0, -3.5], "mood": [1, 0, 1]})

    assert read_scores(str(tmp_path), IDS) == {"likelihood": [-1.0, -2.0, -3.5], "mood": [1.0, 0.0, 1.0]}
    assert read_scores(str(tmp_path), ["r2", "r0", "r1"])["likelihood"] == [-3.5, -1.0, -2.0]


def test_scores_change_neither_a_pools_root_nor_what_is_read_of_it(tmp_path: Path):
    rows = [make_row(index) for index in range(3)]
    address = str(tmp_path)
    plain = write_pool(
        address, rows=[to_row_table(rows)], rejections=[], fingerprint="f", parents={}, details={}
    )
    assert read_scores(address, IDS) == {}
    write_scores(address, IDS, {"likelihood": [-1.0, -2.0, -3.0]})

    assert read_pool(address) == plain
    assert read_scores(address, [row.row_id for row in read_pool(address).rows]) == {
        "likelihood": [-1.0, -2.0, -3.0]
    }


def test_scores_of_other_rows_are_refused_with_the_numbers(tmp_path: Path):
    write_scores(str(tmp_path), IDS, {"likelihood": [-1.0, -2.0, -3.0]})

    for ids, num_missing in ((["r0", "r1"], 0), ([*IDS, "r3"], 1), (["r0", "r1", "x"], 1)):
        with pytest.raises(
            StoreError, match=f"scores 3 rows, the pool has {len(ids)}, of which {num_missing}"
        ):
            read_scores(str(tmp_path), ids)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([-1.0, -2.0], "each of 3 rows, got 2 values, 0 of them"),
        ([-1.0, math.nan, -math.inf], "got 3 values, 2 of them not finite"),
    ],
)
def test_a_column_that_does_not_score_every_row_is_not_written(
    tmp_path: Path, values: list[float], numbers: str
):
    with pytest.raises(StoreError, match=numbers):
        write_scores(str(tmp_path), IDS, {"likelihood": values})
    assert not Path(join(str(tmp_path), SCORES)).exists()


def test_a_row_is_scored_once(tmp_path: Path):
    with pytest.raises(StoreError, match="got 3 ids of 2 rows"):
        write_scores(str(tmp_path), ["r0", "r1", "r0"], {"likelihood": [1.0, 2.0, 3.0]})
