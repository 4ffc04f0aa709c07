"""The table of forms against the classes of vLLM that it speaks of."""

import importlib
import inspect

import pytest

from delia.store.forms import ALWAYS_TIED, EMBEDDING_LORA, UNTIED_STAND_IN

ARCHITECTURES = sorted(
    {
        *EMBEDDING_LORA,
        *ALWAYS_TIED,
        UNTIED_STAND_IN,
        "GemmaForCausalLM",
        "Gemma3ForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
    }
)


@pytest.fixture(scope="module")
def vllm_class():
    """Return a function that finds the class which vLLM's registry names for an architecture."""
    from vllm.model_executor.models.registry import ModelRegistry

    def find(architecture: str) -> type:
        entry = ModelRegistry.models[architecture]
        found: type = vars(importlib.import_module(entry.module_name))[entry.class_name]
        return found

    return find


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_classes_that_take_lora_on_their_embedding_are_those_that_say_so(vllm_class, architecture):
    declared = getattr(vllm_class(architecture), "embedding_modules", {})
    # the stand-in loses the scale of a Gemma's embedding with it, so it is not asked to
    expected = architecture in EMBEDDING_LORA or architecture == UNTIED_STAND_IN
    assert ("embed_tokens" in declared) is expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_classes_without_an_output_head_are_those_that_are_always_tied(vllm_class, architecture):
    builders = [
        vars(kind)["__init__"] for kind in vllm_class(architecture).__mro__ if "__init__" in vars(kind)
    ]
    has_head = any("self.lm_head =" in inspect.getsource(build) for build in builders[:-1])
    assert has_head is (architecture not in ALWAYS_TIED)
