"""Evol-Instruct: an instruction is made harder (depth) or turned into a rarer one (breadth), then answered.

Source: Xu et al. 2023, "WizardLM: Empowering Large Language Models to Follow Complex Instructions",
https://arxiv.org/abs/2304.12244. One operation a candidate, drawn by its id; chain sources with `feeds_on` for
several generations. Differs from the paper: the prompts are ours, and of its four rules of elimination the
judge that compares both instructions is left out (equal texts are rejected, near ones are curation's business).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from delia.generate.engine import Completion, Request
from delia.rng import make_random
from delia.schema import Message, Rejection, Row
from delia.synthesize.socket import SynthesisContext

DEPTH = (
    "Add one more condition that the answer must meet to this instruction.",
    "Ask for more depth in this instruction.",
    "Put something more specific in the place of what this instruction says in general.",
    "Change this instruction so that its answer takes several steps of reasoning.",
    "Add data that the answer has to use to this instruction.",
)
BREADTH = "Write a new instruction in the field of this one, about something rarer."


@dataclass(frozen=True, kw_only=True)
class EvolInstruct:
    """`operations` are asked for before the instruction; `ending` says that nothing else is wanted."""

    operations: tuple[str, ...] = (*DEPTH, BREADTH)
    ending: str = "Write the new instruction only."
    stand_in: str = "JSON"

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Evolve the instruction of one row, then answer it."""
        old = context.mask(context.chats[index % len(context.chats)][-2].content, self.stand_in)
        if not completions:
            operation = make_random("evol_instruct", context.row_id(index)).choice(self.operations)
            prompt = f"{operation} {self.ending}".rstrip() + f"\n{old}"
            return context.ask(index, (Message(role="user", content=prompt),), turn="instruction")
        text = context.say(completions[0])
        fault = self._find_fault(text, old)
        if fault:
            return context.reject(index, fault, text, completions)
        return context.answer(index, completions)

    def _find_fault(self, text: str, old: str) -> str | None:
        """Return why an evolved instruction is thrown away: the paper's rules that need no judge."""
        if text == old:
            return "unchanged"
        parts = filter(None, (self.ending, *self.operations))
        return "copies_the_request" if any(part in text for part in parts) else None
