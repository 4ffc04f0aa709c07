"""Attribute grid: an instruction for each combination of persona, topic and whatever else is listed.

Source: Yu et al. 2023, "Large Language Model as Attributed Training Data Generator" (AttrPrompt),
https://arxiv.org/abs/2306.15895; personas as an attribute: Ge et al. 2024, https://arxiv.org/abs/2406.20094.
Differs from both: the combinations are visited at a stride near the golden section of their number, each once
before any comes again, so that a short pool is spread over the whole grid.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from delia.generate.engine import Completion, Request
from delia.schema import Message, Rejection, Row
from delia.synthesize.socket import SynthesisContext

GOLDEN = (math.sqrt(5) - 1) / 2
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "person": ("a child", "a nurse", "a farmer", "a programmer", "a lawyer", "a traveller", "a teacher"),
    "topic": ("food", "numbers", "nature", "money", "history", "machines", "language", "health", "music"),
    "kind": ("a question", "a list", "a comparison", "a rewrite", "a plan", "an explanation"),
}


def choose_stride(size: int) -> int:
    """Return a step that visits `size` places once each before it returns, near the golden section."""
    wanted = max(1, round(size * GOLDEN))
    return next(step for step in range(wanted, size + 2) if math.gcd(step, size) == 1)


@dataclass(frozen=True, kw_only=True)
class AttributeGrid:
    """`attributes` are names with their values; `request` is asked for each combination."""

    reads_task: ClassVar[bool] = False

    request: str = "Write one instruction for an assistant, and nothing else."
    attributes: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict(ATTRIBUTES))

    def __post_init__(self) -> None:
        """Refuse a grid without places.

        Raises:
            TypeError: An attribute has no values, or there is none.
        """
        empty = [name for name, values in self.attributes.items() if not values]
        if empty or not self.attributes:
            raise TypeError(f"every attribute needs values, got none for {empty or 'any'}")

    def __call__(
        self, context: SynthesisContext, index: int, completions: Sequence[Completion]
    ) -> Request | Row | Rejection:
        """Ask for an instruction with the attributes of the index, then answer it."""
        if not completions:
            wishes = [f"{name}: {value}" for name, value in self.choose(index).items()]
            prompt = "\n".join((self.request, *wishes))
            return context.ask(index, (Message(role="user", content=prompt),), turn="instruction")
        return context.answer(index, completions)

    def choose(self, index: int) -> dict[str, str]:
        """Return the attributes of a candidate."""
        size = math.prod(len(values) for values in self.attributes.values())
        place = index * choose_stride(size) % size
        chosen = {}
        for name, values in sorted(
            self.attributes.items()
        ):  # settings that differ in their order are one recipe
            place, own = divmod(place, len(values))
            chosen[name] = values[own]
        return chosen
