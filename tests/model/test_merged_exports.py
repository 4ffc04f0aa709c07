"""What was trained, and what its merged export computes: every variant with token rows, every shape, tied."""

from pathlib import Path

import pytest
import torch

from delia.model.adapted import attach, collect
from delia.model.loading import load_base
from delia.model.lora import LoraConfig
from delia.store.adapters import read_traits, write_adapter
from delia.store.models import ModelConfig
from delia.store.serving import write_served

TOKENS = (7, 9)
PLAIN = LoraConfig(rank=4, alpha=12, dropout=0.0, target_modules="all-linear")
VARIANTS = {
    "rows alone": None,
    "plain": PLAIN,
    "rslora": PLAIN.model_copy(update={"use_rslora": True}),
    "dora": PLAIN.model_copy(update={"use_dora": True}),
    "pissa": PLAIN.model_copy(update={"init": "pissa"}),
    "dora + rslora + pissa": PLAIN.model_copy(update={"use_dora": True, "use_rslora": True, "init": "pissa"}),
}


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    ids_BT = torch.randint(20, 290, (4, 12), generator=torch.Generator().manual_seed(1))
    ids_BT[:, 3], ids_BT[:, 7] = TOKENS
    return model(input_ids=ids_BT).logits


@pytest.mark.parametrize("shape", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_export_computes_what_was_trained(tiny_base, tmp_path, shape, variant):
    settings, lora = ModelConfig(path=str(tiny_base(shape))), VARIANTS[variant]
    model = attach(load_base(settings), lora=lora, token_ids=TOKENS)
    noise = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
    tensors = collect(model, trained, scaling=lora.scaling if lora else 1.0)
    adapter = tmp_path / "adapter"
    write_adapter(adapter, tensors, vocab_size=model.config.vocab_size, base_model=settings.path)
    assert read_traits(adapter).has_dora is bool(lora and lora.use_dora)

    served = write_served("merged", Path(settings.path), adapter, tmp_path / "merged", dtype="float32")
    expected_BTV = compute_logits(model.eval())
    assert (expected_BTV - compute_logits(load_base(settings))).abs().max() > 0.1
    merged_BTV = compute_logits(load_base(settings.model_copy(update={"path": str(served.model)})))
    torch.testing.assert_close(merged_BTV, expected_BTV, atol=1e-4, rtol=1e-4)
