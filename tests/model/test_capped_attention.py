"""The attention that a base is loaded with: the settings', but for a cap that it would leave out."""

import torch

from delia.model.loading import load_base
from delia.store.models import ModelConfig


@torch.no_grad()
def compute_logits(base, attention: str) -> torch.Tensor:
    ids_BT = torch.arange(20, 52).reshape(2, 16)
    return load_base(ModelConfig(path=str(base), attention=attention))(input_ids=ids_BT).logits


def test_the_cap_of_a_gemmas_attention_is_kept(tiny_base):
    """transformers' sdpa would leave it out, vLLM does not."""
    base = tiny_base("Gemma2")
    config = load_base(ModelConfig(path=str(base))).config
    assert config.attn_logit_softcapping == 50.0
    assert torch.equal(compute_logits(base, "sdpa"), compute_logits(base, "eager"))


def test_attention_is_the_settings_where_nothing_stands_against_it(tiny_base):
    model = load_base(ModelConfig(path=str(tiny_base("Llama")), attention="sdpa"))
    assert model.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in model.parameters())
