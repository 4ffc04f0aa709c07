"""Task files of any user -> Task, and back: an address -> rows by split, checked as a whole.

    directory/  task.yaml  train.jsonl  dev.jsonl  test.jsonl   (or .parquet; dev and test may be absent)
    rows.jsonl | rows.parquet                                   one file, split here
    directory/  state.json ... | dataset_dict.json ...          saved by `datasets.save_to_disk`
    hf://datasets/ORG/NAME@COMMIT                               data/train-00000-of-00002.parquet ..., as on the hub

A file or a single dataset is split by the hash of each row's prompt: the rows of one prompt stay
together, and a row keeps its split however the file grows. Files that are split already are taken as
they are, so a split that is absent there is empty here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import yaml
from pydantic import Field, model_validator

from delia.config import FrozenConfig, validate
from delia.errors import ConfigError, StoreError, TaskFileError
from delia.rng import hash_text
from delia.schema import SPLITS, SeedTask, Split, Task, hash_messages
from delia.store.tables import join, list_names, open_filesystem, read_bytes, write_bytes
from delia.store.task_columns import ColumnMapping, check_text, render_row
from delia.store.task_files import SUFFIXES, RawRow, read_raw_rows
from delia.store.task_forms import HEADER, HUB_SCHEME, SPLIT_BY_NAME, TaskForm, find_form, naming_hub_errors
from delia.store.task_rows import (
    PlacedRow,
    at_place,
    check_overlaps,
    check_tokens,
    name_rows,
    parse_each,
    parse_rows,
    split_rows,
)


class TaskConfig(FrozenConfig):
    """Where a task lies and what it is; what is left empty here is taken from its `task.yaml`.

    Fractions and seed split a single file; fractions are shares of prompts, 0 leaves a split empty.
    `max_line_bytes` bounds a line of JSON Lines.
    """

    path: str = Field(min_length=1)
    columns: ColumnMapping = ColumnMapping()
    tokens: tuple[str, ...] = ()
    long_instruction: str = ""
    metrics: tuple[str, ...] = ()
    licence: str = ""
    dev_fraction: float = Field(default=0.1, ge=0, lt=1)
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    seed: int = 0
    max_line_bytes: int = Field(default=32 << 20, gt=0)

    @model_validator(mode="after")
    def _leave_some_to_train(self) -> Self:
        if self.dev_fraction + self.test_fraction >= 1:
            raise ValueError("dev_fraction + test_fraction must be below 1, train gets the rest")
        return self


class TaskHeader(FrozenConfig):
    """The keys of `task.yaml`; an empty name stands for the directory's."""

    name: str = ""
    tokens: tuple[str, ...] = ()
    long_instruction: str = ""
    metrics: tuple[str, ...] = Field(default=("exact_match",), min_length=1)
    licence: str = ""
    columns: ColumnMapping = ColumnMapping()


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Foreign data.

    Attributes:
        items: In the file's order rows, and in the place of a malformed one the error that names its place.
        licence: That of rows which state none themselves.
    """

    items: Sequence[SeedTask | TaskFileError]
    licence: str = ""


def read_task(config: TaskConfig) -> Task:
    """Read and check a task before any work is done on it.

    Every split is a key of `rows_by_split`, in the order of its file. A row without an id gets its
    content hash; the second of two equal rows gets another, so that ids name rows.

    Raises:
        TaskFileError: The first thing that is wrong, with the file and the line or row.
    """
    path = config.path.rstrip("/") or "/"
    form, header, raw_by_split = _read_raw(config, path, keeps_faults=False)
    rows = parse_rows(raw_by_split, header.columns)
    if form.is_whole:
        fractions: dict[Split, float] = {"dev": config.dev_fraction, "test": config.test_fraction}
        with at_place(path):
            rows = split_rows(rows, fraction_by_split=fractions, seed=config.seed)
    return _assemble(rows, header, path)


def read_import(config: TaskConfig) -> Imported:
    """Read the train rows of foreign data, all rows of a single file, each by itself: no row costs another.

    Ids, tokens and the rows of other splits play no part, and are not checked.

    Raises:
        TaskFileError: What is wrong with the file as a whole, or with every row of it.
    """
    path = config.path.rstrip("/") or "/"
    _, header, raw_by_split = _read_raw(config, path, keeps_faults=True)
    with at_place(path):
        check_text(header.licence, f"the licence of {HEADER} or of the settings")
    return Imported(items=parse_each(raw_by_split, header.columns), licence=header.licence)


def write_task(directory: str, task: Task) -> None:
    """Write a task as a directory that `read_task` reads back, with an equal digest.

    Split files that are there already are replaced. `task.yaml` comes last: without it the directory
    is no task, so that a half-written one is never read.

    Raises:
        TaskFileError: `read_task` would refuse the task, or its digest is not that of its rows.
    """
    directory = directory.rstrip("/")
    fields_by_split = {
        split: [render_row(row) for row in task.rows_by_split.get(split, ())] for split in SPLITS
    }
    raw_by_split = {
        split: [
            RawRow(place=f"{join(directory, split)}.jsonl: line {number}", fields=fields)
            for number, fields in enumerate(rows, start=1)
        ]
        for split, rows in fields_by_split.items()
    }
    header = TaskHeader(
        name=task.name,
        tokens=task.tokens,
        long_instruction=task.long_instruction,
        metrics=task.metrics,
        licence=task.licence,
        columns=ColumnMapping(layout="messages"),
    )
    digest = _assemble(parse_rows(raw_by_split, header.columns), header, directory).digest
    if digest != task.digest:
        raise TaskFileError(
            f"{directory}: the task's digest {task.digest!r} is not that of its rows, {digest!r};"
            " make it with digest_task"
        )
    _clear(directory)
    for split, rows in fields_by_split.items():
        if rows:
            text = "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in rows)
            write_bytes(join(directory, f"{split}.jsonl"), text.encode())
    tree = header.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(tree, sort_keys=False)  # with allow_unicode, U+0085 comes back as a blank
    write_bytes(join(directory, HEADER), text.encode())


def digest_task(
    rows_by_split: Mapping[Split, Sequence[SeedTask]], tokens: Sequence[str], long_instruction: str
) -> str:
    """Return the hash of every row in order, the tokens and the long instruction; 32 hex digits."""
    hash_by_split = [
        hash_text(
            *(
                hash_text(
                    row.task_id,
                    row.suite,
                    row.phrasing,
                    row.licence,
                    hash_messages(row.messages),
                    hash_messages(row.base_messages),
                )
                for row in rows_by_split.get(split, ())
            )
        )
        for split in SPLITS
    ]
    return hash_text(hash_text(*tokens), long_instruction, *hash_by_split)


def _read_raw(
    config: TaskConfig, path: str, *, keeps_faults: bool
) -> tuple[TaskForm, TaskHeader, dict[Split, list[RawRow]]]:
    """Find what lies at a path and read every file of it."""
    with naming_hub_errors(path):
        form = find_form(path)
        header = _read_header(form, path, config)
        raw_by_split = {
            split: [
                row
                for file in files
                for row in read_raw_rows(
                    file, max_line_bytes=config.max_line_bytes, keeps_faults=keeps_faults
                )
            ]
            for split, files in form.files_by_split.items()
        }
    return form, header, raw_by_split


def _read_header(form: TaskForm, path: str, config: TaskConfig) -> TaskHeader:
    """Read `task.yaml` where there is one; what the settings say wins."""
    name = path.rpartition("/")[2]
    header = TaskHeader()
    if form.header is not None:
        try:
            tree = yaml.safe_load(read_bytes(form.header).decode("utf-8-sig")) or {}
        except (OSError, StoreError, yaml.YAMLError, RecursionError, ValueError) as error:
            raise TaskFileError(f"{form.header}: not YAML in UTF-8: {error}") from error
        if not isinstance(tree, dict):
            raise TaskFileError(f"{form.header}: names with values are needed, not {type(tree).__name__}")
        try:
            header = validate(TaskHeader, tree)
        except ConfigError as error:
            raise TaskFileError(
                f"{form.header}: {error}; the keys are {list(TaskHeader.model_fields)}"
            ) from error
    settings = {key: value for key, value in config if key in TaskHeader.model_fields}
    chosen = {key: value for key, value in settings.items() if value and value != ColumnMapping()}
    name = name.partition("@")[0] if path.startswith(HUB_SCHEME) else name
    stem = name.rpartition(".")[0] if name.lower().endswith(SUFFIXES) else name
    return header.model_copy(update={"name": header.name or stem} | chosen)


def _assemble(rows: list[PlacedRow], header: TaskHeader, path: str) -> Task:
    """Name the rows, check what no row shows alone, and build the task."""
    named = name_rows(rows)
    check_overlaps(named)
    with at_place(path):
        for text in (header.name, header.long_instruction, header.licence, *header.tokens, *header.metrics):
            check_text(text, f"a text of {HEADER} or of the settings")
        check_tokens(header.tokens, named)
    rows_by_split = {
        split: tuple(placed.row for placed in named if placed.split == split) for split in SPLITS
    }
    return Task(
        name=header.name,
        digest=digest_task(rows_by_split, header.tokens, header.long_instruction),
        rows_by_split=rows_by_split,
        tokens=header.tokens,
        long_instruction=header.long_instruction,
        metrics=header.metrics,
        licence=header.licence,
    )


def _clear(directory: str) -> None:
    """Delete what an earlier task left, its header first."""
    stale = {f"{name}{suffix}" for name in SPLIT_BY_NAME for suffix in SUFFIXES}
    present = list_names(directory)
    for name in [HEADER, *sorted(stale)]:
        if name in present:
            filesystem, path = open_filesystem(join(directory, name))
            filesystem.delete_file(path)
