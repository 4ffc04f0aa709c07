"""The socket of token weights: what each trained token counts, and how sure of it the model shall be.

    weigher(TrainedTokens) -> (weights [n], smoothing [n]), None for 1 and 0

A weigher sees a token's probability under the model that is trained, and no gradient flows through it.
The loss stays normalised by the count of trained tokens, so weights change its scale.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

Weights = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class TrainedTokens:
    """A few trained tokens, n of one micro-batch.

    Attributes:
        logprobs_n: The label's log-probability in nats under the model in training.
        row_n: Each token's row, as a place in `rows`.
        rows: Row numbers of the micro-batch.
        score_n: Its row's score from `train.row_scores`, None without that setting.
    """

    logprobs_n: Tensor
    row_n: Tensor
    rows: tuple[int, ...]
    score_n: Tensor | None = None


class TokenWeighter(Protocol):
    """Says what trained tokens count."""

    def __call__(self, tokens: TrainedTokens) -> Weights:
        """Return weights [n] and label smoothing [n], each None where it is 1 or 0 for all."""


def weigh_equally(tokens: TrainedTokens) -> Weights:
    """Count each trained token once: the negative log-likelihood."""
    return None, None


@dataclass(frozen=True)
class ScoredWeigher:
    """A weigher that is told the scores of rows, float32 [R]."""

    weigher: TokenWeighter
    score_R: Tensor

    def __call__(self, tokens: TrainedTokens) -> Weights:
        """Look up each token's row and ask the weigher."""
        rows = torch.tensor(tokens.rows, dtype=torch.long)
        score_n = self.score_R[rows[tokens.row_n.cpu()]].to(tokens.logprobs_n.device)
        return self.weigher(replace(tokens, score_n=score_n))
