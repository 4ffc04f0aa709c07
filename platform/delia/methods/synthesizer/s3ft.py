"""S3FT: the model's own answer where it says what the reference says, else the nearest thing to it.

Source: Gupta et al. 2025, "Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language
Models", https://arxiv.org/abs/2502.08130. Own answer judged equal to the reference: it is kept. Else the reference in
the model's own words, judged equal: that is kept. Else the reference. As in the paper the model may be its own
judge; it answers in JSON that the engine's grammar holds it to. The prompts are ours.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from delia.generate.engine import Completion, Request
from delia.schema import Message, Messages, Rejection, Row
from delia.synthesize.socket import SynthesisContext, check_request

JUDGE = "Do both answers to the question say the same?\nquestion: {question}\nfirst: {reference}\nsecond: {answer}"
REPHRASE = "Say this answer in your own words.\nquestion: {question}\nanswer: {reference}"
VERDICT_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"same": {"type": "boolean"}},
        "required": ["same"],
        "additionalProperties": False,
    }
)


@dataclass(frozen=True, kw_only=True)
class S3FT:
    """Answers the rows that the source feeds on, or the task's own; each once.

    With `in_json` the judge's answer is held to a schema; without, it begins with `yes` where both are equal.
    `judge` and `rephrase` name what is put into them in braces, as their defaults do; they may leave the question out.
    """

    judge: str = JUDGE
    rephrase: str = REPHRASE
    in_json: bool = True
    max_verdict_tokens: int = 32

    def __post_init__(self) -> None:
        """Refuse prompts that can't be filled.

        Raises:
            TypeError: `judge` or `rephrase` lacks a field, or has other braces.
        """
        check_request("judge", self.judge, ("reference", "answer"), optional=("question",))
        check_request("rephrase", self.rephrase, ("reference",), optional=("question",))

    def count_candidates(self, num_chats: int) -> int:
        """Return how many chats can be answered once each."""
        return num_chats

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Answer, judge; where it differs rephrase, judge again."""
        if index >= len(context.chats):
            return context.reject(index, "no_more_instructions", "")
        *question, reference = context.chats[index]
        prompt: Messages = tuple(question)
        if not completions:
            return context.ask(index, prompt, turn="answer")
        for turn in (0, 2):  # an attempt, then its verdict
            attempt = completions[turn]
            is_whole = attempt.finish_reason == "stop"
            is_same = is_whole and context.say(attempt) == reference.content
            if not is_same and len(completions) == turn + 1:
                return self._ask_judge(context, index, prompt, context.say(attempt), turn)
            if is_same or (is_whole and self._agrees(context, completions[turn + 1])):
                return context.row(index, prompt, completions, answer=attempt, is_asked=turn == 0)
            if len(completions) == 2:
                text = self.rephrase.format(question=prompt[-1].content, reference=reference.content)
                return context.ask(index, (Message(role="user", content=text),), turn="rephrasing")
        return context.keep(index, (*prompt, reference))

    def _ask_judge(
        self, context: SynthesisContext, index: int, prompt: Messages, answer: str, turn: int
    ) -> Request:
        reference = context.chats[index][-1].content
        text = self.judge.format(question=prompt[-1].content, reference=reference, answer=answer)
        request = context.ask(index, (Message(role="user", content=text),), turn=f"verdict {turn}")
        return dataclasses.replace(
            request,
            temperature=0.0,
            max_tokens=self.max_verdict_tokens,
            json_schema=VERDICT_SCHEMA if self.in_json else "",
        )

    def _agrees(self, context: SynthesisContext, verdict: Completion) -> bool:
        text = context.say(verdict)
        if not self.in_json:
            return text.strip().casefold().startswith("yes")
        try:
            return json.loads(text)["same"] is True
        except (ValueError, KeyError, TypeError):  # cut before its end
            return False
