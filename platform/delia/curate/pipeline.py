"""Candidates in index order -> accepted rows and rejections with a named reason.

    Row | Rejection --filters, overlap, duplicates--> Row | Rejection

Acceptance is a pure function of the candidates in index order: a row is compared with accepted rows of
lower index only, so of two near-duplicates the lower index survives, and how the candidates were cut
into batches changes nothing. A curator keeps what it accepted in memory; to resume, feed a new one all
candidates again.
"""

from collections import Counter
from collections.abc import Iterable

from pydantic import Field

from delia.curate.dedup import SeenInstructions
from delia.curate.filters import FilterConfig, find_fault
from delia.curate.overlap import OVERLAPS_EVAL, HeldOut
from delia.schema import Rejection, Row, SeedTask

Candidate = Row | Rejection

MAX_REJECTED_TEXT = 2000
"""Characters that are kept of a rejected row's instruction."""


class CurateConfig(FilterConfig):
    """What is kept of the candidates; None switches a rule off.

    `near_duplicate_threshold` is a Jaccard similarity of sets of word n-grams of `ngram` words (see
    `curate.dedup` on short texts); `num_perm` is the size of a MinHash, and changes what is searched, not
    what counts as similar. `overlap_ngram` is the number of words in a row that a row may not share with
    dev or test.
    """

    near_duplicate_threshold: float | None = Field(default=0.8, ge=0.3, le=1)
    num_perm: int = Field(default=128, ge=16)
    ngram: int = Field(default=3, gt=0)
    overlap_ngram: int | None = Field(default=8, gt=0)


class Curator:
    """Decides on the candidates of one source, one after the other.

    Attributes:
        counts: Rejections so far by reason, those of synthesis included.
        num_accepted: Rows accepted so far.
    """

    def __init__(
        self,
        config: CurateConfig,
        *,
        eval_rows: Iterable[SeedTask] = (),
        train_rows: Iterable[SeedTask] = (),
    ) -> None:
        """Start with nothing accepted; for `eval_rows` and `train_rows` see `overlap.HeldOut`."""
        self.counts: Counter[str] = Counter()
        self.num_accepted = 0
        self._config = config
        self._last_index: int | None = None
        self._held_out = HeldOut(eval_rows, train_rows=train_rows, ngram=config.overlap_ngram)
        self._seen = SeenInstructions(
            threshold=config.near_duplicate_threshold, num_perm=config.num_perm, ngram=config.ngram
        )

    def feed(self, candidates: Iterable[Candidate], *, target: int | None = None) -> list[Candidate]:
        """Decide on the next candidates.

        Args:
            candidates: In index order, after all that were fed before. A rejection of synthesis passes
                through and is counted.
            target: Once so many rows are accepted, over all calls, further candidates are ignored: they
                become neither row nor rejection. None takes all.

        Returns:
            Rows as they came, and rejections with the instruction as their text.

        Raises:
            ValueError: An index does not lie above the one before.
        """
        results: list[Candidate] = []
        for candidate in candidates:
            if self._last_index is not None and candidate.index <= self._last_index:
                raise ValueError(
                    f"candidates must come in index order, got index {candidate.index} of"
                    f" {candidate.source!r} after {self._last_index}; sort them, one curator a source"
                )
            self._last_index = candidate.index
            if target is None or self.num_accepted < target:
                results.append(self._decide(candidate))
        return results

    def _decide(self, candidate: Candidate) -> Candidate:
        if isinstance(candidate, Rejection):
            self.counts[candidate.reason] += 1
            return candidate
        reason = self._find_reason(candidate)
        if reason is None:
            self.num_accepted += 1
            return candidate
        self.counts[reason] += 1
        return Rejection(
            row_id=candidate.row_id,
            index=candidate.index,
            source=candidate.source,
            reason=reason,
            text=candidate.instruction[:MAX_REJECTED_TEXT],
            num_output_tokens=candidate.num_output_tokens,
        )

    def _find_reason(self, row: Row) -> str | None:
        """Return why a row is rejected; `admit` comes last, because it remembers what it lets pass."""
        fault = find_fault(row, self._config)
        if fault is not None:
            return fault
        if self._held_out.overlaps(row):
            return OVERLAPS_EVAL
        return self._seen.admit(row.instruction)
