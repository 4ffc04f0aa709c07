"""Likelihoods of answers under the base model, in nats per token."""

import pytest
import torch
from transformers import PreTrainedModel

from delia.chat import ChatEncoder, load_chat
from delia.curate import likelihood
from delia.curate.likelihood import score_answers
from delia.model.loading import load_base
from delia.schema import Message, Row
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")


@pytest.fixture(scope="module")
def chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_base(STARTER)


def make_row(answer: str, question: str = "what is the capital of france ?") -> Row:
    messages = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Row(row_id="r", index=0, source="s", messages=messages)


def test_the_score_is_the_mean_log_probability_of_the_answers_tokens_and_its_end(model, chat):
    row = make_row("the capital of france is paris")
    encoded = chat.encode_chat(row.messages)
    ids = torch.tensor([encoded.input_ids])
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    places = [place for place, counts in enumerate(encoded.loss_mask) if counts]
    expected = sum(float(logprobs[place - 1, encoded.input_ids[place]]) for place in places) / len(places)

    assert len(places) == 7
    assert score_answers(model, chat, [row]) == pytest.approx([expected], abs=1e-5)


def test_the_right_answer_is_likelier_than_a_wrong_one_and_both_than_another_questions(model, chat):
    right, wrong, unasked = score_answers(
        model, chat, [make_row("paris"), make_row("rome"), make_row("hammer fox hammer")]
    )

    assert 0 > right > wrong > unasked


@pytest.mark.parametrize("limit", [1, 1 << 28])
def test_no_limit_of_memory_changes_a_score(model, chat, monkeypatch, limit):
    rows = [make_row("paris"), make_row("red"), make_row("the capital of france is paris")]
    together = score_answers(model, chat, rows)
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", limit)

    assert score_answers(model, chat, rows) == pytest.approx(together, abs=1e-5)
    assert score_answers(model, chat, []) == []
