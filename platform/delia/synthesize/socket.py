"""The `Synthesizer` socket: how a method makes candidates, one at a time, from an index.

    method(context, index, completions so far) -> Request for the next turn | Row | Rejection

A method sees its context, an index and what the engine said to it, never the clock, the order or other
candidates of its round, so a candidate is the same on any replica and after any restart. What it may feed
on, `closed`, are accepted rows of sources that are finished.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

from delia.chat import ChatEncoder, EncodedChat
from delia.generate.engine import Completion, Request
from delia.rng import derive_seed, hash_text
from delia.schema import MAX_REJECTED_TEXT, Message, Messages, Rejection, Row, SeedTask


@dataclass(frozen=True, kw_only=True)
class SynthesisContext:
    """What a method may use: the chat format, the task's train rows and token, rows of closed rounds."""

    source: str
    recipe: str
    chat: ChatEncoder
    seed_tasks: tuple[SeedTask, ...]
    token: str
    long_instruction: str
    closed: tuple[Row, ...] = ()

    def row_id(self, index: int) -> str:
        """Return a candidate's id: the recipe's hash and its index."""
        return hash_text(self.recipe, str(index))

    def request(
        self, index: int, prompt_ids: Sequence[int], *, turn: str, end_ids: tuple[int, ...] = ()
    ) -> Request:
        """Build a request whose sampling seed comes from the candidate's id and the turn's name."""
        return Request(
            request_id=f"{self.source}:{index}",
            prompt_ids=tuple(prompt_ids),
            seed=derive_seed(self.row_id(index), turn),
            end_ids=end_ids,
        )

    def ask(self, index: int, messages: Messages, *, turn: str) -> Request:
        """Build a request for the assistant's turn after `messages`."""
        return self.request(index, self.chat.encode_prompt(messages), turn=turn)

    def mask(self, text: str, stand_in: str) -> str:
        """Return a text with a word in the place of the task's token, which no model knows yet."""
        return text.replace(self.token, stand_in) if self.token else text

    def spells_token(self, text: str) -> bool:
        """Tell whether what a model wrote holds a task token: it knows none, but the text would be encoded as one."""
        return any(token in text for token in {self.token, *self.chat.token_ids} if token)

    @cached_property
    def chats(self) -> tuple[Messages, ...]:
        """What a method that feeds on rows reads: the closed rounds, or the task's rows without them."""
        if self.closed:
            return tuple(row.messages for row in self.closed)
        return tuple(task.messages for task in self.seed_tasks if task.reference is not None)

    def say(self, completion: Completion) -> str:
        """Return a completion's text."""
        return self.chat.decode(completion.token_ids)

    def answer(
        self, index: int, completions: Sequence[Completion], *, before: Messages = ()
    ) -> Request | Row | Rejection:
        """Have the instruction answered that the first completion wrote: the last turns of many methods.

        `before` are the turns before the instruction.
        """
        text = self.say(completions[0])
        if not text or completions[0].finish_reason != "stop":
            return self.reject(index, "unfinished" if text else "no_instruction", text, completions)
        if self.spells_token(text):
            return self.reject(index, "template_leak", text, completions)
        question = (*before, Message(role="user", content=text))
        if len(completions) == 1:
            return self.ask(index, question, turn="answer")
        return self.row(index, question, completions)

    def row(
        self,
        index: int,
        messages: Messages,
        completions: Sequence[Completion],
        *,
        answer: Completion | None = None,
        is_asked: bool = True,
    ) -> Row:
        """Build a row that ends in an answer of the engine.

        Args:
            index: The candidate's.
            messages: What is answered.
            completions: All turns of the candidate.
            answer: Which of them answers; None is the last.
            is_asked: Whether it was given to `messages` alone; the row has then the lengths that the engine counted.
        """
        chosen = answer or completions[-1]
        whole = (*messages, Message(role="assistant", content=self.say(chosen)))
        if not is_asked:
            return self.keep(index, whole, finish_reason=chosen.finish_reason)
        return Row(
            row_id=self.row_id(index),
            index=index,
            source=self.source,
            messages=whole,
            finish_reason=chosen.finish_reason,
            num_prompt_tokens=chosen.num_prompt_tokens,
            num_output_tokens=len(chosen.token_ids) + (chosen.finish_reason == "stop"),  # with its end
        )

    def keep(self, index: int, messages: Messages, *, finish_reason: str = "stop") -> Row:
        """Build a row of a whole chat; its lengths are the chat's own, whatever the candidate cost.

        Raises:
            ChatError: The template can't write the chat, so that no one could train on it.
        """
        row = Row(
            row_id=self.row_id(index),
            index=index,
            source=self.source,
            messages=messages,
            finish_reason=finish_reason,
        )
        return measure_row(row, self.chat.encode_chat(messages))

    def reject(self, index: int, reason: str, text: str, completions: Sequence[Completion] = ()) -> Rejection:
        """Build a rejection by the method itself."""
        return Rejection(
            row_id=self.row_id(index),
            index=index,
            source=self.source,
            reason=reason,
            text=text[:MAX_REJECTED_TEXT],
            num_output_tokens=sum(len(item.token_ids) for item in completions),
        )


def measure_row(row: Row, encoded: EncodedChat) -> Row:
    """Return a row with the lengths of its prompt and of its last answer with its end: together all ids of its chat."""
    num_prompt = encoded.loss_mask.index(True)
    return replace(row, num_prompt_tokens=num_prompt, num_output_tokens=len(encoded.input_ids) - num_prompt)


def check_request(knob: str, text: str, needed: Sequence[str], *, optional: Sequence[str] = ()) -> None:
    """Hold that a knob's text has what is put into it in braces, and no other braces.

    Args:
        knob: Its name.
        text: Its value.
        needed: The fields that it must have.
        optional: Those that it may have.

    Raises:
        TypeError: It is not so; `config.build_method` says of which method.
    """
    marked = {name: f"\0{name}\0" for name in (*needed, *optional)}
    fields = " ".join(f"{{{name}}}" for name in marked)
    try:
        filled = text.format(**marked)
    except (LookupError, ValueError, AttributeError) as error:
        raise TypeError(
            f"{knob} has no braces but {fields}, got {text!r} ({error!r}); double a brace that is text"
        ) from error
    missing = " ".join(f"{{{name}}}" for name in needed if marked[name] not in filled)
    if missing:
        raise TypeError(f"{knob} takes {fields}, and {text!r} is without {missing}; put it in")


@runtime_checkable
class Bounded(Protocol):
    """A method that has only so many candidates to give, whatever its index."""

    def count_candidates(self, num_chats: int) -> int:
        """Return how many it has where `SynthesisContext.chats` are so many."""
        ...


class Synthesizer(Protocol):
    """A method of synthesis; a frozen value whose fields are its knobs.

    One that needs nothing of the task has the class variable `reads_task` = False: its context is without the task's
    rows and long instruction, and its candidates are found again when those have changed.
    """

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Return the next turn's request, or what became of the candidate.

        Args:
            context: What all candidates of the source share.
            index: The candidate's, from 0.
            completions: The answers to this candidate's requests so far; none at first.
        """
        ...
