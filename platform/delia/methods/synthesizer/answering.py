"""Answering: instructions that are there already, answered by the model of the source.

Source: the self-sampled answers of DELIA, Zeng et al. 2024, https://arxiv.org/abs/2408.10841. Zero-shot at T=1
the expected gradient of such rows is zero at the start (the score identity), which is the buffer's argument.
With `demonstrated` the model first sees the reference answer as its own, one turn earlier, and then the
question again: the authors' published code, at their temperature, which gives the reference's content in
the model's words; the identity does not hold for it. With a teacher as the source's model: distillation.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from delia.generate.engine import Completion, Request
from delia.schema import Messages, Rejection, Row
from delia.synthesize.socket import SynthesisContext

DEMONSTRATED_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Answers the rows that the source feeds on, or the task's own; each once.

    `temperature` takes the place of the stage's; with `demonstrated` it is the authors' 0.7 unless set.
    """

    demonstrated: bool = False
    temperature: float | None = None

    def count_candidates(self, num_chats: int) -> int:
        """Return how many chats can be answered once each."""
        return num_chats

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Ask the question of one row; keep the answer."""
        if index >= len(context.chats):
            return context.reject(index, "no_more_instructions", "")
        *question, reference = context.chats[index]
        if completions:
            return context.row(index, tuple(question), completions, is_asked=not self.demonstrated)
        prompt: Messages = tuple(question)
        if self.demonstrated:
            prompt = (*prompt, reference, question[-1])
        published = DEMONSTRATED_TEMPERATURE if self.demonstrated else None
        temperature = published if self.temperature is None else self.temperature
        request = context.ask(index, prompt, turn="answer")
        return request if temperature is None else dataclasses.replace(request, temperature=temperature)
