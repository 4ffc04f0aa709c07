"""Mean hidden states: of the counted tokens, whatever else is in the batch."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from delia.chat import load_chat
from delia.curate.embedding import scale_to_unit
from delia.model.hidden import embed_with_base, mean_hidden_states
from delia.model.loading import find_layers, load_base
from delia.starter.world import draw_item
from delia.store.models import ModelConfig, resolve_model

SEQUENCES = [
    ([5, 9, 17, 30, 31], [False, True, True, False, False]),
    ([40], [True]),
    ([7, 7, 8, 60, 61, 62, 63], [False] * 6 + [True]),
    ([3, 4], [False, False]),
]


def to_unit_scale(state_D: torch.Tensor) -> torch.Tensor:
    """Return a state with a root mean square of 1."""
    return state_D / state_D.square().mean().sqrt()


@pytest.mark.parametrize(("num_layers", "middle"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_the_mean_is_that_of_the_states_half_way_up(make_shape, shape: str, num_layers: int, middle: int):
    """Beside the states that transformers lists: before the first layer, then after each."""
    model = make_shape(shape, num_hidden_layers=num_layers)
    ids = [5, 9, 17, 30]
    vector = mean_hidden_states(model, [(ids, [False, False, True, False])])
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states

    torch.testing.assert_close(torch.from_numpy(vector[0]), to_unit_scale(states[middle][0, 2]))


def test_the_layers_above_the_middle_are_not_run_and_stay_as_they_were(make_shape):
    model = make_shape("llama", num_hidden_layers=4)
    before = model(input_ids=torch.tensor([[5, 9]])).logits
    run: list[int] = []
    layers = find_layers(model)
    for place, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, inputs, place=place: run.append(place))
    mean_hidden_states(model, SEQUENCES, batch_size=len(SEQUENCES))
    assert run == [0, 1]

    torch.testing.assert_close(model(input_ids=torch.tensor([[5, 9]])).logits, before)
    assert run == [0, 1, 0, 1, 2, 3]


def test_of_a_model_whose_layers_are_not_found_the_last_states_are_taken(make_shape):
    model = make_shape("llama")
    model.config.num_hidden_layers += 1
    (vector,) = mean_hidden_states(model, [([5, 9], [False, True])])
    last = model.base_model(torch.tensor([[5, 9]])).last_hidden_state

    torch.testing.assert_close(torch.from_numpy(vector), to_unit_scale(last[0, 1]))


def test_the_middle_states_know_a_question_of_the_starter_in_other_words():
    """A question's paraphrase lies nearest to it among those of hundreds more often than by the last states."""
    config = ModelConfig(path="package://delia.starter/weights")
    model, chat = load_base(config), load_chat(str(resolve_model(config)))
    rng = random.Random(0)
    items = [item for item in (draw_item(rng) for _ in range(600)) if not item.in_system]
    texts, others = (
        [
            replace(item, phrasing=(item.phrasing + turn) % len(item.kind.phrasings)).prompt()[-1]["content"]
            for item in items
        ]
        for turn in (0, 1)
    )

    def count_found() -> float:
        one_ND, other_ND = (scale_to_unit(embed_with_base(model, chat, some)) for some in (texts, others))
        cosines_NN = one_ND @ other_ND.T
        return float(((cosines_NN >= np.diag(cosines_NN)[:, None]).sum(1) == 1).mean())

    middle = count_found()
    model.config.num_hidden_layers += 1  # the last states, as above
    assert count_found() + 0.2 < middle
    assert middle > 0.6


def test_the_mean_over_several_tokens_worked_out_one_by_one(save_model):
    model = load_base(save_model())
    (ids, mask), vectors_ND = SEQUENCES[0], mean_hidden_states(model, SEQUENCES)
    single = [
        mean_hidden_states(model, [(ids, [place == k for k in range(len(ids))])])[0]
        for place, is_counted in enumerate(mask)
        if is_counted
    ]

    np.testing.assert_allclose(vectors_ND[0], np.mean(single, axis=0), atol=1e-5)
    assert not vectors_ND[3].any()


def test_no_token_outweighs_the_others(make_shape):
    """One token's state is a thousand times as large as that of the other."""
    model = make_shape("llama", num_hidden_layers=4, tie_word_embeddings=False)
    model.get_input_embeddings().weight[9] *= 1000
    one, other = (mean_hidden_states(model, [([3, 9], mask)])[0] for mask in ([True, False], [False, True]))
    (both,) = mean_hidden_states(model, [([3, 9], [True, True])])

    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-5)
    assert np.linalg.norm(one) == pytest.approx(np.linalg.norm(other), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_no_cut_into_batches_changes_a_vector(save_model, batch_size):
    model = load_base(save_model())
    together = mean_hidden_states(model, SEQUENCES, batch_size=len(SEQUENCES))

    np.testing.assert_allclose(
        mean_hidden_states(model, SEQUENCES, batch_size=batch_size), together, atol=1e-5
    )
    assert np.abs(together[0] - together[2]).max() > 0.1


def test_of_a_text_only_its_own_tokens_count(save_model):
    config = save_model()
    model, chat = load_base(config), load_chat(config.path)
    (vector,) = embed_with_base(model, chat, ["what is the fox ?"])
    prefix = chat.encode_user_prefix()
    words = chat.tokenizer.encode(" what is the fox ?", add_special_tokens=False)
    ids = [*prefix, *words]
    expected = mean_hidden_states(model, [(ids, [False] * len(prefix) + [True] * len(words))])[0]

    np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_a_blank_text_has_the_vector_of_zeros(save_model):
    config = save_model()
    vectors_ND = embed_with_base(load_base(config), load_chat(config.path), ["", " ", "the fox"])

    assert [bool(vector.any()) for vector in vectors_ND] == [False, False, True]
