"""Packed rows -> the loss of their trained tokens, which is all that a model in training is asked for.

    loss = sum over trained tokens of weight * cross-entropy(target, softmax(logits))

The gradient of any such loss by the logits is weight * (softmax - target); tokens that are held to the base's
distribution count their divergence from it instead (`train.divergence`).

Legend: N trained tokens, n of one chunk, M held ones, V vocabulary, D hidden.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from delia.model.original import base_alone
from delia.train.divergence import HeldTokens, sum_divergence
from delia.train.head import Head, HeadConfig, sum_by_chunks
from delia.train.packing import Stream
from delia.train.passes import add_pass, run_decoder
from delia.train.weighting import TokenWeighter, TrainedTokens


def prepare_loss(model: PreTrainedModel, head: HeadConfig) -> None:
    """Give a model, sharded or not, `compute_loss(stream, weigher)`, which FSDP treats as `forward`.

    `compute_loss(stream, weigher, held)` holds some of the trained tokens to the base's distribution.
    """

    def compute_loss(
        self: PreTrainedModel, stream: Stream, weigher: TokenWeighter, held: HeldTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        if held is None:
            return sum_cross_entropy(_read_hidden(self, stream), Head.of(self, head), stream, weigher)
        return _compute_held_loss(self, stream, weigher, head, held)

    add_pass(model, compute_loss)


def _read_hidden(model: PreTrainedModel, stream: Stream) -> Tensor:
    """Return the last hidden states at the places that predict a trained token, [N, D]."""
    states_TD = run_decoder(model, stream.ids_T, stream.positions_T, stream.lengths)
    return states_TD.index_select(0, stream.places_N.to(states_TD.device))


def _compute_held_loss(
    model: PreTrainedModel, stream: Stream, weigher: TokenWeighter, head: HeadConfig, held: HeldTokens
) -> tuple[Tensor, Tensor]:
    """Return the loss with held tokens' divergence in the place of theirs, and each token's own in nats, [N].

    A second pass without the adapter gives the base's states, and without a base's own dropout; every worker makes it,
    held tokens or not.
    """
    with torch.no_grad(), base_alone(model):
        original_ND = _read_hidden(model, stream)
    hidden_ND = _read_hidden(model, stream)
    is_held_N = held.is_held_N
    told = replace(stream, labels_N=stream.labels_N[~is_held_N], row_N=stream.row_N[~is_held_N])
    is_held_N = is_held_N.to(hidden_ND.device)
    nats, nats_M = sum_divergence(hidden_ND[is_held_N], original_ND[is_held_N], Head.of(model, head))
    loss, told_N = sum_cross_entropy(hidden_ND[~is_held_N], Head.of(model, head), told, weigher)
    losses_N = hidden_ND.new_empty(len(stream.labels_N), dtype=torch.float32)
    losses_N[is_held_N], losses_N[~is_held_N] = nats_M, told_N
    return loss + held.weight * nats, losses_N


def sum_cross_entropy(
    hidden_ND: Tensor, head: Head, stream: Stream, weigher: TokenWeighter
) -> tuple[Tensor, Tensor]:
    """Return the summed weighted loss, a scalar to call `backward` on, and each token's own in nats, [N].

    With a label smoothing of e (Szegedy et al. 2016, arXiv 1512.00567) the target is 1 - e + e / V at the
    label and e / V elsewhere.
    """
    labels_N = stream.labels_N.to(hidden_ND.device)

    def score(part: slice, logits_nV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels_n = labels_N[part]
        logprobs_nV = logits_nV.log_softmax(-1)
        logprobs_n = logprobs_nV.gather(1, labels_n[:, None])[:, 0]
        tokens = TrainedTokens(logprobs_n=logprobs_n, row_n=stream.row_N[part], rows=stream.rows)
        weights_n, smoothing_n = weigher(tokens)
        losses_n = -logprobs_n
        if smoothing_n is not None:
            losses_n = (1 - smoothing_n) * losses_n - smoothing_n * logprobs_nV.mean(-1)
        by_logits_nV = logprobs_nV.exp_()
        confidence_n = torch.ones_like(losses_n) if smoothing_n is None else 1 - smoothing_n
        by_logits_nV.scatter_add_(1, labels_n[:, None], -confidence_n[:, None])
        if smoothing_n is not None:
            by_logits_nV -= smoothing_n[:, None] / logits_nV.shape[1]
        if weights_n is not None:
            losses_n, by_logits_nV = losses_n * weights_n, by_logits_nV.mul_(weights_n[:, None])
        return losses_n.double().sum(), -logprobs_n, by_logits_nV

    return sum_by_chunks(score, hidden_ND, head)
