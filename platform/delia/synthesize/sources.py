"""The settings of synthesis: which sources, made by what, from what.

SourceConfig: a method, or a file of rows;  feeds_on: accepted rows of sources before it
"""

from typing import Self

from pydantic import Field, model_validator

from delia.config import FrozenConfig, MethodConfig
from delia.generate.engine import SamplingConfig
from delia.schema import TASK_SOURCE
from delia.store.models import ModelConfig
from delia.store.tasks import TaskConfig


class SourceConfig(FrozenConfig):
    """One source of the pool, and how many accepted rows it is to supply.

    Its rows are written by a `synthesizer`, or are the train rows of a task file, `rows`. A method may
    feed on sources before it: it begins when they are closed. `model` is another model that writes and
    answers, a teacher; None is the model that will be tuned. No more than `max_candidates`, in whole
    chunks, are tried; None means four times the rows that are accepted: `num_rows`, or with `curate.select` more.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    synthesizer: MethodConfig | None = None
    rows: TaskConfig | None = None
    feeds_on: tuple[str, ...] = ()
    model: ModelConfig | None = None
    num_rows: int = Field(gt=0)
    max_candidates: int | None = Field(default=None, gt=0)

    def count_candidates(self, num_accepted: int) -> int:
        """Return how many candidates are tried, where so many rows are to be accepted."""
        return self.max_candidates or 4 * num_accepted

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if self.name == TASK_SOURCE:
            raise ValueError(
                f"{TASK_SOURCE!r} is what the task's own rows are called; give the source another name"
            )
        if (self.synthesizer is None) == (self.rows is None):
            raise ValueError(f"source {self.name!r} has either a synthesizer or rows, not both and not none")
        if self.rows is not None and (self.feeds_on or self.model):
            raise ValueError(f"source {self.name!r} is a file of rows: feeds_on and model do nothing there")
        return self


class SynthesizeConfig(FrozenConfig):
    """What is synthesised; `chunk_size` candidates are generated and kept at a time, and found again by the same size.

    Ray Data keeps some 12 kB of every chunk in the driver: a pool of millions of rows wants chunks of thousands.

    A prompt and its answer have at most `max_length` ids together: the engine's own limit, which may be
    higher, must not decide what a candidate says.
    """

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    max_length: int = Field(default=512, gt=1)
    chunk_size: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _tell_sources_apart(self) -> Self:
        names = [source.name for source in self.sources]
        origins = [(item.synthesizer, item.rows, item.feeds_on, item.model) for item in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have names of their own, got {names}")
        if any(origin in origins[:place] for place, origin in enumerate(origins)):
            raise ValueError("two sources of one method with equal knobs give the same rows; join them")
        for place, source in enumerate(self.sources):
            unknown = [name for name in source.feeds_on if name not in names[:place]]
            if unknown:
                raise ValueError(
                    f"source {source.name!r} feeds on {unknown}; the sources before it are {names[:place]}"
                )
        return self
