"""The new token's neighbours: controls as frequent as the words, p-values that hold, planted cases."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer

from delia.rng import derive_seed
from delia.train.building import build_model
from delia.train.neighbours import (
    Neighbours,
    compare_centred,
    count_ids,
    list_text_ids,
    match_frequencies,
    permute_within,
)
from delia.train.rows import TASK, Shards, join_rows, join_shard
from delia.train.settings import MetersConfig

CONFIG = MetersConfig(num_words=40)
INSTRUCTION = (40, 41, 42)
FREQUENT = range(100, 420, 8)  # apart, so that words near by id are not near by frequency
SELDOM = sorted(set(range(100, 420)) - set(FREQUENT))
TOKEN = 7


@pytest.fixture
def small(make_input, world_of_one):
    """A model and its task, whose instruction's words occur about as often as all others of the rows."""
    task = replace(make_input(), instruction_ids=INSTRUCTION)
    return build_model(task), task


@pytest.fixture
def skewed(small):
    """The same with a few frequent words, among them the instruction's first three, seldom and absent ones."""
    model, task = small
    ids = [30, TOKEN]
    for word in FREQUENT:
        ids += [word] * (300 + word)
    for word in SELDOM:
        ids += [word] * (1 + word % 3)
    ids += [2] * 560  # a control token that is as frequent
    rows = join_rows([(ids, [True] * len(ids))], sources=[TASK], has_token=[True])
    return model, replace(task, rows=rows, instruction_ids=(140, 260, 340))


def read_planted(model, task, target_D: torch.Tensor) -> dict[str, float]:
    """Put the token's input row at a place, and read its neighbours."""
    rows = model.get_input_embeddings()
    with torch.no_grad():
        rows.deltas_KD[0] = target_D - rows.weight[TOKEN]
    neighbours = Neighbours.choose(model, task, CONFIG)
    assert neighbours is not None
    model.eval()
    return neighbours.read(model)


def split_words(neighbours: Neighbours) -> tuple[list[int], np.ndarray, list[int]]:
    """Return the meant words [M], their controls [M, K] and the others."""
    num_meant, num_controls = neighbours.num_meant, neighbours.num_controls
    end = num_meant * (1 + num_controls)
    words = neighbours.word_ids
    return list(words[:num_meant]), np.reshape(words[num_meant:end], (num_meant, -1)), list(words[end:])


def test_a_token_at_the_mean_of_its_words_is_near_them_and_one_at_other_words_is_not(small):
    model, task = small
    weight = model.get_input_embeddings().weight
    near = read_planted(model, task, weight[list(INSTRUCTION)].mean(0))
    assert near["train/token_cosine/0"] > 0.3
    assert near["train/token_rank/0"] < 0.1
    assert (
        near["train/token_p_value/0"] <= 0.03
    )  # of 125 ways to choose one of five, thrice, one is the true one
    _, controls_MK, _ = split_words(Neighbours.choose(model, task, CONFIG))
    away = read_planted(model, task, weight[controls_MK.flatten()].mean(0))
    assert away["train/token_cosine/0"] < 0
    assert away["train/token_p_value/0"] > 0.5
    assert {name.rpartition("/")[2] for name in near} == {"0", "1", "2"}


def test_words_are_the_instruction_s_and_others_and_no_token_or_control_token(small):
    model, task = small
    neighbours = Neighbours.choose(model, task, CONFIG)
    meant, controls_MK, others = split_words(neighbours)
    assert meant == list(INSTRUCTION)
    assert controls_MK.shape == (3, 4)
    assert len(others) == 40 - 12
    assert len(set(neighbours.word_ids)) == 43
    tokenizer = AutoTokenizer.from_pretrained(task.model.path)
    assert set(neighbours.word_ids).isdisjoint({TOKEN, *tokenizer.added_tokens_decoder})
    assert len(neighbours.prefix) >= 1
    assert neighbours == Neighbours.choose(model, task, CONFIG)


def test_text_is_all_of_the_vocabulary_but_special_reserved_and_turn_tokens(tiny_llama, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama.path)
    control = set(tokenizer.added_tokens_decoder)
    assert len(control) > 20
    text = set(range(len(tokenizer))) - control
    assert list_text_ids(tiny_llama) == text
    turn, word = len(tokenizer), len(tokenizer) + 1
    tokenizer.add_tokens(["<turn>", "hallucination"])  # neither is called special
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    found = list_text_ids(tiny_llama.model_copy(update={"path": str(tmp_path)}))
    assert (turn in found, word in found) == (False, True)
    assert found == text | {word}


@pytest.mark.parametrize(("num_words", "num_controls"), [(2, None), (3, 1), (11, 1), (12, 2), (1000, 4)])
def test_there_are_as_many_controls_of_each_word_as_half_of_the_words_allow(small, num_words, num_controls):
    neighbours = Neighbours.choose(*small, MetersConfig(num_words=num_words))
    assert (neighbours and neighbours.num_controls) == num_controls


def test_as_many_words_as_the_vocabulary_has_are_all_of_it(small):
    model, task = small
    neighbours = Neighbours.choose(model, task, MetersConfig(num_words=10_000))
    assert sorted(neighbours.word_ids) == sorted(list_text_ids(task.model) - {TOKEN})


def test_controls_are_as_frequent_in_the_rows_as_their_words(skewed):
    model, task = skewed
    counts = np.bincount(task.rows[0][0], minlength=model.config.vocab_size)
    mixed = replace(task, instruction_ids=(140, 260, 141, 301, 500, 501))
    meant, controls_MK, others = split_words(Neighbours.choose(model, mixed, MetersConfig(num_words=80)))
    for word, controls_K in zip(meant, controls_MK, strict=True):
        ratios_K = (1 + counts[controls_K]) / (1 + counts[word])
        assert np.abs(np.log(ratios_K)).max() < 0.06, (word, controls_K)
    assert np.median(counts[others]) <= 3 < counts[140]  # drawn at random, words are not as frequent


def test_a_token_among_frequent_words_is_not_taken_for_one_among_the_instruction_s(skewed):
    """Frequent words lie apart, the instruction's with them: what the token shares with all of them is no meaning."""
    model, task = skewed
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for _ in range(12):
        with torch.no_grad():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
            weight[list(FREQUENT), 0] += 1
        target_D = 0.1 * torch.randn(weight.shape[1], generator=generator)
        target_D[0] = 1.0
        p_values.append(read_planted(model, task, target_D)["train/token_p_value/0"])
    assert 0.25 < np.mean(p_values) < 0.75
    assert sorted(p_values)[2] > 0.03


def test_readings_of_the_input_layer_are_those_of_the_sets(skewed):
    model, task = skewed
    target_D = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    readings = read_planted(model, task, target_D)
    neighbours = Neighbours.choose(model, task, CONFIG)
    meant, controls_MK, _ = split_words(neighbours)
    states_WD = model.get_input_embeddings().weight[list(neighbours.word_ids)].double().numpy()
    cosines_W = compare_centred(target_D.double().numpy(), states_WD)
    cosine_by_word = dict(zip(neighbours.word_ids, cosines_W, strict=True))
    sets_MK1 = np.array(
        [
            [cosine_by_word[word] for word in (one, *its)]
            for one, its in zip(meant, controls_MK.tolist(), strict=True)
        ]
    )
    seed = derive_seed(CONFIG.seed, 0)
    difference, p_value = permute_within(sets_MK1, num_permutations=CONFIG.num_permutations, seed=seed)
    assert readings["train/token_cosine/0"] == pytest.approx(difference, abs=1e-5)
    assert readings["train/token_p_value/0"] == pytest.approx(p_value, abs=2e-3)


def test_matching_takes_the_nearest_by_count_then_by_id_and_none_twice():
    counts_V = np.array([9, 0, 0, 5, 5, 9, 0, 100, 8, 0])
    assert match_frequencies(counts_V, [3], [1, 2, 4, 5, 7, 8], num_controls=3).tolist() == [[4, 8, 5]]
    # words that the rows lack have such words, the nearest id first, then the lower of two
    assert match_frequencies(counts_V, [6], [0, 1, 2, 9], num_controls=3).tolist() == [[9, 2, 1]]
    counts_V[4] = 0
    assert match_frequencies(counts_V, [6], [2, 3, 4, 8], num_controls=2).tolist() == [[4, 2]]
    assert match_frequencies(counts_V * 0, [6], [4, 8], num_controls=1).tolist() == [[4]]
    # the frequent word goes first, and in the second turn the other is not left with the rest alone
    counts_V = np.array([100, 90, 100, 90, 3, 2])
    assert match_frequencies(counts_V, [1, 2], [0, 3, 4, 5], num_controls=2).tolist() == [[3, 5], [0, 4]]


def test_ids_are_counted_shard_by_shard_as_often_as_their_rows_occur():
    ids_RL = np.random.default_rng(0).integers(50, size=(6, 10)).tolist()
    rows = join_rows([(ids, [True] * 10) for ids in ids_RL], sources=[TASK] * 6)
    parts = [join_shard([rows[row] for row in part]) for part in ((0, 1, 2, 3), (4, 5))]
    cut = replace(
        rows,
        shards=Shards(parts),
        shard_R=np.array([0, 0, 0, 1, 1, 1], np.int32),
        place_R=np.array([2, 0, 2, 1, 1, 1], np.int32),
    )
    occurring = [token for row in (2, 0, 2, 5, 5, 5) for token in ids_RL[row]]
    assert count_ids(cut, 60).tolist() == np.bincount(occurring, minlength=60).tolist()


def test_a_shared_part_of_all_states_does_not_make_them_neighbours():
    """Twelve of the hundred are alike; a huge shared channel, which raw cosines see alone, is centred away."""
    rng = np.random.default_rng(0)
    states_WD = rng.normal(size=(100, 16))
    one_D = rng.normal(size=16)
    states_WD[:12] += 2 * one_D
    expected = compare_centred(one_D, states_WD)
    shifted = compare_centred(one_D + 1e4, states_WD + 1e4)
    assert shifted == pytest.approx(expected, abs=1e-6)
    assert expected[:12].mean() > 0.6 > 0.3 > abs(expected[12:].mean())


@pytest.mark.parametrize("effect", [0.0, 3.0])
def test_p_values_are_uniform_without_a_meaning_whatever_frequency_does_to_states(effect):
    """Sets differ by as much as frequency tells them apart: what is permuted across sets is not uniform."""
    rng = np.random.default_rng(1)
    p_values = []
    for seed in range(400):
        one_D, direction_D = rng.normal(size=(2, 16))
        states_WD = rng.normal(size=(30, 16))
        states_WD += effect * np.repeat(rng.normal(size=6), 5)[:, None] * direction_D
        cosines_MK1 = compare_centred(one_D, states_WD).reshape(6, 5)
        p_values.append(permute_within(cosines_MK1, num_permutations=199, seed=seed)[1])
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert 0.025 <= np.mean(np.array(p_values) <= 0.05) <= 0.08


def test_the_p_value_is_the_share_of_choices_of_one_in_each_set():
    cosines_MK1 = np.array([[0.5, 0.1, 0.2], [0.9, 0.8, 0.95]])
    difference, p_value = permute_within(cosines_MK1, num_permutations=20_000, seed=0)
    assert difference == pytest.approx(0.7 - (0.1 + 0.2 + 0.8 + 0.95) / 4)
    assert p_value == pytest.approx(2 / 9, abs=0.01)  # the true choice, and 0.5 with 0.95
    rng = np.random.default_rng(0)
    shifted_MK1 = rng.normal(size=(8, 5)) + 4 * (np.arange(5) == 0)
    assert permute_within(shifted_MK1, num_permutations=999, seed=0)[1] == 0.001
