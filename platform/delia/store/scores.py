"""Optional columns beside a pool: a score a row, by row id, in a table of its own.

    pool/  rows.parquet  rejected.parquet  scores.parquet (may be missing)  manifest.json

A pool's root covers its rows alone, so columns can be added to a finished pool, and one that was written
before there were any, or by a `delia` that knew none, is read as before: it has no columns.
"""

import math
from collections.abc import Mapping, Sequence

import pyarrow as pa

from delia.errors import StoreError
from delia.store.tables import exists, join, read_table, write_table

SCORES = "scores.parquet"
ROW_ID = "row_id"


def write_scores(address: str, row_ids: Sequence[str], columns: Mapping[str, Sequence[float]]) -> None:
    """Write the columns of a pool's directory, replacing all that it had.

    Args:
        address: The pool's directory, finished or not.
        row_ids: The rows, each once.
        columns: Name -> one value a row, in the order of `row_ids`.

    Raises:
        StoreError: A column of another length, a value that is no number, or an id twice.
    """
    if len(set(row_ids)) < len(row_ids):
        raise StoreError(
            f"{address!r}: a score is of one row, got {len(row_ids)} ids of {len(set(row_ids))} rows"
        )
    for name, values in columns.items():
        num_wrong = sum(not math.isfinite(value) for value in values)
        if len(values) != len(row_ids) or num_wrong:
            raise StoreError(
                f"{address!r}: column {name!r} needs a finite number for each of {len(row_ids)} rows, got"
                f" {len(values)} values, {num_wrong} of them not finite; see how it is made"
            )
    arrays = {ROW_ID: pa.array(row_ids, pa.string())}
    arrays |= {name: pa.array(values, pa.float64()) for name, values in columns.items()}
    write_table(join(address, SCORES), pa.table(arrays))


def read_scores(address: str, row_ids: Sequence[str]) -> dict[str, list[float]]:
    """Read the columns of a pool, in the order of its rows; none where it has no such table.

    Args:
        address: The pool's directory.
        row_ids: Its rows, as `read_pool` gives them.

    Raises:
        StoreError: The table is not of these rows.
    """
    if not exists(join(address, SCORES)):
        return {}
    table = read_table(join(address, SCORES))
    places = {row_id: place for place, row_id in enumerate(table.column(ROW_ID).to_pylist())}
    if places.keys() != set(row_ids) or table.num_rows != len(places):
        num_missing = len(set(row_ids) - places.keys())
        raise StoreError(
            f"{join(address, SCORES)!r} scores {table.num_rows} rows, the pool has {len(row_ids)}, of which"
            f" {num_missing} are not in it; delete the file and score the pool again"
        )
    columns = {name: table.column(name).to_pylist() for name in table.column_names if name != ROW_ID}
    return {name: [values[places[row_id]] for row_id in row_ids] for name, values in columns.items()}


def read_score_column(path: str, column: str) -> dict[str, float]:
    """Read one column of a table of scores, which may be of any rows, as row id -> score.

    Args:
        path: The Parquet file's address.
        column: Its name.

    Raises:
        StoreError: There is no such table or column, an id twice, or a value that is no number.
    """
    if not exists(path):
        raise StoreError(f"there is no table of scores at {path!r}; write one with {ROW_ID!r} and {column!r}")
    table = read_table(path)
    missing = [name for name in (ROW_ID, column) if name not in table.column_names]
    if missing:
        raise StoreError(f"{path!r} has no column {missing}, it has {table.column_names}; name one of them")
    ids, values = table.column(ROW_ID).to_pylist(), table.column(column).to_pylist()
    scores = dict(zip(ids, values, strict=True))
    if len(scores) < len(ids) or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise StoreError(
            f"{path!r}: {column!r} needs a finite number for each row, once; got {len(ids)} values of"
            f" {len(scores)} rows"
        )
    return {row_id: float(value) for row_id, value in scores.items()}
