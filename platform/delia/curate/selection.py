"""Pick a source's rows out of more accepted ones: the `Selector` socket.

    rows --make_columns--> columns --Selector, num_rows, seed--> row ids --select_rows--> Rows, Rejections

A source that is to supply N rows accepts `oversample` x N of its candidates first, in index order, and a
method keeps N of those; the others are rejected as `not_selected`, kept and counted. Both steps are functions of
the candidates in index order, so replicas and restarts don't change a pool.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from delia.config import MethodConfig
from delia.curate.embedding import Embedder
from delia.curate.openings import find_opening
from delia.curate.rejection import reject
from delia.errors import ConfigError
from delia.schema import Rejection, Row

NOT_SELECTED = "not_selected"

Columns = Mapping[str, NDArray[Any]]
"""Name -> one value a row, all in one order. `row_id` is always there; `embedding` is [N, D], unit rows."""


class Selector(Protocol):
    """A method of selection; a frozen value whose fields are its knobs."""

    def __call__(self, columns: Columns, *, num_rows: int, seed: int) -> list[str]:
        """Return the ids of `num_rows` different rows, 0 < num_rows <= N, in the order of choice."""
        ...


class SelectConfig(MethodConfig):
    """A selector, and how many accepted rows it chooses from, for each that it keeps."""

    oversample: float = Field(default=2.0, gt=1)
    seed: int = 0

    def count_accepted(self, num_rows: int) -> int:
        """Return how many rows a source accepts, to keep so many."""
        return math.ceil(num_rows * self.oversample)


def find_column(columns: Columns, name: str) -> NDArray[Any]:
    """Return a column.

    Raises:
        ConfigError: There is none of that name; with those that there are.
    """
    if name not in columns:
        raise ConfigError(f"a selector asks for column {name!r}, there are {sorted(columns)}")
    return columns[name]


def make_columns(rows: Sequence[Row], embed: Embedder) -> dict[str, NDArray[Any]]:
    """Return what selectors may read of rows: ids, sources, lengths in tokens; of user turns openings, embeddings."""
    texts = [row.user_text for row in rows]
    return {
        "row_id": np.array([row.row_id for row in rows], dtype=object),
        "source": np.array([row.source for row in rows], dtype=object),
        "num_prompt_tokens": np.array([row.num_prompt_tokens for row in rows]),
        "num_output_tokens": np.array([row.num_output_tokens for row in rows]),
        "opening": np.array([" ".join(find_opening(text)) for text in texts], dtype=object),
        "embedding": embed(texts),
    }


def select_rows(
    rows: Sequence[Row], select: Selector, *, num_rows: int, seed: int, embed: Embedder
) -> tuple[list[Row], list[Rejection]]:
    """Return the rows that a method keeps, in their order, and the rejections of the others.

    Raises:
        ConfigError: Fewer rows than are to be kept, or a method returned something else than so many
            different ids of theirs.
    """
    if not 0 < num_rows <= len(rows):
        raise ConfigError(
            f"a selector keeps 1 to {len(rows)} of {len(rows)} rows, got {num_rows}; lower num_rows"
        )
    chosen = select(make_columns(rows, embed), num_rows=num_rows, seed=seed)
    kept = set(chosen)
    if not (len(chosen) == len(kept) == num_rows and kept <= {row.row_id for row in rows}):
        raise ConfigError(
            f"{select!r} must return {num_rows} different ids of the given rows, got {len(chosen)}, of which"
            f" {len(kept)} differ and {len(kept & {row.row_id for row in rows})} are known; mend the method"
        )
    dropped = [reject(row, NOT_SELECTED) for row in rows if row.row_id not in kept]
    return [row for row in rows if row.row_id in kept], dropped
