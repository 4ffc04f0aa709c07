"""Where a new token's row starts: the word that the base model itself would put in its place.

    task rows -> the words that the base expects there -> the one most likely, given the answers too

A gradient from elsewhere often ends in a row that forces the answers' format whatever is said around
it; starting at a word that fits the sentence keeps what the base knows of such words, negation
included. Discrete search over real words is AutoPrompt's (Shin et al. 2020, arXiv 2010.15980); here the
candidates come from the base's own next-token distribution, so that they fit the wording.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

Sequences = Sequence[tuple[Sequence[int], Sequence[bool]]]


def _pad(sequences: Sequences) -> tuple[Tensor, Tensor]:
    length = max(len(ids) for ids, _ in sequences)
    ids_BT = torch.zeros((len(sequences), length), dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), length), dtype=torch.bool)
    for index, (ids, mask) in enumerate(sequences):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        mask_BT[index, : len(ids)] = torch.tensor(mask)
    return ids_BT, mask_BT


@torch.no_grad()
def list_candidates(
    model: PreTrainedModel, ids_BT: Tensor, token_id: int, *, num_candidates: int
) -> list[tuple[int, float]]:
    """Return the ids that the base most expects where a token stands, with their mean log-probability.

    A token at the very start of a row has nothing before it and does not vote.
    """
    logprobs_BTV = model(input_ids=ids_BT).logits.float().log_softmax(-1)
    places = [(row, place) for row, place in (ids_BT == token_id).nonzero().tolist() if place > 0]
    if not places:
        return []
    mean_V = torch.stack([logprobs_BTV[row, place - 1] for row, place in places]).mean(0)
    mean_V[token_id] = -torch.inf
    best = mean_V.topk(min(num_candidates, len(mean_V) - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@torch.no_grad()
def find_stand_in(
    model: PreTrainedModel, rows: Sequences, token_id: int, *, num_candidates: int = 64, num_rows: int = 32
) -> int | None:
    """Return the id of the word that best takes a token's place, None where the token never occurs.

    The best has the highest log-probability of being there plus that of the answers when it is.

    Args:
        model: The base model.
        rows: (input_ids, loss_mask) of the task; the first `num_rows` that hold the token are read.
        token_id: The token's row.
        num_candidates: How many words are tried; each costs one pass over the rows.
        num_rows: How many rows are read.
    """
    chosen = [row for row in rows if token_id in row[0]][:num_rows]
    if not chosen:
        return None
    ids_BT, mask_BT = _pad(chosen)
    labels_BT = torch.where(mask_BT, ids_BT, -100)
    scores: list[tuple[float, int]] = []
    for candidate, log_prior in list_candidates(model, ids_BT, token_id, num_candidates=num_candidates):
        swapped_BT = torch.where(ids_BT == token_id, candidate, ids_BT)
        logits_BTV = model(input_ids=swapped_BT).logits[:, :-1].float()
        nats = functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        scores.append((log_prior - float(nats) / len(chosen), candidate))
    return max(scores)[1] if scores else None
