"""Hidden states -> the loss of trained tokens and its gradient, a few tokens' logits at a time.

    loss = sum over trained tokens of weight * cross-entropy(target, softmax(logits))

The gradient of any such loss by the logits is weight * (softmax - target), so it is formed beside the
loss, in place, and only hidden states of trained tokens ever meet the vocabulary: no [B, T, V] exists.
(The same idea in Triton: Liger, arXiv 2410.10989.)

Legend: N trained tokens, n of one chunk, V vocabulary, D hidden.
"""

from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from delia.errors import TrainError
from delia.model.original import base_alone
from delia.train.divergence import HeldTokens, sum_divergence
from delia.train.packing import Stream
from delia.train.weighting import TokenWeighter, TrainedTokens

CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Logits that exist at once: what a core's caches bear, and enough rows to fill a GPU."""
METHOD = "compute_loss"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a causal model does between its last hidden state and its logits.

    `softcap` bounds logits by c tanh(x / c) (Gemma 2); `scale` multiplies them (Cohere), or is one over
    what divides them (Granite).
    """

    softcap: float | None
    scale: float


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
    segments: Any = {"segments": (ids_BT.shape[1],)}
    with torch.no_grad():
        expected_TV = cast(nn.Module, model)(input_ids=ids_BT, use_cache=False, **segments).logits[0].float()
        hidden_TD = model.get_decoder()(input_ids=ids_BT, use_cache=False, **segments).last_hidden_state[0]
        logits_TV = _read_logits(hidden_TD, model.get_output_embeddings(), head)
    if not torch.allclose(logits_TV, expected_TV, rtol=1e-3, atol=1e-3 * float(expected_TV.abs().max())):
        raise TrainError(
            f"the logits of {type(model).__name__} are not those of its last hidden state, head, softcap and"
            " scale; this architecture's head is not known here (delia.train.objective.read_head)"
        )
    return head


def _read_logits(hidden_nD: Tensor, output: nn.Module, head: HeadConfig) -> Tensor:
    logits_nV = cast(Tensor, output(hidden_nD)).float() * head.scale
    return logits_nV if head.softcap is None else head.softcap * torch.tanh(logits_nV / head.softcap)


def prepare_loss(model: PreTrainedModel, head: HeadConfig) -> None:
    """Give a model, sharded or not, `compute_loss(stream, weigher)`, which FSDP treats as `forward`.

    `compute_loss(stream, weigher, held)` holds some of the trained tokens to the base's distribution.
    """

    def compute_loss(
        self: PreTrainedModel, stream: Stream, weigher: TokenWeighter, held: HeldTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        if held is None:
            return _compute_loss(self, stream, weigher, head)
        return _compute_held_loss(self, stream, weigher, head, held)

    setattr(model, METHOD, MethodType(compute_loss, model))
    register_fsdp_forward_method(cast(nn.Module, model), METHOD)


def _compute_loss(
    model: PreTrainedModel, stream: Stream, weigher: TokenWeighter, head: HeadConfig
) -> tuple[Tensor, Tensor]:
    """Return the summed loss, a scalar to call `backward` on, and each trained token's own in nats, [N]."""
    output = model.get_output_embeddings()
    assert isinstance(output, nn.Linear)  # `read_head` has looked
    hidden_ND = _read_hidden(model, stream)
    labels_N = stream.labels_N.to(hidden_ND.device)
    chunks = _ByChunks.apply(hidden_ND, output.weight, output.bias, labels_N, stream, weigher, head)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], chunks)


def _read_hidden(model: PreTrainedModel, stream: Stream) -> Tensor:
    """Return the last hidden states at the places that predict a trained token, [N, D]."""
    device = cast(nn.Linear, model.get_output_embeddings()).weight.device
    states = model.get_decoder()(
        input_ids=stream.ids_T[None].to(device),
        position_ids=stream.positions_T[None].to(device),
        use_cache=False,
        segments=stream.lengths,
    )
    return cast(Tensor, states.last_hidden_state[0].index_select(0, stream.places_N.to(device)))


def _compute_held_loss(
    model: PreTrainedModel, stream: Stream, weigher: TokenWeighter, head: HeadConfig, held: HeldTokens
) -> tuple[Tensor, Tensor]:
    """Return the loss with held tokens' divergence in the place of theirs, and each token's own in nats, [N].

    A second pass without the adapter gives the base's states; every worker makes it, held tokens or not.
    """
    output = model.get_output_embeddings()
    assert isinstance(output, nn.Linear)  # `read_head` has looked
    with torch.no_grad(), base_alone(model):
        original_ND = _read_hidden(model, stream)
    hidden_ND = _read_hidden(model, stream)
    device = hidden_ND.device
    is_held_N = held.is_held_N
    told = replace(stream, labels_N=stream.labels_N[~is_held_N], row_N=stream.row_N[~is_held_N])
    nats, nats_M = sum_divergence(
        hidden_ND[is_held_N.to(device)],
        original_ND[is_held_N.to(device)],
        output.weight,
        output.bias,
        head=(head.softcap, head.scale),
        chunk_bytes=CHUNK_BYTES[device.type],
    )
    loss, told_N = _ByChunks.apply(  # type: ignore[no-untyped-call]
        hidden_ND[~is_held_N.to(device)],
        output.weight,
        output.bias,
        told.labels_N.to(device),
        told,
        weigher,
        head,
    )
    losses_N = hidden_ND.new_empty(len(stream.labels_N), dtype=torch.float32)
    losses_N[is_held_N.to(device)], losses_N[~is_held_N.to(device)] = nats_M, told_N
    return loss + held.weight * nats, losses_N


class _ByChunks(torch.autograd.Function):
    """The summed loss of hidden states [N, D]; its gradients are there before `backward` is called."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        stream: Stream,
        weigher: TokenWeighter,
        head: HeadConfig,
    ) -> tuple[Tensor, Tensor]:
        size = max(1, CHUNK_BYTES[hidden_ND.device.type] // (4 * weight_VD.shape[0]))
        by_hidden_ND = torch.empty_like(hidden_ND)
        by_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if weight_VD.requires_grad else None
        losses_N = hidden_ND.new_empty(len(labels_N), dtype=torch.float32)
        total = hidden_ND.new_zeros((), dtype=torch.float64)
        for start in range(0, len(labels_N), size):
            part = slice(start, start + size)
            loss, losses_N[part], by_logits_nV = _score_chunk(
                hidden_ND[part], weight_VD, bias_V, labels_N[part], stream.row_N[part], stream, weigher, head
            )
            total += loss
            by_logits_nV = by_logits_nV.to(weight_VD.dtype)
            torch.mm(by_logits_nV, weight_VD, out=by_hidden_ND[part])
            if by_weight_VD is not None:
                by_weight_VD += (by_logits_nV.T @ hidden_ND[part]).float()
        ctx.save_for_backward(by_hidden_ND, by_weight_VD)
        ctx.mark_non_differentiable(losses_N)
        return total.float(), losses_N

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden_ND, by_weight_VD = ctx.saved_tensors
        by_weight = None if by_weight_VD is None else (by_weight_VD * by_total).to(by_hidden_ND.dtype)
        return by_hidden_ND * by_total.to(by_hidden_ND.dtype), by_weight, None, None, None, None, None


def _score_chunk(
    hidden_nD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    labels_n: Tensor,
    row_n: Tensor,
    stream: Stream,
    weigher: TokenWeighter,
    head: HeadConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum of losses, each token's cross-entropy, and the gradient by the head's output.

    With a label smoothing of e (Szegedy et al. 2016, arXiv 1512.00567) the target is 1 - e + e / V at the
    label and e / V elsewhere.
    """
    logits_nV = torch.nn.functional.linear(hidden_nD, weight_VD, bias_V).float()
    if head.scale != 1.0:
        logits_nV *= head.scale
    slope_nV = None
    if head.softcap is not None:
        logits_nV = logits_nV.div_(head.softcap).tanh_()
        slope_nV = 1 - logits_nV.square()
        logits_nV *= head.softcap
    logprobs_nV = logits_nV.log_softmax(-1)
    logprobs_n = logprobs_nV.gather(1, labels_n[:, None])[:, 0]
    weights_n, smoothing_n = weigher(TrainedTokens(logprobs_n=logprobs_n, row_n=row_n, rows=stream.rows))
    losses_n = -logprobs_n
    if smoothing_n is not None:
        losses_n = (1 - smoothing_n) * losses_n - smoothing_n * logprobs_nV.mean(-1)
    by_logits_nV = logprobs_nV.exp_()
    confidence_n = torch.ones_like(losses_n) if smoothing_n is None else 1 - smoothing_n
    by_logits_nV.scatter_add_(1, labels_n[:, None], -confidence_n[:, None])
    if smoothing_n is not None:
        by_logits_nV -= smoothing_n[:, None] / weight_VD.shape[0]
    if weights_n is not None:
        losses_n, by_logits_nV = losses_n * weights_n, by_logits_nV.mul_(weights_n[:, None])
    if slope_nV is not None:
        by_logits_nV *= slope_nV
    if head.scale != 1.0:
        by_logits_nV *= head.scale
    return losses_n.double().sum(), -logprobs_n, by_logits_nV
