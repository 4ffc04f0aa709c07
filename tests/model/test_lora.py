"""LoRA's variants and starts: what they adapt, that none changes the base's output, and what they refuse."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from delia.config import override
from delia.errors import ConfigError
from delia.model.adapted import attach, part_of, takes_decay
from delia.model.loading import load_base
from delia.model.lora import MOVES_BASE, LoraConfig

INITS = ("default", "pissa", "pissa_niter_16", "olora", "corda", "eva")
QUERY = "model.layers.1.self_attn.q_proj"
every_init = pytest.mark.parametrize("init", INITS)


def make_rows(seed: int = 0) -> list[list[int]]:
    """Return rows of 5 to 12 ids, 340 in all."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(20, 290, (5 + i % 8,), generator=generator).tolist() for i in range(40)]


def make_lora(**settings) -> LoraConfig:
    return LoraConfig(**({"rank": 4, "alpha": 12, "dropout": 0.0, "target_modules": "all-linear"} | settings))


@pytest.fixture
def build(save_model):
    """Return a function of LoRA's settings that gives a tiny Llama with it."""

    def build(*, seed: int = 0, rows_seed: int = 0, token_ids=(), **settings) -> nn.Module:
        return attach(
            load_base(save_model()),
            lora=make_lora(**settings),
            token_ids=token_ids,
            seed=seed,
            task_rows=make_rows(rows_seed),
        )

    return build


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(20, 60).reshape(4, 10)).logits


def read_parameters(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ---- what is adapted


def test_all_linear_layers_but_the_head_are_adapted(build):
    adapted = {name for name, module in build().named_modules() if hasattr(module, "lora_A")}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    expected = attention | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert adapted == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in expected}


@pytest.mark.parametrize("name", ["embed_tokens", "norm", "query"])
def test_a_target_that_is_no_linear_layer_is_refused(build, name):
    with pytest.raises(ConfigError, match=rf"'{name}'.*no linear layer of .* has such a name.*'q_proj'"):
        build(target_modules=("q_proj", name))


def test_the_head_is_no_target(build):
    with pytest.raises(ConfigError, match=r"\['lm_head'\] is the output head, which stays as it is"):
        build(target_modules=("q_proj", "lm_head"))


def test_targets_may_be_set_to_all_linear_on_the_command_line():
    assert override(LoraConfig(), ["target_modules=all-linear"]).target_modules == "all-linear"
    assert override(make_lora(), ["target_modules=[q_proj]"]).target_modules == ("q_proj",)
    with pytest.raises(ConfigError, match="target_modules"):
        override(LoraConfig(), ["target_modules=everything"])


# ---- the scale


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 12 / 4), (True, 12 / math.sqrt(4))])
def test_the_scale_is_the_one_that_pefts_layers_apply(build, use_rslora, scaling):
    assert make_lora(use_rslora=use_rslora).scaling == scaling
    model = build(use_rslora=use_rslora)
    assert model.get_submodule(QUERY).scaling == {"default": scaling}


# ---- starts


def test_the_default_start_is_pefts_own_from_the_seed(save_model):
    """Twelve layers: PEFT shortens lists of twenty and more targets, which must not change what is drawn."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2
    )
    ours, theirs = LlamaForCausalLM(config), LlamaForCausalLM(config)
    attach(ours, lora=LoraConfig(rank=2, alpha=2, dropout=0.0), seed=7)
    torch.manual_seed(7)
    plain = PeftLoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    inject_adapter_in_model(plain, theirs)

    expected = {name: value for name, value in theirs.named_parameters() if ".lora_" in name}
    drawn = {name: value for name, value in ours.named_parameters() if ".lora_" in name}
    assert len(drawn) == 12 * 4 * 2
    assert [name for name, value in expected.items() if not torch.equal(value, drawn.pop(name))] == []
    assert drawn == {}


@every_init
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
def test_a_start_changes_no_logit_beyond_rounding(save_model, build, init, use_dora):
    expected_BTV = compute_logits(load_base(save_model()))
    model = build(init=init, use_dora=use_dora, token_ids=(7,))
    tolerance = 1e-5 * float(expected_BTV.abs().max())
    torch.testing.assert_close(compute_logits(model), expected_BTV, atol=tolerance, rtol=0)


@every_init
def test_a_start_has_the_rank_of_the_settings_and_moves_the_base_only_where_it_says(save_model, build, init):
    model, base = build(init=init), load_base(save_model())
    layer = model.get_submodule(QUERY)
    assert (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape) == ((4, 32), (32, 4))
    assert bool(layer.lora_B["default"].weight.any()) == (init in MOVES_BASE)
    moved = not torch.equal(layer.base_layer.weight, base.get_submodule(QUERY).weight)
    assert moved == (init in MOVES_BASE)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


@every_init
def test_a_start_comes_of_its_seed_and_rows_alone(build, init):
    first = read_parameters(build(init=init))
    torch.manual_seed(1234)
    again, other_seed, other_rows = (
        read_parameters(build(init=init, **changes)) for changes in ({}, {"seed": 1}, {"rows_seed": 1})
    )
    a_name = f"{QUERY}.lora_A.default.weight"
    assert [name for name, value in first.items() if not torch.equal(value, again[name])] == []
    assert torch.equal(first[a_name], other_seed[a_name]) == (init not in ("default", "pissa_niter_16"))
    assert torch.equal(first[a_name], other_rows[a_name]) == (init not in ("corda", "eva"))


def test_pissa_takes_out_the_largest_singular_values(save_model, build):
    """With the four largest gone, the fifth is the largest that the base has left."""
    before = load_base(save_model()).get_submodule(QUERY).weight
    after = build(init="pissa", use_rslora=True).get_submodule(QUERY).base_layer.weight
    expected = torch.linalg.svdvals(before)
    torch.testing.assert_close(torch.linalg.svdvals(after)[:5], expected[4:9], atol=1e-4, rtol=1e-4)


def test_eva_starts_at_the_directions_in_which_the_inputs_vary_most(save_model, build):
    """Against the best four directions of the first layer's inputs; of 32 random ones, four hold an eighth."""
    base, found = load_base(save_model()), []
    handle = base.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].flatten(0, 1))
    )
    for row in make_rows():
        base(input_ids=torch.tensor([row]))
    handle.remove()
    inputs_TD = torch.cat(found) - torch.cat(found).mean(0)
    most = float(torch.linalg.svdvals(inputs_TD)[:4].square().sum())

    a_RI = build(init="eva").get_submodule("model.layers.0.self_attn.q_proj").lora_A["default"].weight
    torch.testing.assert_close(a_RI @ a_RI.T, torch.eye(4), atol=1e-4, rtol=0)
    assert 0.98 * most < float((inputs_TD @ a_RI.T).square().sum()) <= 1.001 * most
    assert most > 1.5 * 4 / 32 * float(inputs_TD.square().sum())


@every_init
def test_a_bfloat16_base_stays_one_and_starts_within_its_rounding(save_model, init):
    settings = save_model()
    half = settings.model_copy(update={"dtype": "bfloat16"})
    model = attach(load_base(half), lora=make_lora(init=init), task_rows=make_rows())
    assert model.get_submodule(QUERY).base_layer.weight.dtype == torch.bfloat16
    start, base, exact = (compute_logits(m).float() for m in (model, load_base(half), load_base(settings)))
    assert (start - base).abs().mean() < 2 * (base - exact).abs().mean()


def test_all_workers_take_the_first_ones_start(build, monkeypatch):
    """Two machines may round a singular vector to opposite signs; here the second has read other rows."""
    sent: list[torch.Tensor] = []

    def join(broadcast) -> None:
        played = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2, broadcast=broadcast)
        monkeypatch.setattr("delia.model.lora.dist", played)

    join(lambda tensor, src: sent.append(tensor.clone()))
    first = build(init="corda", use_dora=True)
    join(lambda tensor, src: tensor.copy_(sent.pop(0)))
    second = build(init="corda", use_dora=True, rows_seed=1)

    assert sent == []
    values = {**read_parameters(second), **dict(second.named_buffers())}
    expected = {**read_parameters(first), **dict(first.named_buffers())}
    assert f"{QUERY}.start_A" in expected
    assert [name for name, value in expected.items() if not torch.equal(value, values[name])] == []


# ---- parts


def test_magnitudes_are_trained_with_lora_and_do_not_decay(build):
    model = build(use_dora=True, token_ids=(7,))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if part_of(name) == "token_rows"} == {"model.embed_tokens.deltas_KD"}
    lora = {name for name in trained if part_of(name) == "lora"}
    magnitudes = {name for name in lora if "magnitude" in name}
    assert (len(magnitudes), len(lora)) == (2 * 7, 2 * 7 * 3)
    assert {name for name, parameter in trained.items() if takes_decay(name, parameter)} == lora - magnitudes


# ---- what is refused


def test_an_unknown_start_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="'default', 'pissa'"):
        override(LoraConfig(), ["init=gaussian"])


@pytest.mark.parametrize("init", ["corda", "eva"])
def test_a_start_that_reads_rows_is_refused_without_any(save_model, init):
    with pytest.raises(ConfigError, match=rf"init={init} .* of the task's rows, there are 0"):
        attach(load_base(save_model()), lora=make_lora(init=init))


def test_eva_without_enough_tokens_is_refused_since_peft_would_wait_for_ever(save_model):
    with pytest.raises(ConfigError, match=r"starts from 8 or more tokens .* there are 7; lower"):
        attach(
            load_base(save_model()), lora=make_lora(init="eva"), task_rows=[[20, 21, 22], [23, 24, 25, 26]]
        )


@pytest.mark.parametrize(("init", "rank", "room"), [("pissa", 17, 16), ("corda", 17, 16), ("eva", 17, 16)])
def test_a_rank_over_a_targets_room_is_refused(build, init, rank, room):
    """k_proj is 32 -> 16; EVA looks for twice the rank among 32 inputs."""
    with pytest.raises(
        ConfigError, match=rf"rank={rank}: .* has room for {room} at train\.lora\.init={init}"
    ):
        build(init=init, rank=rank)
