"""What papers claim of their methods, measured where it shows at this scale: on the starter."""

import random
from dataclasses import replace

import pytest
import torch

from delia.chat import ChatEncoder, load_chat
from delia.config import MethodConfig
from delia.model.loading import load_base
from delia.recipes.starter import STARTER
from delia.schema import SeedTask
from delia.starter.formats import FORMAT_BY_NAME, ask_phrasings
from delia.starter.lexicon import ITEMS
from delia.store.models import ModelConfig, resolve_model
from delia.store.task_columns import ColumnMapping, parse_row
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig


@pytest.fixture(scope="module")
def chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)))


# ---- Post-Ins: an instruction after its input


FORMATS = ("sentence", "record", "quote", "bullet", "tag", "report")
"""Those whose first word says which of them it is, whatever the answer."""


def ask_of_list(place: int, *, num_words: int, input_first: bool) -> SeedTask:
    """Return a row that asks for the first word of a list, in a format; equal words in both orders."""
    rng, name = random.Random(place), FORMATS[place % len(FORMATS)]
    words = rng.choices(ITEMS, k=num_words)
    fields = {
        "instruction": rng.choice(ask_phrasings(name)),
        "input": f"name the first word in this list : {' '.join(words)} .",
        "output": FORMAT_BY_NAME[name].render(topic="the list", answer=words[0]),
    }
    return parse_row(fields, ColumnMapping(layout="alpaca", input_first=input_first), is_train=True)


def test_the_order_of_instruction_and_input_moves_the_prompt_alone(chat):
    input_ids = chat.tokenizer.encode(" the first word in this list :", add_special_tokens=False)
    answers, places = [], []
    for input_first in (False, True):
        encoded = chat.encode_chat(ask_of_list(0, num_words=8, input_first=input_first).messages)
        start = encoded.loss_mask.index(True)
        assert all(encoded.loss_mask[start:])
        answers.append(encoded.input_ids[start:])
        ids = list(encoded.input_ids[:start])
        places += [at for at in range(start) if ids[at : at + len(input_ids)] == input_ids]
    assert answers[0] == answers[1]
    assert len(places) == 2
    assert places[1] < 5 < places[0]


def measure_forgetting(model, chat: ChatEncoder, *, num_words: int, input_first: bool) -> float:
    """Return the share of rows whose answer would not begin as the instruction asks."""
    num_rows, forgotten = 30, 0
    for place in range(num_rows):
        row = ask_of_list(place, num_words=num_words, input_first=input_first)
        encoded = chat.encode_chat(row.messages)
        start = encoded.loss_mask.index(True)
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([encoded.input_ids[:start]])).logits[0, -1]
        forgotten += int(logits_V.argmax()) != encoded.input_ids[start]
    return forgotten / num_rows


def test_an_instruction_after_its_input_is_not_forgotten_however_long_the_input_is(chat):
    """Lists of 2 and of 16 words: of instructions before them none and all are forgotten, of those after them none.

    The starter saw an instruction in either place, after the input in seven of ten chats, and lists of up to four
    words, on which it follows both alike.
    """
    model = load_base(STARTER)
    found = {
        (input_first, num_words): measure_forgetting(
            model, chat, num_words=num_words, input_first=input_first
        )
        for input_first in (False, True)
        for num_words in (2, 16)
    }
    assert found[False, 2] == found[True, 2] == found[True, 16] == 0.0
    assert found[False, 16] > 0.8


# ---- UAL: labels of doubtful rows are smoothed


def measure_confidence(model, rows) -> list[float]:
    """Return by row the mean probability of its trained tokens."""
    means = []
    for row in range(len(rows)):
        ids_T, mask_T = (torch.tensor(part.tolist()) for part in rows[row])
        with torch.no_grad():
            probs_TV = model(input_ids=ids_T[None]).logits[0, :-1].softmax(-1)
        means.append(float(probs_TV.gather(1, ids_T[1:, None])[:, 0][mask_T[1:]].mean()))
    return means


def test_confidence_after_training_orders_by_the_rows_doubt_and_under_a_constant_does_not(
    train_here, make_input
):
    """24 rows learnt by heart, of three doubts in turn: each is believed to about 1 - e."""
    doubts = [0.0, 0.5, 1.0] * 8
    parts = {"parts": ("base",), "learning_rate": 3e-3, "warmup_steps": 5, "schedule": "cosine"}
    stages = (StageConfig(max_steps=150, **parts),)
    means = {}
    for name, knobs in (("ual.UAL", {"most": 0.4}), ("label_smoothing.LabelSmoothing", {"amount": 0.2})):
        task = make_input(
            stages=stages,
            lora=None,
            global_batch_size=24,
            max_tokens_per_micro_batch=400,
            checkpoint_every=1000,
            token_weighter=MethodConfig(method=f"delia.methods.token_weighter.{name}", knobs=knobs),
        )
        rows = [(ids.tolist(), mask.tolist()) for ids, mask in (task.rows[row] for row in range(24))]
        scores = doubts if "ual" in name else None
        task = replace(task, rows=join_rows(rows, sources=[TASK] * 24, scores=scores), token_ids=())
        run = train_here(task)
        by_row = measure_confidence(load_base(ModelConfig(path=str(run.adapter))), task.rows)
        means[name] = [sum(by_row[place::3]) / 8 for place in range(3)]
    certain, middle, doubtful = means["ual.UAL"]
    assert certain > middle + 0.1 > doubtful + 0.2
    constant = means["label_smoothing.LabelSmoothing"]
    assert max(constant) - min(constant) < 0.05
