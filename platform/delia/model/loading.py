"""Load a base model: safetensors only, local code only, in the dtype and attention of its settings."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from delia.errors import ConfigError
from delia.store.models import ModelConfig, resolve_model


def load_base(config: ModelConfig) -> PreTrainedModel:
    """Return the base model on the CPU, in eval mode, its parameters frozen.

    Raises:
        ConfigError: No such dtype, or the directory holds no causal language model.
    """
    dtype = getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"model.dtype must be float32, bfloat16 or float16, got {config.dtype!r}")
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attention}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            resolve_model(config), use_safetensors=True, local_files_only=True, **options
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"can't load base model {config.path!r}: {error}") from error
    if config.attention == "sdpa" and getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers' sdpa leaves Gemma 2's cap of the scores out
    model.requires_grad_(False)
    model.eval()
    return model
