"""Magpie: the model writes the instructions itself, prompted with the template's user prefix alone.

Source: Xu et al. 2024, "Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with
Nothing", https://arxiv.org/abs/2406.08464. Differs from the paper: instruction and answer are both
sampled at T=1 by the model that will be tuned, so that the score identity of DELIA's buffer holds.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from delia.generate.engine import Completion, Request
from delia.schema import Message, Rejection, Row
from delia.synthesize.socket import SynthesisContext


@dataclass(frozen=True, kw_only=True)
class Magpie:
    """Instruction from the user prefix, answer by self-sampling; `system` is put before both.

    `answered_by` is the address of an adapter that answers instead of the base: the control "foreign
    answers", for which DELIA's argument does not hold.
    """

    reads_task: ClassVar[bool] = False

    system: str | None = None
    answered_by: str = ""

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Let the user's turn be written, then answer it."""
        if not completions:
            prefix, ends = context.chat.encode_user_prefix(self.system), context.chat.user_end_ids
            return context.request(index, prefix, turn="instruction", end_ids=ends)
        before = (Message(role="system", content=self.system),) if self.system else ()
        step = context.answer(index, completions, before=before)
        return dataclasses.replace(step, adapter=self.answered_by) if isinstance(step, Request) else step
