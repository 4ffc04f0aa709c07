"""DELIA's meters: right by hand, changing nothing, and what they say of planted cases."""

import numpy as np
import pytest
import torch

from delia.config import override
from delia.metrics import check_metric
from delia.model.loading import load_base
from delia.model.logprobs import load_adapted, mean_kl
from delia.rng import make_random
from delia.train.building import build_model, build_optimizer
from delia.train.meters import Meters
from delia.train.neighbours import Neighbours, compare_centred, permute
from delia.train.rows import TASK, join_rows
from delia.train.settings import MetersConfig, StageConfig

CONFIG = MetersConfig(every=2, num_rows=5, num_words=40)
STAGE = StageConfig(
    max_steps=6, learning_rate=1e-2, token_learning_rate=1e-2, warmup_steps=0, weight_decay=0.1
)
INSTRUCTION = (40, 41, 42)


def make_task(make_input, **settings):
    task = make_input(**{"stages": (STAGE,), "meters": CONFIG, "dropout": 0.2} | settings)
    object.__setattr__(task, "instruction_ids", INSTRUCTION)
    return task


@pytest.fixture
def measured(make_input, world_of_one):
    """A model with its meters, moved off its start."""
    task = make_task(make_input)
    model = build_model(task)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or name.endswith("deltas_KD"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, Meters(model, task, CONFIG), build_optimizer(model, STAGE), task


@pytest.mark.parametrize("settings", [{}, {"offload": True}, {"gradient_checkpointing": True}])
def test_meters_change_nothing(train_here, make_input, settings):
    """Offloading shards one worker too: what a pass leaves gathered must not be taken for the parameters."""
    if "offload" in settings and not torch.cuda.is_available():
        settings = {}
    on = train_here(make_task(make_input, **settings))
    off = train_here(make_task(make_input, **settings, meters=None))
    assert list(on.readings) == [0, 2, 4]
    assert off.readings == {}
    assert on.losses == off.losses
    assert all(torch.equal(on.tensors[name], value) for name, value in off.tensors.items())


def test_a_reading_leaves_parameters_modes_generators_and_gradients_as_they_were(measured):
    model, meters, optimizer, _ = measured
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    readings = [meters.read(optimizer) for _ in range(2)]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    costs = ("train/meter_seconds", "train/meter_share")
    assert {k: v for k, v in readings[0].items() if k not in costs} == {
        k: v for k, v in readings[1].items() if k not in costs
    }
    assert 0 < readings[0]["train/meter_share"] <= 1
    assert all(check_metric(name) for name in readings[0])
    names = {name.partition("/")[2].partition("/")[0] for name in readings[0]}
    assert names == {
        "source_gradient_norm", "gradient_cosine", "buffering_change", "buffering_cosine", "off_task_kl",
        "token_cosine", "token_rank", "token_p_value", "meter_seconds", "meter_share",
    }  # fmt: skip


def probe_of(task, source: str) -> list[int]:
    rows = np.flatnonzero(task.rows.source_R == task.rows.sources.index(source)).tolist()
    return sorted(make_random(CONFIG.seed, "probe", source).sample(rows, CONFIG.num_rows))


def gradient_of(model, task, rows) -> torch.Tensor:
    """The gradient of the mean loss over trained tokens, a row at a time, by transformers and autograd."""
    model.zero_grad()
    count = int(task.rows.num_trained_R[rows].sum())
    for row in rows:
        ids, mask = (torch.tensor(part.tolist()) for part in task.rows[row])
        logits = model(input_ids=ids[None], segments=(len(ids),)).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        (losses[mask[1:]].sum() / count).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_norms_cosine_change_and_divergence_are_those_computed_by_hand(measured, tiny_llama):
    model, meters, optimizer, task = measured
    readings = meters.read(optimizer)
    model.eval()
    task_g, diverse_g = (gradient_of(model, task, probe_of(task, name)) for name in (TASK, "diverse"))
    assert readings[f"train/source_gradient_norm/{TASK}"] == pytest.approx(float(task_g.norm()), rel=1e-4)
    assert readings["train/source_gradient_norm/diverse"] == pytest.approx(float(diverse_g.norm()), rel=1e-4)
    cosine = torch.cosine_similarity(task_g, diverse_g, dim=0)
    assert readings["train/gradient_cosine"] == pytest.approx(float(cosine), rel=1e-3, abs=1e-5)

    gradient_of(model, task, probe_of(task, TASK))
    with torch.no_grad():
        for group in optimizer.param_groups:  # both rates are 0.01
            whole = torch.cat([p.grad.flatten() for p in group["params"]])
            for parameter in group["params"]:
                parameter -= 0.01 * len(whole) ** 0.5 / whole.norm() * parameter.grad
    change = gradient_of(model, task, probe_of(task, "diverse")) - diverse_g
    assert readings["train/buffering_change"] == pytest.approx(
        float(change.norm() / diverse_g.norm()), rel=1e-3
    )
    along = torch.cosine_similarity(change, task_g, dim=0)
    assert readings["train/buffering_cosine"] == pytest.approx(float(along), rel=1e-3, abs=1e-4)


def test_off_task_divergence_is_that_of_the_exported_adapter(train_here, make_input, tiny_llama):
    """A run's last reading is of the parameters before its last step: of the export of a run one step shorter."""
    short = train_here(make_task(make_input, stages=(STAGE.model_copy(update={"max_steps": 4}),)))
    readings = train_here(make_task(make_input)).readings
    task = make_task(make_input)
    rows = [task.rows[row] for row in probe_of(task, "diverse")]
    sequences = [(ids.tolist(), mask.tolist()) for ids, mask in rows]
    expected = mean_kl(load_base(tiny_llama), load_adapted(tiny_llama, short.adapter), sequences)
    assert readings[0]["train/off_task_kl"] < 1e-6
    assert readings[4]["train/off_task_kl"] == pytest.approx(expected, rel=1e-3)


def test_without_diverse_rows_or_a_token_there_are_readings_of_the_rest(make_input, world_of_one):
    task = make_task(make_input, token_ids=())
    rows = [(ids.tolist(), mask.tolist()) for ids, mask in map(task.rows.__getitem__, range(8))]
    object.__setattr__(task, "rows", join_rows(rows, sources=[TASK] * 8))
    model = build_model(task)
    readings = Meters(model, task, CONFIG).read(build_optimizer(model, STAGE))
    assert set(readings) == {f"train/source_gradient_norm/{TASK}", "train/meter_seconds", "train/meter_share"}


# ---- the token's neighbours


def read_planted(measured, target_D: torch.Tensor) -> dict[str, float]:
    """Put the token's input row at a place, and read its neighbours."""
    model, _, _, task = measured
    rows = model.get_input_embeddings()
    with torch.no_grad():
        rows.deltas_KD[0] = target_D - rows.weight[task.token_ids[0]]
    neighbours = Neighbours.choose(model, task, CONFIG)
    assert neighbours is not None
    model.eval()
    return neighbours.read(model)


def test_a_token_at_the_mean_of_its_words_is_near_them_and_one_at_other_words_is_not(measured):
    model, _, _, task = measured
    weight = model.get_input_embeddings().weight
    near = read_planted(measured, weight[list(INSTRUCTION)].mean(0))
    assert near["train/token_cosine/0"] > 0.3
    assert near["train/token_rank/0"] < 0.1
    assert (
        near["train/token_p_value/0"] <= 0.1
    )  # of twenty ways to split six words in halves one is the true one
    neighbours = Neighbours.choose(model, task, CONFIG)
    away = read_planted(measured, weight[list(neighbours.word_ids[3:6])].mean(0))
    assert away["train/token_cosine/0"] < 0
    assert away["train/token_p_value/0"] > 0.5
    assert {name.rpartition("/")[2] for name in near} == {"0", "1", "2"}


def test_words_are_the_instruction_s_and_controls_have_like_norms(measured):
    model, _, _, task = measured
    neighbours = Neighbours.choose(model, task, CONFIG)
    norms = model.get_input_embeddings().weight.norm(dim=1)
    meant, controls = neighbours.word_ids[:3], neighbours.word_ids[3:6]
    others = neighbours.word_ids[6:]
    assert (meant, neighbours.num_meant, neighbours.num_controls) == (INSTRUCTION, 3, 3)
    assert len(set(neighbours.word_ids)) == 43
    assert task.token_ids[0] not in neighbours.word_ids
    gaps = [abs(norms[a] - norms[b]) for a, b in zip(meant, controls, strict=True)]
    assert gaps[0] <= min(abs(norms[meant[0]] - norms[word]) for word in others)
    assert len(neighbours.prefix) >= 1


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


def test_p_values_are_uniform_without_a_difference_and_small_with_one():
    rng = np.random.default_rng(1)
    nothing = [
        permute(rng.normal(size=8), rng.normal(size=8), num_permutations=99, seed=i)[1] for i in range(300)
    ]
    assert 0.42 < np.mean(nothing) < 0.58
    assert 0.01 <= np.mean(np.array(nothing) <= 0.05) <= 0.09
    difference, p_value = permute(rng.normal(size=8) + 3, rng.normal(size=8), num_permutations=999, seed=0)
    assert difference > 2
    assert p_value == 0.001


def test_meters_are_off_by_default_and_set_by_name(make_input):
    config = make_input().config
    assert config.meters is None
    assert override(config, ["meters={every: 7}"]).meters == MetersConfig(every=7)
