"""When a source has given enough: its rows are there, its tokens are spent, or it says nothing new.

    decided candidates in index order --StopRule--> the place after which none counts

A pure function of the candidates in index order, like acceptance itself: neither replicas nor restarts
move it.
"""

from collections import deque

from pydantic import Field

from delia.config import FrozenConfig
from delia.curate.dedup import DUPLICATE, NEAR_DUPLICATE
from delia.curate.semantic import SEMANTIC_DUPLICATE
from delia.schema import Rejection, Row

ENOUGH_ROWS = "rows"
ENOUGH_TOKENS = "tokens"
NOTHING_NEW = "novelty"
REPEATS = frozenset((DUPLICATE, NEAR_DUPLICATE, SEMANTIC_DUPLICATE))


class StopConfig(FrozenConfig):
    """When a source ends before its rows are there; None means no such limit.

    `max_output_tokens` bounds the tokens that were generated for its candidates, in all their turns, rejected ones
    included. `min_new_share` is the
    least share of new instructions among the last `window` that were not rejected for other reasons.
    """

    max_output_tokens: int | None = Field(default=None, gt=0)
    min_new_share: float | None = Field(default=None, ge=0, le=1)
    window: int = Field(default=512, gt=0)


class StopRule:
    """Follows one source; `reason` is set once it ends.

    Attributes:
        num_rows: Rows that it is to give.
        num_accepted: Rows so far.
        num_output_tokens: Tokens that were generated for rows and rejections so far.
        reason: `rows`, `tokens` or `novelty`; None while it goes on.
    """

    def __init__(self, config: StopConfig, *, num_rows: int) -> None:
        """Begin a source that is to give `num_rows`."""
        self.num_accepted = self.num_output_tokens = 0
        self.reason: str | None = None
        self._config = config
        self.num_rows = num_rows
        self._is_new: deque[bool] = deque(maxlen=config.window)

    @property
    def new_share(self) -> float:
        """Return the share of new instructions in the window so far; 1 before the first."""
        return sum(self._is_new) / len(self._is_new) if self._is_new else 1.0

    def count(self, decided: Row | Rejection, *, num_spent: int = 0) -> None:
        """Take the next candidate, in index order, and the tokens it cost; none after `reason` is set."""
        self.num_output_tokens += num_spent
        is_row = isinstance(decided, Row)
        self.num_accepted += is_row
        if is_row or (isinstance(decided, Rejection) and decided.reason in REPEATS):
            self._is_new.append(is_row)
        limit, floor = self._config.max_output_tokens, self._config.min_new_share
        if self.num_accepted >= self.num_rows:
            self.reason = ENOUGH_ROWS
        elif limit is not None and self.num_output_tokens >= limit:
            self.reason = ENOUGH_TOKENS
        elif floor is not None and len(self._is_new) == self._config.window and self.new_share < floor:
            self.reason = NOTHING_NEW
