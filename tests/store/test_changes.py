"""Changes of weights: cases worked by hand, and every scaling of PEFT's held against PEFT."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from delia.errors import EngineError, StoreError
from delia.store.adapters import CONFIG, WEIGHTS, read_tensors
from delia.store.changes import WeightChange, read_changes

A_RI = torch.tensor([[1.0, 2.0]])
B_OR = torch.tensor([[3.0], [0.0]])


def test_a_linear_change_worked_by_hand():
    """[[10, 20], [30, 40]] + 2 x [[3, 6], [0, 0]]."""
    change = WeightChange(a_RI=A_RI, b_OR=B_OR, scaling=2.0)
    changed = change.apply(torch.tensor([[10.0, 20.0], [30.0, 40.0]]))
    assert changed.tolist() == [[16.0, 32.0], [30.0, 40.0]]
    assert change.shape == (2, 2)


def test_a_dora_change_worked_by_hand():
    """Rows (3, 4) and (0, 5), both of norm 5, are given norms 10 and 1."""
    magnitude = torch.tensor([10.0, 1.0])
    change = WeightChange(a_RI=A_RI, b_OR=torch.zeros(2, 1), scaling=1.0, magnitude=magnitude)
    assert change.apply(torch.tensor([[3.0, 4.0], [0.0, 5.0]])).tolist() == [[6.0, 8.0], [0.0, 1.0]]


def test_an_embedding_changes_in_its_tokens_rows_alone():
    """Rows of a [3, 2] embedding: token 2 gets (5, 7)."""
    a_RV = torch.tensor([[0.0, 0.0, 1.0]])
    change = WeightChange(a_RI=a_RV, b_OR=torch.tensor([[5.0], [7.0]]), scaling=1.0, is_embedding=True)
    changed = change.apply(torch.ones(3, 2))
    assert changed.tolist() == [[1.0, 1.0], [1.0, 1.0], [6.0, 8.0]]
    assert change.shape == (3, 2)


def test_the_columns_of_an_embedding_are_given_doras_norms():
    """Columns (3, 0, 4 + 0) and (0, 1, 0), of norms 5 and 1, are given 10 and 1."""
    a_RV = torch.tensor([[0.0, 0.0, 1.0]])
    change = WeightChange(
        a_RI=a_RV,
        b_OR=torch.tensor([[4.0], [0.0]]),
        scaling=1.0,
        is_embedding=True,
        magnitude=torch.tensor([10.0, 1.0]),
    )
    changed = change.apply(torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    assert changed.tolist() == [[6.0, 0.0], [0.0, 1.0], [8.0, 0.0]]


def test_a_weight_keeps_its_dtype_and_is_rounded_once():
    """1 + 3 x 2^-9 lies between two numbers of bfloat16; each addend alone would vanish."""
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    change = WeightChange(a_RI=torch.full((3, 1), 2.0**-9), b_OR=torch.ones(1, 3), scaling=1.0)
    changed = change.apply(ones)
    assert changed.dtype == torch.bfloat16
    assert changed.item() == (torch.tensor(1 + 3 * 2.0**-9)).bfloat16().item() != 1.0
    assert change.apply(ones, torch.float32).item() == 1 + 3 * 2.0**-9


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*q_proj": 12}},
        {"r": 4, "lora_alpha": 6, "use_dora": True},
        {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True},
    ],
    ids=["plain", "rslora", "patterns", "dora", "dora with rslora"],
)
def test_a_change_is_what_peft_merges(tiny_base, peft_adapter, settings):
    base = tiny_base("Llama")
    directory = peft_adapter(base, **settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, str(directory)).merge_and_unload().state_dict()

    changes = read_changes(directory)
    assert len(changes) == 6, "three modules in each of two layers"
    for name, change in changes.items():
        assert not torch.allclose(merged[name], before[name], atol=1e-2)
        torch.testing.assert_close(change.apply(before[name]), merged[name], atol=1e-5, rtol=1e-5)


def test_half_a_change_is_refused(tiny_base, tiny_adapter):
    directory = tiny_adapter(tiny_base("Llama"), seed=3)
    tensors = read_tensors(directory)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(StoreError, match=r"q_proj' has \['A'\], a change needs A and B"):
        read_changes(directory)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq"])
def test_an_adapter_that_moves_its_base_as_it_is_loaded_is_refused(tiny_base, tiny_adapter, init):
    directory = tiny_adapter(tiny_base("Llama"))
    config = json.loads((directory / CONFIG).read_text()) | {"init_lora_weights": init}
    (directory / CONFIG).write_text(json.dumps(config))
    with pytest.raises(EngineError, match=f"init_lora_weights='{init}' changes the base as the adapter is"):
        read_changes(directory)
