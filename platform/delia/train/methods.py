"""The research methods of a training, built from its settings: what each token, input and parameter is subject to.

Without any the loss is the negative log-likelihood of the rows as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from delia.config import build_method
from delia.errors import ConfigError
from delia.train.building import TrainInput
from delia.train.corruption import InputCorruption, corrupt_stream
from delia.train.divergence import HeldTokens
from delia.train.freezing import ParameterMask, freeze
from delia.train.packing import Stream
from delia.train.rows import TrainRows
from delia.train.settings import TrainConfig
from delia.train.tally import SourceLosses
from delia.train.weighting import ScoredWeigher, TokenWeighter, weigh_equally


@dataclass(frozen=True, kw_only=True)
class StepMethods:
    """What applies to one step's streams.

    Attributes:
        weigher: What a trained token counts.
        corrupt: What is read in a stream's place.
        held: Which of its tokens are held to the base; None, for all streams alike, if none ever is.
        by_source: Where this worker's losses are entered, if anywhere.
    """

    weigher: TokenWeighter = weigh_equally
    corrupt: Callable[[Stream], Stream] = lambda stream: stream
    held: Callable[[Stream], HeldTokens | None] = lambda stream: None
    by_source: SourceLosses | None = None


PLAIN = StepMethods()
"""Every trained token counts once, and rows are read as they are."""


@dataclass(frozen=True, kw_only=True)
class TrainMethods:
    """The methods of a whole training."""

    config: TrainConfig
    rows: TrainRows
    vocab_size: int
    weigher: TokenWeighter = weigh_equally
    mask: ParameterMask | None = None
    corruption: InputCorruption | None = None

    def at(self, step: int, by_source: SourceLosses | None = None) -> StepMethods:
        """Return what applies to the streams of a step."""
        if self.corruption is None:
            return StepMethods(weigher=self.weigher, held=self._hold, by_source=by_source)
        corrupt = partial(
            corrupt_stream,
            rows=self.rows,
            corruption=self.corruption,
            names=(self.config.seed, "corruption", step),
            progress=step / self.config.max_steps,
            vocab_size=self.vocab_size,
        )
        return StepMethods(weigher=self.weigher, corrupt=corrupt, held=self._hold, by_source=by_source)

    def freeze(self, model: nn.Module, moved: Sequence[nn.Parameter], step: int) -> None:
        """Drop the gradients of what stands still in a step, of the parameters that its stage moves."""
        if self.mask is not None:
            ids = set(map(id, moved))
            trained = {name: p for name, p in model.named_parameters() if id(p) in ids}
            freeze(trained, self.mask, seed=self.config.seed, step=step)

    def _hold(self, stream: Stream) -> HeldTokens | None:
        weight = self.config.kl_weight
        return (
            None
            if weight is None
            else HeldTokens(is_held_N=~stream.look_up(self.rows.is_task_R), weight=weight)
        )


def build_methods(task: TrainInput, *, vocab_size: int) -> TrainMethods:
    """Build the methods that settings name.

    Raises:
        ConfigError: A method that can't be built, or scores that nothing reads.
    """
    config, rows = task.config, task.rows
    check_methods(config)
    weigher, mask, corruption = (
        build_method(method, allowed_modules=task.allowed_modules) if method is not None else None
        for method in (config.token_weighter, config.parameter_mask, config.input_corruption)
    )
    if weigher is not None and rows.score_R is not None:
        weigher = ScoredWeigher(weigher, torch.from_numpy(rows.score_R))
    return TrainMethods(
        config=config,
        rows=rows,
        vocab_size=vocab_size,
        weigher=weigher or weigh_equally,
        mask=mask,
        corruption=corruption,
    )


def check_methods(config: TrainConfig) -> None:
    """Build every method of `delia` that settings name, to see that it can be.

    Raises:
        ConfigError: One can't, or scores are given that no method reads.
    """
    for method in (config.token_weighter, config.parameter_mask, config.input_corruption):
        if method is not None and method.method.startswith("delia."):  # others are known to who allows them
            build_method(method)
    if config.row_scores is not None and config.token_weighter is None:
        raise ConfigError(
            "train.row_scores are read by a weigher; set train.token_weighter, or leave the scores out"
        )
