"""Adapter directories: one standard PEFT directory that HF + PEFT and vLLM load alike.

    adapter/  adapter_model.safetensors  adapter_config.json  tokenizer files  manifest.json (last)

What full tuning leaves in its place is a model's directory (`train.export`), which PEFT is not asked about.

Low-rank matrices are stored scaled, so that alpha equals the rank and every engine's scaling is 1.
The k trained rows of new tokens are exactly an embedding LoRA of rank k: A [k, V] holds a one-hot
row a token, B [D, k] the deltas; `rank_pattern` sets it apart from the rest. A DoRA adapter also holds
each target's magnitude.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from delia.errors import EngineError, StoreError
from delia.store.directories import fetch_directory
from delia.store.forms import EMBEDDING_LORA, AdapterTraits, choose_form

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LORA_ENDINGS = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_ENDINGS = (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE_ENDINGS = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
FOREIGN_SETTINGS = ("modules_to_save", "trainable_token_indices", "layer_replication", "fan_in_fan_out")
"""What of PEFT this platform never writes, and neither serves nor merges."""
BASE_CHANGING_INITS = ("pissa", "corda", "olora", "loftq")


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
    with _open_weights(directory) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict


def _open_weights(directory: Path) -> Any:
    path = directory / WEIGHTS
    if not path.is_file():
        raise StoreError(f"{directory} has no {WEIGHTS}; a pickled adapter is not read")
    return safe_open(str(path), framework="pt")


def read_config(directory: Path) -> dict[str, Any]:
    """Read an adapter's `adapter_config.json`.

    Raises:
        EngineError: There is none.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise EngineError(f"{directory} has no {CONFIG}; give a PEFT adapter directory")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def read_traits(directory: Path) -> AdapterTraits:
    """Return what decides in which form an adapter is served; no tensor is read.

    Raises:
        EngineError: It holds what no form serves; names it.
    """
    if is_whole(directory):
        return AdapterTraits(is_whole=True)
    config = read_config(directory)
    for name in FOREIGN_SETTINGS:
        if config.get(name):
            raise EngineError(
                f"{directory}: vLLM can't load an adapter with {name}={config[name]!r};"
                " export it with delia, which writes rows of tokens as an embedding LoRA"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise EngineError(
            f"{directory}: init_lora_weights={init!r} changes the base as the adapter is loaded;"
            " export it with delia, as plain LoRA"
        )
    has_dora = bool(config.get("use_dora"))
    with _open_weights(directory) as file:
        names = list(file.keys())
        endings = (*LORA_ENDINGS, *EMBEDDING_ENDINGS, *(MAGNITUDE_ENDINGS if has_dora else ()))
        foreign = [name for name in names if not name.endswith(endings)]
        if foreign:
            raise EngineError(
                f"{directory}: vLLM can't load the tensors {foreign[:3]}; only LoRA matrices are served"
            )
        ranks = [
            file.get_slice(name).get_shape()[0]
            for name in names
            if name.endswith((LORA_ENDINGS[0], EMBEDDING_ENDINGS[0]))
        ]
    has_rows = any(name.endswith(EMBEDDING_ENDINGS) for name in names)
    return AdapterTraits(rank=max(ranks, default=1), has_rows=has_rows, has_dora=has_dora)


def check_servable(directory: Path, architecture: str | None = None) -> None:
    """Refuse what would kill a vLLM engine: one bad adapter ends every later request there.

    Args:
        directory: The adapter.
        architecture: Of the base that the engine has loaded; None where its class is not known.

    Raises:
        EngineError: Naming what the engine can't load, and the form to use.
    """
    traits = read_traits(directory)
    needed = choose_form(architecture or next(iter(EMBEDDING_LORA)), traits)
    if needed.form == "whole":
        raise EngineError(
            f"{directory}: can't be served by LoRARequest: {needed.reason}; name its directory as the model"
        )
    if needed.form != "lora":
        raise EngineError(
            f"{directory}: can't be served by LoRARequest: {needed.reason}; export it with delia:"
            f" delia export {directory} --form {needed.form} --output DIR"
        )


def fetch_adapter(address: str) -> Path:
    """Return a local directory with the adapter's files; a remote one is copied once a process.

    Raises:
        StoreError: Nothing is at the address, on this node.
    """
    return fetch_directory(address, kind="adapter")


def is_whole(directory: Path) -> bool:
    """Tell whether a directory holds a model of its own in the place of an adapter."""
    return (directory / "config.json").is_file() and not (directory / CONFIG).is_file()
