"""The procedural world: (kind, arguments, format, phrasing) -> one chat with one right answer.

A tuple is held out of pre-training when its hash says so, one in ten; kinds with few arguments
(the facts) therefore repeat their arguments in training under other phrasings and formats.
"""

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

from delia.rng import derive_seed, make_random
from delia.starter.formats import (
    FORMAT_BY_NAME,
    FORMATS,
    PLAIN,
    FormatRequest,
    ask_phrasings,
    draw_request,
    forbid_phrasings,
)
from delia.starter.kinds import KINDS, Args, Kind

HELD_OUT_ONE_IN = 10
REWRITE_REQUESTS = ("say in other words", "put this in other words", "write this in another way")
Message = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of the world with its right answer."""

    kind: Kind
    args: Args
    phrasing: int
    request: FormatRequest
    request_first: bool = False
    in_system: bool = False

    @property
    def key(self) -> str:
        """Return the tuple that decides whether the item is held out."""
        return "|".join((self.kind.name, *self.args, self.request.cell, str(self.phrasing)))

    @property
    def is_held_out(self) -> bool:
        """Tell whether pre-training never sees this (kind, arguments, format, phrasing)."""
        return derive_seed("starter", "held-out", self.key) % HELD_OUT_ONE_IN == 0

    @property
    def question(self) -> str:
        """Return the question without a word about formats."""
        return self.kind.phrasings[self.phrasing].format(*self.args)

    @property
    def answer(self) -> str:
        """Return the right answer in the format that applies."""
        return self.answer_in(self.request.applies)

    def answer_in(self, format_name: str) -> str:
        """Return the right answer in any format, whatever the item asks for."""
        plain = self.kind.answer(self.args)
        if format_name == PLAIN:
            return plain
        return FORMAT_BY_NAME[format_name].render(topic=self.kind.topic.format(*self.args), answer=plain)

    def prompt(self, request_text: str | None = None) -> list[Message]:
        """Return the messages before the answer; `request_text` replaces the item's own request."""
        request = self.request.text if request_text is None else request_text
        if request and self.in_system:
            return [{"role": "system", "content": request}, {"role": "user", "content": self.question}]
        parts = (request, self.question) if self.request_first else (self.question, request)
        return [{"role": "user", "content": " ".join(part for part in parts if part)}]

    def messages(self) -> list[Message]:
        """Return the whole chat, answer included."""
        return [*self.prompt(), {"role": "assistant", "content": self.answer}]


def draw_item(
    rng: random.Random, *, kinds: tuple[Kind, ...] = KINDS, weights: tuple[float, ...] | None = None
) -> Item:
    """Draw one item, every kind equally often unless `weights` says otherwise."""
    kind = rng.choice(kinds) if weights is None else rng.choices(kinds, weights)[0]
    return Item(
        kind=kind,
        args=kind.draw(rng),
        phrasing=rng.randrange(len(kind.phrasings)),
        request=draw_request(rng),
        request_first=rng.random() < 0.3,
        in_system=rng.random() < 0.1,
    )


def draw_chats(
    *seed_names: int | str, num_chats: int, weights: tuple[float, ...] | None = None
) -> Iterator[list[Message]]:
    """Yield pre-training chats; one in twenty has a second turn."""
    rng = make_random("starter", *seed_names)
    for _ in range(num_chats):
        if rng.random() < 0.05:
            yield _draw_rewriting(rng)
            continue
        chat = _draw_training_item(rng, weights).messages()
        if rng.random() < 0.05:
            follow_up = dataclasses.replace(_draw_training_item(rng, weights), in_system=False)
            chat += follow_up.messages()
        yield chat


def _draw_rewriting(rng: random.Random) -> list[Message]:
    """Draw a chat that puts an instruction in other words; many answers are right."""
    if rng.random() < 0.3:
        item = draw_item(rng)
        ways = [phrasing.format(*item.args) for phrasing in item.kind.phrasings]
    else:
        name = rng.choice(FORMATS).name
        ways = list(ask_phrasings(name) if rng.random() < 0.6 else forbid_phrasings(name))
    original, other = rng.sample(ways, 2)
    return [
        {"role": "user", "content": f"{rng.choice(REWRITE_REQUESTS)} : {original}"},
        {"role": "assistant", "content": other},
    ]


def _draw_training_item(rng: random.Random, weights: tuple[float, ...] | None) -> Item:
    while True:
        item = draw_item(rng, weights=weights)
        if not item.is_held_out:
            return item


def draw_held_out(*seed_names: int | str, num_items: int) -> list[Item]:
    """Return distinct held-out items."""
    rng = make_random("starter", *seed_names)
    items: dict[str, Item] = {}
    while len(items) < num_items:
        item = draw_item(rng)
        if item.is_held_out:
            items.setdefault(item.key, item)
    return list(items.values())
