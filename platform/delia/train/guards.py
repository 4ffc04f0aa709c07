"""What ends a training, and what may not begin one: spikes, a driver that asks to stop, rows that teach wrongly.

A spike is a loss over `max_loss_spike` times the median of the last `WINDOW` steps of the stage, or a
gradient norm over `max_norm_spike` times theirs. A median under a nat, or under the norm that gradients
are clipped to, counts as that much: a model that has learnt its rows by heart meets a hard one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from delia.errors import TrainError
from delia.train.rows import TASK
from delia.train.settings import TrainConfig

WINDOW = 32
MIN_STEPS = 8
"""So many steps of a stage are seen before one of them can be a spike."""


class Line(Protocol):
    """What a worker has of its driver: it logs there, and hears whether to stop."""

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics of a step."""

    def asks_to_stop(self) -> bool:
        """Tell whether the driver wants an end, without waiting for it."""


class SilentLine:
    """The line of every worker but the first: it says and hears nothing."""

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Log nothing."""

    def asks_to_stop(self) -> bool:
        """Hear nothing: the first worker does, and tells the others."""
        return False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a worker ended: after which step, and why it could not go on, if it could not."""

    step: int
    problem: str = ""


class LossWatch:
    """Tells when a training goes wrong; what it remembers is kept in checkpoints.

    Attributes:
        recent_2W: Loss and gradient norm of the last steps of the stage, NaN where there was none.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Remember nothing."""
        self._config = config
        self.recent_2W = torch.full((2, WINDOW), math.nan, dtype=torch.float64)

    def see(self, step: int, loss: float, norm: float) -> str:
        """Take in the loss and the gradient norm of a step that starts at 0; return what is wrong, if anything."""
        config = self._config
        stage, stage_step = config.locate(step)
        way_out = (
            f"lower train.stages.{stage}.learning_rate or token_learning_rate, or raise its warmup_steps;"
            " a run of other settings starts anew"
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"step {step}: loss {loss}, gradient norm {norm}; {way_out}"
        if stage_step == 0:
            self.recent_2W.fill_(math.nan)
        checks = (
            ("loss", loss, config.max_loss_spike, 1.0, self.recent_2W[0]),
            ("norm", norm, config.max_norm_spike, config.max_grad_norm, self.recent_2W[1]),
        )
        for name, value, factor, least, recent_W in checks:
            bound = _bound(recent_W, factor, least)
            if value > bound:
                return (
                    f"step {step}: {'gradient norm' if name == 'norm' else name} {value:.4g} is over {bound:.4g},"
                    f" train.max_{name}_spike={factor:g} times what the last steps had; {way_out}, or raise"
                    f" train.max_{name}_spike, null for no limit"
                )
        self.recent_2W[:, stage_step % WINDOW] = torch.tensor([loss, norm])
        return ""


def _bound(recent_W: Tensor, factor: float | None, least: float) -> float:
    """Return what a value must exceed to be a spike; infinity where none can be one yet."""
    if factor is None or int(recent_W.isfinite().sum()) < MIN_STEPS:
        return math.inf
    return factor * max(float(recent_W.nanmedian()), least)


def agree(flag: object) -> bool:
    """Return on all workers whether any of them has a true flag; each must call it."""
    if dist.get_world_size() == 1:
        return bool(flag)
    shared = torch.tensor(int(bool(flag)))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


def check_trained(ids: Sequence[int], mask: Sequence[bool], *, end_ids: Sequence[int], name: str) -> None:
    """Refuse a row that would teach nothing, or never to end.

    Args:
        ids: Token ids of the row.
        mask: Which of them the loss counts.
        end_ids: Those that end a generation.
        name: What an error calls the row.

    Raises:
        TrainError: No id is trained, or the last trained one ends no turn.
    """
    trained = [token for token, flag in zip(ids, mask, strict=True) if flag]
    if not trained:
        raise TrainError(f"{name} has no trained token; give it an answer, or take it out")
    if trained[-1] not in end_ids:
        raise TrainError(
            f"the last trained token of {name} is {trained[-1]}, which ends no turn ({list(end_ids)} do): the"
            " adapter would never stop; set model.chat_template to a template that closes the assistant's turn"
        )


def check_template(pool_hash: str | None, own_hash: str) -> None:
    """Refuse rows that were made under another chat template, vocabulary or other task tokens.

    Args:
        pool_hash: What the pool's manifest says, None where it says nothing.
        own_hash: Of the chat format that rows are encoded with.

    Raises:
        TrainError: They differ.
    """
    if pool_hash is not None and pool_hash != own_hash:
        raise TrainError(
            f"the pool was made with template hash {pool_hash}, training has {own_hash}: its answers were sampled"
            " from other prompts; make the pool again with this model and template"
        )


def check_left(kept: Sequence[str], sources: Sequence[str], config: TrainConfig) -> None:
    """Refuse a mixture of which the policy of long rows leaves nothing, or nothing of the task.

    Args:
        kept: Sources of the rows that are left.
        sources: Of all rows.
        config: Has the limit and the policy.

    Raises:
        TrainError: With the counts.
    """
    for what, left, among in (
        ("rows", len(kept), len(sources)),
        ("task rows", kept.count(TASK), list(sources).count(TASK)),
    ):
        if left == 0 and (among or what == "rows"):
            raise TrainError(
                f"of {among} {what} none is left under train.max_length={config.max_length} and"
                f" train.on_long={config.on_long}; raise max_length, or set on_long=truncate_prompt_left"
            )
