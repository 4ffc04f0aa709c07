"""Tiny random models of five shapes, laid out as a hub would, with the starter's tokenizer."""

from collections.abc import Callable

import pytest

from delia.store.models import ModelConfig

SLIDING = ("gemma2", "mistral")
"""Shapes with a sliding window: 8 tokens here, less than most rows of the tests."""
SaveModel = Callable[..., ModelConfig]


@pytest.fixture(scope="session")
def save_model(save_shape) -> SaveModel:
    """Return a function that saves a shape once and gives its settings; wide weights, so that logits differ."""

    def save(shape: str = "llama", *, is_tied: bool = False) -> ModelConfig:
        window = {"sliding_window": 8} if shape in SLIDING else {}
        path = save_shape(shape, initializer_range=0.2, tie_word_embeddings=is_tied, **window)
        return ModelConfig(path=str(path))

    return save
