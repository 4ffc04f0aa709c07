"""Pools on storage: accepted rows and rejections, committed by a manifest.

    pool/  rows.parquet  rejected.parquet  manifest.json     write_pool, read_pool, read_rejections

A pool is written table by table and read place by place, so it may be larger than memory: its index has ids and
sources alone.
Its root is the Merkle root over its rows' leaves in the order (source, index).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from delia.errors import StoreError
from delia.schema import Rejection, Row, Task
from delia.store.candidates import REJECTION_SCHEMA, ROW_SCHEMA, from_rejection_table, from_row_table
from delia.store.merkle import MerkleTree
from delia.store.tables import (
    Manifest,
    commit,
    is_finished,
    join,
    open_parquet,
    open_table,
    read_manifest,
    read_table,
)

KIND = "pool"
ROWS = "rows.parquet"
REJECTED = "rejected.parquet"


@dataclass(frozen=True, kw_only=True, eq=False)
class PoolIndex:
    """Which rows a pool has, in the order (source, index), without their texts.

    Attributes:
        row_ids: Arrow strings; a row's place is where its id stands.
        sources: Arrow strings, parallel.
        read: Reads the rows at some places, in ascending order, on any process that reaches the storage; a row
            that was changed is a StoreError.
    """

    row_ids: pa.ChunkedArray
    sources: pa.ChunkedArray
    read: Callable[[Sequence[int]], tuple[Row, ...]]

    def group_ids(self) -> dict[str, list[str]]:
        """Return the row ids of each source."""
        names = self.sources.unique().to_pylist()
        return {name: self.row_ids.filter(compute.equal(self.sources, name)).to_pylist() for name in names}


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A finished pool: its manifest, and its rows where they are asked for.

    `load` reads the index and verifies it; two pools are compared by their manifests.
    """

    manifest: Manifest
    load: Callable[[], PoolIndex] = field(compare=False, repr=False)

    @cached_property
    def index(self) -> PoolIndex:
        """Return which rows there are, read once.

        Raises:
            StoreError: They are not those that were committed.
        """
        return self.load()

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Return all accepted rows, read once; they must fit in memory.

        Raises:
            StoreError: They were changed since they were committed.
        """
        return self.index.read(range(len(self.index.row_ids)))


def write_pool(  # a pool's two tables and the three fields of its manifest
    address: str,
    *,
    rows: Iterable[pa.Table],
    rejections: Iterable[pa.Table],
    fingerprint: str,
    parents: Mapping[str, str],
    details: Mapping[str, Any],
) -> Pool:
    """Write a pool and commit it; the manifest is written last. One that is finished is left as it is.

    Args:
        address: Directory; other files in it, such as `parts/`, are left alone.
        rows: Tables of `ROW_SCHEMA`, iterated twice; in the order (source, index), each place and row id once.
        rejections: Tables of `REJECTION_SCHEMA`; counted by reason as `rejected_REASON`.
        fingerprint: Of the settings and parents that made the pool.
        parents: Name -> digest of what the pool was made from.
        details: Anything else that JSON can hold.

    Raises:
        StoreError: Rows out of order, a row id twice, or another pool is finished there.
    """
    tree = _check_rows(rows)
    if is_finished(address):
        found = read_manifest(address, kind=KIND).root
        if found != tree.root:
            raise StoreError(
                f"{address!r} holds a finished pool with root {found}, this one has {tree.root};"
                " a stored pool is not overwritten: write to another directory"
            )
        return read_pool(address)  # of a killed job's acceptance and its successor, the later one comes here
    reasons: Counter[str] = Counter()
    num_written = 0
    with open_table(join(address, ROWS), ROW_SCHEMA) as writer:
        for table in rows:
            writer.write_table(table)
            num_written += table.num_rows
    if num_written != tree.num_leaves:
        raise StoreError(
            f"{address!r}: rows are iterated twice, and were {tree.num_leaves} and then {num_written}; give a sequence"
        )
    with open_table(join(address, REJECTED), REJECTION_SCHEMA) as writer:
        for table in rejections:
            writer.write_table(table)
            reasons.update(table["reason"].to_pylist())
    schemas = {ROWS: ROW_SCHEMA, REJECTED: REJECTION_SCHEMA}
    manifest = Manifest(
        kind=KIND,
        fingerprint=fingerprint,
        root=tree.root,
        counts={
            "accepted": tree.num_leaves,
            **{f"rejected_{name}": reasons[name] for name in sorted(reasons)},
        },
        parents=dict(parents),
        schema={name: [f"{item.name}: {item.type}" for item in schema] for name, schema in schemas.items()},
        details=dict(details),
    )
    commit(address, manifest)
    return read_pool(address)


def _check_rows(tables: Iterable[pa.Table]) -> MerkleTree:
    """Hold that rows are in order and of different ids; return their tree."""
    tree, before, ids = MerkleTree(), ("", -1), []
    for table in tables:
        places = zip(table["source"].to_pylist(), table["index"].to_pylist(), strict=True)
        for place, leaf in zip(places, table["leaf"].to_pylist(), strict=True):
            if place <= before:
                raise StoreError(
                    f"a pool's rows are in the order (source, index), each place once, got {place} after"
                    f" {before}; sort the rows"
                )
            before = place
            tree.add(leaf)
        ids += table["row_id"].chunks
    row_ids = pa.chunked_array(ids, pa.string())
    if compute.count_distinct(row_ids).as_py() < tree.num_leaves:
        twice = max(row_ids.value_counts().to_pylist(), key=lambda item: item["counts"])
        raise StoreError(
            f"a row id names one row of a pool, got {twice['values']} {twice['counts']} times; see how it is made"
        )
    return tree


def read_pool(address: str) -> Pool:
    """Open a finished pool; its index is read, and verified against its root, when it is asked for.

    Raises:
        StoreError: It is unfinished, of another kind or a newer format.
    """
    manifest = read_manifest(address, kind=KIND)
    return Pool(manifest=manifest, load=partial(_load_index, address, manifest))


def _load_index(address: str, manifest: Manifest) -> PoolIndex:
    tree, ids, sources = MerkleTree(), [], []
    with open_parquet(join(address, ROWS)) as file:
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        for batch in file.iter_batches(columns=["row_id", "source", "leaf"]):
            ids.append(batch["row_id"])
            sources.append(batch["source"])
            for leaf in batch["leaf"].to_pylist():
                tree.add(leaf)
    num_accepted = manifest.counts["accepted"]
    # The count too: a Merkle root pads odd levels, so a last row said twice can have the same root.
    if tree.root != manifest.root or tree.num_leaves != num_accepted:
        raise StoreError(
            f"{address!r}: {tree.num_leaves} rows have root {tree.root}, but {num_accepted} rows with root"
            f" {manifest.root} were committed; restore {ROWS}, or make the pool again"
        )
    starts = np.cumsum([0, *(group.num_rows for group in groups)])
    return PoolIndex(
        row_ids=pa.chunked_array(ids, pa.string()),
        sources=pa.chunked_array(sources, pa.string()),
        read=partial(_read_places, join(address, ROWS), starts.tolist()),
    )


def _read_places(address: str, starts: Sequence[int], places: Sequence[int]) -> tuple[Row, ...]:
    """Read rows at ascending places, one row group at a time; the rows of each begin at `starts`."""
    places_P = np.asarray(places, np.int64)
    group_P = np.searchsorted(starts, places_P, side="right") - 1
    rows: list[Row] = []
    with open_parquet(address) as file:
        for group in np.unique(group_P).tolist():
            table = file.read_row_group(group).take(places_P[group_P == group] - starts[group])
            rows += from_row_table(table, address=address)
    return tuple(rows)


def join_licences(task: Task, pool: Pool | None) -> str:
    """Return the licences of all that an adapter may have been trained on: of the task, its train rows and the pool."""
    by_source = pool.manifest.details.get("licences", {}) if pool else {}
    stated = {task.licence, *(row.licence for row in task.rows_by_split["train"])}
    return ", ".join(sorted(stated.union(*by_source.values()) - {""}))


def index_rows(rows: Sequence[Row]) -> PoolIndex:
    """Return the index of rows in memory."""
    return PoolIndex(
        row_ids=pa.chunked_array([[row.row_id for row in rows]], pa.string()),
        sources=pa.chunked_array([[row.source for row in rows]], pa.string()),
        read=lambda places: tuple(rows[place] for place in places),
    )


def read_rejections(address: str) -> list[Rejection]:
    """Read what a finished pool did not accept, and why.

    Raises:
        StoreError: It is unfinished, of another kind or a newer format.
    """
    read_manifest(address, kind=KIND)
    return from_rejection_table(read_table(join(address, REJECTED)))
