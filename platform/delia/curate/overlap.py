"""Decontamination: does a row's instruction hold a prompt of the dev or test split, or of another set?

    TaskConfigs --read_eval_rows--> eval rows --digest_prompts--> what of them decides a pool
    eval rows, train rows -> HeldOut;  Row --HeldOut.overlaps--> bool

A row overlaps if its instruction, with or without system turns, or one user turn of it equals an eval prompt; or
if it contains an eval prompt's user text, or one word n-gram of it. The last two act on user texts of at least n words
only. System turns of eval rows give no n-grams: a task says the same one in train.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from delia.curate.ngrams import list_ngrams, normalise
from delia.rng import hash_text
from delia.schema import Messages, Row, SeedTask, hash_messages
from delia.store.task_rows import at_place
from delia.store.tasks import TaskConfig, read_task

OVERLAPS_EVAL = "overlaps_eval"


def read_eval_rows(sets: Sequence[TaskConfig]) -> tuple[SeedTask, ...]:
    """Read the rows of other sets that a pool is kept clear of: dev and test of each, or all where it has neither.

    A single file is taken whole. A set with a row that can't be read is refused: what that row says could
    not be kept out.

    Raises:
        TaskFileError: The first set that is missing or malformed, with its place in the settings.
    """
    rows: list[SeedTask] = []
    for number, config in enumerate(sets):
        whole = config.model_copy(update={"dev_fraction": 0.0, "test_fraction": 0.0})
        with at_place(f"curate.decontaminate.{number}"):
            splits = read_task(whole).rows_by_split
        rows += (*splits["dev"], *splits["test"]) or splits["train"]
    return tuple(rows)


def digest_prompts(rows: Iterable[SeedTask]) -> str:
    """Return the hash of the prompts of eval rows, in any order: of all that `HeldOut` reads of them."""
    return hash_text(*sorted({hash_messages(row.prompt) for row in rows}))


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
            eval_rows: All rows of dev and test, and those of `read_eval_rows`.
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
        user_turns = (normalise(message.content) for message in row.messages if message.role == "user")
        if not self._whole.isdisjoint((instruction, normalise(row.user_text), *user_turns)):
            return True
        ngrams = self._split(instruction)
        if not self._ngrams.isdisjoint(ngrams):
            return True
        starts = self._texts_by_start.keys() & set(ngrams)
        return any(
            f" {text} " in f" {instruction} " for start in starts for text in self._texts_by_start[start]
        )
