"""Mean hidden states: of the counted tokens, whatever else is in the batch."""

import numpy as np
import pytest
import torch

from delia.chat import load_chat
from delia.model.hidden import embed_with_base, mean_hidden_states
from delia.model.loading import load_base

SEQUENCES = [
    ([5, 9, 17, 30, 31], [False, True, True, False, False]),
    ([40], [True]),
    ([7, 7, 8, 60, 61, 62, 63], [False] * 6 + [True]),
    ([3, 4], [False, False]),
]


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gemma2", "mistral"])
def test_the_mean_is_that_of_the_states_that_the_head_reads(save_model, shape):
    """The head applied to the state of one token gives that token's logits."""
    model = load_base(save_model(shape))
    ids = [5, 9, 17, 30]
    vector = mean_hidden_states(model, [(ids, [False, False, True, False])])
    logits_V = model(input_ids=torch.tensor([ids])).logits[0, 2]
    head_V = model.get_output_embeddings()(torch.from_numpy(vector[0]))
    cap = getattr(model.config, "final_logit_softcapping", None)

    torch.testing.assert_close(torch.tanh(head_V / cap) * cap if cap else head_V, logits_V)


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
