"""Where a new token's row starts: the word that the base model itself would put in its place.

    task rows -> the words that the base expects there -> the one most likely, given the answers too

A gradient from elsewhere often ends in a row that forces the answers' format whatever is said around
it; starting at a word that fits the sentence keeps what the base knows of such words, negation
included. Discrete search over real words is AutoPrompt's (Shin et al. 2020, arXiv 2010.15980); here the
candidates come from the base's own next-token distribution, so that they fit the wording.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from delia.model.logprobs import pad_sequences

Sequences = Sequence[tuple[Sequence[int], Sequence[bool]]]

MAX_PASS_TOKENS = 4096
"""Padded tokens of one pass of the model."""


def _choose_rows(rows: Sequences, token_id: int, *, num_rows: int, max_tokens: int) -> Sequences:
    """Return the first rows that hold the token, at least one, together within both limits."""
    chosen: list[tuple[Sequence[int], Sequence[bool]]] = []
    num_tokens = 0
    for ids, mask in rows:
        if token_id in ids:
            num_tokens += len(ids)
            if chosen and (len(chosen) == num_rows or num_tokens > max_tokens):
                break
            chosen.append((ids, mask))
    return chosen


def _split_passes(sequences: Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield padded ids and masks, rows of like length together, each pass within `MAX_PASS_TOKENS`."""
    waiting: list[tuple[Sequence[int], Sequence[bool]]] = []
    for ids, mask in sorted(sequences, key=lambda row: len(row[0])):
        if waiting and (len(waiting) + 1) * len(ids) > MAX_PASS_TOKENS:
            yield pad_sequences(waiting)
            waiting = []
        waiting.append((ids, mask))
    yield pad_sequences(waiting)


def _logits_at(model: PreTrainedModel, ids_BT: Tensor, is_read_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 logits [n, V] of the positions that are read, and their places [n, 2] (row, position).

    The head sees the columns in which any row is read: [B, T, V] of a large vocabulary fits no memory.
    """
    columns = is_read_BT.any(0).nonzero().squeeze(1)
    device = model.device
    logits_BCV = model(input_ids=ids_BT.to(device), logits_to_keep=columns.to(device)).logits
    places = is_read_BT[:, columns].nonzero()
    read_nV = logits_BCV[places[:, 0].to(device), places[:, 1].to(device)].float().cpu()
    return read_nV, torch.stack((places[:, 0], columns[places[:, 1]]), 1)


@torch.no_grad()
def list_candidates(
    model: PreTrainedModel, rows: Sequences, token_id: int, *, num_candidates: int
) -> list[tuple[int, float]]:
    """Return the ids that the base most expects where a token stands, with their mean log-probability.

    A token at the very start of a row has nothing before it and does not vote.
    """
    total_V, count = torch.zeros(()), 0
    for ids_BT, _ in _split_passes(rows):
        precedes_BT = functional.pad(ids_BT[:, 1:] == token_id, (0, 1))
        if precedes_BT.any():
            logits_nV, _ = _logits_at(model, ids_BT, precedes_BT)
            total_V = total_V + logits_nV.log_softmax(-1).sum(0)
            count += len(logits_nV)
    if not count:
        return []
    mean_V = total_V / count
    mean_V[token_id] = -torch.inf
    best = mean_V.topk(min(num_candidates, len(mean_V) - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@torch.no_grad()
def find_stand_in(
    model: PreTrainedModel,
    rows: Sequences,
    token_id: int,
    *,
    num_candidates: int = 64,
    num_rows: int = 32,
    max_tokens: int = 8192,
) -> int | None:
    """Return the id of the word that best takes a token's place, None where the token never occurs.

    The best has the highest log-probability of being there plus that of the answers when it is.

    Args:
        model: The base model.
        rows: (input_ids, loss_mask) of the task; the first that hold the token are read.
        token_id: The token's row.
        num_candidates: How many words are tried; each costs one pass over the rows that are read.
        num_rows: How many rows are read at most.
        max_tokens: How many tokens are read at most; one row is always read.
    """
    chosen = _choose_rows(rows, token_id, num_rows=num_rows, max_tokens=max_tokens)
    if not chosen:
        return None
    passes = list(_split_passes(chosen))
    scores: list[tuple[float, int]] = []
    for candidate, log_prior in list_candidates(model, chosen, token_id, num_candidates=num_candidates):
        nats = 0.0
        for ids_BT, mask_BT in passes:
            swapped_BT = torch.where(ids_BT == token_id, candidate, ids_BT)
            precedes_BT = functional.pad(mask_BT[:, 1:], (0, 1))
            logits_nV, places = _logits_at(model, swapped_BT, precedes_BT)
            targets_n = ids_BT[places[:, 0], places[:, 1] + 1]
            nats += float(functional.cross_entropy(logits_nV, targets_n, reduction="sum"))
        scores.append((log_prior - nats / len(chosen), candidate))
    return max(scores)[1] if scores else None
