"""Directories with a manifest: Parquet tables on any filesystem, committed by the manifest.

    directory/  rows.parquet  parts/part-00000.parquet ...  manifest.json (written last)

A directory without a manifest is unfinished. Addresses are local paths or URIs (`s3://`, `gs://`)
that `pyarrow.fs` opens; a commit is the manifest, never a rename of a directory. A file is written
beside its name and moved onto it, so a half-written one is never taken for a whole one.
"""

import importlib.resources
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import xxhash

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


def join(address: str, *names: str) -> str:
    """Append names to a path or a URI."""
    return "/".join((address.rstrip("/"), *(name for name in names if name)))


def exists(address: str) -> bool:
    """Tell whether a file or a directory is at an address."""
    filesystem, path = open_filesystem(address)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def write_bytes(address: str, data: bytes) -> None:
    """Write a whole file, or nothing that has its name."""
    filesystem, path = open_filesystem(address)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_output_stream(path) as stream:  # an object appears when it is closed
            stream.write(data)
        return
    partial = f"{path}.partial-{os.getpid()}"
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_bytes(address: str) -> bytes:
    """Read a whole file.

    Raises:
        StoreError: Nothing is there.
    """
    filesystem, path = open_filesystem(address)
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())
    except FileNotFoundError as error:
        raise StoreError(f"no file at {address!r}") from error


def upload_directory(directory: Path, address: str) -> None:
    """Copy a local directory's files below an address; the caller commits what is complete."""
    filesystem, path = open_filesystem(address)
    filesystem.create_dir(path, recursive=True)
    pafs.copy_files(str(directory), path, destination_filesystem=filesystem)


def write_table(address: str, table: pa.Table) -> None:
    """Write one Parquet file, whole or not at all."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(address, sink.getvalue().to_pybytes())


def read_table(address: str) -> pa.Table:
    """Read one Parquet file.

    Raises:
        StoreError: It is missing or not Parquet.
    """
    try:
        return pq.read_table(pa.BufferReader(read_bytes(address)))
    except pa.ArrowInvalid as error:
        raise StoreError(f"{address!r} is not a Parquet file: {error}") from error


def list_names(address: str) -> list[str]:
    """Return the names in a directory, sorted; none if there is no directory."""
    filesystem, path = open_filesystem(address)
    selector = pafs.FileSelector(path, allow_not_found=True)
    return sorted(info.base_name for info in filesystem.get_file_info(selector))


def merkle_root(leaves: list[str]) -> str:
    """Return the Merkle root over ordered leaf hashes; of no leaves, the hash of nothing."""
    level = [bytes.fromhex(leaf) for leaf in leaves] or [xxhash.xxh3_128_digest(b"")]
    while len(level) > 1:
        level += level[-1:] if len(level) % 2 else []
        level = [xxhash.xxh3_128_digest(level[i] + level[i + 1]) for i in range(0, len(level), 2)]
    return level[0].hex()


def commit(address: str, manifest: Manifest) -> None:
    """Write the manifest, which makes the directory finished."""
    text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False, sort_keys=True)
    write_bytes(join(address, MANIFEST), text.encode())


def read_manifest(address: str, *, kind: str) -> Manifest:
    """Read the manifest of a finished directory.

    Raises:
        StoreError: The directory is unfinished, of another kind, or written by a newer version.
    """
    if not is_finished(address):
        raise StoreError(f"{address!r} has no {MANIFEST}: it is unfinished; run its job again to resume it")
    tree = json.loads(read_bytes(join(address, MANIFEST)))
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
