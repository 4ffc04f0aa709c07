"""Pools and batches of candidates on storage.

    pool/  rows.parquet  rejected.parquet  manifest.json     write_pool, read_pool, read_rejections
    parts/NAME.parquet  rows and rejections of one chunk     to_candidate_table, from_candidate_table

A pool's root is the Merkle root over its rows' leaves in the order (source, index); it is computed again
whenever a pool is read, so a changed text is seen.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute

from delia.errors import StoreError
from delia.schema import Message, Rejection, Row
from delia.store.tables import (
    Manifest,
    commit,
    is_finished,
    join,
    merkle_root,
    read_manifest,
    read_table,
    write_table,
)

Candidate = Row | Rejection

KIND = "pool"
ROWS = "rows.parquet"
REJECTED = "rejected.parquet"

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
    ]
)
"""What a candidate cost in all its turns; stands beside it, and is no part of what it is."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Accepted rows in the order (source, index), and the manifest of their directory."""

    rows: tuple[Row, ...]
    manifest: Manifest


def _to_record(candidate: Candidate) -> dict[str, Any]:
    # `dataclasses.asdict` copies every value, deeply: ten times the time of this
    record = {name: getattr(candidate, name) for name in candidate.__slots__}
    if isinstance(candidate, Row):
        record["messages"] = [{"role": turn.role, "content": turn.content} for turn in candidate.messages]
        record["leaf"] = candidate.leaf
    return record


def _to_row(record: Mapping[str, Any]) -> Row:
    fields = {name: record[name] for name in ROW_SCHEMA.names if name not in ("messages", "leaf")}
    return Row(messages=tuple(Message(**turn) for turn in record["messages"]), **fields)


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
    """What was spent; candidates that were rejected or never looked at are in it too."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    engine_seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Return both together."""
        return Cost(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            engine_seconds=self.engine_seconds + other.engine_seconds,
        )


def to_candidate_table(candidates: Sequence[Candidate]) -> pa.Table:
    """Return candidates as columns of `CANDIDATE_SCHEMA`, in their order."""
    records = [_to_record(candidate) for candidate in candidates]
    return pa.Table.from_pylist(records, schema=CANDIDATE_SCHEMA)


def from_candidate_table(table: pa.Table, *, address: str = "") -> list[Candidate]:
    """Return the candidates of a table, in its order.

    Raises:
        StoreError: A row's content was changed; `address` says where.
    """
    records = table.to_pylist()
    rows = iter(_read_rows((item for item in records if item["reason"] is None), address=address))
    return [next(rows) if item["reason"] is None else _to_rejection(item) for item in records]


def sum_cost(table: pa.Table) -> Cost:
    """Return what the candidates of a table cost; nothing where its columns are missing."""
    sums = [
        compute.sum(table[name]).as_py() or 0 if name in table.column_names else 0
        for name in COST_SCHEMA.names
    ]
    return Cost(prompt_tokens=int(sums[0]), output_tokens=int(sums[1]), engine_seconds=float(sums[2]))


def write_pool(  # a pool's two tables and the three fields of its manifest
    address: str,
    *,
    rows: Sequence[Row],
    rejections: Sequence[Rejection],
    fingerprint: str,
    parents: Mapping[str, str],
    details: Mapping[str, Any],
) -> Pool:
    """Write a pool and commit it; the manifest is written last.

    Args:
        address: Directory; other files in it, such as `parts/`, are left alone.
        rows: In the order (source, index), each place and each row id once.
        rejections: What was not accepted; counted by reason as `rejected_REASON`.
        fingerprint: Of the settings and parents that made the pool.
        parents: Name -> digest of what the pool was made from.
        details: Anything else that JSON can hold.

    Raises:
        StoreError: Rows out of order, a row id twice, or another pool is finished there.
    """
    _check_order(rows)
    root = merkle_root([row.leaf for row in rows])
    if is_finished(address):
        found = read_manifest(address, kind=KIND).root
        if found != root:
            raise StoreError(
                f"{address!r} holds a finished pool with root {found}, this one has {root};"
                " a stored pool is not overwritten: write to another directory"
            )
    tables = {
        ROWS: pa.Table.from_pylist([_to_record(row) for row in rows], schema=ROW_SCHEMA),
        REJECTED: pa.Table.from_pylist([_to_record(item) for item in rejections], schema=REJECTION_SCHEMA),
    }
    for name, table in tables.items():
        write_table(join(address, name), table)
    reasons = Counter(item.reason for item in rejections)
    manifest = Manifest(
        kind=KIND,
        fingerprint=fingerprint,
        root=root,
        counts={"accepted": len(rows), **{f"rejected_{name}": reasons[name] for name in sorted(reasons)}},
        parents=dict(parents),
        schema={name: [f"{item.name}: {item.type}" for item in tables[name].schema] for name in tables},
        details=dict(details),
    )
    commit(address, manifest)
    return Pool(rows=tuple(rows), manifest=manifest)


def _check_order(rows: Sequence[Row]) -> None:
    for before, row in pairwise(rows):
        if (before.source, before.index) >= (row.source, row.index):
            raise StoreError(
                f"a pool's rows are in the order (source, index), each place once, got"
                f" {(row.source, row.index)} after {(before.source, before.index)}; sort the rows"
            )
    row_id, times = next(iter(Counter(row.row_id for row in rows).most_common(1)), ("", 0))
    if times > 1:
        raise StoreError(f"a row id names one row of a pool, got {row_id} {times} times; see how it is made")


def read_pool(address: str) -> Pool:
    """Read a finished pool and verify its rows against its root.

    Raises:
        StoreError: It is unfinished, of another kind or a newer format, or its rows were changed.
    """
    manifest = read_manifest(address, kind=KIND)
    rows = _read_rows(read_table(join(address, ROWS)).to_pylist(), address=address)
    root = merkle_root([row.leaf for row in rows])
    num_accepted = manifest.counts["accepted"]
    # The count too: a Merkle root pads odd levels, so a last row said twice can have the same root.
    if root != manifest.root or len(rows) != num_accepted:
        raise StoreError(
            f"{address!r}: {len(rows)} rows have root {root}, but {num_accepted} rows with root"
            f" {manifest.root} were committed; restore {ROWS}, or make the pool again"
        )
    return Pool(rows=rows, manifest=manifest)


def read_rejections(address: str) -> list[Rejection]:
    """Read what a finished pool did not accept, and why.

    Raises:
        StoreError: It is unfinished, of another kind or a newer format.
    """
    read_manifest(address, kind=KIND)
    return [_to_rejection(record) for record in read_table(join(address, REJECTED)).to_pylist()]
