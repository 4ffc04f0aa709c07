"""Where a base model lies: an address -> a directory on this machine.

    package://delia.starter/weights     shipped inside an installed package
    /models/llama-3-8b                  a local path, the same on every node, or a mounted share
    org/name                            a hub id; `revision` is then required
    s3://bucket/models/llama            a bucket; each process that loads it copies it first

Addresses, not paths, travel between machines; each process resolves them for itself.
"""

from pathlib import Path
from typing import Literal

from delia.config import FrozenConfig
from delia.errors import ConfigError
from delia.rng import hash_text
from delia.store.tables import PACKAGE_SCHEME, fetch_directory, open_filesystem

Quantisation = Literal["none", "nf4", "int8"]


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
        ConfigError: The path does not exist, or a hub id has no revision.
    """
    if config.path.startswith(PACKAGE_SCHEME):
        path = Path(open_filesystem(config.path)[1])
    elif "://" in config.path:
        path = fetch_directory(config.path, kind="model")
    else:
        path = Path(config.path).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_absolute() or config.path.startswith((".", PACKAGE_SCHEME)) or config.path.count("/") != 1:
        raise ConfigError(f"base model {config.path!r} has no config.json in {path}; give a model directory")
    if config.revision is None:
        raise ConfigError(
            f"base model {config.path!r} is a hub id without a revision; set model.revision to a commit"
        )
    from huggingface_hub import snapshot_download  # late: a tenth of a second, and only for hub ids

    return Path(snapshot_download(config.path, revision=config.revision))


def place_model(config: ModelConfig, path: str) -> ModelConfig:
    """Return the settings of a base with another directory in its place."""
    return config.model_copy(update={"path": path, "revision": None})


def identify_model(config: ModelConfig) -> str:
    """Return what a model is, for row ids and lineage: the hub commit, or a hash of the weights' index.

    A local directory is identified by its config and by name and size of its weight files plus the
    bytes of the first MiB of each, so that 100 GB are not read to start a job.
    """
    if config.revision is not None:
        return f"{config.path}@{config.revision}"
    path = resolve_model(config)
    parts = [(path / "config.json").read_text()]
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            parts += [file.name, str(file.stat().st_size), stream.read(1 << 20).hex()]
    return f"local@{hash_text(*parts)}"
