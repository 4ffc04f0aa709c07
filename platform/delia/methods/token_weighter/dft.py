"""DFT, dynamic fine-tuning: a token counts as much as the model already believes in it.

    weight = p(label), without a gradient:  grad = -p grad log p = -grad p

Source: Wu et al. 2025, "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
Rectification", https://arxiv.org/abs/2508.05629. Read as a policy gradient, fine-tuning divides the reward of
each token by its probability, which lets unlikely tokens rule a step; the weight takes that division back.
"""

from dataclasses import dataclass

from delia.train.weighting import TrainedTokens, Weights


@dataclass(frozen=True, kw_only=True)
class DFT:
    """The weight is p + `floor` (1 - p): 0 is the paper's, 1 is plain fine-tuning."""

    floor: float = 0.0

    def __call__(self, tokens: TrainedTokens) -> Weights:
        """Return the label's probability as its weight."""
        probs_n = tokens.logprobs_n.exp()
        return probs_n + self.floor * (1 - probs_n), None
