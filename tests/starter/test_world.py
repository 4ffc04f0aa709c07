"""The starter's world: right answers worked by hand, and held-out tuples that training never shows."""

import random
import re
from collections.abc import Iterator
from string import Formatter

import pytest

from delia.rng import make_random
from delia.starter import lexicon as lex
from delia.starter.formats import FORMAT_BY_NAME, FORMATS, NO_REQUEST, PLAIN, FormatRequest, draw_request
from delia.starter.formats import ask_phrasings as list_asks
from delia.starter.formats import forbid_phrasings as list_forbids
from delia.starter.kinds import KIND_BY_NAME, KINDS, draw_sentence, translate
from delia.starter.world import REWRITE_REQUESTS, Item, Message, draw_chats, draw_held_out, draw_item

LINGO = lex.TRANSLATIONS
WORKED = {
    "capital": (("spain",), "capital of spain", "madrid"),
    "country": (("madrid",), "country of madrid", "spain"),
    "category": (("bee",), "group of bee", "insect"),
    "colour": (("fox",), "colour of fox", "red"),
    "home": (("whale",), "place of whale", "sea"),
    "sound": (("cow",), "sound of cow", "moo"),
    "opposite": (("late",), "opposite of late", "early"),
    "reverse": (("fox cat dog bear",), "reverse fox cat dog bear", "bear dog cat fox"),
    "first": (("fox cat dog",), "first of fox cat dog", "fox"),
    "last": (("fox cat dog",), "last of fox cat dog", "dog"),
    "second": (("fox cat dog",), "second of fox cat dog", "cat"),
    "count": (("fox cat dog bear",), "count fox cat dog bear", "4"),
    "remove": (("fox cat dog", "cat"), "fox cat dog without cat", "fox dog"),
    "contains": (("fox cat", "bear"), "bear in fox cat", "no"),
    "repeat": (("owl", "3"), "owl times 3", "owl owl owl"),
    "add": (("17", "8"), "17 plus 8", "25"),
    "subtract": (("20", "3"), "20 minus 3", "17"),
    "double": (("49",), "double 49", "98"),
    "next": (("98",), "after 98", "99"),
    "larger": (("9", "80"), "larger of 9 and 80", "80"),  # as numbers: as text 9 would win
    "bigger": (("bee", "truck"), "bigger of bee and truck", "truck"),
    "to_lingo": (("the fox", LINGO["fox"]), "the fox in lingo", LINGO["fox"]),
    "from_lingo": (("the fox", LINGO["fox"]), f"{LINGO['fox']} in english", "the fox"),
}
RENDERED = {
    "sentence": "the answer is red .",
    "record": "{ thought : colour of fox , answer : red }",
    "quote": '" red "',
    "bullet": "- red",
    "arrow": "colour of fox => red",
    "tag": "< answer > red < / answer >",
    "twice": "red and again red",
    "report": "topic : colour of fox ; result : red",
}


def make_item(kind: str, args: tuple[str, ...], request: FormatRequest = NO_REQUEST, **fields: bool) -> Item:
    return Item(kind=KIND_BY_NAME[kind], args=args, phrasing=0, request=request, **fields)


# ---- answers


def test_the_hand_worked_cases_leave_out_no_kind_and_no_format():
    assert set(WORKED) == set(KIND_BY_NAME)
    assert set(RENDERED) == set(FORMAT_BY_NAME)


@pytest.mark.parametrize("kind", WORKED)
def test_the_answer_and_the_topic_of_a_kind_worked_by_hand(kind):
    args, topic, answer = WORKED[kind]
    item = make_item(kind, args)

    assert item.answer == answer
    assert item.answer_in("arrow") == f"{topic} => {answer}"


@pytest.mark.parametrize("name", RENDERED)
def test_a_format_worked_by_hand_applies_where_it_is_asked_for_and_not_where_it_is_forbidden(name):
    ask = FormatRequest(applies=name, mentions=name, text=f"use the {name} format .")
    forbid = FormatRequest(applies=PLAIN, mentions=name, text=f"skip the {name} format .")

    assert make_item("colour", ("fox",), ask).answer == RENDERED[name]
    assert make_item("colour", ("fox",), forbid).answer == "red"
    assert (ask.cell, forbid.cell, NO_REQUEST.cell) == (name, f"no-{name}", PLAIN)


@pytest.mark.parametrize(
    ("english", "words"),
    [
        ("fox", ["fox"]),
        ("the red fox", ["fox", "red"]),
        ("the fox sees the cat", ["fox", "cat", "sees"]),
        ("the red fox sees the cat", ["fox", "red", "cat", "sees"]),
    ],
)
def test_lingo_has_no_articles_the_colour_behind_its_noun_and_the_verb_last(english, words):
    assert translate(english) == " ".join(LINGO[word] for word in words)


def test_every_word_of_lingo_is_two_syllables_and_stands_for_one_english_word():
    assert set(LINGO) == {*lex.THINGS, *lex.VERBS, *lex.COLOURS}
    assert len(set(LINGO.values())) == len(LINGO)
    assert {len(word.split()) for word in LINGO.values()} == {2}


def test_words_that_the_base_is_not_to_know_are_in_no_translation_that_it_sees():
    rng = make_random("test", "known")
    known = frozenset(LINGO) - lex.UNKNOWN_TO_BASE
    translations = [KIND_BY_NAME[name].draw(rng)[0] for name in ("to_lingo", "from_lingo") * 500]
    translations += [draw_sentence(rng, words=known) for _ in range(500)]

    assert set(LINGO) >= lex.UNKNOWN_TO_BASE
    assert lex.UNKNOWN_TO_BASE & {word for text in translations for word in text.split()} == set()


def test_arithmetic_stays_among_the_numbers_from_0_to_99():
    rng = make_random("test", "numbers")
    names = ("add", "subtract", "double", "next", "larger", "count")
    answers = {int(kind.answer(kind.draw(rng))) for name in names * 300 for kind in [KIND_BY_NAME[name]]}

    assert 0 <= min(answers) <= max(answers) <= 99


# ---- prompts


def test_a_request_stands_behind_the_question_before_it_or_in_the_system_turn():
    ask = FormatRequest(applies="bullet", mentions="bullet", text="use the bullet format .")
    question = "what colour is the fox ?"
    turns = {
        (): [("user", f"{question} use the bullet format .")],
        ("request_first",): [("user", f"use the bullet format . {question}")],
        ("in_system",): [("system", "use the bullet format ."), ("user", question)],
    }
    for names, expected in turns.items():
        prompt = make_item("colour", ("fox",), ask, **dict.fromkeys(names, True)).prompt()
        assert [(turn["role"], turn["content"]) for turn in prompt] == expected
    assert make_item("colour", ("fox",), in_system=True).prompt() == [{"role": "user", "content": question}]


def test_a_prompt_takes_another_request_and_the_answer_stays_that_of_the_item():
    ask = FormatRequest(applies="bullet", mentions="bullet", text="use the bullet format .")
    item = make_item("colour", ("fox",), ask)

    assert item.prompt("be short .")[0]["content"] == "what colour is the fox ? be short ."
    assert item.messages()[-1] == {"role": "assistant", "content": "- red"}


@pytest.mark.parametrize("list_phrasings", [list_asks, list_forbids])
def test_phrasings_are_many_and_distinct_and_each_names_the_format_once(list_phrasings):
    phrasings = list_phrasings("<sep>")

    assert len(set(phrasings)) == len(phrasings) == 7 * 12 * 5
    assert {text.count("the <sep> format") for text in phrasings} == {1}
    assert [text for text in phrasings if "  " in text or not text.endswith(" .")] == []


def test_no_phrasing_both_asks_and_forbids():
    assert set(list_asks("record")) & set(list_forbids("record")) == set()
    assert [text for text in list_asks("record") if re.search(r"\b(not|never|avoid|skip)\b", text)] == []


def test_requests_are_drawn_as_often_as_documented():
    rng = make_random("test", "requests")
    cells = [draw_request(rng) for _ in range(12_000)]
    asked = [item for item in cells if item.applies != PLAIN]
    described = [item for item in asked if item.text in FORMAT_BY_NAME[item.applies].descriptions]
    counts = (
        cells.count(NO_REQUEST),
        len(asked) - len(described),
        len(described),
        sum(item.cell.startswith("no-") for item in cells),
    )

    assert [abs(count - share * 1000) < 150 for count, share in zip(counts, (3, 4, 2, 3), strict=True)] == [
        True
    ] * 4


# ---- held out


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
