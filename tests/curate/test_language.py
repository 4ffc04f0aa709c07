"""Foreign texts are found, and what can't be told is kept."""

import random
from collections.abc import Iterator

import pytest

from delia.curate import language
from delia.curate.language import find_languages, is_foreign
from delia.errors import ConfigError
from delia.starter.world import draw_item


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Let no test find what another one asked."""
    language._judge_short.cache_clear()
    yield
    language._judge_short.cache_clear()


FOREIGN = {
    "de": ("Wie heißt die Hauptstadt von Polen?", "Der Hund ist in Berlin.", "Das Land im Winter."),
    "fr": ("Quelle est la capitale de la Pologne ?", "Le restaurant est cher.", "Cite trois animaux."),
    "es": ("¿Cuál es la capital de Polonia?", "El animal es normal.", "Escribe un cuento sobre el mar."),
    "it": ("Qual è la capitale della Polonia?", "Il gatto è nero.", "Dimmi tre animali marini."),
    "nl": ("Wat is de hoofdstad van Polen?", "Het water is warm in de winter.", "De hand is open."),
    "pt": ("Qual é a capital da Polônia?", "O hotel é central.", "Nomeie um animal."),
    "sv": ("Vad heter Polens huvudstad?", "Det är en hund.", "Skriv en kort text om vintern."),
    "pl": ("Jaka jest stolica Polski?", "To jest kot.", "Podaj trzy miasta."),
    "tr": ("Polonya'nın başkenti neresi?", "Kedi siyah.", "Bana bir hikaye anlat."),
    "fi": ("Mikä on Puolan pääkaupunki?", "Kissa on musta.", "Kirjoita tarina."),
    "id": ("Apa ibu kota Polandia?", "Air itu dingin.", "Tulis cerita tentang hutan."),
    "la": ("Gallia est omnis divisa in partes tres.", "In principio erat verbum.", "Canis est magnus."),
}


class Unsure:
    """A detector that finds no language."""

    @staticmethod
    def compute_language_confidence_values(text):
        return []


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


@pytest.mark.parametrize("code", ["de", "fr", "es", "it", "nl", "pt", "sv", "pl", "tr", "fi", "id", "la"])
def test_no_foreign_text_is_kept_because_a_quick_look_finds_the_wanted_language_in_it(code, monkeypatch):
    """What the quick detector lets pass is what the thorough one alone would let pass."""
    quick, thorough = language._build_detectors()
    (wanted,) = find_languages(("en",))
    of_english = 0.0
    for text in FOREIGN[code]:
        of_english = max(of_english, quick.compute_language_confidence(text, wanted))
        with monkeypatch.context() as patch:
            patch.setattr(language, "_build_detectors", lambda: (Unsure, thorough))
            expected = is_foreign(text, ("en",))
        language._judge_short.cache_clear()
        assert is_foreign(text, ("en",)) == expected

    assert of_english < language._KEPT_SHARE / 2, "near to what would let a text pass"


def test_most_english_questions_need_no_thorough_look(monkeypatch):
    quick, thorough = language._build_detectors()
    asked: list[str] = []

    class Watched:
        def compute_language_confidence_values(self, text):
            asked.append(text)
            return thorough.compute_language_confidence_values(text)

    rng = random.Random(3)
    texts = [draw_item(rng).prompt()[-1]["content"] for _ in range(300)]
    monkeypatch.setattr(language, "_build_detectors", lambda: (quick, Watched()))

    assert not any(is_foreign(text, ("en",)) for text in texts)
    assert 0 < len(asked) < 60


def test_a_text_that_comes_again_is_not_looked_at_again(monkeypatch):
    long = "there are 42 foxes . " * 10
    assert not is_foreign("42 foxes", ("en",))
    assert not is_foreign(long, ("en",))
    monkeypatch.setattr(language, "_build_detectors", None)

    assert not is_foreign("42 foxes", ("en",))
    with pytest.raises(TypeError):  # long ones would fill the memory
        is_foreign(long, ("en",))


def test_a_language_that_is_not_known_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"got \['english', 'xx'\]; there are \['af', 'ar',"):
        find_languages(("en", "english", "xx"))
