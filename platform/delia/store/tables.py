"""Directories with a manifest: Parquet tables on any filesystem, committed by the manifest.

    directory/  rows.parquet  parts/part-00000.parquet ...  manifest.json (written last)

A directory without a manifest is unfinished. Addresses are local paths or URIs (`s3://`, `gs://`)
that `pyarrow.fs` opens; a commit is the manifest, never a rename of a directory. A file is written
beside its name and moved onto it, so a half-written one is never taken for a whole one.
"""

import importlib.resources
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from delia.errors import StoreError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PACKAGE_SCHEME = "package://"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished directory holds and where it came from.

    `fingerprint` covers the settings and parents that made it; `root` covers its content.
    """

    kind: str
    fingerprint: str
    root: str
    counts: dict[str, int]
    parents: dict[str, str] = field(default_factory=dict)
    schema: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def open_filesystem(address: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a local path or a URI, and the path inside it.

    `package://name/inner` is a directory shipped inside an installed package; each process resolves
    it for itself, since the package lies elsewhere on another node.
    """
    try:
        if address.startswith(PACKAGE_SCHEME):
            package, _, inner = address.removeprefix(PACKAGE_SCHEME).partition("/")
            return pafs.LocalFileSystem(), str(importlib.resources.files(package)) + f"/{inner}"
        if "://" in address:
            filesystem, path = pafs.FileSystem.from_uri(address)
            return filesystem, path
        return pafs.LocalFileSystem(), os.path.abspath(address)
    except (OSError, ValueError, ModuleNotFoundError, pa.ArrowInvalid) as error:
        raise StoreError(f"can't open {address!r}: {error}; use a local path, s3:// or gs://") from error


@contextmanager
def _naming(address: str, doing: str, way_out: str) -> Iterator[None]:
    """Turn what storage raises into an error with the address and the way out.

    Raises:
        StoreError: In the place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(f"can't {doing} {address!r}: {error}; {way_out}") from error


def _reading(address: str) -> Any:
    return _naming(address, "read", "see that it can be reached from here, or set another address")


def writing(address: str) -> Any:
    """Name the address and the way out where it can't be written; see `_naming`."""
    return _naming(address, "write", "free space there or allow writing, or set another output_dir")


def join(address: str, *names: str) -> str:
    """Append names to a path or a URI, before its options (`s3://bucket/runs?region=eu-west-1`)."""
    place, mark, options = address.partition("?") if "://" in address else (address, "", "")
    return "/".join((place.rstrip("/"), *(name for name in names if name))) + mark + options


def exists(address: str) -> bool:
    """Tell whether a file or a directory is at an address."""
    filesystem, path = open_filesystem(address)
    with _reading(address):
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


@contextmanager
def _open_sink(address: str) -> Iterator[Any]:
    """Open a file for writing that has its name once the block has ended without an error.

    Raises:
        StoreError: It can't be written; nothing of it is left on a local disk.
    """
    filesystem, path = open_filesystem(address)
    with writing(address):
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        if not isinstance(filesystem, pafs.LocalFileSystem):
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                # an object appears when its stream is closed, whatever has happened: all is there before it is opened,
                # and an interrupt, which only a process's first thread sees, waits until all is written
                with ThreadPoolExecutor(1) as thread:
                    thread.submit(_upload, file, filesystem, path).result()
            return
        partial = f"{path}.partial-{uuid.uuid4().hex}"  # a process id is not unique where hosts share a disk
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)


def _upload(file: IO[bytes], filesystem: pafs.FileSystem, path: str) -> None:
    with filesystem.open_output_stream(path) as stream:
        shutil.copyfileobj(file, stream)


def write_bytes(address: str, data: bytes) -> None:
    """Write a whole file, or nothing that has its name.

    Raises:
        StoreError: It can't be written; nothing of it is left on a local disk.
    """
    with _open_sink(address) as sink:
        sink.write(data)


@contextmanager
def leave_mark(address: str) -> Iterator[str]:
    """Write a small file into a directory, and remove it at the end: work is lost where it can't be kept.

    Yields:
        The file's address, by which another process can tell whether it sees the same directory.

    Raises:
        StoreError: It can't be written, with the reason.
    """
    mark = join(address, f".writable-{uuid.uuid4().hex}")
    write_bytes(mark, bytes(4096))
    try:
        yield mark
    finally:
        filesystem, path = open_filesystem(mark)
        with suppress(OSError):  # who may write may not be allowed to remove
            filesystem.delete_file(path)


def read_bytes(address: str) -> bytes:
    """Read a whole file.

    Raises:
        StoreError: Nothing is there, or it can't be read.
    """
    filesystem, path = open_filesystem(address)
    with _reading(address):
        try:
            with filesystem.open_input_stream(path) as stream:
                return bytes(stream.read())
        except FileNotFoundError as error:
            raise StoreError(f"no file at {address!r}") from error


@contextmanager
def open_table(address: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Write one Parquet file table by table, whole or not at all: for rows that don't fit in memory.

    Raises:
        StoreError: It can't be written.
    """
    with _open_sink(address) as sink, pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        yield writer


def write_table(address: str, table: pa.Table) -> None:
    """Write one Parquet file, whole or not at all."""
    with open_table(address, table.schema) as writer:
        writer.write_table(table)


def read_table(address: str) -> pa.Table:
    """Read one Parquet file.

    Raises:
        StoreError: It is missing, not Parquet, or was cut or changed after it was written.
    """
    data = read_bytes(address)
    with _parsing(address):
        return pq.read_table(pa.BufferReader(data))


@contextmanager
def open_parquet(address: str) -> Iterator[pq.ParquetFile]:
    """Open one Parquet file to read parts of it.

    Raises:
        StoreError: See `read_table`.
    """
    if not exists(address):
        raise StoreError(f"no file at {address!r}")
    filesystem, path = open_filesystem(address)
    with _parsing(address), filesystem.open_input_file(path) as source:
        yield pq.ParquetFile(source, pre_buffer=True)


@contextmanager
def _parsing(address: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"{address!r} is not a Parquet file, or not a whole one: {reason}; remove it and run its job again,"
            " which makes it anew, or restore it"
        ) from error


def list_names(address: str) -> list[str]:
    """Return the names in a directory, sorted; none if there is no directory."""
    filesystem, path = open_filesystem(address)
    selector = pafs.FileSelector(path, allow_not_found=True)
    with _reading(address):
        return sorted(info.base_name for info in filesystem.get_file_info(selector))


def commit(address: str, manifest: Manifest) -> None:
    """Write the manifest, which makes the directory finished."""
    text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False, sort_keys=True)
    write_bytes(join(address, MANIFEST), text.encode())


def read_manifest(address: str, *, kind: str) -> Manifest:
    """Read the manifest of a finished directory.

    Raises:
        StoreError: The directory is unfinished, of another kind, or written by a newer version, or the
            manifest was damaged.
    """
    if not is_finished(address):
        raise StoreError(f"{address!r} has no {MANIFEST}: it is unfinished; run its job again to resume it")
    try:
        tree = json.loads(read_bytes(join(address, MANIFEST)))
    except ValueError as error:
        raise StoreError(
            f"{join(address, MANIFEST)!r} was damaged: {error}; remove it and run its job again, or restore it"
        ) from error
    if tree.get("format_version", 0) > FORMAT_VERSION:
        raise StoreError(
            f"{address!r} has format version {tree['format_version']}, this delia reads up to"
            f" {FORMAT_VERSION}; upgrade delia"
        )
    if tree.get("kind") != kind:
        raise StoreError(f"{address!r} holds a {tree.get('kind')!r}, a {kind!r} is needed here")
    return Manifest(**tree)


def is_finished(address: str) -> bool:
    """Tell whether the directory has its manifest."""
    return exists(join(address, MANIFEST))
