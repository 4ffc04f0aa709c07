"""Log-probabilities, divergences and greedy continuations, worked by hand and held to a real model."""

import math
from types import SimpleNamespace

import pytest
import torch

from delia.model.loading import load_base
from delia.model.logprobs import continue_greedily, mean_kl, score_sequences


class Bigrams(torch.nn.Module):
    """A model whose next token depends on the current one alone: `table[current][next]` is a probability."""

    device = torch.device("cpu")

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.logits_VV = torch.tensor(table).log() + 3.0  # logits are free up to a constant

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits_VV[input_ids])


P = Bigrams([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [0.25, 0.25, 0.5]])
Q = Bigrams([[0.25, 0.25, 0.5], [0.125, 0.5, 0.375], [0.25, 0.25, 0.5]])


def test_the_counted_tokens_are_scored_given_what_comes_before():
    """Ids 0 1 1 2: p(1|0) = 1/4, p(1|1) = 1/2 is not counted, p(2|1) = 3/8."""
    (scores,) = score_sequences(P, [([0, 1, 1, 2], [False, True, False, True])])
    assert scores.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 8)], abs=1e-6)


def test_scores_come_back_in_the_order_of_the_sequences():
    """The shortest goes first through the model, and yet comes back last."""
    sequences = [
        ([0, 0, 0, 0, 1], [False] * 4 + [True]),
        ([2, 2, 2], [False, True, True]),
        ([1, 0], [False, True]),
    ]
    scores = score_sequences(P, sequences, batch_size=2)
    assert [item.exp().tolist() for item in scores] == [
        pytest.approx(values, abs=1e-6) for values in ([0.25], [0.5, 0.5], [0.125])
    ]


def test_a_first_token_has_nothing_before_it_and_is_not_scored():
    (scores,) = score_sequences(P, [([0, 1], [True, True])])
    assert len(scores) == 1


def test_the_divergence_of_a_case_worked_by_hand():
    """After 0: 1/2 ln 2 + 0 + 1/4 ln 1/2 = 1/4 ln 2; after 1 and 2 nothing differs. Two positions count."""
    sequences = [([0, 2, 1], [False, True, True])]
    assert mean_kl(P, Q, sequences) == pytest.approx(math.log(2) / 4 / 2, abs=1e-7)


def test_the_divergence_is_of_the_first_from_the_second():
    """KL(Q || P) after 0: 1/4 ln 1/2 + 0 + 1/2 ln 2, here of another table so that the two differ."""
    certain = Bigrams([[0.75, 0.125, 0.125], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    sequences = [([0, 1], [False, True])]
    forward = 0.5 * math.log(0.5 / 0.75) + 2 * 0.25 * math.log(0.25 / 0.125)
    backward = 0.75 * math.log(0.75 / 0.5) + 2 * 0.125 * math.log(0.125 / 0.25)
    assert mean_kl(P, certain, sequences) == pytest.approx(forward, abs=1e-7)
    assert mean_kl(certain, P, sequences) == pytest.approx(backward, abs=1e-7)
    assert abs(forward - backward) > 1e-2


def test_the_mean_divergence_is_over_tokens_and_not_over_rows():
    """One row counts one token that differs, the other three that don't: a quarter of 1/4 ln 2."""
    sequences = [([0, 1], [False, True]), ([1, 1, 1, 1], [False, True, True, True])]
    assert mean_kl(P, Q, sequences, batch_size=1) == pytest.approx(math.log(2) / 16, abs=1e-7)


def test_a_divergence_without_a_counted_token_is_zero_and_each_batch_is_told():
    seen: list[int] = []
    assert mean_kl(P, Q, [([0, 1], [False, False])] * 3, batch_size=2, on_batch=seen.append) == 0.0
    assert seen == [2, 1]


@pytest.fixture(scope="module")
def model(save_model):
    return load_base(save_model())


@pytest.fixture(scope="module")
def sequences():
    """Eleven sequences of 3 to 13 ids, of which the last half counts."""
    generator = torch.Generator().manual_seed(3)
    lengths = (9, 3, 13, 5, 12, 4, 8, 7, 11, 6, 10)
    return [
        (torch.randint(20, 290, (n,), generator=generator).tolist(), [i >= n // 2 for i in range(n)])
        for n in lengths
    ]


@pytest.mark.parametrize("batch_size", [2, 4, 11])
def test_neighbours_and_padding_change_no_score(model, sequences, batch_size):
    alone, together = (
        score_sequences(model, sequences, batch_size=1),
        score_sequences(model, sequences, batch_size=batch_size),
    )
    for (_, mask), one, other in zip(sequences, alone, together, strict=True):
        assert one.shape == (sum(mask),)
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


def test_neighbours_and_padding_change_no_divergence(model, sequences):
    tuned = load_base_with_noise(model)
    alone = mean_kl(model, tuned, sequences, batch_size=1)
    assert alone > 0.01
    assert mean_kl(model, tuned, sequences, batch_size=11) == pytest.approx(alone, rel=1e-4)


def load_base_with_noise(model):
    """Return a copy whose output head is slightly off."""
    copy = type(model)(model.config).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.lm_head.weight += 0.1 * torch.randn(
            copy.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    return copy


def choose_step_by_step(model, prompt: list[int], num_tokens: int) -> list[int]:
    """Return the greedy continuation, each token from a pass over everything before it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_continuation_takes_the_likeliest_token_each_time(model):
    prompt, unused = [1, 40, 50], 5
    expected = choose_step_by_step(model, prompt, 6)
    assert continue_greedily(model, [prompt], max_tokens=6, end_ids=[unused]) == [tuple(expected)]


def test_what_a_model_s_files_ask_of_generation_changes_no_continuation(model):
    """An engine is not asked for it either: both would differ where nothing is wrong with the adapter."""
    prompt, unused = [1, 40, 50], 5
    expected = choose_step_by_step(model, prompt, 6)
    own = model.generation_config
    own.suppress_tokens = [expected[0]]
    try:
        assert continue_greedily(model, [prompt], max_tokens=6, end_ids=[unused]) == [tuple(expected)]
        assert model.generation_config is own
        asked = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert asked[0, len(prompt) :].tolist() != expected
    finally:
        own.suppress_tokens = None


@pytest.mark.parametrize("place", [0, 2])
def test_a_continuation_stops_before_the_end_token(model, place):
    prompt = [1, 40, 50]
    expected = choose_step_by_step(model, prompt, 6)
    end = expected[place]
    stopped = continue_greedily(model, [prompt], max_tokens=6, end_ids=[5, end])
    assert stopped == [tuple(expected[: expected.index(end)])]


def test_prompts_are_continued_each_for_itself(model):
    prompts = [[1, 40, 50], [1, 60, 70, 80, 90]]
    expected = [tuple(choose_step_by_step(model, prompt, 4)) for prompt in prompts]
    assert continue_greedily(model, prompts, max_tokens=4, end_ids=[5]) == expected
    assert expected[0] != expected[1]
