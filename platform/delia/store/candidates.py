"""Candidates as tables: what a chunk of synthesis, and each of a pool's two files, has for columns.

    Row, Rejection --to_*_table--> Arrow --from_*_table--> Row, Rejection

A row's leaf stands beside it and is computed again whenever a table is read, so a changed text is seen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute

from delia.errors import StoreError
from delia.schema import Message, Rejection, Row

Candidate = Row | Rejection

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
ROW_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("index", pa.int64()),
        ("source", pa.string()),
        ("messages", _MESSAGES),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int64()),
        ("num_output_tokens", pa.int64()),
        ("leaf", pa.string()),
        ("licence", pa.string()),
    ]
)
REJECTION_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("index", pa.int64()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("text", pa.string()),
        ("num_output_tokens", pa.int64()),
    ]
)
CANDIDATE_SCHEMA = pa.unify_schemas([ROW_SCHEMA, REJECTION_SCHEMA])
"""A row has no `reason`; a rejection has one, and no `messages`."""
COST_SCHEMA = pa.schema(
    [
        ("spent_prompt_tokens", pa.int64()),
        ("spent_output_tokens", pa.int64()),
        ("engine_seconds", pa.float64()),
        ("device_seconds", pa.float64()),
    ]
)
"""What a candidate cost in all its turns; stands beside it, and is no part of what it is."""


def _to_record(candidate: Candidate) -> dict[str, Any]:
    # `dataclasses.asdict` copies every value, deeply: ten times the time of this
    record = {name: getattr(candidate, name) for name in candidate.__slots__}
    if isinstance(candidate, Row):
        record["messages"] = [{"role": turn.role, "content": turn.content} for turn in candidate.messages]
        record["leaf"] = candidate.leaf
    return record


def _to_row(record: Mapping[str, Any]) -> Row:
    # a file without the column of licences is read too
    fields = {name: record[name] for name in Row.__slots__ if name in record}
    return Row(**fields | {"messages": tuple(Message(**turn) for turn in record["messages"])})


def _to_rejection(record: Mapping[str, Any]) -> Rejection:
    return Rejection(**{name: record[name] for name in REJECTION_SCHEMA.names})


def _read_rows(records: Iterable[Mapping[str, Any]], *, address: str) -> tuple[Row, ...]:
    rows = []
    for record in records:
        row = _to_row(record)
        if row.leaf != record["leaf"]:
            raise StoreError(
                f"{address!r}: row {row.row_id} was changed, its content hashes to {row.leaf} and"
                f" {record['leaf']} was stored; restore the file, or make it again"
            )
        rows.append(row)
    return tuple(rows)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What was spent; candidates that were rejected or never looked at are in it too.

    `device_seconds` are the engine's times the GPUs of its replica, or its CPUs where it has none; NaN where a part of
    them is not known.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    engine_seconds: float = 0.0
    device_seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Return both together."""
        return Cost(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            engine_seconds=self.engine_seconds + other.engine_seconds,
            device_seconds=self.device_seconds + other.device_seconds,
        )


def to_candidate_table(candidates: Sequence[Candidate]) -> pa.Table:
    """Return candidates as columns of `CANDIDATE_SCHEMA`, in their order."""
    records = [_to_record(candidate) for candidate in candidates]
    return pa.Table.from_pylist(records, schema=CANDIDATE_SCHEMA)


def to_row_table(rows: Sequence[Row]) -> pa.Table:
    """Return rows as columns of `ROW_SCHEMA`, in their order."""
    return pa.Table.from_pylist([_to_record(row) for row in rows], schema=ROW_SCHEMA)


def to_rejection_table(rejections: Sequence[Rejection]) -> pa.Table:
    """Return rejections as columns of `REJECTION_SCHEMA`, in their order."""
    return pa.Table.from_pylist([_to_record(item) for item in rejections], schema=REJECTION_SCHEMA)


def list_licences(tables: Iterable[pa.Table]) -> list[str]:
    """Return what the rows of tables of `ROW_SCHEMA` state as their licences, each once, sorted."""
    return sorted({name for table in tables for name in table["licence"].unique().to_pylist()} - {""})


def from_row_table(table: pa.Table, *, address: str = "") -> tuple[Row, ...]:
    """Return the rows of a table, in its order.

    Raises:
        StoreError: A row's content was changed; `address` says where.
    """
    return _read_rows(table.to_pylist(), address=address)


def from_rejection_table(table: pa.Table) -> list[Rejection]:
    """Return the rejections of a table, in its order."""
    return [_to_rejection(record) for record in table.to_pylist()]


def from_candidate_table(table: pa.Table, *, address: str = "") -> list[Candidate]:
    """Return the candidates of a table, in its order.

    Raises:
        StoreError: A row's content was changed; `address` says where.
    """
    records = table.to_pylist()
    rows = iter(_read_rows((item for item in records if item["reason"] is None), address=address))
    return [next(rows) if item["reason"] is None else _to_rejection(item) for item in records]


def read_spent(table: pa.Table) -> tuple[int, ...]:
    """Return the output tokens that each candidate of a table cost; none where the column is missing."""
    name = "spent_output_tokens"
    return tuple(table[name].to_pylist()) if name in table.column_names else ()


def sum_cost(table: pa.Table) -> Cost:
    """Return what the candidates of a table cost; nothing where its columns are missing.

    Candidates that have an engine's seconds alone were stored without saying what devices it had.
    """
    sums = {
        name: compute.sum(table[name]).as_py() or 0
        for name in COST_SCHEMA.names
        if name in table.column_names
    }
    engine_seconds = float(sums.get("engine_seconds", 0))
    return Cost(
        prompt_tokens=sums.get("spent_prompt_tokens", 0),
        output_tokens=sums.get("spent_output_tokens", 0),
        engine_seconds=engine_seconds,
        device_seconds=float(sums.get("device_seconds", math.nan if engine_seconds else 0)),
    )
