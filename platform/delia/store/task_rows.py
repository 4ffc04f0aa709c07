"""Rows of a task as a whole: raw rows -> placed rows -> splits, ids, and what no row shows alone.

A row keeps the place that it was read from until every check has passed, so that a fault which two
rows make together still names both.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from delia.errors import TaskFileError
from delia.rng import derive_seed, hash_text
from delia.schema import SPLITS, SeedTask, Split, hash_messages
from delia.store.task_columns import OPTIONAL, ColumnMapping, parse_row, resolve_layout
from delia.store.task_files import RawRow


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlacedRow:
    """A row with its split, and its place for messages."""

    row: SeedTask
    split: Split
    place: str


@contextmanager
def at_place(place: str) -> Iterator[None]:
    """Put a place before the message of a TaskFileError that is raised inside."""
    try:
        yield
    except TaskFileError as error:
        raise TaskFileError(f"{place}: {error}") from None


def parse_rows(raw_by_split: Mapping[Split, list[RawRow]], columns: ColumnMapping) -> list[PlacedRow]:
    """Parse the rows of every split, train first, under one layout.

    Raises:
        TaskFileError: The first row that is wrong; no train row; or a renamed column that no row has.
    """
    if not raw_by_split["train"]:
        raise TaskFileError("train has 0 rows; a task needs at least one")
    first = raw_by_split["train"][0]
    with at_place(first.place):
        _check_renamed(raw_by_split, columns)
        resolved = resolve_layout(columns, first.fields)
    placed = []
    for split, rows in raw_by_split.items():
        for raw in rows:
            with at_place(raw.place):
                row = parse_row(raw.fields, resolved, is_train=split == "train")
            placed.append(PlacedRow(row=row, split=split, place=raw.place))
    return placed


def parse_each(
    raw_by_split: Mapping[Split, list[RawRow]], columns: ColumnMapping
) -> list[SeedTask | TaskFileError]:
    """Parse the train rows each by itself, under the layout of the first that has one.

    Returns:
        In the file's order rows, and in the place of a malformed one the error that names it.

    Raises:
        TaskFileError: That of the first row where none can be parsed; or a renamed column that no row has.
    """
    parsed: list[SeedTask | TaskFileError] = []
    resolved: ColumnMapping | None = None
    for raw in raw_by_split["train"]:
        try:
            with at_place(raw.place):
                resolved = resolved or resolve_layout(columns, raw.fields)
                parsed.append(parse_row(raw.fields, resolved, is_train=True))
        except TaskFileError as error:
            fault = raw.fault or str(error)
            parsed.append(TaskFileError(fault))  # not the one that was raised: its traceback holds the row
    if all(isinstance(item, TaskFileError) for item in parsed):
        raise TaskFileError(f"{parsed[0]} (and none of the {len(parsed)} rows can be read)")
    with at_place(raw_by_split["train"][0].place):
        _check_renamed(raw_by_split, columns)
    return parsed


def split_rows(
    rows: list[PlacedRow], *, fraction_by_split: Mapping[Split, float], seed: int
) -> list[PlacedRow]:
    """Move whole prompts out of train, each by a number in [0, 1) that its text and the seed give.

    Args:
        rows: Of one file; their order does not matter.
        fraction_by_split: Expected share of prompts of dev and of test; 0 leaves a split empty.
        seed: Another seed gives another split.

    Raises:
        TaskFileError: A split that was asked for got no row.
    """
    dev, test = fraction_by_split["dev"], fraction_by_split["test"]
    moved = []
    for placed in rows:
        number = derive_seed("split", seed, hash_messages(placed.row.prompt)) / 2**63
        split: Split = "test" if number < test else "dev" if number < test + dev else "train"
        moved.append(dataclasses.replace(placed, split=split))
    held = {placed.split for placed in moved}
    if empty := [split for split in SPLITS if fraction_by_split.get(split, 1) > 0 and split not in held]:
        raise TaskFileError(
            f"splitting {len(rows)} rows leaves {empty} without one; change dev_fraction (now {dev}),"
            f" test_fraction ({test}) or seed ({seed}), or give train, dev and test files"
        )
    return moved


def name_rows(rows: list[PlacedRow]) -> list[PlacedRow]:
    """Give a row without an id its content hash, and the next of equal rows a hash with its count."""
    named = []
    num_seen: Counter[str] = Counter()
    for placed in rows:
        content = hash_messages(placed.row.messages)
        num_seen[content] += 1
        default = content if num_seen[content] == 1 else hash_text(content, str(num_seen[content]))
        row = dataclasses.replace(placed.row, task_id=placed.row.task_id or default)
        named.append(dataclasses.replace(placed, row=row))
    return named


def check_overlaps(rows: list[PlacedRow]) -> None:
    """Refuse two rows of one id, and a dev or test row whose prompt was trained on.

    Raises:
        TaskFileError: With the places of both rows.
    """
    place_by_id: dict[str, str] = {}
    for placed in rows:
        if placed.row.task_id in place_by_id:
            raise TaskFileError(
                f"{placed.place}: the id {placed.row.task_id[:80]!r} is that of"
                f" {place_by_id[placed.row.task_id]} too; an id names one row"
            )
        place_by_id[placed.row.task_id] = placed.place
    trained = {hash_messages(placed.row.prompt): placed.place for placed in rows if placed.split == "train"}
    for placed in rows:
        prompt = hash_messages(placed.row.prompt)
        if placed.split != "train" and prompt in trained:
            raise TaskFileError(
                f"{placed.place}: this {placed.split} row has the prompt of the train row {trained[prompt]};"
                " its score would be one of memory, so remove one of the two"
            )


def check_tokens(tokens: tuple[str, ...], rows: list[PlacedRow]) -> None:
    """Refuse a token that is blank or that no train row holds: there is nothing to learn it from."""
    chats = [placed.row.messages for placed in rows if placed.split == "train"]
    for token in tokens:
        if not token.strip() or not any(token in turn.content for chat in chats for turn in chat):
            raise TaskFileError(
                f"the token {token!r} occurs nowhere in the {len(chats)} train rows;"
                " correct its spelling in tokens, or write it into the rows"
            )


def _check_renamed(raw_by_split: Mapping[Split, list[RawRow]], columns: ColumnMapping) -> None:
    """Refuse a name for an optional column that no row has: a misspelt one would go unseen."""
    found = {name for rows in raw_by_split.values() for raw in rows for name in raw.fields}
    name_by_field = columns.model_dump()
    for field in OPTIONAL:
        if name_by_field[field] not in {field, *found}:
            raise TaskFileError(
                f"no row has the column {name_by_field[field]!r} that columns.{field} names;"
                f" found {sorted(found)[:20]}"
            )
