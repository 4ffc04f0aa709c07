"""Rewriting: a task's instruction in many wordings, written by the model that will be tuned.

Source: the 60 paraphrases of one instruction in the data of DELIA, Zeng et al. 2024,
https://arxiv.org/abs/2408.10841 (who wrote them is not known). The model does not know a new token yet,
so `stand_in` takes its place while the model rewrites and the token is put back where it stood.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from delia.generate.engine import Completion, Request
from delia.schema import Message, Rejection, Row, SeedTask
from delia.synthesize.socket import SynthesisContext


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """`request` asks for another wording of `{instruction}`; a row keeps its question and its answer."""

    request: str = "Say this in other words: {instruction}"
    stand_in: str = "JSON"

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Ask for another wording of one train row's instruction, and put it in the old one's place."""
        seed_task = context.seed_tasks[index % len(context.seed_tasks)]
        wording = _find_wording(seed_task)
        if not completions:
            masked = context.mask(wording, self.stand_in)
            question = Message(role="user", content=self.request.format(instruction=masked))
            return context.ask(index, (question,), turn="rewriting")
        text = context.say(completions[0])
        if not text:
            return context.reject(index, "no_instruction", text, completions)
        if context.token and context.token in wording:
            if text.count(self.stand_in) != wording.count(context.token):
                return context.reject(index, "lost_token", text, completions)
            text = text.replace(self.stand_in, context.token)
        if text == wording:
            return context.reject(index, "unchanged", text, completions)
        question = Message(role="user", content=seed_task.prompt[-1].content.replace(wording, text))
        answer = Message(role="assistant", content=seed_task.reference or "")
        messages = (*seed_task.prompt[:-1], question, answer)
        return context.keep(index, messages, finish_reason=completions[0].finish_reason)


def _find_wording(seed_task: SeedTask) -> str:
    """Return the instruction inside the question; all of it where `phrasing` is no more than a label."""
    last = seed_task.prompt[-1].content
    return seed_task.phrasing if seed_task.phrasing and seed_task.phrasing in last else last
