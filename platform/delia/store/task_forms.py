"""What a task's path turned out to be: an address -> the files of each split.

    directory/  task.yaml  train.jsonl ...        rows.jsonl | rows.parquet
    directory/  state.json | dataset_dict.json    hf://datasets/ORG/NAME@COMMIT

A dataset of the hub is named with its commit, so that a job that goes on later reads the same rows.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow.fs as pafs

from delia.errors import StoreError, TaskFileError
from delia.schema import SPLITS, Split
from delia.store.tables import join, list_names, open_filesystem
from delia.store.task_files import DATASET_STATE, SUFFIXES, read_json_object

HEADER = "task.yaml"
DATASET_SPLITS = "dataset_dict.json"
HUB_SCHEME = "hf://"
HUB_DATA = "data"
HUB_NAME = re.compile(r"hf://datasets/[^/@]+/[^/@]+@[0-9a-f]{40}(/.*)?")
SHARD = re.compile(
    r"(?P<split>[a-z]+)(-(?P<number>\d{5})-of-(?P<total>\d{5})(-[0-9a-f]+)?)?\.(?P<suffix>jsonl|parquet)"
)
"""A file of a dataset on the hub: of a whole split, or one of its shards."""
SPLIT_BY_NAME: dict[str, Split] = {"train": "train", "dev": "dev", "validation": "dev", "test": "test"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskForm:
    """What a path turned out to be; where `is_whole`, train is one dataset that is still to be split."""

    files_by_split: dict[Split, list[str]]
    is_whole: bool = False
    header: str | None = None


def find_form(path: str) -> TaskForm:
    """Look at what lies at a path.

    Raises:
        TaskFileError: Nothing, nothing that is a task, or a dataset of the hub without a commit.
    """
    if path.startswith(HUB_SCHEME) and not HUB_NAME.fullmatch(path):
        raise TaskFileError(
            f"{path}: a dataset of the hub is named with its commit, since a branch may change under a job:"
            " hf://datasets/ORG/NAME@COMMIT, of 40 hexadecimal digits"
        )
    try:
        filesystem, inner = open_filesystem(path)
        kind = filesystem.get_file_info(inner).type
        names = list_names(path) if kind == pafs.FileType.Directory else []
    except (OSError, StoreError) as error:
        raise TaskFileError(f"{path}: can't be read: {error}") from error
    if kind == pafs.FileType.NotFound:
        raise TaskFileError(f"{path}: no such file or directory; correct the task's path")
    if HEADER in names:
        files = [name for name in names if name.lower().endswith(SUFFIXES)]
        return TaskForm(files_by_split=_match_splits(path, files), header=join(path, HEADER))
    if DATASET_SPLITS in names:
        splits = read_json_object(join(path, DATASET_SPLITS)).get("splits")
        if not isinstance(splits, list):
            raise TaskFileError(f"{path}: {DATASET_SPLITS} lists no splits; save the datasets again")
        return TaskForm(files_by_split=_match_splits(path, [str(name) for name in splits]))
    if kind == pafs.FileType.File or DATASET_STATE in names:
        return TaskForm(files_by_split={"train": [path]}, is_whole=True)
    if path.startswith(HUB_SCHEME) and (shards := _find_shards(path, names)):
        return TaskForm(files_by_split=shards, is_whole=shards.keys() == {"train"})
    raise TaskFileError(
        f"{path}: no form of a task; a directory needs {HEADER} and train.jsonl, or is one that"
        f" datasets.save_to_disk wrote; found {names[:20]}"
    )


def _find_shards(path: str, names: list[str]) -> dict[Split, list[str]]:
    """Return the files of each split of a dataset on the hub; other splits are left out, nothing without train.

    Raises:
        TaskFileError: A split is there in two forms, or lacks a shard.
    """
    found: dict[Split, list[tuple[str, re.Match[str]]]] = {}
    folders = {
        path: names,
        join(path, HUB_DATA): list_names(join(path, HUB_DATA)) if HUB_DATA in names else [],
    }
    for folder, files in folders.items():
        for match in filter(None, map(SHARD.fullmatch, files)):
            if match["split"] in SPLIT_BY_NAME:
                found.setdefault(SPLIT_BY_NAME[match["split"]], []).append((folder, match))
    for split, shards in found.items():
        numbers = [int(match["number"] or 0) for _, match in shards]
        forms = {(folder, match["split"], match["total"], match["suffix"]) for folder, match in shards}
        if len(forms) > 1 or sorted(numbers) != list(range(int(shards[0][1]["total"] or 1))):
            raise TaskFileError(
                f"{path}: the files of {split} are not each shard of one form once:"
                f" {[match[0] for _, match in shards]}; name one file"
            )
    addresses = {
        split: [join(folder, match[0]) for folder, match in sorted(shards, key=lambda item: item[1][0])]
        for split, shards in found.items()
    }
    return addresses if "train" in found else {}


@contextmanager
def naming_hub_errors(path: str) -> Iterator[None]:
    """Turn what the hub's client raises when the hub can't be reached into the error of a task file.

    Raises:
        TaskFileError: In the place of an error of transport, which is no `OSError` there.
    """
    if not path.startswith(HUB_SCHEME):
        yield
        return
    from httpx2 import HTTPError  # late: what the hub's client brings, and for hub datasets alone

    try:
        yield
    except (HTTPError, OSError) as error:
        raise TaskFileError(
            f"{path}: the hub can't be read: {error}; see whether this machine reaches it (HF_ENDPOINT, HF_HUB_OFFLINE)"
        ) from error


def _match_splits(path: str, names: list[str]) -> dict[Split, list[str]]:
    found: dict[Split, str] = {}
    for name in names:
        split = SPLIT_BY_NAME.get(name.partition(".")[0])
        if split is None:
            raise TaskFileError(
                f"{path}: {name!r} belongs to no split; call it {' or '.join(SPLIT_BY_NAME)}, or move it away"
            )
        if split in found:
            raise TaskFileError(f"{path}: {found[split]!r} and {name!r} are both {split}; keep one")
        found[split] = name
    if "train" not in found:
        raise TaskFileError(f"{path}: no train rows, found {names}; add train.jsonl")
    return {split: [join(path, found[split])] for split in SPLITS if split in found}
