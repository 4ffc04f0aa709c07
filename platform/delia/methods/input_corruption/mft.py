"""MFT, masked-thought fine-tuning: a share of an answer's tokens can't be read by those after them.

Source: Chen et al. 2024, "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical
Reasoning Learning of Language Models", https://arxiv.org/abs/2403.02178. Each token of the answer is replaced with
the same probability, which rises in a line from 0 to `share` over the first part of training; the authors' scripts
put a mask token there, or a random token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from delia.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MFT:
    """`mask_id` is what stands in a token's place; None draws any id of the vocabulary.

    `rising` is the part of all steps over which the probability rises; 0 for one that is constant.
    """

    share: float = 0.4
    rising: float = 2 / 3
    mask_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not (0 <= self.share <= 1 and 0 <= self.rising <= 1):
            raise ConfigError(f"mft needs shares of 0 to 1, got share={self.share}, rising={self.rising}")

    def __call__(
        self, answer_ids: Sequence[int], *, progress: float, vocab_size: int, rng: random.Random
    ) -> list[int]:
        """Return the answer with some of its tokens replaced."""
        share = self.share * min(1.0, progress / self.rising) if self.rising else self.share
        return [self._replace(vocab_size, rng) if rng.random() < share else token for token in answer_ids]

    def _replace(self, vocab_size: int, rng: random.Random) -> int:
        return rng.randrange(vocab_size) if self.mask_id is None else self.mask_id
