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
from typing import Self

from pydantic import Field, model_validator

from delia.curate.dedup import SeenInstructions
from delia.curate.embedding import HASHED, Embedder
from delia.curate.filters import FilterConfig
from delia.curate.leaks import ControlTexts
from delia.curate.novelty import Novelty
from delia.curate.rejection import reject
from delia.curate.screening import Candidate, Screened, Screener
from delia.curate.selection import SelectConfig
from delia.curate.semantic import SEMANTIC_DUPLICATE, SeenMeanings
from delia.curate.stopping import StopRule
from delia.errors import ConfigError
from delia.schema import Rejection, Row, SeedTask
from delia.store.tasks import TaskConfig

_BLOCK = 256
"""Candidates whose meanings are compared at a time."""


class CurateConfig(FilterConfig):
    """What is kept of the candidates; None switches a rule off.

    `reject_template_leaks` refuses rows that spell a control token (`curate.leaks`).
    `near_duplicate_threshold` is a Jaccard similarity of sets of word n-grams of `ngram` words (see
    `curate.dedup` on short texts); `num_perm` is the size of a MinHash, and changes what is searched, not
    what counts as similar. `overlap_ngram` is the number of words in a row that a row may not share with
    dev or test, nor with the sets of `decontaminate`: files or directories as a task's, such as the
    benchmarks that an adapter will be scored on (`overlap.read_eval_rows`).

    `semantic_threshold` is a cosine of the instructions' embeddings, and needs an `embedder` that knows
    meanings: "base" or a sentence-transformers directory (`curate.embedding`). Cosines of no two embedders
    lie alike: see the nearest distances of a pool's diversity report before choosing. `embedder` also
    serves that report and `select`, for which the default, "hashed", needs no model.

    `select` picks a source's rows out of more accepted ones (`curate.selection`). `score_likelihood` stores
    each row's mean log-probability under the base beside the pool (`curate.likelihood`).

    `num_screeners` processes tell languages and embed ahead of the one that compares, where settings ask for
    either (`flow.screening`). It changes no row.
    """

    reject_template_leaks: bool = True
    near_duplicate_threshold: float | None = Field(default=0.8, ge=0.3, le=1)
    num_perm: int = Field(default=128, ge=16)
    ngram: int = Field(default=3, gt=0)
    overlap_ngram: int | None = Field(default=8, gt=0)
    decontaminate: tuple[TaskConfig, ...] = ()
    embedder: str = HASHED
    semantic_threshold: float | None = Field(default=None, gt=0, le=1)
    select: SelectConfig | None = None
    score_likelihood: bool = False
    num_screeners: int = Field(default=1, ge=1)

    @property
    def is_costly(self) -> bool:
        """Tell whether to screen a row takes the better part of a millisecond, or more."""
        return self.languages is not None or self.semantic_threshold is not None

    @model_validator(mode="after")
    def _name_an_embedder_of_meanings(self) -> Self:
        if self.semantic_threshold is not None and self.embedder == HASHED:
            raise ValueError(
                f"semantic_threshold={self.semantic_threshold:g} compares meanings, embedder={HASHED!r} knows"
                " words only; set embedder to 'base' or to a sentence-transformers directory"
            )
        return self


class Curator:
    """Decides on the candidates of one source, one after the other.

    Attributes:
        counts: Rejections so far by reason, those of synthesis included.
        num_accepted: Rows accepted so far.
        novelty: How new the instructions of the candidates were, accepted or not.
    """

    def __init__(
        self,
        config: CurateConfig,
        *,
        eval_rows: Iterable[SeedTask] = (),
        train_rows: Iterable[SeedTask] = (),
        control_texts: ControlTexts | None = None,
        embed: Embedder | None = None,
    ) -> None:
        """Start with nothing accepted.

        Args:
            config: The rules.
            eval_rows: See `overlap.HeldOut`.
            train_rows: See `overlap.HeldOut`.
            control_texts: The chat format's control tokens; None: no text is one.
            embed: Embeds instructions; needed for `semantic_threshold` alone.

        Raises:
            ConfigError: An unknown language, or semantic duplicates without an embedder.
        """
        if config.semantic_threshold is not None and embed is None:
            raise ConfigError("curate.semantic_threshold needs an embedder; give the curator `embed`")
        self.counts: Counter[str] = Counter()
        self.num_accepted = 0
        self.novelty = Novelty()
        self._last_index: int | None = None
        self._screener = make_screener(
            config, eval_rows=eval_rows, train_rows=train_rows, control_texts=control_texts, embed=embed
        )
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
    ) -> list[Candidate]:
        """Decide on the next candidates.

        Args:
            candidates: In index order, after all that were fed before. A rejection of synthesis passes
                through and is counted.
            rule: Follows the source; once it ends, further candidates are ignored: they become neither
                row nor rejection. None takes all.
            screened: What they show, by a screener with these rules; None screens them here.

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
                results += self._decide(block, shown, rule)
        return results

    def _check_order(self, candidate: Candidate) -> None:
        if self._last_index is not None and candidate.index <= self._last_index:
            raise ValueError(
                f"candidates must come in index order, got index {candidate.index} of"
                f" {candidate.source!r} after {self._last_index}; sort them, one curator a source"
            )
        self._last_index = candidate.index

    def _decide(
        self, block: Sequence[Candidate], screened: Screened, rule: StopRule | None
    ) -> Iterator[Candidate]:
        """Yield what becomes of the candidates of a block, until the source ends."""
        if self._meanings is not None and screened.vectors_ND is not None:
            self._meanings.open(screened.vectors_ND)
        for place, candidate in enumerate(block):
            decided = self._decide_one(candidate, screened.faults[place], place)
            yield decided
            if rule is not None:
                rule.count(decided)
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
        reason = self._seen.compare(row.instruction)
        if reason is None and self._meanings is not None and self._meanings.is_near(place):
            reason = SEMANTIC_DUPLICATE
        if reason is None:
            self._seen.remember(row.instruction)
            if self._meanings is not None:
                self._meanings.remember(place)
        return reason


def make_screener(
    config: CurateConfig,
    *,
    eval_rows: Iterable[SeedTask] = (),
    train_rows: Iterable[SeedTask] = (),
    control_texts: ControlTexts | None = None,
    embed: Embedder | None = None,
) -> Screener:
    """Return what screens candidates by the rules of a pool; see `Screener`.

    Raises:
        ConfigError: An unknown language.
    """
    return Screener(
        config,
        overlap_ngram=config.overlap_ngram,
        eval_rows=eval_rows,
        train_rows=train_rows,
        control_texts=control_texts if config.reject_template_leaks else None,
        embed=embed if config.semantic_threshold is not None else None,
    )
