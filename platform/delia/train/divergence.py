"""KL(base || tuned) at chosen places of a stream, and its gradient, a few tokens' logits at a time.

    hidden states of both [N, D], one head -> sum over N of sum over V of p (log p - log q)

An explicit penalty on leaving the base, by its whole distribution where a sampled label is one draw from it.
With p fixed the gradient by the tuned logits is q - p. Adding such a term to a task's loss: Li and Hoiem 2016,
arXiv 1606.09282.

Legend: N places, n of one chunk, V vocabulary, D hidden.
"""

from dataclasses import dataclass

from torch import Tensor

from delia.train.head import Head, sum_by_chunks


@dataclass(frozen=True, kw_only=True)
class HeldTokens:
    """Trained tokens that are held to the base's distribution instead of being told their label.

    `is_held_N` says which of a stream's; `weight` is what a nat of divergence counts.
    """

    is_held_N: Tensor
    weight: float = 1.0


def sum_divergence(hidden_ND: Tensor, original_ND: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """Return the summed divergence in nats, to call `backward` on, and each place's own, float32 [N].

    Args:
        hidden_ND: Last hidden states of the tuned model.
        original_ND: Those of the base at the same places; no gradient flows into them.
        head: The output head, the same for both and not trained.
    """

    def score(part: slice, logits_nV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        original_nV, _ = head(original_ND[part])
        target_nV, logprobs_nV = original_nV.log_softmax(-1), logits_nV.log_softmax(-1)
        probs_nV = target_nV.exp()
        nats_n = (probs_nV * (target_nV - logprobs_nV)).sum(-1)
        return nats_n.double().sum(), nats_n, logprobs_nV.exp_().sub_(probs_nV)

    return sum_by_chunks(score, hidden_ND, head, num_held=2)
