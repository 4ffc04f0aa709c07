"""The socket of parameter masks: what stands still for a step.

    mask(units, seed, step) -> the units that are frozen

A unit is what only makes sense together: a LoRA layer's matrices, else one parameter. A frozen one has no
gradient, so that AdamW passes it by: neither momentum nor weight decay moves it, and its own count of steps
stands still. Memory and time are those of training everything.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn

from delia.errors import TrainError


class ParameterMask(Protocol):
    """A method of freezing; a frozen value whose fields are its knobs."""

    def __call__(self, units: Sequence[str], *, seed: int, step: int) -> frozenset[str]:
        """Return the units that a step leaves as they are: a function of its arguments alone.

        Args:
            units: Names of what the stage trains, each once, in the model's order.
            seed: The training's.
            step: The global one, from 0.
        """
        ...


def unit_of(parameter_name: str) -> str:
    """Return the unit that a parameter belongs to."""
    return parameter_name.partition(".lora_")[0]


def freeze(
    parameters: Mapping[str, nn.Parameter], mask: ParameterMask, *, seed: int, step: int
) -> frozenset[str]:
    """Drop the gradients of the units that a mask freezes, and return those.

    Args:
        parameters: What the stage trains, by name.
        mask: The method.
        seed: See `ParameterMask`.
        step: See `ParameterMask`.

    Raises:
        TrainError: The mask names a unit that there is not, or freezes all.
    """
    units = tuple(dict.fromkeys(map(unit_of, parameters)))
    frozen = mask(units, seed=seed, step=step)
    if not frozen < set(units):
        raise TrainError(
            f"{mask!r} must freeze some of {len(units)} units and not all, got {len(frozen)}, of which"
            f" {len(frozen - set(units))} are unknown; mend the method or its knobs"
        )
    for name, parameter in parameters.items():
        if unit_of(name) in frozen:
            parameter.grad = None
    return frozen
