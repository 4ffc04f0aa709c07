"""Which form of an adapter vLLM serves: what it can load depends on the base model's class.

    architecture + what the adapter holds  ->  lora | patched_base | merged | whole, and the reason

A LoRARequest brings low-rank matrices of linear layers everywhere, and rows of tokens where vLLM's
class takes LoRA on its embedding. Elsewhere the rows go into a copy of the base, and the rest stays a
LoRARequest; what vLLM knows no LoRA for is merged. Full tuning leaves a model, which is served as it is.
`tests/generate` holds the table against vLLM.
"""

from dataclasses import dataclass
from typing import Literal

from delia.errors import EngineError

Form = Literal["lora", "patched_base", "merged", "whole"]
EMBEDDING_LORA = frozenset(
    (
        "Cohere2ForCausalLM",
        "CohereForCausalLM",
        "GraniteForCausalLM",
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "Phi3ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    )
)
"""Architectures whose class in vLLM 0.32 lists the input embedding in `embedding_modules`."""
ALWAYS_TIED = frozenset(("Cohere2ForCausalLM", "CohereForCausalLM", "Gemma2ForCausalLM"))
"""Architectures whose class in vLLM 0.32 computes logits with the input embedding, whatever the config says."""
UNTIED_STAND_IN = "TransformersForCausalLM"
"""vLLM's class that runs transformers' own model code: it takes an output head of its own in their place."""
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM 0.32 accepts as `max_lora_rank`."""


@dataclass(frozen=True, kw_only=True)
class AdapterTraits:
    """What of an adapter decides its form: the largest rank, whether it has rows of tokens or is a DoRA.

    `is_whole` tells that it is no adapter but a model of its own.
    """

    rank: int = 1
    is_whole: bool = False
    has_rows: bool = False
    has_dora: bool = False


@dataclass(frozen=True, kw_only=True)
class ServingForm:
    """A form, and why it is needed."""

    form: Form
    reason: str


def choose_form(architecture: str, traits: AdapterTraits) -> ServingForm:
    """Return the lightest form in which vLLM serves an adapter.

    Args:
        architecture: The first of `architectures` in the base's config.json.
        traits: What the adapter holds.
    """
    if traits.is_whole:
        return ServingForm(form="whole", reason="all parameters were trained: it is a model of its own")
    if traits.has_dora:
        return ServingForm(form="merged", reason="vLLM has no DoRA (use_dora=True)")
    if traits.rank > SERVED_RANKS[-1]:
        return ServingForm(
            form="merged", reason=f"rank {traits.rank} is over vLLM's largest, {SERVED_RANKS[-1]}"
        )
    if traits.has_rows and architecture not in EMBEDDING_LORA:
        return ServingForm(
            form="patched_base", reason=f"vLLM's {architecture} takes no LoRA on its input embedding"
        )
    return ServingForm(form="lora", reason=f"vLLM's {architecture} takes all of it by LoRARequest")


def untied_architecture(architecture: str) -> str:
    """Return the architecture under which vLLM loads a base with an output head of its own."""
    return UNTIED_STAND_IN if architecture in ALWAYS_TIED else architecture


def fit_rank(rank: int) -> int:
    """Return the smallest `max_lora_rank` of vLLM that admits a rank.

    Raises:
        EngineError: None does.
    """
    for size in SERVED_RANKS:
        if size >= rank:
            return size
    raise EngineError(f"LoRA rank {rank} is over vLLM's largest, {SERVED_RANKS[-1]}; merge the adapter first")
