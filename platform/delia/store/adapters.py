"""Adapter directories: one standard PEFT directory that HF + PEFT and vLLM load alike.

    adapter/  adapter_model.safetensors  adapter_config.json  tokenizer files  manifest.json (last)

Low-rank matrices are stored scaled, so that alpha equals the rank and every engine's scaling is 1.
The k trained rows of new tokens are exactly an embedding LoRA of rank k: A [k, V] holds a one-hot
row a token, B [D, k] the deltas; `rank_pattern` sets it apart from the rest. A DoRA adapter also holds
each target's magnitude.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from delia.errors import EngineError, StoreError
from delia.store.tables import MANIFEST, open_filesystem

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_fetched: dict[str, tempfile.TemporaryDirectory[str]] = {}


@dataclass(frozen=True, kw_only=True)
class AdapterTensors:
    """What was trained, by the base model's own module names.

    `lora_by_module`: name such as `model.layers.0.self_attn.q_proj` -> (A [R, in], B [out, R]),
    already scaled. `magnitude_by_module`, [out], makes it DoRA: then every module has one, and the input
    embedding too if it has rows. `row_deltas_KD` belongs to `token_ids` and to the input embedding alone.
    """

    lora_by_module: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    magnitude_by_module: Mapping[str, torch.Tensor] = field(default_factory=dict)
    embedding_module: str = "model.embed_tokens"
    token_ids: tuple[int, ...] = ()
    row_deltas_KD: torch.Tensor | None = None


def to_peft(
    tensors: AdapterTensors, *, vocab_size: int, base_model: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the `adapter_config.json` of a PEFT LoRA adapter.

    Raises:
        StoreError: Nothing was trained, or magnitudes are there for some targets only.
    """
    if not tensors.lora_by_module and tensors.row_deltas_KD is None:
        raise StoreError("an adapter needs LoRA matrices, token rows or both; nothing was trained")
    named: dict[str, torch.Tensor] = {}
    rank = 0
    for module, (a_RI, b_OR) in tensors.lora_by_module.items():
        named[f"{PREFIX}{module}.lora_A.weight"] = a_RI.float().contiguous()
        named[f"{PREFIX}{module}.lora_B.weight"] = b_OR.float().contiguous()
        rank = max(rank, a_RI.shape[0])
    targets = sorted({module.rpartition(".")[2] for module in tensors.lora_by_module})
    modules = list(tensors.lora_by_module)
    patterns: dict[str, int] = {}
    if tensors.row_deltas_KD is not None:
        num_rows = len(tensors.token_ids)
        a_KV = torch.zeros(num_rows, vocab_size)
        a_KV[torch.arange(num_rows), torch.tensor(tensors.token_ids)] = 1.0
        named[f"{PREFIX}{tensors.embedding_module}.lora_embedding_A"] = a_KV
        named[f"{PREFIX}{tensors.embedding_module}.lora_embedding_B"] = (
            tensors.row_deltas_KD.float().T.contiguous()
        )
        embedding = tensors.embedding_module.rpartition(".")[2]
        targets.append(embedding)
        modules.append(tensors.embedding_module)
        rank = rank or num_rows
        patterns = {embedding: num_rows} if num_rows != rank else {}
    bare = [module for module in modules if module not in tensors.magnitude_by_module]
    if tensors.magnitude_by_module and bare:
        raise StoreError(f"a DoRA adapter has a magnitude for every target; {bare} have none")
    for module, magnitude in tensors.magnitude_by_module.items():
        named[f"{PREFIX}{module}.lora_magnitude_vector"] = magnitude.float().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "init_lora_weights": True,
        **({"use_dora": True} if tensors.magnitude_by_module else {}),
    }
    return named, config


def write_adapter(directory: Path, tensors: AdapterTensors, *, vocab_size: int, base_model: str) -> None:
    """Write weights and config; the caller commits the manifest when all files are there."""
    named, config = to_peft(tensors, vocab_size=vocab_size, base_model=base_model)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(named, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read the weights; safetensors only, nothing is unpickled."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise StoreError(f"{directory} has no {WEIGHTS}; a pickled adapter is not read")
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


def check_servable(directory: Path) -> None:
    """Refuse what would kill a vLLM engine: one bad adapter ends every later request there.

    Raises:
        EngineError: Naming what the engine can't load, and the form to use.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise EngineError(f"{directory} has no {CONFIG}; give a PEFT adapter directory")
    config = json.loads(path.read_text())
    for name in ("modules_to_save", "trainable_token_indices", "use_dora", "layer_replication"):
        if config.get(name):
            raise EngineError(
                f"{directory}: vLLM can't load an adapter with {name}={config[name]!r};"
                " export it with delia (rows as an embedding LoRA) or merge it into its base"
            )
    foreign = [
        name
        for name in read_tensors(directory)
        if not name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"))
    ]
    if foreign:
        raise EngineError(
            f"{directory}: vLLM can't load the tensors {foreign[:3]}; only LoRA matrices are served"
        )


def fetch_adapter(address: str) -> Path:
    """Return a local directory with the adapter's files; a remote one is copied once a process.

    Raises:
        StoreError: Nothing is at the address, on this node.
    """
    filesystem, path = open_filesystem(address)
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        raise StoreError(
            f"no adapter directory at {address!r} on this node; use storage that every node can read"
        )
    if isinstance(filesystem, pafs.LocalFileSystem):
        return Path(path)
    if address not in _fetched:
        folder = tempfile.TemporaryDirectory(prefix="delia-adapter-")
        pafs.copy_files(path, folder.name, source_filesystem=filesystem)
        _fetched[address] = folder
    return Path(_fetched[address].name)


def is_adapter(directory: Path) -> bool:
    """Tell whether a directory holds a finished adapter of this platform."""
    return (directory / MANIFEST).is_file() and (directory / WEIGHTS).is_file()
