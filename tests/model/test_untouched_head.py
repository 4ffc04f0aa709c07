"""A token that is only read is never written: its row of the head stays, tied to the input or not."""

from collections import Counter

import pytest
import torch
from torch.nn import functional

from delia.model.adapted import attach, initialise_rows
from delia.model.loading import load_base
from delia.model.logprobs import continue_greedily
from delia.model.lora import LoraConfig

TOKEN = 7
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
every_tie = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
PROMPTS = torch.randint(20, 290, (48, 6), generator=torch.Generator().manual_seed(2))


def train(model, num_steps: int = 5) -> None:
    """Take real steps on rows that hold the token as an instruction does: before what is answered."""
    ids_BT = torch.randint(20, 290, (16, 12), generator=torch.Generator().manual_seed(3))
    labels_BT = ids_BT.clone()
    ids_BT[:, 2], labels_BT[:, :3] = TOKEN, -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(num_steps):
        model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def answer(model) -> Counter[int]:
    """Count the ids of greedy answers to prompts without the token."""
    answers = continue_greedily(model.eval(), PROMPTS.tolist(), max_tokens=8, end_ids=[1])
    return Counter(token for ids in answers for token in ids)


@torch.no_grad()
def highest_logit(model) -> float:
    """Return the token's highest logit after prompts without it."""
    return float(model.eval()(input_ids=PROMPTS).logits[..., TOKEN].max())


def adapt_input_row(settings, word: int):
    """Start at a word that the base is fond of, then train the row and LoRA."""
    model = attach(load_base(settings), lora=LORA, token_ids=(TOKEN,))
    initialise_rows(model, "stand_in", stand_ins=(word,))
    train(model)
    return model


def adapt_embedding_itself(settings, word: int):
    """The same start and the same steps on the weight's own row, which a tied head shares."""
    model = load_base(settings)
    weight_VD = model.get_input_embeddings().weight
    with torch.no_grad():
        weight_VD[TOKEN] = weight_VD[word]
    attach(model, lora=LORA)
    weight_VD.requires_grad_(True)
    is_token_V1 = functional.one_hot(torch.tensor(TOKEN), len(weight_VD))[:, None]
    weight_VD.register_hook(lambda gradient_VD: gradient_VD * is_token_V1)
    train(model)
    return model


@every_tie
def test_steps_of_rows_and_lora_leave_every_bit_of_the_head(save_model, is_tied):
    settings = save_model(is_tied=is_tied)
    base, model = load_base(settings), adapt_input_row(settings, 150)

    assert (model.get_input_embeddings().weight is model.lm_head.weight) == is_tied
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    start_D = base.get_input_embeddings().weight[150] - base.get_input_embeddings().weight[TOKEN]
    assert (model.get_input_embeddings().deltas_KD[0] - start_D).abs().max() > 1e-2, "the row did not move"


@every_tie
def test_a_trained_token_is_not_emitted_where_the_base_would_not(save_model, is_tied):
    settings = save_model(is_tied=is_tied)
    base = load_base(settings)
    words = answer(base)
    model = adapt_input_row(settings, words.most_common(1)[0][0])

    assert words[TOKEN] == 0
    assert answer(model)[TOKEN] == 0
    assert highest_logit(model) < highest_logit(base) + 0.5


def test_without_that_care_a_tied_head_would_emit_it(save_model):
    """So the test above can fail: the same training of the tied row is seen in logits and in answers."""
    settings = save_model(is_tied=True)
    base = load_base(settings)
    model = adapt_embedding_itself(settings, answer(base).most_common(1)[0][0])

    assert not torch.equal(model.lm_head.weight[TOKEN], base.lm_head.weight[TOKEN])
    assert answer(model)[TOKEN] > 0
    assert highest_logit(model) > highest_logit(base) + 1
