"""Tables in the order in which they come, on this machine's disk: for rows that don't fit in memory.

    table, table, ... --Spool.add--> a file of Arrow's --iteration--> table, table, ...

A spool is scratch space of one process. Its file has no name, so the disk is free again when the process ends,
however it ends.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from delia.errors import StoreError

_BATCH_ROWS = 4096
"""Rows that are handed out at a time, also where they came a few at a time."""


class Spool:
    """A growing file of rows of one schema.

    Attributes:
        num_rows: Rows in it.
    """

    def __init__(self, schema: pa.Schema) -> None:
        """Start empty; the file lies where Python puts temporary ones (TMPDIR)."""
        self.num_rows = 0
        self._schema = schema
        self._file = tempfile.TemporaryFile(prefix="delia-spool-")  # noqa: SIM115  # closed with the spool
        self._writer = pa.ipc.new_stream(
            self._file, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")
        )

    def add(self, table: pa.Table) -> None:
        """Append rows.

        Raises:
            StoreError: This machine's disk is full.
        """
        try:
            self._writer.write_table(table)
            self._file.flush()
        except OSError as error:
            raise StoreError(
                f"can't keep rows in {tempfile.gettempdir()!r} until they are written: {error}; free space there, on"
                " each node, or set TMPDIR"
            ) from error
        self.num_rows += table.num_rows

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield all rows so far, in order; may be called again, and rows may be added afterwards."""
        if not self.num_rows:
            return  # nothing is written before the first rows, the schema neither
        batches: list[pa.RecordBatch] = []
        # through /proc it is opened once more, at an offset of its own
        with open(f"/proc/self/fd/{self._file.fileno()}", "rb") as file, pa.ipc.open_stream(file) as reader:
            left = self.num_rows  # the stream has no end mark yet
            while left:
                batches.append(reader.read_next_batch())
                left -= batches[-1].num_rows
                if not left or sum(batch.num_rows for batch in batches) >= _BATCH_ROWS:
                    yield pa.Table.from_batches(batches, self._schema)
                    batches = []


@dataclass(frozen=True)
class Chain:
    """Several sequences of tables as one that can be read more than once."""

    parts: tuple[Iterable[pa.Table], ...]

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the tables of each part."""
        for part in self.parts:
            yield from part
