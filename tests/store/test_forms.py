"""Which form an adapter needs: what vLLM can't load by LoRARequest goes into weights."""

import pytest

from delia.errors import EngineError
from delia.store.forms import AdapterTraits, choose_form, fit_rank, untied_architecture

LLAMA, QWEN2, QWEN3 = "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
GEMMA2, MISTRAL = "Gemma2ForCausalLM", "MistralForCausalLM"


@pytest.mark.parametrize("architecture", [LLAMA, QWEN2, QWEN3, GEMMA2, MISTRAL, "NewForCausalLM"])
def test_low_rank_matrices_are_served_by_request_everywhere(architecture):
    assert choose_form(architecture, AdapterTraits(rank=16)).form == "lora"


@pytest.mark.parametrize(
    ("architecture", "form"),
    [
        (LLAMA, "lora"),
        (QWEN3, "lora"),
        (QWEN2, "patched_base"),
        (GEMMA2, "patched_base"),
        (MISTRAL, "patched_base"),
        ("NewForCausalLM", "patched_base"),
    ],
)
def test_rows_go_into_the_base_where_its_embedding_takes_no_lora(architecture, form):
    chosen = choose_form(architecture, AdapterTraits(rank=16, has_rows=True))
    assert chosen.form == form
    assert architecture in chosen.reason


@pytest.mark.parametrize("architecture", [LLAMA, MISTRAL])
@pytest.mark.parametrize("has_rows", [False, True])
def test_what_vllm_knows_no_lora_for_is_merged(architecture, has_rows):
    dora = choose_form(architecture, AdapterTraits(rank=16, has_rows=has_rows, has_dora=True))
    assert (dora.form, dora.reason) == ("merged", "vLLM has no DoRA (use_dora=True)")
    large = choose_form(architecture, AdapterTraits(rank=513, has_rows=has_rows))
    assert (large.form, large.reason) == ("merged", "rank 513 is over vLLM's largest, 512")
    assert choose_form(architecture, AdapterTraits(rank=512)).form == "lora"


def test_a_class_that_is_always_tied_is_stood_in_for_where_the_head_is_its_own():
    assert untied_architecture(GEMMA2) == "TransformersForCausalLM"
    assert untied_architecture(LLAMA) == LLAMA


def test_a_rank_is_served_under_the_next_larger_one():
    assert [fit_rank(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(EngineError, match="LoRA rank 513 is over vLLM's largest, 512; merge the adapter"):
        fit_rank(513)
