"""The starter's world: right answers worked by hand, and the prompts that ask for them."""

import re

import pytest

from delia.rng import make_random
from delia.starter import lexicon as lex
from delia.starter.formats import FORMAT_BY_NAME, NO_REQUEST, PLAIN, FormatRequest, draw_request
from delia.starter.formats import ask_phrasings as list_asks
from delia.starter.formats import forbid_phrasings as list_forbids
from delia.starter.kinds import KIND_BY_NAME, draw_sentence, translate
from delia.starter.world import Item

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
