"""Template leaks: does a chat spell out a control token of its own template?

    chat encoder's control tokens, task tokens --> ControlTexts;  Row --ControlTexts.leaks--> bool

Such text comes from a model that ran past its turn, or from data that was rendered twice. `chat` keeps it
text, so it can't break a chat; but a model trained on it learns to write it, and engines that re-tokenise
what they are sent parse it.

A task token that a task declares (`<sep>`) is no leak in an instruction that was made of the task's own rows: it is
put there on purpose, and is the only text that contents are parsed for. In an answer it is one: the token stands for an
instruction and is never to be emitted, and the row would train just that. In foreign text it is one anywhere, since
"what does <sep> mean ?" asks for no format and would be encoded with the token: rows of files are refused as they are
read (`flow.screening`), instructions that a model wrote by the method that asked for them (`synthesize.socket`).

A model whose control tokens look like text that people write (Llama-2's `<s>` is a tag of HTML) loses rows
that mean the text: switch the rule off there.
"""

import re
from collections.abc import Iterable

from delia.schema import Row


def _compile(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(text) for text in sorted(texts) if text.strip()) or r"(?!)")


class ControlTexts:
    """The texts that no turn may hold, and those that no answer may hold."""

    def __init__(self, control_tokens: Iterable[str] = (), *, task_tokens: Iterable[str] = ()) -> None:
        """Take the texts; they are compared letter by letter, and blank ones are left out."""
        self._anywhere = _compile(control_tokens)
        self._in_answers = _compile(task_tokens)

    def leaks(self, row: Row) -> bool:
        """Tell whether a turn of a row spells a control token, or an assistant's turn a task token."""
        return any(
            self._anywhere.search(message.content)
            or (message.role == "assistant" and self._in_answers.search(message.content))
            for message in row.messages
        )
