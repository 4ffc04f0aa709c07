"""Decontamination: does a row's instruction hold a prompt of the dev or test split?

    eval rows, train rows -> HeldOut;  Row --HeldOut.overlaps--> bool

A row overlaps if its instruction, with or without system turns, equals an eval prompt; or if it contains
an eval prompt's user text, or one word n-gram of it. The last two act on user texts of at least n words
only. System turns of eval rows give no n-grams: a task says the same one in train.
"""

from collections import defaultdict
from collections.abc import Iterable

from delia.curate.ngrams import list_ngrams, normalise
from delia.schema import Messages, Row, SeedTask

OVERLAPS_EVAL = "overlaps_eval"


def _join_user_turns(messages: Messages) -> str:
    return normalise("\n".join(message.content for message in messages if message.role == "user"))


def _join_turns(messages: Messages) -> str:
    return normalise("\n".join(message.content for message in messages))


class HeldOut:
    """The texts of dev and test that no row of a pool may hold."""

    def __init__(
        self, eval_rows: Iterable[SeedTask], *, train_rows: Iterable[SeedTask] = (), ngram: int | None = 8
    ) -> None:
        """Index the eval rows.

        Args:
            eval_rows: All rows of dev and test.
            train_rows: The task's own train rows. An n-gram that they hold too, such as the fixed part
                of a template, betrays nothing and is left out; whole texts are never left out.
            ngram: Words of an n-gram; None compares whole texts only.
        """
        self._ngram = ngram
        self._whole: set[str] = set()
        self._ngrams: set[str] = set()
        self._texts_by_start: dict[str, list[str]] = defaultdict(list)
        for row in eval_rows:
            text = _join_user_turns(row.prompt)
            self._whole |= {text, _join_turns(row.prompt)}
            ngrams = self._split(text)
            self._ngrams.update(ngrams)
            if ngrams:
                self._texts_by_start[ngrams[0]].append(text)
        for row in train_rows:
            self._ngrams.difference_update(self._split(_join_turns(row.prompt)))
        self._whole.discard("")

    def _split(self, text: str) -> list[str]:
        return list_ngrams(text.split(), self._ngram) if self._ngram is not None else []

    def overlaps(self, row: Row) -> bool:
        """Tell whether a row's instruction equals, contains or shares an n-gram with an eval prompt."""
        instruction = normalise(row.instruction)
        if instruction in self._whole or _join_user_turns(row.messages[:-1]) in self._whole:
            return True
        ngrams = self._split(instruction)
        if not self._ngrams.isdisjoint(ngrams):
            return True
        starts = self._texts_by_start.keys() & set(ngrams)
        return any(
            f" {text} " in f" {instruction} " for start in starts for text in self._texts_by_start[start]
        )
