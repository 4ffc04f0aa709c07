"""Instructions -> vectors of unit length, by the embedder that a setting names.

    "hashed"               word uni- and bigrams, no model: what the texts share, not what they mean
    "base"                 mean middle hidden state of the base model (`model.hidden`)
    /models/all-mpnet      a sentence-transformers model in a local directory

Every vector is a function of its text alone, up to the last bits of a float. Models run on the CPU of the
machine that curates: where the base has billions of parameters, take a sentence-transformers model.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from delia.chat import ChatEncoder
from delia.curate.ngrams import list_ngrams, normalise
from delia.errors import ConfigError
from delia.store.models import ModelConfig

Vectors = NDArray[np.float32]
Embedder = Callable[[Sequence[str]], Vectors]
"""Texts -> float32 [N, D], rows of length 1, or 0 where a text says nothing."""

HASHED = "hashed"
BASE = "base"
HASHED_DIMENSIONS = 512


def scale_to_unit(vectors_ND: NDArray[Any]) -> Vectors:
    """Return float32 rows of length 1; rows of zeros stay.

    Raises:
        ConfigError: A value is not finite.
    """
    if not np.isfinite(vectors_ND).all():
        raise ConfigError(
            "the embedder gave values that are not finite; where it is the base in float16, whose states can be larger"
            " than that holds, set model.dtype to bfloat16 or float32, or curate.embedder to another model"
        )
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(vectors_ND / np.where(norms_N1 > 0, norms_N1, 1), dtype=np.float32)


def embed_hashed(texts: Sequence[str]) -> Vectors:
    """Return hashed counts of word uni- and bigrams, signed: two texts' cosine is what they share.

    Source: Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning",
    https://arxiv.org/abs/0902.2206. In 512 places cosines of unlike texts lie around 0 by some 0.04.
    """
    vectors_ND = np.zeros((len(texts), HASHED_DIMENSIONS), dtype=np.float32)
    for place, text in enumerate(texts):
        words = normalise(text).split()
        for term in (*words, *list_ngrams(words, 2)):
            number = xxhash.xxh3_64_intdigest(term.encode("utf-8", "surrogatepass"))
            vectors_ND[place, number % HASHED_DIMENSIONS] += 1 if number >> 63 else -1
    return scale_to_unit(vectors_ND)


def load_embedder(name: str, *, model: ModelConfig, chat: ChatEncoder) -> Embedder:
    """Return the embedder that a setting names; a model is loaded at its first use.

    Args:
        name: "hashed", "base", or the directory of a sentence-transformers model.
        model: The base model, for "base".
        chat: Its chat format.

    Raises:
        ConfigError: See `check_embedder`.
    """
    check_embedder(name)
    if name == HASHED:
        return embed_hashed
    if name == BASE:
        return _embed_with_base(model, chat)
    return _embed_with_sentence_transformer(name)


def _embed_with_base(config: ModelConfig, chat: ChatEncoder) -> Embedder:
    loaded: list[Any] = []

    def embed(texts: Sequence[str]) -> Vectors:
        from delia.model.hidden import embed_with_base  # late: torch, and only for this embedder
        from delia.model.loading import load_base

        if not loaded:
            loaded.append(load_base(config))
        return scale_to_unit(embed_with_base(loaded[0], chat, texts))

    return embed


def check_embedder(name: str) -> None:
    """Refuse an embedder that can't be loaded, without loading it.

    Raises:
        ConfigError: No such directory, no model in it, or sentence-transformers is not installed.
    """
    if name in (HASHED, BASE):
        return
    if not Path(name).is_dir():
        raise ConfigError(
            f"curate.embedder is {HASHED!r}, {BASE!r} or the directory of a sentence-transformers model, got"
            f" {name!r}, which is no directory; download the model first"
        )
    if not (Path(name) / "modules.json").is_file():
        raise ConfigError(
            f"curate.embedder={name!r} is no sentence-transformers model: it has no modules.json; save one"
            " there with SentenceTransformer.save"
        )
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(
            f"curate.embedder={name!r} needs sentence-transformers, which is not installed; run `pip install"
            f" delia[embed]`, or set curate.embedder to {BASE!r}"
        )


def _embed_with_sentence_transformer(path: str) -> Embedder:
    from sentence_transformers import SentenceTransformer  # late: an optional package

    loaded = SentenceTransformer(path, device="cpu", local_files_only=True, trust_remote_code=False)

    def embed(texts: Sequence[str]) -> Vectors:
        return scale_to_unit(loaded.encode(list(texts), convert_to_numpy=True, show_progress_bar=False))

    return embed
