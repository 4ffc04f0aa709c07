"""The `Synthesizer` socket: how a method makes candidates, one at a time, from an index.

    open(index) -> first request;  reply(first completion) -> second request or None
    close(completions) -> Row | Rejection

A method sees its context and an index, never the clock, the order or other candidates, so a
candidate is the same on any replica and after any restart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from delia.chat import ChatEncoder
from delia.generate.engine import Completion, Request
from delia.rng import derive_seed, hash_text
from delia.schema import Messages, Rejection, Row, SeedTask


@dataclass(frozen=True, kw_only=True)
class SynthesisContext:
    """What a method may use: the chat format, the task's train rows and its token."""

    source: str
    recipe: str
    chat: ChatEncoder
    seed_tasks: tuple[SeedTask, ...]
    token: str
    long_instruction: str

    def row_id(self, index: int) -> str:
        """Return a candidate's id: the recipe's hash and its index."""
        return hash_text(self.recipe, str(index))

    def request(self, index: int, prompt_ids: Sequence[int], *, turn: str) -> Request:
        """Build a request whose sampling seed comes from the candidate's id and the turn."""
        return Request(
            request_id=f"{self.source}:{index}",
            prompt_ids=tuple(prompt_ids),
            seed=derive_seed(self.row_id(index), turn),
        )

    def row(self, index: int, messages: Messages, completions: Sequence[Completion]) -> Row:
        """Build a row whose last completion is its answer."""
        return Row(
            row_id=self.row_id(index),
            index=index,
            source=self.source,
            messages=messages,
            finish_reason=completions[-1].finish_reason,
            num_prompt_tokens=completions[-1].num_prompt_tokens,
            num_output_tokens=sum(len(item.token_ids) for item in completions),
        )

    def reject(self, index: int, reason: str, text: str, completions: Sequence[Completion]) -> Rejection:
        """Build a rejection by the method itself."""
        return Rejection(
            row_id=self.row_id(index),
            index=index,
            source=self.source,
            reason=reason,
            text=text[:2000],
            num_output_tokens=sum(len(item.token_ids) for item in completions),
        )


def read_index(completion: Completion) -> int:
    """Return the candidate's index from its request id."""
    return int(completion.request_id.rpartition(":")[2])


class Synthesizer(Protocol):
    """A method of synthesis; a frozen value whose fields are its knobs."""

    def open(self, context: SynthesisContext, index: int) -> Request:
        """Return the first request of a candidate."""
        ...

    def reply(self, context: SynthesisContext, completion: Completion) -> Request | None:
        """Return the second request, None where the first completion ends the candidate."""
        ...

    def close(self, context: SynthesisContext, completions: Sequence[Completion]) -> Row | Rejection:
        """Turn one or two completions into a row, or say why there is none."""
        ...
