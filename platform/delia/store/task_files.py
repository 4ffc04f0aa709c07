"""Raw rows of one file: an address -> objects, each with the place that it stands at.

    x.jsonl, x.json-lines   one JSON object a line, UTF-8; a place is a line
    x.parquet               a place is a row, counted from 1
    x/state.json, *.arrow   what `datasets.Dataset.save_to_disk` writes; a place is a row

Files come from anybody. Whatever is wrong with one ends in a TaskFileError that names the place.
Lines are read in pieces, so that an endless line is refused before it fills the memory.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from delia.errors import StoreError, TaskFileError
from delia.store.tables import exists, join, open_filesystem, read_bytes

LINE_SUFFIXES = (".jsonl", ".json-lines")
PARQUET_SUFFIX = ".parquet"
SUFFIXES = (*LINE_SUFFIXES, PARQUET_SUFFIX)
DATASET_STATE = "state.json"
PIECE_BYTES = 1 << 20
FOREIGN_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RawRow:
    """One object of a file, not yet looked at, and its place for messages; `fault` says why it has no fields."""

    place: str
    fields: dict[str, Any]
    fault: str = ""


def read_raw_rows(address: str, *, max_line_bytes: int, keeps_faults: bool = False) -> list[RawRow]:
    """Read every row of a JSON Lines file, a Parquet file or a saved dataset.

    Args:
        address: Local path or URI; the format follows from the suffix.
        max_line_bytes: Longest line of a JSON Lines file, in bytes without its end.
        keeps_faults: A line or row that can't be unpacked becomes a row with a fault, not an error.

    Raises:
        TaskFileError: Missing, unreadable, of an unknown format, malformed, or without rows.
    """
    if address.lower().endswith(LINE_SUFFIXES):
        rows = list(_read_json_lines(address, max_line_bytes, keeps_faults=keeps_faults))
    elif address.lower().endswith(PARQUET_SUFFIX):
        rows = list(_read_parquet(address, keeps_faults=keeps_faults))
    elif exists(join(address, DATASET_STATE)):
        rows = list(_read_dataset(address, keeps_faults=keeps_faults))
    else:
        raise TaskFileError(f"{address}: no format is known for this name; use one of {list(SUFFIXES)}")
    if not rows:
        raise TaskFileError(f"{address}: 0 rows; write at least one, or remove the file")
    return rows


def read_json_object(address: str) -> dict[str, Any]:
    """Read a small file that is one JSON object, such as the state of a saved dataset."""
    try:
        data = read_bytes(address)
    except (OSError, StoreError) as error:
        raise TaskFileError(f"{address}: can't be read: {error}") from error
    return _parse_object(data, place=address)


def _read_json_lines(address: str, max_line_bytes: int, *, keeps_faults: bool) -> Iterator[RawRow]:
    filesystem, path = open_filesystem(address)
    try:
        with filesystem.open_input_stream(path) as stream:
            for number, line in _iterate_lines(stream, address, max_line_bytes):
                if number == 1:
                    line = _strip_mark(line, address)
                if line.strip():
                    place = f"{address}: line {number}"
                    try:
                        row = RawRow(place=place, fields=_parse_object(line, place=place))
                    except TaskFileError as error:
                        if not keeps_faults:
                            raise
                        row = RawRow(place=place, fields={}, fault=str(error))
                    yield row
    except OSError as error:
        raise TaskFileError(f"{address}: can't be read: {error}") from error


def _iterate_lines(stream: Any, address: str, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines; holds one line and one piece at a time.

    Only a line feed ends a line: `str.splitlines` would also cut at U+2028, which JSON allows in texts.
    """
    pending = bytearray()
    number = 1
    while piece := stream.read(PIECE_BYTES):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            pending += end
            _check_length(pending, address, number, max_line_bytes)
            yield number, bytes(pending)
            pending.clear()
            number += 1
        pending += rest
        _check_length(pending, address, number, max_line_bytes)
    yield number, bytes(pending)


def _check_length(line: bytearray, address: str, number: int, max_line_bytes: int) -> None:
    if len(line) > max_line_bytes:
        raise TaskFileError(
            f"{address}: line {number} is longer than max_line_bytes={max_line_bytes};"
            " write one JSON object a line, or raise max_line_bytes"
        )


def _strip_mark(line: bytes, address: str) -> bytes:
    for mark, name in FOREIGN_MARKS.items():
        if line.startswith(mark):
            raise TaskFileError(f"{address}: line 1 begins with the mark of {name}; save the file as UTF-8")
    return line.removeprefix(codecs.BOM_UTF8)


def _parse_object(line: bytes, *, place: str) -> dict[str, Any]:
    if b"\0" in line:
        raise TaskFileError(
            f"{place}: NUL bytes, so this is binary or UTF-16 without its mark; save the file as UTF-8 text"
        )
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise TaskFileError(
            f"{place}: not UTF-8 at byte {error.start} (0x{line[error.start]:02x}); save the file as UTF-8"
        ) from error
    except RecursionError as error:
        raise TaskFileError(f"{place}: JSON nests too deep to be read; flatten the row") from error
    except ValueError as error:  # also a number of more digits than Python converts
        raise TaskFileError(f"{place}: not JSON: {error}; write one JSON object a line") from error
    if not isinstance(value, dict):
        raise TaskFileError(
            f"{place}: JSON, but {type(value).__name__} where an object is needed; write one object a line"
        )
    return value


def _read_parquet(address: str, *, keeps_faults: bool) -> Iterator[RawRow]:
    filesystem, path = open_filesystem(address)
    try:
        with filesystem.open_input_file(path) as file:
            batches = pq.ParquetFile(file).iter_batches(batch_size=1024)
            yield from _unpack(batches, address, keeps_faults=keeps_faults)
    except (pa.ArrowException, OSError) as error:
        raise TaskFileError(f"{address}: can't be read as Parquet: {error}") from error


def _read_dataset(address: str, *, keeps_faults: bool) -> Iterator[RawRow]:
    state = read_json_object(join(address, DATASET_STATE))
    try:
        shards = [join(address, entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise TaskFileError(
            f"{address}: {DATASET_STATE} lists no data files; save the dataset again with save_to_disk"
        ) from error
    yield from _unpack(_iterate_batches(shards), address, keeps_faults=keeps_faults)


def _iterate_batches(shards: list[str]) -> Iterator[pa.RecordBatch]:
    for shard in shards:
        filesystem, path = open_filesystem(shard)
        try:
            with filesystem.open_input_stream(path) as stream:
                yield from pa.ipc.open_stream(stream)
        except (pa.ArrowException, OSError) as error:
            raise TaskFileError(f"{shard}: can't be read as Arrow: {error}") from error


def _unpack(batches: Iterator[pa.RecordBatch], address: str, *, keeps_faults: bool) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for index in range(batch.num_rows):
            number += 1
            place = f"{address}: row {number}"
            try:  # Arrow checks texts only when they are unpacked
                [fields] = batch.slice(index, 1).to_pylist()
                row = RawRow(place=place, fields=fields)
            except UnicodeDecodeError as error:
                fault = f"{place}: text is not UTF-8: {error.reason}; write it again"
                if not keeps_faults:
                    raise TaskFileError(fault) from error
                row = RawRow(place=place, fields={}, fault=fault)
            yield row
