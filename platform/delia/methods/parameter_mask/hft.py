"""HFT, half fine-tuning: half of the matrices of each kind stand still, the others the next time.

Source: Hui et al. 2024, "HFT: Half Fine-Tuning for Large Language Models", https://arxiv.org/abs/2404.18466.
There a round is a whole stage of fine-tuning, and a matrix is a weight of the model; here a round is a number of
steps, and with LoRA a matrix is the pair (A, B) of an adapted module. Halves are drawn for two rounds at a
time, so that what stood still in the first of them moves in the second.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from delia.errors import ConfigError
from delia.rng import make_random

KINDS = {
    "norm": re.compile(r"norm|(^|\.)ln_"),
    "attention": re.compile(r"attn|attention"),
    "ffn": re.compile(r"mlp|ffn|feed_forward|experts?"),
}
"""Kinds by what a name holds; the first that fits. What fits none is a kind of its own."""


@dataclass(frozen=True, kw_only=True)
class HFT:
    """A round has `steps_per_round` steps; of an odd number of matrices the smaller half freezes first."""

    steps_per_round: int = 100

    def __post_init__(self) -> None:
        """Refuse a round without steps."""
        if self.steps_per_round < 1:
            raise ConfigError(f"hft needs steps_per_round of at least 1, got {self.steps_per_round}")

    def __call__(self, units: Sequence[str], *, seed: int, step: int) -> frozenset[str]:
        """Return this round's half of each kind; a kind of one matrix never freezes."""
        pair, is_second = divmod(step // self.steps_per_round, 2)
        by_kind: dict[str, list[str]] = {}
        for unit in units:
            by_kind.setdefault(find_kind(unit), []).append(unit)
        frozen: set[str] = set()
        for kind, members in by_kind.items():
            members.sort()  # what is drawn depends on names, not on their order
            make_random(seed, "hft", kind, pair).shuffle(members)
            middle = len(members) // 2
            if len(members) > 1:
                frozen.update(members[middle:] if is_second else members[:middle])
        return frozenset(frozen)


def find_kind(unit: str) -> str:
    """Return the kind of a matrix by its name."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(unit)), "other")
