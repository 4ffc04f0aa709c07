"""The safetensors files of a model, rewritten one at a time: what no change touches is linked or copied.

    model.safetensors, or model-00001-of-00030.safetensors ... with model.safetensors.index.json

One file is in memory at a time, so a base of 140 GB needs the memory of its largest file.
"""

import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from delia.errors import StoreError
from delia.store.changes import WeightChange

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"
PLAIN_DTYPES = frozenset(("F32", "F16", "BF16"))


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Where a model's weights lie: weight name -> file name in `directory`; `index` is that of shards."""

    directory: Path
    file_by_name: Mapping[str, str]
    index: Mapping[str, Any] | None = None

    def names_in(self, file: str) -> list[str]:
        """Return the names of the weights of one file."""
        return [name for name, found in self.file_by_name.items() if found == file]

    def check(self, changes: Mapping[str, WeightChange]) -> None:
        """Refuse changes that these weights can't take, before any work.

        Raises:
            StoreError: A weight is missing, of another shape, or quantised.
        """
        for name, change in changes.items():
            if name not in self.file_by_name:
                raise StoreError(f"{self.directory} has no weight {name!r}, which the adapter changes")
            with safe_open(str(self.directory / self.file_by_name[name]), framework="pt") as file:
                found = file.get_slice(name)
                shape, dtype = tuple(found.get_shape()), found.get_dtype()
            if shape != change.shape:
                raise StoreError(
                    f"{self.directory}: {name!r} has shape {shape}, the adapter changes {change.shape};"
                    " give the base that it was trained on"
                )
            if dtype not in PLAIN_DTYPES:
                raise StoreError(
                    f"{self.directory}: {name!r} is stored as {dtype}; only {sorted(PLAIN_DTYPES)} can be"
                    " changed: give the base in full precision"
                )


def find_weights(directory: Path) -> WeightFiles:
    """Find the safetensors files of a model as transformers does: one whole file, else the index.

    Raises:
        StoreError: There are none, or some are missing; pickled weights are not read.
    """
    if (directory / WHOLE).is_file():
        with safe_open(str(directory / WHOLE), framework="pt") as file:
            return WeightFiles(directory=directory, file_by_name=dict.fromkeys(file.keys(), WHOLE))
    if not (directory / INDEX).is_file():
        raise StoreError(f"{directory} has neither {WHOLE} nor {INDEX}; give a model in safetensors")
    index = json.loads((directory / INDEX).read_text())
    missing = sorted({file for file in index["weight_map"].values() if not (directory / file).is_file()})
    if missing:
        raise StoreError(
            f"{directory}: {INDEX} names {missing[:3]}, which are not there; fetch the base again"
        )
    return WeightFiles(directory=directory, file_by_name=index["weight_map"], index=index)


def write_changed(
    files: WeightFiles,
    changes: Mapping[str, WeightChange],
    output: Path,
    *,
    dtype: torch.dtype,
    new_head_from: str | None = None,
    copy: bool = False,
) -> dict[str, int]:
    """Write a model's weights with changes; files that hold none of them are linked.

    Args:
        files: The model's weights; they stay as they are.
        changes: By weight name; `WeightFiles.check` has passed.
        output: An existing directory.
        dtype: In which the model will be loaded; what is changed is not rounded to a narrower one.
        new_head_from: The weight whose old values become an output head of its own, beside it.
        copy: Copy instead of link, for a directory that is to be moved.

    Returns:
        The number of files that were rewritten, and linked or copied.
    """
    counts = {"files_rewritten": 0, "files_kept": 0}
    grown: Counter[str] = Counter()
    for file in sorted(set(files.file_by_name.values())):
        names = files.names_in(file)
        if not changes.keys() & set(names):
            keep_file(files.directory / file, output / file, copy=copy)
            counts["files_kept"] += 1
            continue
        with safe_open(str(files.directory / file), framework="pt") as opened:
            old = {name: opened.get_tensor(name) for name in names}
            metadata = opened.metadata() or {"format": "pt"}
        new = dict(old)
        for name in changes.keys() & old.keys():
            wide = torch.promote_types(old[name].dtype, dtype)
            new[name] = changes[name].apply(old[name], wide).contiguous()
        if new_head_from in old:
            new[HEAD] = old[new_head_from]
        write_tensors(output / file, new, metadata)
        counts["files_rewritten"] += 1
        grown.update(measure_tensors(new))
        grown.subtract(measure_tensors(old))
    before = (files.index or {}).get("metadata", {})
    totals = {key: before.get(key, 0) + count for key, count in grown.items()}
    write_index(files, output, totals, new_head_from=new_head_from)
    return counts


def write_index(
    files: WeightFiles, output: Path, totals: Mapping[str, int], *, new_head_from: str | None = None
) -> None:
    """Write the index of files that were rewritten, if they have one.

    Args:
        files: The model's weights as they were.
        output: Where they now are.
        totals: Of all files that are now there (`measure_tensors`).
        new_head_from: See `write_changed`.
    """
    if files.index is None:
        return
    new_names = {HEAD: files.file_by_name[new_head_from]} if new_head_from else {}
    metadata = files.index.get("metadata", {})
    index = {
        "metadata": metadata | {key: count for key, count in totals.items() if key in metadata},
        "weight_map": {**files.file_by_name, **new_names},
    }
    write_text(output / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def measure_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return what an index says of all weights: their bytes and how many numbers they are."""
    return {
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "total_parameters": sum(tensor.numel() for tensor in tensors.values()),
    }


def keep_file(source: Path, target: Path, *, copy: bool) -> None:
    """Put a file elsewhere as it is: a link where links can be, else a copy."""
    with placing(target) as partial:
        if not copy:
            try:
                os.symlink(source.resolve(), partial)
            except OSError:  # a share without links
                copy = True
        if copy:
            shutil.copyfile(source, partial)


def write_tensors(target: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a whole safetensors file, or nothing that has its name; others may read it as any file."""
    with placing(target) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(mode)  # safetensors makes a file for its owner alone


def write_text(target: Path, text: str) -> None:
    """Write a whole text file, or nothing that has its name."""
    with placing(target) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def placing(target: Path) -> Iterator[Path]:
    """Yield a name to write to, which is moved onto the target; a half-written file never has its name.

    Raises:
        StoreError: In the place of an `OSError`.
    """
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex}")
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise StoreError(
            f"can't write {str(target)!r}: {error}; free space there or allow writing, or set another directory"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
