"""What an adapter does to the weights of its base: LoRA, rsLoRA, DoRA, and rows of tokens.

adapter directory  ->  {weight name: WeightChange},   changed = change.apply(weight)
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delia.errors import StoreError
from delia.store.adapters import (
    EMBEDDING_ENDINGS,
    LORA_ENDINGS,
    MAGNITUDE_ENDINGS,
    PREFIX,
    read_config,
    read_tensors,
    read_traits,
)

PART_BY_ENDING = {
    **dict(zip(LORA_ENDINGS, ("A", "B"), strict=True)),
    **dict(zip(EMBEDDING_ENDINGS, ("embedding_A", "embedding_B"), strict=True)),
    **dict.fromkeys(MAGNITUDE_ENDINGS, "magnitude"),
}


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """A low-rank change of one weight.

    For a linear layer [O, I] it is `b_OR @ a_RI`; for an embedding [V, D] its transpose, of a [R, V] and
    b [D, R]. `magnitude` is DoRA's (Liu et al. 2024, arXiv 2402.09353): the norms that the outputs of a
    linear layer [O], or the columns of an embedding [D], are given afterwards.
    """

    a_RI: Tensor
    b_OR: Tensor
    scaling: float
    is_embedding: bool = False
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the weight that this changes."""
        rows, columns = self.b_OR.shape[0], self.a_RI.shape[1]
        return (columns, rows) if self.is_embedding else (rows, columns)

    def apply(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the changed weight, computed in float32, in a dtype, that of the weight by default."""
        dtype = dtype or weight.dtype
        changed = self._change_rows(weight, dtype) if self.is_embedding else self._add_product(weight)
        if self.magnitude is not None:
            over = 0 if self.is_embedding else 1
            norms = torch.linalg.vector_norm(changed.float(), dim=over)
            changed = changed.float() * (self.magnitude.float() / norms).unsqueeze(over)
        return changed.to(dtype)

    def _add_product(self, weight_OI: Tensor) -> Tensor:
        return weight_OI.float() + self.scaling * (self.b_OR.float() @ self.a_RI.float())

    def _change_rows(self, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an embedding with the rows of its tokens changed; the others are not computed."""
        rows = self.a_RI.any(dim=0).nonzero().squeeze(1)
        deltas_KD = self.scaling * (self.b_OR.float() @ self.a_RI[:, rows].float()).T
        changed_VD = weight_VD.to(dtype, copy=True)
        changed_VD[rows] = (weight_VD[rows].float() + deltas_KD).to(dtype)
        return changed_VD


def read_changes(directory: Path) -> dict[str, WeightChange]:
    """Return an adapter's changes by the names of the base's weights.

    Raises:
        EngineError: It is no adapter of low-rank matrices.
        StoreError: A matrix is without its other half.
    """
    read_traits(directory)
    config, tensors = read_config(directory), read_tensors(directory)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        ending = next(ending for ending in PART_BY_ENDING if name.endswith(ending))
        module = name.removeprefix(PREFIX).removesuffix(ending)
        parts.setdefault(module, {})[PART_BY_ENDING[ending]] = value
    changes = {}
    for module, found in sorted(parts.items()):
        is_embedding = "embedding_A" in found
        first, second = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
        if not {first, second} <= set(found):
            raise StoreError(f"{directory}: module {module!r} has {sorted(found)}, a change needs A and B")
        changes[f"{module}.weight"] = WeightChange(
            a_RI=found[first],
            b_OR=found[second],
            scaling=_scaling(config, module),
            is_embedding=is_embedding,
            magnitude=found.get("magnitude"),
        )
    return changes


def _scaling(config: dict[str, Any], module: str) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) of rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""

    def find(patterns: dict[str, float] | None, otherwise: float) -> float:
        matching = (v for key, v in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", module))
        return next(matching, otherwise)

    rank = find(config.get("rank_pattern"), config["r"])
    alpha = find(config.get("alpha_pattern"), config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
