"""Screening ahead: batches that are done when a test says so come in their order."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from delia.flow import screening
from delia.flow.screening import AHEAD, Screeners


@dataclass(frozen=True)
class Item:
    """A batch: a letter, of a source that is `a` where nothing else is said."""

    name: str
    source: str = "a"


class Slow:
    """Screeners whose batches are done once their letters are in `done`; `sent` has what each was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.done: set[str] = set()
        self.sent: list[list[str]] = [[] for _ in range(count)]
        monkeypatch.setattr(screening, "_is_done", self.done.__contains__)
        monkeypatch.setattr(screening.ray, "wait", lambda refs, **_: (refs[:1], refs[1:]))
        self.screeners = Screeners([SlowActor(items) for items in self.sent])
        for _ in range(count):
            self.screeners._admit(0)

    def screen(self, letters: Iterable[str], ended: Collection[str] = ()) -> Iterator[str]:
        return self.screeners.screen_ahead(
            (Item(letter, source="b" if letter.isupper() else "a") for letter in letters), ended
        )


class SlowActor:
    """An actor's handle: `screen.remote` notes the letter, which is its own result."""

    def __init__(self, items: list[str]) -> None:
        self.screen = SimpleNamespace(remote=lambda item: items.append(item.name) or item.name)
        self.__ray_ready__ = SimpleNamespace(remote=object)


def test_batches_come_in_their_order_and_are_read_ahead_so_far_and_no_further(monkeypatch):
    slow, read = Slow(monkeypatch, 2), []
    results = slow.screen(read.append(item) or item for item in "abcdefghij")
    slow.done.update("bcde")  # all that comes after the first

    assert next(results) == "a"  # who takes it waits for it
    assert read == list("abcde")[: AHEAD * 2 + 1]
    assert [next(results) for _ in range(4)] == list("bcde")
    slow.done.update("fghij")
    assert list(results) == list("fghij")


def test_a_batch_that_is_done_is_handed_on_before_more_is_read(monkeypatch):
    slow, read = Slow(monkeypatch, 2), []
    slow.done.update("abc")
    results = slow.screen(read.append(item) or item for item in "abc")

    assert [(next(results), len(read)) for _ in range(3)] == [("a", 1), ("b", 2), ("c", 3)]


def test_the_slower_of_two_gets_less_to_do(monkeypatch):
    slow = Slow(monkeypatch, 2)
    results = slow.screen(slow.done.update(item if item != "a" else "") or item for item in "abcdefgh")

    assert list(results) == list("abcdefgh")
    assert slow.sent == [["a"], list("bcdefgh")]


def test_batches_of_a_source_that_has_ended_are_neither_waited_for_nor_handed_on(monkeypatch):
    slow, ended = Slow(monkeypatch, 2), set()
    results = slow.screen("aBcDe", ended)
    slow.done.update("a")

    assert next(results) == "a"
    ended.add("b")
    slow.done.update("ce")
    assert list(results) == ["c", "e"]


def test_one_that_has_not_started_gets_nothing_to_do(monkeypatch):
    slow = Slow(monkeypatch, 1)
    late = SlowActor([])
    monkeypatch.setattr(screening.ray, "wait", lambda refs, **_: ([], refs))
    slow.screeners._starting[object()] = late

    assert list(slow.screen("abcd")) == list("abcd")
    assert slow.sent == [list("abcd")]


def test_without_screeners_items_pass_one_by_one():
    read: list[Item] = []
    results = Screeners(()).screen_ahead((read.append(item) or item for item in (Item("a"), Item("b"))), ())

    assert next(results) == Item("a")
    assert read == [Item("a")]
    assert list(results) == [Item("b")]
