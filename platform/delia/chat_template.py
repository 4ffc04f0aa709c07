"""A chat template: turns to text, and where in the text the answers are.

    [{"role": ..., "content": ...}]  --Jinja, dates fixed-->  text + spans of the trained characters

Spans come from the template's `{% generation %}` markers, else from rendering the chat up to each
answer: what the answer adds to the text before it is the span. Each ends with the end-of-turn token.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from delia.errors import ChatError

TrainOn = Literal["last", "all"]
Turns = list[dict[str, str]]
Span = tuple[int, int]

TODAY = datetime(2024, 7, 26)  # in every template, so that a chat has the same ids next year
_DATE_CALL = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WAY_OUT = "set `chat_template` to a template file that"


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template's Jinja text and the named special tokens that it may write, such as `bos_token`."""

    text: str
    variables: Mapping[str, Any]

    def render(self, turns: Turns, *, is_prompt: bool) -> tuple[str, list[Span]]:
        """Return the text of a chat, and the spans that its generation markers show.

        Raises:
            ChatError: The template refuses the chat, or leaves out a system's or a user's content.
        """
        try:
            texts, spans = cast(
                tuple[list[str], list[list[Span]]],
                render_jinja_template(
                    conversations=[turns],
                    chat_template=self.text,
                    return_assistant_tokens_mask=self.has_markers,
                    add_generation_prompt=is_prompt,
                    **self.variables,
                ),
            )
        except jinja2.TemplateError as error:
            roles = [turn["role"] for turn in turns]
            raise ChatError(
                f"the chat template refuses the roles {roles}: {error}; change them, or {_WAY_OUT} takes them"
            ) from error
        for turn in turns:
            if turn["role"] != "assistant" and turn["content"].strip() not in texts[0]:
                raise ChatError(
                    f"the chat template leaves out or alters the {turn['role']}'s {turn['content'][:80]!r};"
                    f" {_WAY_OUT} writes it as it is"
                )
        return texts[0], spans[0] if spans else []

    @cached_property
    def has_markers(self) -> bool:
        """Tell whether the template marks what the assistant writes."""
        return _MARKERS.search(self.text) is not None

    def find_answers(self, turns: Turns, train_on: TrainOn, end_of_turn: str) -> tuple[str, list[Span]]:
        """Return a chat's text and the spans of its trained answers, end-of-turn token included.

        Raises:
            ChatError: An answer can't be told apart, or does not end in the end-of-turn token.
        """
        text, marked = self.render(turns, is_prompt=False)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if self.has_markers and len(marked) != len(answers):
            raise ChatError(
                f"the chat template marks {len(marked)} answers of {len(answers)}; {_WAY_OUT} puts each in"
                " {% generation %}"
            )
        wanted = answers[-1:] if train_on == "last" else answers
        spans = marked[-len(wanted) :]
        if not self.has_markers:
            spans = [self._find_added(text, turns, i) for i in wanted]
        closed = []
        for start, end in spans:
            found = text.find(end_of_turn, start)
            if found < 0 or text[end:found].strip():
                raise ChatError(
                    f"the answer {text[start:end][:80]!r} does not end in {end_of_turn!r}, the end-of-turn"
                    f" token; {_WAY_OUT} ends every answer in it"
                )
            closed.append((start, found + len(end_of_turn)))
        return text, closed

    def find_end_of_turn(self, control_tokens: Iterable[str]) -> str:
        """Return the control token that the template writes after an answer.

        Raises:
            ChatError: It writes none, so a tuned model would not be taught to stop.
        """
        turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "delia"}]
        text, _ = self.render(turns, is_prompt=False)
        tail = text.rpartition("delia")[2]
        found = [token for token in control_tokens if token in tail]
        if not found:
            raise ChatError(
                f"the chat template writes {tail!r} after an answer, which holds no special token: the model"
                f" would not learn to stop; {_WAY_OUT} ends an answer in one"
            )
        return min(found, key=lambda token: (tail.index(token), -len(token)))

    def _find_added(self, text: str, turns: Turns, index: int) -> Span:
        """Return what turn `index` adds to the turns before it and the generation prompt."""
        before, _ = self.render(turns[:index], is_prompt=True)
        after, _ = self.render(turns[: index + 1], is_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ChatError(
                "the chat template has no generation markers, and the chat does not begin with what it writes"
                f" up to turn {index}, so that turn can't be told apart; train on the last turn alone, or"
                f" {_WAY_OUT} puts answers in {{% generation %}}"
            )
        return len(before), len(after)


def read_template(tokenizer: PreTrainedTokenizerFast, file: str | None) -> ChatTemplate:
    """Return the template of a file, else the tokenizer's own, with calls for today's date replaced.

    Raises:
        ChatError: There is no template, or it asks for the time in a way that can't be fixed.
    """
    if file is None and tokenizer.chat_template is None:
        raise ChatError(f"the tokenizer has no chat template; {_WAY_OUT} suits the model")
    if file is not None and not Path(file).is_file():
        raise ChatError(f"`chat_template` names a template file, there is none at {file!r}; correct the path")
    text = Path(file).read_text(encoding="utf-8") if file is not None else tokenizer.get_chat_template()
    fixed = _DATE_CALL.sub(lambda found: repr(TODAY.strftime(found[2])), text)
    if "strftime_now(" in fixed:
        raise ChatError(f"the chat template reads the clock: its ids would change; {_WAY_OUT} holds a date")
    return ChatTemplate(text=fixed, variables=tokenizer.special_tokens_map)
