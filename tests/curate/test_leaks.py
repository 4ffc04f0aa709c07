"""Control tokens that are spelled out in a chat."""

import pytest

from delia.chat import load_chat
from delia.curate.leaks import ControlTexts
from delia.curate.pipeline import Curator
from delia.curate.screening import Screener
from delia.curate.settings import CurateConfig
from delia.schema import TEMPLATE_LEAK, Message, Rejection, Row
from delia.starter.task_files import TOKEN
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")


def make_row(instruction: str, answer: str = "tom", *, system: str = "") -> Row:
    messages = (
        Message(role="system", content=system),
        Message(role="user", content=instruction),
        Message(role="assistant", content=answer),
    )
    return Row(row_id="r0", index=0, source="s", messages=messages)


@pytest.fixture(scope="module")
def starter_texts() -> ControlTexts:
    """What a workspace gives for the starter with a task token."""
    chat = load_chat(str(resolve_model(STARTER)), task_tokens=[TOKEN])
    return ControlTexts(chat.table.control_ids, task_tokens=chat.token_ids)


@pytest.mark.parametrize(
    ("row", "is_leak"),
    [
        (make_row("name a cat"), False),
        (make_row("name a cat <|end|> now"), True),
        (make_row("name a cat", "tom<|assistant|>"), True),
        (make_row("name a cat", system="x<|user|>"), True),
        (make_row("name a cat <|reserved_3|>"), True),
        (make_row("name a cat <|END|>"), False),
        (make_row("name a cat <| end |>"), False),
    ],
)
def test_the_starters_control_tokens_are_found_in_every_turn(
    starter_texts: ControlTexts, row: Row, is_leak: bool  # noqa: FBT001
):  # fmt: skip
    assert starter_texts.leaks(row) is is_leak


def test_a_task_token_belongs_into_instructions_and_not_into_answers(starter_texts: ControlTexts):
    """Its row is for input only: an answer that holds it would train the model to emit it."""
    assert not starter_texts.leaks(make_row(f"use the {TOKEN} format .", system=TOKEN))
    assert starter_texts.leaks(make_row("use the format .", f"here it is : {TOKEN}"))


def test_texts_are_compared_as_they_are_and_blank_ones_are_left_out():
    texts = ControlTexts(["[INST]", ".*", " ", ""])

    assert [texts.leaks(make_row(text)) for text in ("a b", "INST", "[INST] a", "a.*b")] == [
        False, False, True, True
    ]  # fmt: skip
    assert not ControlTexts().leaks(make_row("<|end|>", "<|end|>"))


def test_the_curator_names_a_leak_unless_the_rule_is_off():
    row, texts = make_row("name a cat <|end|>"), ControlTexts(["<|end|>"])
    (rejection,) = Curator(Screener(CurateConfig(), control_texts=texts)).feed([row])

    assert isinstance(rejection, Rejection)
    assert rejection.reason == TEMPLATE_LEAK == "template_leak"
    assert Curator(Screener(CurateConfig(reject_template_leaks=False), control_texts=texts)).feed([row]) == [
        row
    ]
