"""The settings of curation."""

from typing import Self

from pydantic import Field, model_validator

from delia.curate.embedding import HASHED
from delia.curate.filters import FilterConfig
from delia.curate.selection import SelectConfig
from delia.store.tasks import TaskConfig


class CurateConfig(FilterConfig):
    """What is kept of the candidates; None switches a rule off.

    `reject_template_leaks` refuses rows that spell a control token, and rows of files that spell a task token (see
    `curate.leaks`).
    `near_duplicate_threshold` is a Jaccard similarity of the user turns' sets of word n-grams of `ngram` words (see
    `curate.dedup` on short texts and system turns); `num_perm` is the size of a MinHash, and changes what is searched,
    not what counts as similar. `overlap_ngram` is the number of words in a row that a row may not share with
    dev or test, nor with the sets of `decontaminate`: files or directories as a task's, such as the
    benchmarks that an adapter will be scored on (`overlap.read_eval_rows`).

    `semantic_threshold` is a cosine of the user turns' embeddings, and needs an `embedder` that knows
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
