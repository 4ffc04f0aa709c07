"""LoftQ's start: what quantising lost, as far as a rank holds it; packed weights are played by rounded ones."""

import pytest
import torch
from torch import nn

from delia.model.adapted import attach, collect
from delia.model.loading import load_base
from delia.model.lora import LoraConfig

QUERY = "model.layers.1.self_attn.q_proj"


def make_lora(**settings) -> LoraConfig:
    return LoraConfig(rank=4, alpha=12, dropout=0.0, target_modules="all-linear", init="loftq", **settings)


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(20, 60).reshape(4, 10)).logits


@torch.no_grad()
def round_off(model: nn.Module) -> nn.Module:
    """Play a quantised base: the adapted layers' weights in sixteen steps."""
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                step = module.weight.abs().max() / 8
                module.weight.copy_((module.weight / step).round() * step)
    return model


@pytest.fixture
def build_loftq(save_model, monkeypatch):
    """Return a function of LoRA's settings that gives the played base with what LoftQ starts at."""
    monkeypatch.setattr("delia.model.lora.dequantize_bnb_weight", lambda weight: weight)

    def build(**settings) -> nn.Module:
        rounded = round_off(load_base(save_model()))
        return attach(rounded, lora=make_lora(**settings), whole=load_base(save_model()))

    return build


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
def test_loftq_gives_back_as_much_as_its_rank_can(save_model, build_loftq, use_rslora):
    """Eckart and Young: what is missing after it are the singular values past the rank."""
    whole_OI = load_base(save_model()).get_submodule(QUERY).weight
    model = build_loftq(use_rslora=use_rslora)
    layer = model.get_submodule(QUERY)
    kept_OI = layer.base_layer.weight
    assert torch.equal(kept_OI, round_off(load_base(save_model())).get_submodule(QUERY).weight)

    scaling = make_lora(use_rslora=use_rslora).scaling
    assert scaling not in (0, 1)
    given_OI = scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    missing = torch.linalg.svdvals(whole_OI - kept_OI - given_OI)
    expected = torch.linalg.svdvals(whole_OI - kept_OI)
    assert float(expected[3]) > 1e-2
    torch.testing.assert_close(missing[: 32 - 4], expected[4:], atol=1e-5, rtol=1e-4)

    base_BTV, rounded_BTV = (
        compute_logits(m) for m in (load_base(save_model()), round_off(load_base(save_model())))
    )
    assert (compute_logits(model) - base_BTV).abs().mean() < 0.8 * (rounded_BTV - base_BTV).abs().mean()


@torch.no_grad()
def test_after_loftq_what_training_changed_is_exported_and_the_start_is_not(save_model, build_loftq):
    """Untouched, the adapter over the whole base says what the base says; moved, it moves the base by as much."""
    model = build_loftq()
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if ".lora_" in name}
    still = collect(model, trained, scaling=make_lora().scaling).lora_by_module[QUERY]
    assert still[0].shape == (8, 32)
    torch.testing.assert_close(still[1] @ still[0], torch.zeros(32, 32), atol=1e-6, rtol=0)

    name = f"{QUERY}.lora_B.default.weight"
    trained[name] = trained[name] + 1.0
    a_RI, b_OR = collect(model, trained, scaling=make_lora().scaling).lora_by_module[QUERY]
    moved_OI = make_lora().scaling * torch.ones(32, 4) @ trained[f"{QUERY}.lora_A.default.weight"]
    torch.testing.assert_close(b_OR @ a_RI, moved_OI, atol=1e-5, rtol=1e-4)
