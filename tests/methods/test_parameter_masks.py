"""One contract for every parameter mask, and what is special to each."""

import importlib
import pickle
import pkgutil
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import nn

from delia.errors import ConfigError, TrainError
from delia.methods import parameter_mask
from delia.methods.parameter_mask.hft import HFT, find_kind
from delia.train.freezing import ParameterMask, freeze, unit_of

METHODS: dict[str, ParameterMask] = {"hft": HFT(steps_per_round=5)}
ATTENTION = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]
FFN = [
    f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in ("up_proj", "gate_proj", "down_proj")
]
UNITS = [*ATTENTION, *FFN, "model.embed_tokens.deltas_KD"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> ParameterMask:
    return METHODS[request.param]


# ---- the contract


def test_no_method_is_left_out_of_this_file():
    assert {module.name for module in pkgutil.iter_modules(parameter_mask.__path__)} == set(METHODS)


def test_a_mask_is_a_frozen_value_in_the_module_of_its_name_which_names_its_paper(method):
    module = importlib.import_module(type(method).__module__)
    assert METHODS[module.__name__.rpartition(".")[2]] is method
    assert "https://arxiv.org/abs/" in (module.__doc__ or "")
    assert pickle.loads(pickle.dumps(method)) == method
    assert isinstance(type(method)(), type(method))
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(method)[0].name, 1)


def test_a_mask_depends_on_seed_and_step_alone_and_leaves_something_to_train(method):
    forwards = [method(UNITS, seed=3, step=step) for step in range(40)]
    assert [method(UNITS, seed=3, step=step) for step in reversed(range(40))] == forwards[::-1]
    assert all(set() < frozen < set(UNITS) for frozen in forwards)
    assert forwards != [method(UNITS, seed=4, step=step) for step in range(40)]


# ---- hft


def test_half_of_each_kind_is_frozen_a_round_and_the_others_the_next():
    hft = HFT(steps_per_round=5)
    rounds = [
        {hft(UNITS, seed=0, step=step) for step in range(start, start + 5)} for start in range(0, 60, 5)
    ]
    assert [len(frozen) for frozen in rounds] == [1] * 12
    halves = [next(iter(frozen)) for frozen in rounds]
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert (len(first & set(ATTENTION)), len(first & set(FFN))) == (3, 4)
        assert (len(second & set(ATTENTION)), len(second & set(FFN))) == (3, 5)
        assert first | second == set(ATTENTION + FFN)
        assert not first & second
    assert len(set(halves)) > 8, "rounds are not drawn anew"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.mlp.up_proj", "ffn"),
        ("model.layers.0.post_attention_layernorm.weight", "norm"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("transformer.h.0.attn.c_attn", "attention"),
        ("model.layers.1.block_sparse_moe.experts.0.w1", "ffn"),
        ("lm_head.weight", "other"),
    ],
)
def test_a_matrix_is_of_the_kind_that_its_name_says(name, kind):
    assert find_kind(name) == kind


def test_a_round_without_steps_is_refused():
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        HFT(steps_per_round=0)


# ---- freezing


def make_parameters() -> dict[str, nn.Parameter]:
    names = [f"a.{unit}.lora_{matrix}.default.weight" for unit in ("q", "v") for matrix in "AB"]
    return {name: nn.Parameter(torch.ones(3)) for name in [*names, "embed.deltas_KD"]}


def test_both_matrices_of_a_layer_are_one_unit():
    assert sorted({unit_of(name) for name in make_parameters()}) == ["a.q", "a.v", "embed.deltas_KD"]


def test_what_is_frozen_is_moved_by_neither_momentum_nor_decay_and_goes_on_as_if_nothing_was():
    """Three steps, one step frozen, one more: the frozen ones end as after four steps in all."""
    ends = {}
    for is_frozen in (True, False):
        parameters = make_parameters()
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, weight_decay=0.5)
        for step in range(5 if is_frozen else 4):
            for parameter in parameters.values():
                parameter.grad = torch.tensor([1.0, -2.0, 0.5])
            before = {name: p.detach().clone() for name, p in parameters.items()}
            if is_frozen and step == 3:
                frozen = freeze(parameters, lambda units, seed, step: frozenset({"a.q"}), seed=0, step=step)
                assert frozen == {"a.q"}
            optimizer.step()
            still = {name for name, p in parameters.items() if torch.equal(p, before[name])}
            assert still == ({n for n in parameters if ".q." in n} if is_frozen and step == 3 else set())
        ends[is_frozen] = parameters
    for name in ends[True]:
        assert torch.equal(ends[True][name], ends[False][name]) == (".q." in name), name


@pytest.mark.parametrize(
    ("frozen", "reason"),
    [({"a.x"}, "1, of which 1 are unknown"), ({"a.q", "a.v", "embed.deltas_KD"}, "got 3")],
)
def test_a_mask_that_freezes_all_or_what_is_not_there_is_refused(frozen, reason):
    with pytest.raises(TrainError, match=reason):
        freeze(make_parameters(), lambda units, seed, step: frozenset(frozen), seed=0, step=0)
