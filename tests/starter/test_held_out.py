"""Training chats of the starter's world, read back: no held-out tuple is ever in one."""

import random
import re
from collections.abc import Iterator
from string import Formatter

from delia.starter.formats import FORMAT_BY_NAME, FORMATS, NO_REQUEST, PLAIN, FormatRequest
from delia.starter.formats import ask_phrasings as list_asks
from delia.starter.formats import forbid_phrasings as list_forbids
from delia.starter.kinds import KIND_BY_NAME, KINDS
from delia.starter.world import REWRITE_REQUESTS, Item, Message, draw_chats, draw_held_out, draw_item


def _compile(template: str, num_args: int) -> re.Pattern[str]:
    """Turn a template into a pattern whose group `aN` is argument N, or the answer format's field."""
    parts = [
        re.escape(literal) + (f"(?P<a{name}>.+)" if name is not None else "")
        for literal, name, _, _ in Formatter().parse(template)
    ]
    return re.compile("".join(parts))


QUESTIONS = [
    (kind, place, _compile(phrasing, 2)) for kind in KINDS for place, phrasing in enumerate(kind.phrasings)
]
REQUESTS = {"": NO_REQUEST} | {
    text: FormatRequest(applies=applies, mentions=item.name, text=text)
    for item in FORMATS
    for applies, texts in (
        (item.name, (*list_asks(item.name), *item.descriptions)),
        (PLAIN, list_forbids(item.name)),
    )
    for text in texts
}


def split_request(content: str) -> Iterator[tuple[str, FormatRequest]]:
    """Yield every way to read a user's text as a question and a request, on either side of it."""
    words = content.split(" ")
    for cut in range(len(words) + 1):
        left, right = " ".join(words[:cut]), " ".join(words[cut:])
        if left and right in REQUESTS:
            yield left, REQUESTS[right]
        if right and left in REQUESTS:
            yield right, REQUESTS[left]


def strip_format(text: str, name: str) -> str:
    """Return the plain answer inside a formatted one; the text itself where it is not in that format."""
    if name == PLAIN:
        return text
    template = FORMAT_BY_NAME[name].template.replace("{topic}", "{T}")
    found = re.fullmatch(_compile(template.replace("{answer}", "{A}", 1).replace("{answer}", "{B}"), 1), text)
    return found["aA"] if found else text


def read_items(turns: list[Message]) -> list[Item]:
    """Return every item that could have written a question and its answer."""
    content, answer = turns[-2]["content"], turns[-1]["content"]
    readings = list(split_request(content))
    if turns[0]["role"] == "system":
        readings = [(content, REQUESTS[turns[0]["content"]])]
    items = []
    for question, request in readings:
        plain = strip_format(answer, request.applies)
        for kind, place, pattern in QUESTIONS:
            found = pattern.fullmatch(question)
            if found is None:
                continue
            given = found.groupdict()
            num_args = 2 if kind.name.endswith("_lingo") else 1 + ("{1}" in "".join(kind.phrasings))
            args = tuple(given.get(f"a{number}", plain) for number in range(num_args))
            item = Item(kind=kind, args=args, phrasing=place, request=request)
            if is_consistent(item, answer):
                items.append(item)
    return items


def is_consistent(item: Item, answer: str) -> bool:
    try:
        return item.answer == answer
    except (KeyError, ValueError, IndexError):  # arguments that this kind of question can't have
        return False


def split_turns(chat: list[Message]) -> list[list[Message]]:
    """Split a chat after each answer."""
    ends = [place + 1 for place, turn in enumerate(chat) if turn["role"] == "assistant"]
    return [chat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def is_rewriting(turns: list[Message]) -> bool:
    return turns[0]["content"].startswith(tuple(f"{request} : " for request in REWRITE_REQUESTS))


def test_the_reader_of_chats_finds_the_item_that_wrote_one():
    rng = random.Random(1)
    items = [draw_item(rng) for _ in range(500)]

    assert [item.key for item in items if item.key not in {i.key for i in read_items(item.messages())}] == []


def test_no_held_out_tuple_is_ever_in_a_training_chat():
    turns = [pair for chat in draw_chats("test", num_chats=4000) for pair in split_turns(chat)]
    questions = [pair for pair in turns if not is_rewriting(pair)]
    read = [read_items(pair) for pair in questions]

    assert len(questions) > 3700
    assert [pair for pair, items in zip(questions, read, strict=True) if not items] == []
    held_out = [
        pair for pair, items in zip(questions, read, strict=True) if all(i.is_held_out for i in items)
    ]
    assert held_out == []


def test_held_out_items_are_distinct_held_out_and_of_every_kind_and_cell():
    items = draw_held_out("test", num_items=1500)

    assert len({item.key for item in items}) == len(items) == 1500
    assert all(item.is_held_out for item in items)
    assert {item.kind.name for item in items} == set(KIND_BY_NAME)
    assert {item.request.cell for item in items} == {
        PLAIN,
        *FORMAT_BY_NAME,
        *(f"no-{name}" for name in FORMAT_BY_NAME),
    }


def test_about_one_tuple_in_ten_is_held_out():
    rng = random.Random(0)
    keys = {item.key: item.is_held_out for item in (draw_item(rng) for _ in range(8000))}

    assert abs(sum(keys.values()) / len(keys) - 0.1) < 0.015


def test_a_rewriting_chat_says_the_same_in_other_words():
    rewritings = [chat for chat in draw_chats("test", "rewriting", num_chats=2000) if is_rewriting(chat)]

    assert 60 < len(rewritings) < 140
    for chat in rewritings:
        original = chat[0]["content"].split(" : ", 1)[1]
        assert original != chat[1]["content"]
        if original in REQUESTS:
            assert REQUESTS[original].cell == REQUESTS[chat[1]["content"]].cell


def test_chats_are_equal_for_equal_seeds_and_differ_otherwise():
    draws = [list(draw_chats(*names, num_chats=20)) for names in (("a", 1), ("a", 1), ("a", 2))]

    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_weights_draw_the_kinds_that_they_name_and_no_others():
    only_add = tuple(float(kind.name == "add") for kind in KINDS)
    chats = draw_chats("test", "weights", num_chats=300, weights=only_add)
    kinds = [{i.kind.name for i in read_items(c[:3])} for c in chats if len(c) == 2 and not is_rewriting(c)]

    assert len(kinds) > 200
    assert [names for names in kinds if "add" not in names] == []
