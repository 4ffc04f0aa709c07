"""Load a base model: safetensors only, local code only, in the dtype, attention and form of its settings."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from delia.errors import ConfigError
from delia.model.lora import MOVES_BASE, LoraConfig
from delia.store.models import ModelConfig, Quantisation, resolve_model


def load_base(config: ModelConfig, *, for_training: bool = False) -> PreTrainedModel:
    """Return the base model in eval mode, its parameters frozen; on the CPU, or on the GPU if quantised.

    Args:
        config: The settings.
        for_training: Whether `config.quantisation` applies; an adapter is served, and so checked, over the
            base as it lies on disk.

    Raises:
        ConfigError: No such dtype, no GPU to quantise on, or the directory holds no causal language model.
    """
    dtype = getattr(torch, config.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"model.dtype must be float32, bfloat16 or float16, got {config.dtype!r}")
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": config.attention}
    if for_training and config.quantisation != "none":
        options |= _quantise(config.quantisation, dtype)
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
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            module.register_state_dict_post_hook(_keep_parameters)
    return model


def load_shapes(config: ModelConfig) -> PreTrainedModel:
    """Return a base's model without its weights, and without memory: names and shapes alone."""
    form = AutoConfig.from_pretrained(resolve_model(config), local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(form)
    return model


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers in their order; empty for a model that does not keep them in one list.

    Not by the names of their classes, which FSDP changes, and which transformers gives with those of other modules.
    """
    number = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return list(next((found for found in lists if len(found) == number), ()))


def count_heads(config: ModelConfig) -> tuple[int, int]:
    """Return a base's heads of queries and of keys; 0 and 0 where its config names none."""
    form = AutoConfig.from_pretrained(resolve_model(config), local_files_only=True).get_text_config()
    num_heads = int(getattr(form, "num_attention_heads", None) or 0)
    return num_heads, int(getattr(form, "num_key_value_heads", None) or num_heads)


def _keep_parameters(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave the scales of packed weights out of a state: torch's checkpoints look for a module's attributes."""
    own = {prefix + name for name, _ in module.named_parameters()}
    for name in [name for name in state if name.startswith(prefix) and name not in own]:
        del state[name]


def _quantise(quantisation: Quantisation, dtype: torch.dtype) -> dict[str, Any]:
    """Return what `from_pretrained` needs to quantise while it loads."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"model.quantisation={quantisation} needs a GPU, and this process sees none; set train.use_gpu=true on a"
            " machine that has one, or model.quantisation=none"
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantisation={quantisation} needs bitsandbytes, which the GPU environment has"
            " (make setup ACCEL=gpu)"
        )
    form = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if quantisation == "nf4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": form, "device_map": {"": torch.cuda.current_device()}}


def check_precision(model: ModelConfig) -> None:
    """Refuse to train in float16, whose gradients fall under its least number as batches grow: nothing scales them.

    Raises:
        ConfigError: With what to take in its place.
    """
    if model.dtype == "float16":
        raise ConfigError(
            "training in model.dtype=float16 loses small gradients; take bfloat16, which has the exponents of float32,"
            " or float32"
        )


def check_quantisation(
    model: ModelConfig,
    lora: LoraConfig | None,
    *,
    trains_base: bool = False,
    num_workers: int,
    use_gpu: bool,
    offload: bool,
) -> None:
    """Refuse to train over a quantised base what can't be, from the settings alone.

    Raises:
        ConfigError: No GPU, several workers or offloaded shards (packed weights are not sharded), a start that
            takes something out of the base's weight, or magnitudes over eight-bit weights; the base's own
            parameters, which have no gradient when they are rounded; LoftQ over anything but four bits.
    """
    if lora is not None and lora.init == "loftq" and (model.quantisation != "nf4" or lora.use_dora):
        raise ConfigError(
            "train.lora.init=loftq starts from what quantising to four bits lost, got"
            f" model.quantisation={model.quantisation} and train.lora.use_dora={str(lora.use_dora).lower()} (whose"
            " magnitudes are of another start); set quantisation=nf4 and use_dora=false, or init=default"
        )
    if model.quantisation == "none":
        return
    name = f"model.quantisation={model.quantisation}"
    if trains_base:
        raise ConfigError(
            f"{name} leaves the base's parameters without gradients, and a stage of train.stages moves the base;"
            " train LoRA, or set quantisation=none"
        )
    if not use_gpu:
        raise ConfigError(f"{name} needs a GPU; set train.use_gpu=true, or model.quantisation=none")
    if num_workers > 1 or offload:
        raise ConfigError(
            f"{name} packs weights in a form that can't be sharded, got train.num_workers={num_workers} and"
            f" train.offload={str(offload).lower()}; set num_workers=1 and offload=false, or quantisation=none"
        )
    if lora is not None and lora.init in MOVES_BASE:
        raise ConfigError(
            f"{name} rounds the base's weight, and train.lora.init={lora.init} takes its start out of that weight;"
            " take init=default, eva or loftq, or quantisation=none"
        )
    if lora is not None and lora.use_dora and model.quantisation == "int8":
        raise ConfigError(
            f"{name} and train.lora.use_dora=true: bitsandbytes loses the scales of eight-bit weights when PEFT reads"
            " their norms; take quantisation=nf4 or none"
        )
