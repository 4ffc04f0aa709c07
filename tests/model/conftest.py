"""Tiny random models of five shapes, laid out as a hub would, with the starter's tokenizer."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from delia.starter.tokenizer import build_tokenizer
from delia.store.models import ModelConfig

SHAPES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "mistral": MistralConfig,
}
SLIDING = ("gemma2", "mistral")
"""Shapes with a sliding window: 8 tokens here, less than most rows of the tests."""
SaveModel = Callable[..., ModelConfig]


@pytest.fixture(scope="session")
def save_model(tmp_path_factory) -> SaveModel:
    """Return a function that saves a shape once and gives its settings; wide weights, so that logits differ."""
    saved: dict[tuple[str, bool], ModelConfig] = {}

    def save(shape: str = "llama", *, is_tied: bool = False) -> ModelConfig:
        if (shape, is_tied) not in saved:
            directory = tmp_path_factory.mktemp(f"{shape}-tied-{is_tied}")
            tokenizer = build_tokenizer()
            config = SHAPES[shape](
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                max_position_embeddings=128,
                initializer_range=0.2,
                tie_word_embeddings=is_tied,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **({"sliding_window": 8} if shape in SLIDING else {}),
            )
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            saved[shape, is_tied] = ModelConfig(path=str(directory))
        return saved[shape, is_tied]

    return save
