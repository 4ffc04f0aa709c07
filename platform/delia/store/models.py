"""Where a base model lies: an address -> a directory on this machine.

    package://delia.starter/weights     shipped inside an installed package
    /models/llama-3-8b                  a local path, the same on every node, or a mounted share
    org/name                            a hub id; `revision` is then required
    s3://bucket/models/llama            a bucket; each process that loads it copies it first

Addresses, not paths, travel between machines; each process resolves them for itself.
"""

import json
import re
from pathlib import Path
from typing import Literal

import xxhash

from delia.config import FrozenConfig
from delia.errors import ConfigError
from delia.rng import hash_text
from delia.store.directories import fetch_directory
from delia.store.tables import PACKAGE_SCHEME, open_filesystem

Quantisation = Literal["none", "nf4", "int8"]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
COMMIT = re.compile("[0-9a-f]{40}")
NUM_SAMPLES = 4
SAMPLE_BYTES = 1 << 14
"""Of each tensor that is larger than all samples of it so many are hashed, evenly spread."""


class ModelConfig(FrozenConfig):
    """A base model and how it is loaded.

    `dtype` is a name that transformers and vLLM share. `attention` is transformers' name of how it reads padded
    rows; training packs rows and chooses for itself (`model.attention`), and vLLM does too. `quantisation` is the
    form in which the base is trained on (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): bitsandbytes' four-bit
    NormalFloat with doubly quantised constants, or LLM.int8(). Everything else reads the base as it lies on disk.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    quantisation: Quantisation = "none"
    chat_template: str | None = None


def resolve_model(config: ModelConfig) -> Path:
    """Return the model's directory on this machine.

    A hub id is downloaded to the hub client's cache; its token comes from the node's environment.

    Raises:
        ConfigError: The path does not exist, or a hub id has no revision, or one that moves.
    """
    if config.path.startswith(PACKAGE_SCHEME):
        path = Path(open_filesystem(config.path)[1])
    elif "://" in config.path:
        path = fetch_directory(config.path, kind="model")
    else:
        path = Path(config.path).expanduser()
    if (path / "config.json").is_file():
        return path
    if not _is_hub_id(config.path):
        raise ConfigError(f"base model {config.path!r} has no config.json in {path}; give a model directory")
    _check_revision(config)
    from huggingface_hub import snapshot_download  # late: a tenth of a second, and only for hub ids

    return Path(snapshot_download(config.path, revision=config.revision))


def place_model(config: ModelConfig, path: str) -> ModelConfig:
    """Return the settings of a base with another directory in its place."""
    return config.model_copy(update={"path": path, "revision": None})


def _check_revision(config: ModelConfig) -> None:
    if config.revision is None:
        raise ConfigError(
            f"base model {config.path!r} is a hub id without a revision; set model.revision to a commit"
        )
    if not COMMIT.fullmatch(config.revision):
        raise ConfigError(
            f"model.revision={config.revision!r} of base model {config.path!r} is a branch or a tag, which may move;"
            " set it to a commit, 40 hexadecimal digits"
        )


def _is_hub_id(path: str) -> bool:
    """Tell whether a path in which no model lies may be the name of one on the hub."""
    is_local = Path(path).expanduser().is_absolute() or path.startswith(".") or "://" in path
    return not is_local and path.count("/") == 1


def identify_model(config: ModelConfig) -> str:
    """Return what a model is, for row ids and lineage: the hub commit, or a hash of what lies in its directory.

    Of a directory the config, the tokenizer and the weights count, of which samples of every tensor are read: 100 GB
    take a second. They miss a few rows that were changed in a large tensor; of an adapter that this project merged
    the config tells (`store.serving`).
    """
    if _is_hub_id(config.path) and not Path(config.path, "config.json").is_file():
        _check_revision(config)
        return f"{config.path}@{config.revision}"
    path = resolve_model(config)
    texts = [path / name for name in ("config.json", *TOKENIZER_FILES) if (path / name).is_file()]
    return f"local@{hash_text(*_hash_files(path, [*texts, *sorted(path.glob('*.safetensors'))]))}"


def identify_directory(path: str) -> str:
    """Return a hash of every file below a directory, weights by samples (`identify_model`)."""
    return hash_text(
        *_hash_files(Path(path), sorted(item for item in Path(path).rglob("*") if item.is_file()))
    )


def _hash_files(directory: Path, files: list[Path]) -> list[str]:
    parts: list[str] = []
    for file in files:
        is_sampled = file.suffix == ".safetensors"
        digest = _hash_samples(file) if is_sampled else xxhash.xxh3_128_hexdigest(file.read_bytes())
        parts += [str(file.relative_to(directory)), digest]
    return parts


def _hash_samples(file: Path) -> str:
    """Return a hash of a safetensors file's header and of samples of each of its tensors."""
    digest = xxhash.xxh3_128(str(file.stat().st_size).encode())
    with file.open("rb") as stream:
        length = stream.read(8)
        header = stream.read(int.from_bytes(length, "little"))
        digest.update(header)
        start = stream.tell()
        for name, item in json.loads(header).items():
            if name == "__metadata__":
                continue
            first, end = item["data_offsets"]
            for place in _place_samples(end - first):
                stream.seek(start + first + place)
                digest.update(stream.read(min(SAMPLE_BYTES, end - first - place)))
    return digest.hexdigest()


def _place_samples(size: int) -> list[int]:
    """Return where samples of so many bytes begin; small tensors are covered."""
    if size <= NUM_SAMPLES * SAMPLE_BYTES:
        return list(range(0, size, SAMPLE_BYTES))
    return [number * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1) for number in range(NUM_SAMPLES)]
