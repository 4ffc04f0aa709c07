"""Candidates in index order -> accepted rows and rejections with a named reason.

    Row | Rejection --Screener: filters, leaks, overlap--> faults, embeddings
    in index order --duplicates by text, by meaning--> Row | Rejection

Acceptance is a pure function of the candidates in index order: a row is compared with accepted rows of
lower index only, so of two near-duplicates the lower index survives, and how the candidates were cut
into batches changes nothing (for semantic duplicates see `semantic`: but for a pair that lies on the threshold
to the last bits of a float). A curator keeps what it accepted in memory; to resume, feed a new one all
candidates again.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from delia.curate.dedup import SeenInstructions
from delia.curate.novelty import Novelty
from delia.curate.rejection import reject
from delia.curate.screening import Candidate, Screened, Screener
from delia.curate.semantic import SEMANTIC_DUPLICATE, SeenMeanings
from delia.curate.stopping import StopRule
from delia.schema import Rejection, Row

_BLOCK = 256
"""Candidates whose meanings are compared at a time."""


class Curator:
    """Decides on the candidates of one source, one after the other.

    Attributes:
        counts: Rejections so far by reason, those of synthesis included.
        num_accepted: Rows accepted so far.
        novelty: How new the instructions of the candidates were, accepted or not.
    """

    def __init__(self, screener: Screener) -> None:
        """Start with nothing accepted; `screener` has the rules, and may serve other sources too."""
        config = screener.config
        self.counts: Counter[str] = Counter()
        self.num_accepted = 0
        self.novelty = Novelty()
        self._last_index: int | None = None
        self._screener = screener
        self._seen = SeenInstructions(
            threshold=config.near_duplicate_threshold, num_perm=config.num_perm, ngram=config.ngram
        )
        self._meanings = SeenMeanings(config.semantic_threshold) if config.semantic_threshold else None

    def feed(
        self,
        candidates: Iterable[Candidate],
        *,
        rule: StopRule | None = None,
        screened: Screened | None = None,
        spent: Sequence[int] = (),
    ) -> list[Candidate]:
        """Decide on the next candidates.

        Args:
            candidates: In index order, after all that were fed before. A rejection of synthesis passes
                through and is counted.
            rule: Follows the source; once it ends, further candidates are ignored: they become neither
                row nor rejection. None takes all.
            screened: What they show, by a screener with the same rules; None screens them here.
            spent: The output tokens that each cost, which the rule counts; empty where they cost none.

        Returns:
            Rows as they came, and rejections with the instruction as their text.

        Raises:
            ValueError: An index does not lie above the one before.
        """
        results: list[Candidate] = []
        given = list(candidates)
        for start in range(0, len(given), _BLOCK):
            block = given[start : start + _BLOCK]
            for candidate in block:
                self._check_order(candidate)
            if rule is None or rule.reason is None:
                shown = (
                    self._screener.screen(block) if screened is None else screened.cut(start, start + _BLOCK)
                )
                results += self._decide(block, shown, rule, spent[start : start + _BLOCK])
        return results

    def _check_order(self, candidate: Candidate) -> None:
        if self._last_index is not None and candidate.index <= self._last_index:
            raise ValueError(
                f"candidates must come in index order, got index {candidate.index} of"
                f" {candidate.source!r} after {self._last_index}; sort them, one curator a source"
            )
        self._last_index = candidate.index

    def _decide(
        self, block: Sequence[Candidate], screened: Screened, rule: StopRule | None, spent: Sequence[int]
    ) -> Iterator[Candidate]:
        """Yield what becomes of the candidates of a block, until the source ends."""
        if self._meanings is not None and screened.vectors_ND is not None:
            self._meanings.open(screened.vectors_ND)
        for place, candidate in enumerate(block):
            decided = self._decide_one(candidate, screened.faults[place], place)
            yield decided
            if rule is not None:
                rule.count(decided, num_spent=spent[place] if spent else 0)
                if rule.reason is not None:
                    return

    def _decide_one(self, candidate: Candidate, fault: str | None, place: int) -> Candidate:
        if isinstance(candidate, Rejection):
            self.counts[candidate.reason] += 1
            return candidate
        self.novelty.add(candidate.instruction)
        reason = fault or self._admit(candidate, place)
        if reason is None:
            self.num_accepted += 1
            return candidate
        self.counts[reason] += 1
        return reject(candidate, reason)

    def _admit(self, row: Row, place: int) -> str | None:
        """Compare a row with the accepted ones; remember it everywhere, or nowhere."""
        reason = self._seen.compare(row.instruction, row.user_text)
        if reason is None and self._meanings is not None and self._meanings.is_near(place):
            reason = SEMANTIC_DUPLICATE
        if reason is None:
            self._seen.remember(row.instruction, row.user_text)
            if self._meanings is not None:
                self._meanings.remember(place)
        return reason
