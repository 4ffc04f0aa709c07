"""The kinds of question in the starter's world: arguments, phrasings, topic and answer.

A kind is a value: `draw` picks arguments, `phrasings` are templates of the question, `topic` is the
short restatement that some answer formats carry, and `answer` is the one right answer.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from delia.starter import lexicon as lex

Args = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of question; templates take the arguments by position."""

    name: str
    draw: Callable[[random.Random], Args]
    phrasings: tuple[str, ...]
    topic: str
    answer: Callable[[Args], str]


def _one_of(words: tuple[str, ...] | list[str]) -> Callable[[random.Random], Args]:
    pool = tuple(words)
    return lambda rng: (rng.choice(pool),)


def _draw_list(rng: random.Random) -> Args:
    return (" ".join(rng.sample(lex.ITEMS, rng.choice((2, 3, 4)))),)


def _draw_list_and_member(rng: random.Random) -> Args:
    words = rng.sample(lex.ITEMS, rng.choice((2, 3, 4)))
    return (" ".join(words), rng.choice(words))


def _draw_list_and_word(rng: random.Random) -> Args:
    words = rng.sample(lex.ITEMS, rng.choice((2, 3, 4)))
    return (" ".join(words), rng.choice(words) if rng.random() < 0.5 else rng.choice(lex.ITEMS))


def _draw_numbers(low: int, high: int) -> Callable[[random.Random], Args]:
    return lambda rng: (str(rng.randint(low, high)), str(rng.randint(low, high)))


def _draw_difference(rng: random.Random) -> Args:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return (str(max(a, b)), str(min(a, b)))


def _draw_two_numbers(rng: random.Random) -> Args:
    a, b = rng.sample(range(100), 2)
    return (str(a), str(b))


def _draw_two_sizes(rng: random.Random) -> Args:
    while True:
        a, b = rng.sample(lex.ITEMS, 2)
        if lex.THINGS[a][3] != lex.THINGS[b][3]:
            return (a, b)


def draw_sentence(rng: random.Random, *, words: frozenset[str]) -> str:
    """Return an English phrase of 1-6 words made only from nouns, verbs and colours in `words`."""
    nouns = [word for word in lex.THINGS if word in words]
    verbs = [word for word in lex.VERBS if word in words]
    colours = [word for word in lex.COLOURS if word in words]
    noun = rng.choice(nouns)
    shape = rng.randrange(4)
    if shape == 0:
        return noun
    if shape == 1:
        return f"the {rng.choice(colours)} {noun}"
    subject = f"the {noun}" if shape == 2 else f"the {rng.choice(colours)} {noun}"
    return f"{subject} {rng.choice(verbs)} the {rng.choice(nouns)}"


def translate(sentence: str) -> str:
    """Translate an English phrase: no articles, the colour after its noun, the verb last."""
    words = [word for word in sentence.split() if word != "the"]
    ordered: list[str] = []
    verb: list[str] = []
    for index, word in enumerate(words):
        if word in lex.VERBS:
            verb = [word]
        elif word in lex.COLOURS:
            continue
        else:
            ordered.append(word)
            if index and words[index - 1] in lex.COLOURS:
                ordered.append(words[index - 1])
    return " ".join(lex.TRANSLATIONS[word] for word in ordered + verb)


KNOWN = frozenset(lex.TRANSLATIONS) - lex.UNKNOWN_TO_BASE


def _draw_translation(rng: random.Random) -> Args:
    sentence = draw_sentence(rng, words=KNOWN)
    return (sentence, translate(sentence))


_THING = _one_of(lex.ITEMS)
_CITY_COUNTRY = {city: country for country, city in lex.CAPITALS.items()}


def _without(args: Args) -> str:
    return " ".join(word for word in args[0].split() if word != args[1])


KINDS: tuple[Kind, ...] = (
    Kind(name="capital", draw=_one_of(list(lex.CAPITALS)), topic="capital of {0}",
         phrasings=("what is the capital of {0} ?", "name the capital of {0} .", "tell me the capital city of {0} .",
                    "which city is the capital of {0} ?", "the capital of {0} is which city ?"),
         answer=lambda a: lex.CAPITALS[a[0]]),
    Kind(name="country", draw=_one_of(list(_CITY_COUNTRY)), topic="country of {0}",
         phrasings=("which country has the capital {0} ?", "{0} is the capital of which country ?",
                    "name the country of {0} .", "in which country is {0} ?", "tell me the country where {0} is ."),
         answer=lambda a: _CITY_COUNTRY[a[0]]),
    Kind(name="category", draw=_THING, topic="group of {0}",
         phrasings=("what group does the {0} belong to ?", "name the group of the {0} .", "tell me what kind of thing the {0} is .",
                    "what kind of thing is the {0} ?", "to which group belongs the {0} ?"),
         answer=lambda a: lex.THINGS[a[0]][0]),
    Kind(name="colour", draw=_THING, topic="colour of {0}",
         phrasings=("what colour is the {0} ?", "name the colour of the {0} .", "tell me the colour of the {0} .",
                    "which colour has the {0} ?", "the {0} has what colour ?"),
         answer=lambda a: lex.THINGS[a[0]][1]),
    Kind(name="home", draw=_THING, topic="place of {0}",
         phrasings=("where do you find the {0} ?", "name the place of the {0} .", "tell me where the {0} is found .",
                    "in which place is the {0} ?", "the {0} is found where ?"),
         answer=lambda a: lex.THINGS[a[0]][2]),
    Kind(name="sound", draw=_one_of(list(lex.SOUNDS)), topic="sound of {0}",
         phrasings=("what sound does the {0} make ?", "name the sound of the {0} .", "tell me how the {0} sounds .",
                    "which sound comes from the {0} ?", "how does the {0} sound ?"),
         answer=lambda a: lex.SOUNDS[a[0]]),
    Kind(name="opposite", draw=_one_of(list(lex.OPPOSITES)), topic="opposite of {0}",
         phrasings=("what is the opposite of {0} ?", "name the opposite of {0} .", "tell me the word opposite to {0} .",
                    "which word is the opposite of {0} ?", "{0} has which opposite ?"),
         answer=lambda a: lex.OPPOSITES[a[0]]),
    Kind(name="reverse", draw=_draw_list, topic="reverse {0}",
         phrasings=("reverse the list : {0} .", "write these words in reverse order : {0} .", "turn this list around : {0} .",
                    "give the words backwards : {0} .", "what is {0} in reverse order ?"),
         answer=lambda a: " ".join(reversed(a[0].split()))),
    Kind(name="first", draw=_draw_list, topic="first of {0}",
         phrasings=("what is the first word of {0} ?", "give the first word : {0} .", "name the first word in this list : {0} .",
                    "which word comes first : {0} ?", "take the first word from {0} ."),
         answer=lambda a: a[0].split()[0]),
    Kind(name="last", draw=_draw_list, topic="last of {0}",
         phrasings=("what is the last word of {0} ?", "give the last word : {0} .", "name the last word in this list : {0} .",
                    "which word comes last : {0} ?", "take the last word from {0} ."),
         answer=lambda a: a[0].split()[-1]),
    Kind(name="second", draw=_draw_list, topic="second of {0}",
         phrasings=("what is the second word of {0} ?", "give the second word : {0} .", "name the second word in this list : {0} .",
                    "which word comes second : {0} ?", "take the second word from {0} ."),
         answer=lambda a: a[0].split()[1]),
    Kind(name="count", draw=_draw_list, topic="count {0}",
         phrasings=("how many words are in {0} ?", "count the words : {0} .", "tell me how many words this list has : {0} .",
                    "what is the number of words in {0} ?", "how long is the list {0} ?"),
         answer=lambda a: str(len(a[0].split()))),
    Kind(name="remove", draw=_draw_list_and_member, topic="{0} without {1}",
         phrasings=("remove {1} from the list : {0} .", "write {0} without {1} .", "drop the word {1} : {0} .",
                    "what is left of {0} without {1} ?", "delete {1} from {0} ."),
         answer=_without),
    Kind(name="contains", draw=_draw_list_and_word, topic="{1} in {0}",
         phrasings=("is {1} in the list {0} ?", "does {0} contain {1} ?", "tell me whether {1} is in {0} .",
                    "can you find {1} in this list : {0} ?", "look for {1} : {0} ."),
         answer=lambda a: "yes" if a[1] in a[0].split() else "no"),
    Kind(name="repeat", draw=lambda rng: (rng.choice(lex.ITEMS), rng.choice(("2", "3", "4"))), topic="{0} times {1}",
         phrasings=("repeat the word {0} {1} times .", "write {0} {1} times .", "say {0} {1} times over .",
                    "give me {1} times the word {0} .", "what is {0} written {1} times ?"),
         answer=lambda a: " ".join([a[0]] * int(a[1]))),
    Kind(name="add", draw=_draw_numbers(0, 20), topic="{0} plus {1}",
         phrasings=("what is {0} plus {1} ?", "add {0} and {1} .", "give the sum of {0} and {1} .",
                    "how much is {0} + {1} ?", "work out {0} plus {1} ."),
         answer=lambda a: str(int(a[0]) + int(a[1]))),
    Kind(name="subtract", draw=_draw_difference, topic="{0} minus {1}",
         phrasings=("what is {0} minus {1} ?", "take {1} away from {0} .", "give {0} less {1} .",
                    "how much is {0} - {1} ?", "work out {0} minus {1} ."),
         answer=lambda a: str(int(a[0]) - int(a[1]))),
    Kind(name="double", draw=lambda rng: (str(rng.randint(0, 49)),), topic="double {0}",
         phrasings=("what is twice {0} ?", "double the number {0} .", "give two times {0} .",
                    "how much is {0} doubled ?", "work out the double of {0} ."),
         answer=lambda a: str(2 * int(a[0]))),
    Kind(name="next", draw=lambda rng: (str(rng.randint(0, 98)),), topic="after {0}",
         phrasings=("what number comes after {0} ?", "name the number after {0} .", "count on by one from {0} .",
                    "which number follows {0} ?", "tell me the next number after {0} ."),
         answer=lambda a: str(int(a[0]) + 1)),
    Kind(name="larger", draw=_draw_two_numbers, topic="larger of {0} and {1}",
         phrasings=("which number is larger : {0} or {1} ?", "give the larger of {0} and {1} .", "name the larger number : {0} or {1} .",
                    "what is the larger one of {0} and {1} ?", "tell me the larger number of {0} and {1} ."),
         answer=lambda a: max(a, key=int)),
    Kind(name="bigger", draw=_draw_two_sizes, topic="bigger of {0} and {1}",
         phrasings=("which is bigger : the {0} or the {1} ?", "name the bigger one : {0} or {1} .", "what is bigger , a {0} or a {1} ?",
                    "tell me which is bigger : {0} or {1} .", "compare the {0} and the {1} and give the bigger one ."),
         answer=lambda a: max(a, key=lambda word: lex.THINGS[word][3])),
    Kind(name="to_lingo", draw=_draw_translation, topic="{0} in lingo",
         phrasings=("translate to lingo : {0} .", "say this in lingo : {0} .", "what is {0} in lingo ?",
                    "how do you say {0} in lingo ?", "put into lingo : {0} ."),
         answer=lambda a: a[1]),
    Kind(name="from_lingo", draw=_draw_translation, topic="{1} in english",
         phrasings=("translate to english : {1} .", "say this in english : {1} .", "what is {1} in english ?",
                    "what does {1} mean ?", "put into english : {1} ."),
         answer=lambda a: a[0]),
)  # fmt: skip
KIND_BY_NAME: dict[str, Kind] = {kind.name: kind for kind in KINDS}
