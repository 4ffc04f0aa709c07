"""Whole directories between this machine and any storage: a model, an adapter, a checkpoint."""

import tempfile
from pathlib import Path

import pyarrow.fs as pafs

from delia.errors import StoreError
from delia.store.tables import open_filesystem, writing

_fetched: dict[str, tempfile.TemporaryDirectory[str]] = {}


def upload_directory(directory: Path, address: str) -> None:
    """Copy a local directory's files below an address; the caller commits what is complete."""
    filesystem, path = open_filesystem(address)
    with writing(address):
        filesystem.create_dir(path, recursive=True)
        pafs.copy_files(str(directory), path, destination_filesystem=filesystem)


def fetch_directory(address: str, *, kind: str) -> Path:
    """Return a local directory with an address's files; a remote one is copied once a process.

    Raises:
        StoreError: Nothing is at the address, on this node.
    """
    filesystem, path = open_filesystem(address)
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        raise StoreError(
            f"no {kind} directory at {address!r} on this node; use storage that every node can read"
        )
    if isinstance(filesystem, pafs.LocalFileSystem):
        return Path(path)
    if address not in _fetched:
        folder = tempfile.TemporaryDirectory(prefix=f"delia-{kind}-")
        pafs.copy_files(path, folder.name, source_filesystem=filesystem)
        _fetched[address] = folder
    return Path(_fetched[address].name)
