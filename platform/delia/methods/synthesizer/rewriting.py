"""Rewriting: a task's instruction in many wordings, written by the model that will be tuned.

Source: the 60 paraphrases of one instruction in the data of DELIA, Zeng et al. 2024,
https://arxiv.org/abs/2408.10841 (who wrote them is not known). The model does not know a new token yet,
so `stand_in` takes its place while the model rewrites and the token is put back where it stood.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from delia.generate.engine import Completion, Request
from delia.schema import Message, Rejection, Row, SeedTask
from delia.synthesize.socket import SynthesisContext, check_request


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """`request` asks for another wording of `{instruction}`; a row keeps its question and its answer."""

    request: str = "Say this in other words: {instruction}"
    stand_in: str = "JSON"

    def __post_init__(self) -> None:
        """Refuse a request that asks about no instruction.

        Raises:
            TypeError: `request` lacks `{instruction}`, or has other braces.
        """
        check_request("request", self.request, ("instruction",))

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Ask for another wording of one train row's instruction, and put it in the old one's place."""
        seed_task = context.seed_tasks[index % len(context.seed_tasks)]
        before, wording, after = _find_wording(seed_task)
        if not completions:
            masked = context.mask(wording, self.stand_in)
            question = Message(role="user", content=self.request.format(instruction=masked))
            return context.ask(index, (question,), turn="rewriting")
        text = context.say(completions[0])
        if not text:
            return context.reject(index, "no_instruction", text, completions)
        if context.spells_token(text):
            return context.reject(index, "template_leak", text, completions)
        if context.token and context.token in wording:
            if text.count(self.stand_in) != wording.count(context.token):
                return context.reject(index, "lost_token", text, completions)
            text = text.replace(self.stand_in, context.token)
        if text == wording:
            return context.reject(index, "unchanged", text, completions)
        question = Message(role="user", content=before + text + after)
        answer = Message(role="assistant", content=seed_task.reference or "")
        messages = (*seed_task.prompt[:-1], question, answer)
        return context.keep(index, messages, finish_reason=completions[0].finish_reason)


def _find_wording(seed_task: SeedTask) -> tuple[str, str, str]:
    """Return what stands before the instruction inside the question, the instruction, and what stands after it.

    The instruction is all of the question where `phrasing` is no more than a label: it does not stand there once, in
    whole words.
    """
    last = seed_task.prompt[-1].content
    found = list(re.finditer(rf"(?:\b|(?=\W)){re.escape(seed_task.phrasing)}(?:\b|(?<=\W))", last))
    start, stop = found[0].span() if seed_task.phrasing and len(found) == 1 else (0, len(last))
    return last[:start], last[start:stop], last[stop:]
