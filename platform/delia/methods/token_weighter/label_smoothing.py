"""Label smoothing: the same doubt in every label, the control of doubt by row (`ual`).

    target = 1 - e + e / V at the label, e / V elsewhere

Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision",
https://arxiv.org/abs/1512.00567.
"""

from dataclasses import dataclass

import torch

from delia.errors import ConfigError
from delia.train.weighting import TrainedTokens, Weights


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing:
    """`amount` is e, at least 0 and below 1."""

    amount: float = 0.1

    def __post_init__(self) -> None:
        """Refuse an amount that leaves the label nothing."""
        if not 0 <= self.amount < 1:
            raise ConfigError(f"label smoothing is at least 0 and below 1, got amount={self.amount}")

    def __call__(self, tokens: TrainedTokens) -> Weights:
        """Return the amount for each token."""
        return None, torch.full_like(tokens.logprobs_n, self.amount)
