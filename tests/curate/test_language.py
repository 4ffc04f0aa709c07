"""Foreign texts are found, and what can't be told is kept."""

import random

import pytest

from delia.curate.language import find_languages, is_foreign
from delia.errors import ConfigError
from delia.starter.world import draw_item


@pytest.mark.parametrize(
    "text",
    [
        "Schreibe ein Gedicht über den Herbst.",
        "Bonjour, comment allez-vous aujourd'hui ?",
        "Напиши короткий рассказ о зимнем лесе.",
        "你好吗",
    ],
)
def test_a_text_in_another_language_is_foreign_until_its_language_is_named(text: str):
    assert is_foreign(text, ("en",))
    assert not is_foreign(text, ("en", "de", "fr", "ru", "zh"))


@pytest.mark.parametrize(
    "text", ["", "42", "ok", "Hallo", "Ciao", "Sort [3,1,2]", "def f(x):\n    return x + 1", "<b>x</b>"]
)
def test_what_is_too_short_to_tell_is_kept(text: str):
    assert not is_foreign(text, ("en",))


def test_a_text_that_may_be_in_a_near_relative_of_the_language_is_kept():
    """The detector finds Danish likeliest (0.71), and Norwegian not impossible (0.19)."""
    text = "Hvad hedder hovedstaden i Frankrig ?"

    assert not is_foreign(text, ("nb",))
    assert is_foreign(text, ("en",))


def test_hundreds_of_short_english_questions_are_all_kept():
    rng = random.Random(3)
    texts = [draw_item(rng).prompt()[-1]["content"] for _ in range(300)]

    assert [text for text in texts if is_foreign(text, ("en",))] == []


def test_a_language_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"got \['english', 'xx'\]; there are \['af', 'ar',"):
        find_languages(("en", "english", "xx"))
