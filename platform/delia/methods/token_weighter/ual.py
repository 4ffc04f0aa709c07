"""UAL, uncertainty-aware learning: labels of a row are smoothed as much as a stronger model doubts it.

    e = most x (score - certain) / (doubtful - certain), kept within 0 and most

Source: Wang et al. 2024, "Uncertainty Aware Learning for Language Model Alignment", ACL 2024,
https://arxiv.org/abs/2406.04854. There a score is what a stronger model says when it is asked how uncertain a
row is; here it is any column of a table by row id (`train.row_scores`), such as the answers' mean
log-probability beside a pool (`curate.score_likelihood`), with `certain` above `doubtful`.
"""

from dataclasses import dataclass

from delia.errors import ConfigError
from delia.train.weighting import TrainedTokens, Weights


@dataclass(frozen=True, kw_only=True)
class UAL:
    """`certain` and `doubtful` are the scores with no smoothing and with `most`."""

    most: float = 0.2
    certain: float = 0.0
    doubtful: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a map that is none."""
        if not 0 <= self.most < 1 or self.certain == self.doubtful:
            raise ConfigError(
                f"ual needs 0 <= most < 1 and two scores that differ, got most={self.most},"
                f" certain={self.certain}, doubtful={self.doubtful}"
            )

    def __call__(self, tokens: TrainedTokens) -> Weights:
        """Return the smoothing of each token's row.

        Raises:
            ConfigError: There are no scores.
        """
        if tokens.score_n is None:
            raise ConfigError("ual reads a score a row; set train.row_scores to a table of them")
        doubt_n = (tokens.score_n - self.certain) / (self.doubtful - self.certain)
        return None, self.most * doubt_n.clamp(0, 1)
