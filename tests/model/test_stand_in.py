"""The word that takes a token's place: the one that scores best when every word is tried the long way."""

import pytest
import torch

from delia.chat import load_chat
from delia.model import stand_in
from delia.model.loading import load_base
from delia.model.stand_in import find_stand_in, list_candidates
from delia.schema import Message
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")
TOKEN = 6
FORMATS = ("count the words : fox cat owl . answer in {} .", "spell the word fox . use {} for your answer .")


@pytest.fixture(scope="module")
def model():
    return load_base(STARTER)


@pytest.fixture(scope="module")
def rows():
    chat = load_chat(str(resolve_model(STARTER)), task_tokens={"<sep>": TOKEN})
    answers = ("{ thought : words answer : 3 }", "{ thought : letters answer : f o x }")
    return [
        (row.input_ids, row.loss_mask)
        for question, answer in zip(FORMATS, answers, strict=True)
        for row in [
            chat.encode_chat(
                (
                    Message(role="user", content=question.format("<sep>")),
                    Message(role="assistant", content=answer),
                )
            )
        ]
    ]


def score_the_long_way(model, rows, token_id: int, candidate: int) -> float:
    """Mean log-probability of the word where the token stands, plus that of the answers, row by row."""
    priors, answers = [], 0.0
    for ids, mask in rows:
        with torch.no_grad():
            own = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            swapped = torch.tensor([[candidate if i == token_id else i for i in ids]])
            other = model(input_ids=swapped).logits[0].log_softmax(-1)
        priors += [float(own[place - 1, candidate]) for place, i in enumerate(ids) if i == token_id]
        answers += sum(float(other[place - 1, ids[place]]) for place in range(len(ids)) if mask[place])
    return sum(priors) / len(priors) + answers / len(rows)


def test_the_best_of_the_candidates_is_found(model, rows):
    candidates = [word for word, _ in list_candidates(model, rows, TOKEN, num_candidates=12)]
    assert len(set(candidates)) == 12
    assert TOKEN not in candidates
    scores = {word: score_the_long_way(model, rows, TOKEN, word) for word in candidates}
    assert find_stand_in(model, rows, TOKEN, num_candidates=12) == max(scores, key=scores.__getitem__)


def test_candidates_are_the_words_that_the_base_expects_before_anything_follows(model, rows):
    chosen = list_candidates(model, rows, TOKEN, num_candidates=3)
    expected = torch.stack(
        [
            model(input_ids=torch.tensor([ids[: ids.index(TOKEN)]])).logits[0, -1].log_softmax(-1)
            for ids, _ in rows
        ]
    ).mean(0)
    expected[TOKEN] = -torch.inf
    assert [word for word, _ in chosen] == expected.topk(3).indices.tolist()
    assert [value for _, value in chosen] == pytest.approx(expected.topk(3).values.tolist(), rel=1e-4)


def test_many_passes_find_what_one_finds(model, rows, monkeypatch):
    whole = find_stand_in(model, rows, TOKEN)
    monkeypatch.setattr(stand_in, "MAX_PASS_TOKENS", 1)
    assert find_stand_in(model, rows, TOKEN) == whole


@pytest.mark.parametrize(("num_rows", "max_tokens"), [(1, 8192), (32, 1), (32, 8192)])
def test_no_more_is_read_than_the_limits_say_and_never_nothing(model, rows, num_rows, max_tokens):
    read = rows if (num_rows, max_tokens) == (32, 8192) else rows[:1]
    found = find_stand_in(model, rows, TOKEN, num_candidates=4, num_rows=num_rows, max_tokens=max_tokens)
    assert found == find_stand_in(model, read, TOKEN, num_candidates=4)
    candidates = [word for word, _ in list_candidates(model, read, TOKEN, num_candidates=4)]
    assert found == max(candidates, key=lambda word: score_the_long_way(model, read, TOKEN, word))


def test_the_head_sees_no_position_that_is_not_read(model, rows, monkeypatch):
    """A large vocabulary times every position of every row fits no memory."""
    columns: list[int] = []
    forward = model.forward

    def count(*args, **options):
        output = forward(*args, **options)
        columns.append(output.logits.shape[1])
        return output

    monkeypatch.setattr(model, "forward", count)
    find_stand_in(model, rows[:1], TOKEN, num_candidates=1)
    assert columns == [rows[0][0].count(TOKEN), sum(rows[0][1])]


def test_a_token_that_never_occurs_or_only_opens_rows_has_no_stand_in(model, rows):
    assert find_stand_in(model, rows, TOKEN + 1) is None
    assert find_stand_in(model, [], TOKEN) is None
    ids, mask = rows[0]
    assert (
        find_stand_in(model, [((TOKEN, *ids[ids.index(TOKEN) + 1 :]), mask[ids.index(TOKEN) :])], TOKEN)
        is None
    )
