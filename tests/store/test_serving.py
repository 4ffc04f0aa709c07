"""Serving forms: what PEFT makes of base and adapter is what each form is, for every shape."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from delia.errors import EngineError, StoreError
from delia.store.adapters import CONFIG, check_servable, read_tensors
from delia.store.serving import ServedFiles, locate_served, read_architecture, write_served
from delia.store.tables import MANIFEST

SHAPES = ("Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral")
TOKENS = (7, 9)
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_tie = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


def load(model: Path, adapter: Path | None = None):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    return (PeftModel.from_pretrained(loaded, str(adapter)) if adapter else loaded).eval()


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    """Return logits [4, 12, V] on prompts in which both tokens stand."""
    ids_BT = torch.randint(20, 290, (4, 12), generator=torch.Generator().manual_seed(1))
    ids_BT[:, 3], ids_BT[:, 7] = TOKENS
    return model(input_ids=ids_BT).logits


def check_equal(served: ServedFiles, base: Path, adapter: Path) -> None:
    """Hold a form to what PEFT computes; the adapter must be seen in it."""
    expected_BTV = compute_logits(load(base, adapter))
    assert (expected_BTV - compute_logits(load(base))).abs().max() > 0.1
    served_BTV = compute_logits(load(served.model or base, served.adapter))
    torch.testing.assert_close(served_BTV, expected_BTV, atol=1e-4, rtol=1e-4)


@every_shape
@every_tie
@pytest.mark.parametrize("form", ["patched_base", "merged"])
def test_a_form_computes_what_peft_does(tiny_base, tiny_adapter, tmp_path, shape, is_tied, form):
    base = tiny_base(shape, is_tied=is_tied)
    adapter = tiny_adapter(base)
    served = write_served(form, base, adapter, tmp_path / "served")
    check_equal(served, base, adapter)
    assert served.model is not None
    config = json.loads((served.model / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    base_head = load(base).get_output_embeddings().weight
    assert torch.equal(load(served.model).get_output_embeddings().weight, base_head), "the head has moved"
