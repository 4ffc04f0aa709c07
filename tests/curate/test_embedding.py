"""Embedders: unit vectors, each a function of its text alone."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from delia.chat import ChatEncoder, load_chat
from delia.curate.embedding import BASE, HASHED, Embedder, embed_hashed, load_embedder
from delia.errors import ConfigError
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")
TEXTS = [
    "what is the capital of france ?",
    "name the capital of spain .",
    "reverse the list : fox cat owl .",
    "what is 3 plus 4 ?",
]


@pytest.fixture(scope="module")
def chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)))


@pytest.fixture(scope="module")
def sentence_transformer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The starter's decoder with mean pooling, saved as sentence-transformers does."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    path = tmp_path_factory.mktemp("sentences")
    transformer = Transformer(str(resolve_model(STARTER)))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(path))
    return str(path)


@pytest.fixture(params=[HASHED, BASE, "directory"])
def embed(request: pytest.FixtureRequest, chat: ChatEncoder, sentence_transformer: str) -> Embedder:
    name = sentence_transformer if request.param == "directory" else request.param
    return load_embedder(name, model=STARTER, chat=chat)


# ---- every embedder


def test_vectors_are_float32_rows_of_length_one(embed: Embedder):
    vectors_ND = embed(TEXTS)

    assert vectors_ND.dtype == np.float32
    assert vectors_ND.shape[0] == len(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors_ND, axis=1), 1, atol=1e-5)


def test_a_vector_depends_on_no_other_text_of_the_batch(embed: Embedder):
    alone = np.concatenate([embed([text]) for text in TEXTS])

    np.testing.assert_allclose(embed(TEXTS), alone, atol=1e-5)
    np.testing.assert_allclose(embed(TEXTS[::-1])[::-1], alone, atol=1e-5)


def test_two_questions_of_one_kind_are_nearer_than_two_of_different_kinds(embed: Embedder):
    cosines = embed(TEXTS) @ embed(TEXTS).T

    assert cosines[0, 1] > max(cosines[0, 2], cosines[0, 3], cosines[1, 2])


# ---- single ones


def test_hashed_cosines_are_what_texts_share():
    """Two words and a bigram each; the word in common is one term of three on both sides."""
    a, b, c, empty = embed_hashed(["red fox", "Red  cat", "blue owl", " "])

    assert float(a @ b) == pytest.approx(1 / 3)
    assert float(a @ c) == pytest.approx(0)
    assert not empty.any()


def test_hashed_cosines_of_texts_that_share_nothing_are_none_on_average():
    """Terms that fall on one place add up with either sign; without signs 40 words would have 0.15."""
    texts = [" ".join(f"w{number}x{place}" for place in range(40)) for number in range(60)]
    cosines = embed_hashed(texts) @ embed_hashed(texts).T
    others = cosines[~np.eye(60, dtype=bool)]

    assert abs(others.mean()) < 0.01
    assert others.std() == pytest.approx(1 / np.sqrt(512), rel=0.2)


def test_the_base_is_loaded_once_and_at_its_first_use(chat: ChatEncoder, monkeypatch: pytest.MonkeyPatch):
    from delia.model import loading

    loads = []
    load_base: Callable[[ModelConfig], object] = loading.load_base
    monkeypatch.setattr(loading, "load_base", lambda config: loads.append(1) or load_base(config))
    embed = load_embedder(BASE, model=STARTER, chat=chat)
    assert loads == []
    embed(TEXTS)
    embed(TEXTS)
    assert loads == [1]


def test_a_name_that_is_no_directory_is_refused_with_what_is_allowed(chat: ChatEncoder):
    with pytest.raises(ConfigError, match=r"'hashed', 'base' or the directory .*, got 'bert', which is no"):
        load_embedder("bert", model=STARTER, chat=chat)


def test_a_missing_package_is_named_with_the_way_out(
    chat: ChatEncoder, sentence_transformer: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)

    with pytest.raises(ConfigError, match=r"needs sentence-transformers, .* `pip install\s+delia\[embed\]`"):
        load_embedder(sentence_transformer, model=STARTER, chat=chat)


def test_a_directory_without_a_model_is_refused(chat: ChatEncoder, tmp_path: Path):
    with pytest.raises(ConfigError, match="is no sentence-transformers model"):
        load_embedder(str(tmp_path), model=STARTER, chat=chat)
