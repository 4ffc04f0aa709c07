"""DELIA's meters: right by hand, changing nothing, and what they say of planted cases."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from delia.config import override
from delia.metrics import check_metric
from delia.model.attention import Segments
from delia.model.loading import load_base
from delia.model.logprobs import load_adapted, mean_kl
from delia.rng import make_random
from delia.train.building import build_model, build_optimizer
from delia.train.meters import Meters, choose_probe
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


@pytest.mark.parametrize(
    "settings",
    [{}, {"offload": True}, {"gradient_checkpointing": True}],
    ids=["plain", "offload", "checkpointing"],
)
def test_meters_change_nothing(train_here, make_input, monkeypatch, settings):
    """Offloading shards one worker too, so that meters read and put back its shards."""
    models = []

    def build(task):
        models.append(build_model(task))
        return models[-1]

    monkeypatch.setattr("delia.train.loop.build_model", build)
    on = train_here(make_task(make_input, **settings))
    off = train_here(make_task(make_input, **settings, meters=None))
    assert [isinstance(model, FSDPModule) for model in models] == ["offload" in settings] * 2
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
    assert all(check_metric(name) for name in readings[0])
    names = {name.partition("/")[2].partition("/")[0] for name in readings[0]}
    assert names == {
        "source_gradient_norm", "gradient_cosine", "buffering_change", "buffering_cosine", "off_task_kl",
        "token_cosine", "token_rank", "token_p_value", "meter_seconds", "meter_share",
    }  # fmt: skip


def test_meters_are_read_before_the_first_step_and_every_so_many_after(train_here, make_input):
    task = make_task(make_input, meters=CONFIG.model_copy(update={"every": 3}))
    assert list(train_here(task).readings) == [0, 3]


def test_the_share_is_the_time_of_all_readings_over_that_since_meters_began(measured, monkeypatch):
    model, _, optimizer, task = measured
    times = iter((10.0, 14.0, 16.0, 26.0, 29.0))  # two seconds of the first 6, then three more of 19
    monkeypatch.setattr("delia.train.meters.time", SimpleNamespace(monotonic=lambda: next(times)))
    meters = Meters(model, task, CONFIG)
    readings = [meters.read(optimizer) for _ in range(2)]
    assert [reading["train/meter_seconds"] for reading in readings] == [2.0, 3.0]
    assert [reading["train/meter_share"] for reading in readings] == [2 / 6, 5 / 19]


def probe_of(task, source: str) -> list[int]:
    rows = np.flatnonzero(task.rows.source_R == task.rows.sources.index(source)).tolist()
    return sorted(make_random(CONFIG.seed, "probe", source).sample(rows, CONFIG.num_rows))


def gradient_of(model, task, rows) -> torch.Tensor:
    """The gradient of the mean loss over trained tokens, a row at a time, by transformers and autograd."""
    model.zero_grad()
    count = int(task.rows.num_trained_R[rows].sum())
    for row in rows:
        ids, mask = (torch.tensor(part.tolist()) for part in task.rows[row])
        logits = model(input_ids=ids[None], segments=Segments(len(ids))).logits[0, :-1]
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


@pytest.mark.parametrize(
    ("num_sources", "counts"), [(0, []), (1, [8]), (3, [3, 3, 2]), (8, [1] * 8), (12, [1] * 12)]
)
def test_a_reading_takes_no_more_rows_with_more_sources_until_each_has_but_one(num_sources, counts):
    names = [TASK, *(f"source{number}" for number in range(num_sources))] * 10
    rows = join_rows([((40, 41), (False, True))] * len(names), sources=names)
    probe = choose_probe(rows, CONFIG.model_copy(update={"num_rows": 8}))
    assert {name: len(chosen) for name, chosen in probe.items()} == dict(
        zip(names, [8, *counts], strict=False)
    )
    assert all(names[row] == name for name, chosen in probe.items() for row in chosen)
    assert all(len(set(chosen)) == len(chosen) for chosen in probe.values())


def test_a_source_of_fewer_rows_than_its_part_gives_all():
    rows = join_rows([((40, 41), (False, True))] * 5, sources=[TASK, "few", "few", "many", TASK])
    assert choose_probe(rows, CONFIG) == {TASK: [0, 4], "few": [1, 2], "many": [3]}


def test_without_diverse_rows_or_a_token_there_are_readings_of_the_rest(make_input, world_of_one):
    task = make_task(make_input, token_ids=())
    rows = [(ids.tolist(), mask.tolist()) for ids, mask in map(task.rows.__getitem__, range(8))]
    object.__setattr__(task, "rows", join_rows(rows, sources=[TASK] * 8))
    model = build_model(task)
    readings = Meters(model, task, CONFIG).read(build_optimizer(model, STAGE))
    assert set(readings) == {f"train/source_gradient_norm/{TASK}", "train/meter_seconds", "train/meter_share"}


def test_meters_are_off_by_default_and_set_by_name(make_input):
    config = make_input().config
    assert config.meters is None
    assert override(config, ["meters={every: 7}"]).meters == MetersConfig(every=7)
