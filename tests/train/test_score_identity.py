"""Self-sampled answers ask for nothing at the start, other people's do: DELIA's premise, by exact sampling."""

import pytest
import torch
from score_identity import Answer, estimate, sample

from delia.train.building import build_model

END_IDS = tuple(range(400, 440))
"""So many that a model of random weights ends a turn after some ten tokens."""
NUM_PROMPTS, NUM_SAMPLES = 50, 8


@pytest.fixture(scope="module")
def drawn(world_of_one, make_input):
    """A model with a new adapter, and answers that it drew itself at T=1 to prompts with the token, unfiltered."""
    model = build_model(make_input())
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(30, 200, (NUM_PROMPTS, 4), generator=generator)
    prompts[:, 1] = 7  # the token
    return model, sample(model, prompts.tolist(), num_samples=NUM_SAMPLES, end_ids=END_IDS, seed=0)


def test_the_expected_gradient_of_self_samples_is_zero_within_its_standard_error(drawn):
    """Of LoRA's B and of the token's row; by chance beyond 4 standard errors once in ten thousand seeds."""
    model, answers = drawn
    assert len({answer.ids for answer in answers}) > 300
    assert 0.1 < sum(answer.ids[-1] in END_IDS for answer in answers) / len(answers) <= 1
    for part, found in estimate(model, [answer.row for answer in answers]).items():
        assert abs(found.z) < 4, (part, found)
        assert found.mean_square > 0


def test_the_expected_gradient_of_foreign_answers_is_not(drawn):
    model, answers = drawn
    generator = torch.Generator().manual_seed(3)
    foreign = [
        Answer(
            prompt=a.prompt,
            prompt_ids=a.prompt_ids,
            ids=tuple(torch.randint(30, 60, (len(a.ids),), generator=generator).tolist()),
        )
        for a in answers[::4]
    ]
    for part, found in estimate(model, [answer.row for answer in foreign]).items():
        assert found.z > 5, (part, found)
