"""Hidden states -> logits as a model's head makes them, a few tokens at a time, and any loss of them.

    loss = sum over tokens of f(logits),  its gradient by logits formed beside it, in place

Only hidden states of trained tokens ever meet the vocabulary, so that no [B, T, V] exists. (The same idea in
Triton: Liger, arXiv 2410.10989.)

Legend: N tokens, n of one chunk, V vocabulary, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from delia.errors import TrainError
from delia.model.attention import Segments

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Logits that exist at once: what a core's caches bear, and enough rows to fill a GPU."""

ScoreLogits = Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(which tokens, their logits [n, V], which may be overwritten) -> summed loss, losses [n], its gradient by logits."""


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a causal model does between its last hidden state and its logits.

    `softcap` bounds logits by c tanh(x / c) (Gemma 2); `scale` multiplies them (Cohere), or is one over
    what divides them (Granite).
    """

    softcap: float | None
    scale: float


@dataclass(frozen=True, kw_only=True)
class Head:
    """A model's output layer, weight [V, D] and bias [V], and what it does with the product."""

    weight_VD: Tensor
    bias_V: Tensor | None
    config: HeadConfig

    @classmethod
    def of(cls, model: PreTrainedModel, config: HeadConfig) -> "Head":
        """Take the head of a model whose form `read_head` has read."""
        output = model.get_output_embeddings()
        assert isinstance(output, nn.Linear)  # `read_head` has looked
        return cls(weight_VD=output.weight, bias_V=output.bias, config=config)

    def __call__(self, hidden_nD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits, float32 [n, V], and their slope by what the layer gave but for the scale (None: 1)."""
        logits_nV = functional.linear(hidden_nD, self.weight_VD, self.bias_V).float()
        if self.config.scale != 1.0:
            logits_nV *= self.config.scale
        if self.config.softcap is None:
            return logits_nV, None
        logits_nV = logits_nV.div_(self.config.softcap).tanh_()
        slope_nV = 1 - logits_nV.square()
        return logits_nV.mul_(self.config.softcap), slope_nV

    def back(self, by_logits_nV: Tensor, slope_nV: Tensor | None) -> Tensor:
        """Turn a gradient by logits, in place, into that by what the layer gave, in the layer's precision."""
        if slope_nV is not None:
            by_logits_nV *= slope_nV
        if self.config.scale != 1.0:
            by_logits_nV *= self.config.scale
        return by_logits_nV.to(self.weight_VD.dtype)


def read_head(model: PreTrainedModel) -> HeadConfig:
    """Read the head's form from the config, and hold it against the model's own logits.

    Raises:
        TrainError: The model does something else there.
    """
    config = model.config
    head = HeadConfig(
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0),
    )
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise TrainError(
            f"the output head of {type(model).__name__} is a {type(model.get_output_embeddings()).__name__},"
            " a plain linear layer is needed, since its logits are computed a few tokens at a time"
        )
    ids_BT = torch.arange(min(8, config.vocab_size), device=model.device)[None]
    segments: Any = {"segments": Segments(ids_BT.shape[1])}
    with torch.no_grad():
        expected_TV = cast(nn.Module, model)(input_ids=ids_BT, use_cache=False, **segments).logits[0].float()
        hidden_TD = model.get_decoder()(input_ids=ids_BT, use_cache=False, **segments).last_hidden_state[0]
        logits_TV, _ = Head.of(model, head)(hidden_TD)
    # a head in half precision rounds its logits at every step; a Gemma 2's differed by 0.6 of this eps
    rounding = max(1e-3, 2 * torch.finfo(hidden_TD.dtype).eps)
    if not torch.allclose(logits_TV, expected_TV, rtol=0, atol=rounding * float(expected_TV.abs().max())):
        raise TrainError(
            f"the logits of {type(model).__name__} are not those of its last hidden state, head, softcap and"
            " scale; this architecture's head is not known here (delia.train.head.read_head)"
        )
    return head


def sum_by_chunks(
    score: ScoreLogits, hidden_ND: Tensor, head: Head, *, num_held: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, a scalar to call `backward` on, and each token's own, float32 [N].

    Args:
        score: Gives the loss of a chunk and its gradient.
        hidden_ND: Last hidden states.
        head: What turns them into logits; its weight and bias may be trained.
        num_held: Arrays of logits that `score` holds at once, the given one counted.
    """
    size = max(1, CHUNK_BYTES[hidden_ND.device.type] // (4 * num_held * head.weight_VD.shape[0]))
    chunks = _ByChunks.apply(hidden_ND, head.weight_VD, head.bias_V, head, score, size)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], chunks)


class _ByChunks(torch.autograd.Function):
    """The summed loss of hidden states [N, D]; its gradients are there before `backward` is called."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        score: ScoreLogits,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        by_hidden_ND = torch.empty_like(hidden_ND)
        by_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if weight_VD.requires_grad else None
        is_biased = bias_V is not None and bias_V.requires_grad
        by_bias_V = torch.zeros_like(cast(Tensor, bias_V), dtype=torch.float32) if is_biased else None
        losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        total = hidden_ND.new_zeros((), dtype=torch.float64)
        for start in range(0, len(hidden_ND), size):
            part = slice(start, start + size)
            logits_nV, slope_nV = head(hidden_ND[part])
            loss, losses_N[part], by_logits_nV = score(part, logits_nV)
            total += loss
            by_output_nV = head.back(by_logits_nV, slope_nV)
            torch.mm(by_output_nV, weight_VD, out=by_hidden_ND[part])
            if by_weight_VD is not None:
                by_weight_VD += (by_output_nV.T @ hidden_ND[part]).float()
            if by_bias_V is not None:
                by_bias_V += by_output_nV.float().sum(0)
        ctx.save_for_backward(by_hidden_ND, by_weight_VD, by_bias_V)
        ctx.mark_non_differentiable(losses_N)
        return total.float(), losses_N

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *(
                None if by is None else (by * by_total).to(ctx.saved_tensors[0].dtype)
                for by in ctx.saved_tensors
            ),
            *(None, None, None),
        )
