"""What stands between rows and a selector: columns, counts, and what a method may return."""

import dataclasses
from collections.abc import Callable

import pytest
from pydantic import ValidationError

from delia.curate.embedding import embed_hashed
from delia.curate.selection import Columns, SelectConfig, make_columns, select_rows
from delia.errors import ConfigError
from delia.schema import Message, Row


def make_rows(num_rows: int) -> list[Row]:
    return [
        Row(
            row_id=f"r{index}",
            index=index,
            source="web",
            messages=(
                Message(role="user", content=f"Name the animal {index}"),
                Message(role="assistant", content="a fox"),
            ),
            num_prompt_tokens=10 + index,
            num_output_tokens=index,
        )
        for index in range(num_rows)
    ]


def choose(pick: Callable[[list[str]], list[str]]) -> Callable[..., list[str]]:
    def select(columns: Columns, *, num_rows: int, seed: int) -> list[str]:
        return pick([str(row_id) for row_id in columns["row_id"]])

    return select


def test_columns_are_what_is_known_of_rows_in_their_order():
    columns = make_columns(make_rows(3), embed_hashed)

    assert columns["row_id"].tolist() == ["r0", "r1", "r2"]
    assert columns["source"].tolist() == ["web"] * 3
    assert columns["opening"].tolist() == ["name animal"] * 3
    assert (columns["num_prompt_tokens"].tolist(), columns["num_output_tokens"].tolist()) == (
        [10, 11, 12],
        [0, 1, 2],
    )
    assert columns["embedding"].tolist() == embed_hashed([row.instruction for row in make_rows(3)]).tolist()


def test_openings_and_embeddings_are_of_what_users_say():
    system = Message(role="system", content="Answer like a pirate")
    rows = [dataclasses.replace(row, messages=(system, *row.messages)) for row in make_rows(3)]
    columns, plain = make_columns(rows, embed_hashed), make_columns(make_rows(3), embed_hashed)

    assert columns["opening"].tolist() == plain["opening"].tolist()
    assert columns["embedding"].tolist() == plain["embedding"].tolist()


def test_rows_keep_their_order_whatever_the_order_of_choice():
    kept, dropped = select_rows(
        make_rows(4), choose(lambda ids: [ids[3], ids[1]]), num_rows=2, seed=0, embed=embed_hashed
    )

    assert [row.row_id for row in kept] == ["r1", "r3"]
    assert [(item.row_id, item.index, item.text, item.num_output_tokens) for item in dropped] == [
        ("r0", 0, "Name the animal 0", 0),
        ("r2", 2, "Name the animal 2", 2),
    ]


@pytest.mark.parametrize("num_rows", [0, 5])
def test_more_rows_than_there_are_is_an_error_and_not_a_smaller_choice(num_rows: int):
    with pytest.raises(ConfigError, match=rf"keeps 1 to 4 of 4 rows, got {num_rows}"):
        select_rows(make_rows(4), choose(lambda ids: ids), num_rows=num_rows, seed=0, embed=embed_hashed)


@pytest.mark.parametrize(
    ("pick", "counts"),
    [
        (lambda ids: ids[:1], "got 1, of which 1 differ and 1 are known"),
        (lambda ids: ids[:3], "got 3, of which 3 differ and 3 are known"),
        (lambda ids: [ids[0], ids[0]], "got 2, of which 1 differ and 1 are known"),
        (lambda ids: [ids[0], ids[1], ids[1]], "got 3, of which 2 differ and 2 are known"),
        (lambda ids: [ids[0], "x"], "got 2, of which 2 differ and 1 are known"),
    ],
)
def test_a_method_that_returns_something_else_is_refused(pick: Callable[[list[str]], list[str]], counts: str):
    with pytest.raises(ConfigError, match=f"must return 2 different ids of the given rows, {counts}"):
        select_rows(make_rows(4), choose(pick), num_rows=2, seed=0, embed=embed_hashed)


def test_so_many_rows_are_accepted_for_each_that_is_kept():
    config = SelectConfig(method="delia.methods.selector.k_center.KCenter", oversample=1.5)

    assert [config.count_accepted(num_rows) for num_rows in (1, 2, 3, 100)] == [2, 3, 5, 150]
    with pytest.raises(ValidationError, match="oversample"):
        SelectConfig(method="x", oversample=1)
