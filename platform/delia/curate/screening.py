"""What a candidate shows by itself: a fault that rejects it, or the embedding of its user turns.

    Row | Rejection --filters, leaks, overlap--> fault or None --embed those without one--> Screened

It depends on nothing that was accepted, so candidates may be screened in any order, in any number of processes;
`pipeline` then decides on them in index order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from delia.curate.embedding import Embedder, Vectors
from delia.curate.filters import find_fault
from delia.curate.language import find_languages
from delia.curate.leaks import ControlTexts
from delia.curate.overlap import OVERLAPS_EVAL, HeldOut
from delia.curate.settings import CurateConfig
from delia.errors import ConfigError
from delia.schema import TEMPLATE_LEAK, Rejection, Row, SeedTask

Candidate = Row | Rejection


@dataclass(frozen=True, kw_only=True)
class Screened:
    """What candidates show, each in its place.

    Attributes:
        faults: The reason that speaks against each, or None; of a rejection of synthesis its own.
        vectors_ND: Embeddings of the user turns, float32 [N, D], zeros where there is a fault; None where nothing
            was embedded.
    """

    faults: Sequence[str | None]
    vectors_ND: Vectors | None

    def cut(self, start: int, stop: int) -> "Screened":
        """Return that of the candidates from one place up to another."""
        vectors_ND = None if self.vectors_ND is None else self.vectors_ND[start:stop]
        return Screened(faults=self.faults[start:stop], vectors_ND=vectors_ND)


class Screener:
    """Screens candidates; the same candidate is always screened alike, but for the last bits of an embedding.

    Attributes:
        config: The rules.
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
        """Take the rules.

        Args:
            config: The rules.
            eval_rows: See `overlap.HeldOut`.
            train_rows: See `overlap.HeldOut`.
            control_texts: The chat format's control tokens; None: no text is one.
            embed: Embeds user turns; needed for `semantic_threshold` alone.

        Raises:
            ConfigError: An unknown language, or semantic duplicates without an embedder.
        """
        if config.semantic_threshold is not None and embed is None:
            raise ConfigError("curate.semantic_threshold needs an embedder; give the screener `embed`")
        find_languages(config.languages or ())
        self.config = config
        self._control_texts = control_texts if config.reject_template_leaks else None
        self._held_out = HeldOut(eval_rows, train_rows=train_rows, ngram=config.overlap_ngram)
        self._embed = embed if config.semantic_threshold is not None else None

    def screen(self, candidates: Sequence[Candidate]) -> Screened:
        """Return what the candidates show."""
        faults = [self._find_fault(item) if isinstance(item, Row) else item.reason for item in candidates]
        return Screened(faults=faults, vectors_ND=self._embed_faultless(candidates, faults))

    def _find_fault(self, row: Row) -> str | None:
        fault = find_fault(row, self.config)
        if fault is not None:
            return fault
        if self._control_texts is not None and self._control_texts.leaks(row):
            return TEMPLATE_LEAK
        return OVERLAPS_EVAL if self._held_out.overlaps(row) else None

    def _embed_faultless(
        self, candidates: Sequence[Candidate], faults: Sequence[str | None]
    ) -> Vectors | None:
        places = [place for place, fault in enumerate(faults) if fault is None]
        rows = [item for place in places if isinstance(item := candidates[place], Row)]
        if self._embed is None or not rows:
            return None
        embedded_MD = self._embed([row.user_text for row in rows])
        vectors_ND = np.zeros((len(candidates), embedded_MD.shape[1]), dtype=np.float32)
        vectors_ND[places] = embedded_MD
        return vectors_ND
