"""What papers claim of their methods, measured where it shows at this scale: on the starter."""

import random
from dataclasses import replace

import pytest
import torch

from delia.chat import ChatEncoder, EncodedChat, load_chat
from delia.config import MethodConfig
from delia.model.loading import load_base
from delia.recipes.starter import STARTER
from delia.schema import Message, SeedTask
from delia.starter.formats import FORMAT_BY_NAME, ask_phrasings
from delia.starter.kinds import KIND_BY_NAME
from delia.starter.lexicon import CAPITALS, ITEMS, OPPOSITES, SOUNDS, THINGS
from delia.starter.world import draw_held_out
from delia.store.models import ModelConfig, resolve_model
from delia.store.task_columns import ColumnMapping, parse_row
from delia.train.building import TrainInput
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig, TrainConfig


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


# ---- HFT: half of the matrices stay as they are


FACTS = {
    "capital": (THINGS, CAPITALS.values()),
    "sound": ([thing for thing in THINGS if thing not in SOUNDS], SOUNDS.values()),
    "opposite": (THINGS, OPPOSITES.values()),
}
"""Kinds of question that the starter knows, of words that it has no such fact of."""


def invent_facts(kind: str, *, num_words: int = 16) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return questions and answers to learn, and the same facts asked for in other phrasings."""
    rng = random.Random(kind)
    words, answers = (list(part) for part in FACTS[kind])
    pairs = [
        (phrasing.format(word), answer)
        for word in rng.sample(words, num_words)
        for answer in [rng.choice(answers)]
        for phrasing in KIND_BY_NAME[kind].phrasings
    ]
    is_shown = [place % 5 < 3 for place in range(len(pairs))]
    return (
        [pair for pair, shown in zip(pairs, is_shown, strict=True) if shown],
        [pair for pair, shown in zip(pairs, is_shown, strict=True) if not shown],
    )


def encode_pair(chat: ChatEncoder, question: str, answer: str) -> EncodedChat:
    return chat.encode_chat(
        (Message(role="user", content=question), Message(role="assistant", content=answer))
    )


def measure_surprise(path: str, rows: list[EncodedChat]) -> float:
    """Return a model's negative log-likelihood of the trained tokens, in nats a token."""
    model, total, num_trained = load_base(ModelConfig(path=path)), 0.0, 0
    for row in rows:
        ids_T, mask_T = torch.tensor(row.input_ids), torch.tensor(row.loss_mask)
        with torch.no_grad():
            logprobs_TV = model(input_ids=ids_T[None]).logits[0, :-1].log_softmax(-1)
        losses_N = -logprobs_TV.gather(1, ids_T[1:, None])[:, 0][mask_T[1:]]
        total, num_trained = total + float(losses_N.sum()), num_trained + len(losses_N)
    return total / num_trained


@pytest.mark.system  # a minute
def test_half_fine_tuning_forgets_less_than_full_tuning_of_three_tasks_learnt_as_well(train_here, chat):
    """Facts learnt kind by kind, a round of HFT each, twice as many steps for half of the matrices.

    Measured, full tuning beside HFT, in nats a token: off the tasks 0.080 and 0.042 were forgotten; of the two kinds
    learnt first 0.47 and 0.21 are left to say; each kind, just learnt, was at 0.057, 0.007, 0.078 and at 0.041,
    0.003, 0.043.
    """
    items = draw_held_out("claims", num_items=150)
    general = [chat.encode_chat(tuple(Message(**turn) for turn in item.messages())) for item in items]
    facts = [[[encode_pair(chat, *pair) for pair in part] for part in invent_facts(kind)] for kind in FACTS]
    hft = MethodConfig(
        method="delia.methods.parameter_mask.hft.HFT", knobs={"steps_per_round": 1000}
    )  # a training is one round
    forgot, learnt, kept = {}, {}, {}
    for num_steps, mask in ((40, None), (80, hft)):
        path = STARTER.path
        for place, (shown, asked) in enumerate(facts):
            stage = StageConfig(
                max_steps=num_steps, parts=("base",), learning_rate=5e-4, warmup_steps=5, schedule="cosine"
            )
            config = TrainConfig(
                lora=None,
                stages=(stage,),
                global_batch_size=24,
                seed=place,
                checkpoint_every=1000,
                parameter_mask=mask,
            )
            rows = join_rows([(row.input_ids, row.loss_mask) for row in shown], sources=[TASK] * len(shown))
            run = train_here(TrainInput(model=ModelConfig(path=path), config=config, rows=rows))
            path = str(run.adapter)
            learnt[num_steps, place] = measure_surprise(path, asked)
        forgot[num_steps] = measure_surprise(path, general) - measure_surprise(STARTER.path, general)
        kept[num_steps] = sum(measure_surprise(path, asked) for _, asked in facts[:2]) / 2

    assert max(learnt.values()) < 0.1
    assert [place for place in range(len(facts)) if learnt[80, place] > learnt[40, place]] == [], (
        "learnt as well"
    )
    assert forgot[80] < 0.75 * forgot[40]
    assert kept[80] < 0.75 * kept[40]
