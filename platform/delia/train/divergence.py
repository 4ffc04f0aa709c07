"""KL(base || tuned) at chosen places of a stream, and its gradient, a few tokens' logits at a time.

    hidden states of both [N, D], one head -> sum over N of sum over V of p (log p - log q)

An explicit penalty on leaving the base, by its whole distribution where a sampled label is one draw from it.
With p fixed the gradient by the tuned logits is q - p, so it is formed beside the value, as the loss's is
(`train.objective`). Adding such a term to a task's loss: Li and Hoiem 2016, arXiv 1606.09282.

Legend: N places, n of one chunk, V vocabulary, D hidden.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class HeldTokens:
    """Trained tokens that are held to the base's distribution instead of being told their label.

    `is_held_N` says which of a stream's; `weight` is what a nat of divergence counts.
    """

    is_held_N: Tensor
    weight: float = 1.0


def sum_divergence(
    hidden_ND: Tensor,
    original_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    head: tuple[float | None, float],
    chunk_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Return the summed divergence in nats, to call `backward` on, and each place's own, float32 [N].

    Args:
        hidden_ND: Last hidden states of the tuned model.
        original_ND: Those of the base at the same places; no gradient flows into them.
        weight_VD: The output head, the same for both and not trained.
        bias_V: Its bias.
        head: The bound of its logits (None: there is none) and their scale.
        chunk_bytes: Of both models' logits that exist at once.
    """
    size = max(1, chunk_bytes // (8 * weight_VD.shape[0]))
    total = _Divergence.apply(hidden_ND, original_ND, weight_VD, bias_V, head, size)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], total)


class _Divergence(torch.autograd.Function):
    """The sum over places; the gradient by hidden states is there before `backward` is called."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        original_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: tuple[float | None, float],
        size: int,
    ) -> tuple[Tensor, Tensor]:
        by_hidden_ND = torch.empty_like(hidden_ND)
        nats_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        for start in range(0, len(hidden_ND), size):
            part = slice(start, start + size)
            target_nV, _ = _score(original_ND[part], weight_VD, bias_V, head)
            logprobs_nV, slope_nV = _score(hidden_ND[part], weight_VD, bias_V, head)
            probs_nV = target_nV.exp()
            nats_N[part] = (probs_nV * (target_nV - logprobs_nV)).sum(-1)
            by_logits_nV = logprobs_nV.exp_().sub_(probs_nV)
            if slope_nV is not None:
                by_logits_nV *= slope_nV
            torch.mm((by_logits_nV * head[1]).to(weight_VD.dtype), weight_VD, out=by_hidden_ND[part])
        ctx.save_for_backward(by_hidden_ND)
        ctx.mark_non_differentiable(nats_N)
        return nats_N.double().sum().float(), nats_N

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (by_hidden_ND,) = ctx.saved_tensors
        return by_hidden_ND * by_total.to(by_hidden_ND.dtype), None, None, None, None, None


def _score(
    hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, head: tuple[float | None, float]
) -> tuple[Tensor, Tensor | None]:
    """Return log-probabilities, and the slope of the bound of logits where there is one."""
    softcap, scale = head
    logits_nV = functional.linear(hidden_nD, weight_VD, bias_V).float() * scale
    if softcap is None:
        return logits_nV.log_softmax(-1), None
    bounded_nV = torch.tanh(logits_nV / softcap)
    return (softcap * bounded_nV).log_softmax(-1), 1 - bounded_nV.square()
