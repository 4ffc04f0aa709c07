"""Magpie: the model writes the instructions itself, prompted with the template's user prefix alone.

Source: Xu et al. 2024, "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with
Nothing", https://arxiv.org/abs/2406.08464. Differs from the paper: instruction and answer are both
sampled at T=1 by the model that will be tuned, so that the score identity of DELIA's buffer holds.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from delia.generate.engine import Completion, Request
from delia.schema import Message, Messages, Rejection, Row
from delia.synthesize.socket import SynthesisContext, read_index


@dataclass(frozen=True, kw_only=True)
class Magpie:
    """Instruction from the user prefix, answer by self-sampling; `system` is put before both.

    `answered_by` is the address of an adapter that answers instead of the base: the control "foreign
    answers", for which DELIA's argument does not hold.
    """

    system: str | None = None
    answered_by: str = ""

    def open(self, context: SynthesisContext, index: int) -> Request:
        """Prompt with the user prefix."""
        return context.request(index, context.chat.encode_user_prefix(self.system), turn="instruction")

    def reply(self, context: SynthesisContext, completion: Completion) -> Request | None:
        """Ask for the answer, unless no whole instruction was written."""
        text = context.chat.decode(completion.token_ids)
        if not text or completion.finish_reason != "stop":
            return None
        prompt = context.chat.encode_prompt((*self._system(), Message(role="user", content=text)))
        request = context.request(read_index(completion), prompt, turn="answer")
        return dataclasses.replace(request, adapter=self.answered_by)

    def close(self, context: SynthesisContext, completions: Sequence[Completion]) -> Row | Rejection:
        """Keep instruction and answer."""
        index, text = read_index(completions[0]), context.chat.decode(completions[0].token_ids)
        if len(completions) == 1:
            return context.reject(index, "unfinished" if text else "no_instruction", text, completions)
        answer = context.chat.decode(completions[1].token_ids)
        turns = (Message(role="user", content=text), Message(role="assistant", content=answer))
        return context.row(index, (*self._system(), *turns), completions)

    def _system(self) -> Messages:
        return (Message(role="system", content=self.system),) if self.system else ()
