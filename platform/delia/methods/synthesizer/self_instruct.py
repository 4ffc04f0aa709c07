"""Self-Instruct: the model is shown a few instructions and writes another one, then answers it.

Source: Wang et al. 2022, "Self-Instruct: Aligning Language Models with Self-Generated Instructions",
https://arxiv.org/abs/2212.10560. As there, six demonstrations are of the seeds and two were written before, here
in closed rounds: chain sources with `feeds_on` to bootstrap. Differs from the paper: a chat model is asked in
a chat; classification tasks are not treated apart; near duplicates are curation's business, not ROUGE-L's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from delia.generate.engine import Completion, Request
from delia.rng import make_random
from delia.schema import Message, Rejection, Row
from delia.synthesize.socket import SynthesisContext


@dataclass(frozen=True, kw_only=True)
class SelfInstruct:
    """`request` is followed by the numbered demonstrations; `stand_in` takes a new token's place there."""

    request: str = "Here are tasks. Write one more task of another kind, and nothing else."
    num_seeds: int = 6
    num_closed: int = 2
    stand_in: str = "JSON"

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Show, let write, let answer."""
        if not completions:
            return context.ask(
                index, (Message(role="user", content=self._show(context, index)),), turn="task"
            )
        return context.answer(index, completions)

    def _show(self, context: SynthesisContext, index: int) -> str:
        rng = make_random("self_instruct", context.row_id(index))
        seeds = rng.sample(context.seed_tasks, min(self.num_seeds, len(context.seed_tasks)))
        written = rng.sample(context.closed, min(self.num_closed, len(context.closed)))
        chosen = [task.prompt[-1].content for task in seeds] + [row.messages[-2].content for row in written]
        rng.shuffle(chosen)
        lines = [
            f"{number}. {context.mask(text, self.stand_in)}" for number, text in enumerate(chosen, start=1)
        ]
        return "\n".join((self.request, *lines))
