"""What is read off a model on fixed ids: log-probabilities, KL divergence, greedy continuations.

Sequences are padded on the right; padding comes after everything that counts, so a causal model
never sees it from a counted position.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from delia.model.loading import load_base
from delia.store.adapters import is_whole
from delia.store.models import ModelConfig, place_model


def load_adapted(config: ModelConfig, adapter: Path) -> PreTrainedModel:
    """Load an adapter directory as any PEFT user does; nothing of this platform's is in between.

    What full tuning left is loaded as any model is.
    """
    if is_whole(adapter):
        return load_base(place_model(config, str(adapter)))
    model = PeftModel.from_pretrained(load_base(config), str(adapter))
    model.eval()
    return cast(PreTrainedModel, model)  # it answers to everything that is asked of it here


def pad_sequences(sequences: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> tuple[Tensor, Tensor]:
    """Return ids and masks [B, T] of at least one sequence, padded with 0 and False on the right."""
    length = max(len(ids) for ids, _ in sequences)
    ids_BT = torch.zeros((len(sequences), length), dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), length), dtype=torch.bool)
    for position, (ids, mask) in enumerate(sequences):
        ids_BT[position, : len(ids)] = torch.tensor(ids)
        mask_BT[position, : len(ids)] = torch.tensor(mask)
    return ids_BT, mask_BT


def batch_sequences(
    sequences: Sequence[tuple[list[int], list[bool]]], *, size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield batches of sequences of like length: their places, ids and masks (`pad_sequences`)."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, *pad_sequences([sequences[index] for index in chosen])


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel, sequences: Sequence[tuple[list[int], list[bool]]], *, batch_size: int = 32
) -> list[Tensor]:
    """Return log-probabilities in nats of the counted tokens of each (ids, mask), float32 [n]."""
    scores: list[Tensor] = [torch.empty(0)] * len(sequences)
    for chosen, ids_BT, mask_BT in batch_sequences(sequences, size=batch_size):
        logits_BTV = model(input_ids=ids_BT.to(model.device)).logits[:, :-1].float().cpu()
        logprobs_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).squeeze(-1)
        for position, index in enumerate(chosen):
            scores[index] = logprobs_BT[position][mask_BT[position, 1:]]
    return scores


@torch.no_grad()
def mean_kl(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    sequences: Sequence[tuple[list[int], list[bool]]],
    *,
    batch_size: int = 32,
    on_batch: Callable[[int], None] = lambda _: None,
) -> float:
    """Return KL(base || tuned) in nats a token, the mean over counted positions.

    On rows that the base sampled itself this estimates how far off its task the tuned model drifted.
    """
    total, count = 0.0, 0
    for chosen, ids_BT, mask_BT in batch_sequences(sequences, size=batch_size):
        log_p = base(input_ids=ids_BT.to(base.device)).logits[:, :-1].float().log_softmax(-1)
        log_q = tuned(input_ids=ids_BT.to(tuned.device)).logits[:, :-1].float().log_softmax(-1)
        kl_BT = (log_p.exp() * (log_p - log_q.to(log_p.device))).sum(-1).cpu()
        total += float(kl_BT[mask_BT[:, 1:]].double().sum())
        count += int(mask_BT[:, 1:].sum())
        on_batch(len(chosen))
    return total / max(1, count)


@torch.no_grad()
def continue_greedily(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_tokens: int, end_ids: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return the greedy continuation of each prompt, one at a time, without its end token.

    What the model's own files ask for beside, such as a repetition penalty, is left out, as engines leave it out.
    """
    settings = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(end_ids),
        pad_token_id=next(iter(end_ids)),
    )
    own, model.generation_config = model.generation_config, settings
    try:
        return [_continue(model, prompt, set(end_ids)) for prompt in prompts]
    finally:
        model.generation_config = own


def _continue(model: PreTrainedModel, prompt: Sequence[int], end_ids: set[int]) -> tuple[int, ...]:
    ids = torch.tensor([list(prompt)], device=model.device)
    output = cast(Any, model).generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    tokens = output[0, len(prompt) :].tolist()
    stop = next((i for i, token in enumerate(tokens) if token in end_ids), len(tokens))
    return tuple(tokens[:stop])
