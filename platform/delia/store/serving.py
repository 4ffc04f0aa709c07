"""An adapter as vLLM is given it: a LoRA directory, a patched copy of its base, or a merged model.

    lora          DIR is an adapter
    patched_base  DIR/base a model whose input embedding holds the token rows, DIR/adapter the rest as LoRA
    merged        DIR is a model

A tied base whose input embedding changes gets an output head of its own, the old embedding, and
`tie_word_embeddings: false`: a tied head would come to emit the tokens. `manifest.json` is written last.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from delia.errors import StoreError
from delia.rng import hash_text
from delia.store.adapters import CONFIG, EMBEDDING_ENDINGS, WEIGHTS, read_config, read_tensors, read_traits
from delia.store.changes import WeightChange, read_changes
from delia.store.forms import Form, ServingForm, choose_form, untied_architecture
from delia.store.models import TOKENIZER_FILES, ModelConfig, identify_model
from delia.store.tables import MANIFEST, Manifest, commit, is_finished, read_manifest
from delia.store.weights import HEAD, find_weights, keep_file, write_changed, write_tensors, write_text

KIND = "served"
FORMS: tuple[Form, ...] = ("lora", "patched_base", "merged")
"""From the lightest; an adapter that is served as one is served as all that follow."""
MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
ADAPTER_KEY = "delia_adapter"
"""In the config of a model: the hash of the adapter that was merged into it."""


@dataclass(frozen=True, kw_only=True)
class ServedFiles:
    """What an engine loads: a model's directory, and the LoRA that requests name; either may be absent.

    Without a model it is the base; without an adapter the model is all.
    """

    form: Form
    model: Path | None = None
    adapter: Path | None = None


def read_architecture(model: Path) -> str:
    """Return the architecture that a model's config names; engines choose their class by it."""
    architectures = json.loads((model / MODEL_CONFIG).read_text(encoding="utf-8")).get("architectures")
    if not architectures:
        raise StoreError(f"{model / MODEL_CONFIG} names no architecture; engines can't choose a class")
    return str(architectures[0])


def write_served(
    form: Form, base: Path, adapter: Path, output: Path, *, dtype: str, copy: bool = False
) -> ServedFiles:
    """Write a form of an adapter; a finished one that is there is kept.

    Args:
        form: The one that `choose_form` gives, or one after it in `FORMS`.
        base: The base model's directory; it stays as it is.
        adapter: The adapter's directory, as `store.adapters` describes it.
        output: The directory to write; it holds nothing else.
        dtype: In which the model will be loaded: over a base stored in bfloat16, what changes is stored in
            float32 for an engine that computes in it, since rounding would lose a part of the change.
        copy: Copy the base's untouched files instead of linking to them.

    Raises:
        EngineError, StoreError: The adapter can't be served at all or not in this form, or it does not
            fit the base; nothing is written.
    """
    base, adapter = base.resolve(), adapter.resolve()
    needed = choose_form(read_architecture(base), read_traits(adapter))
    _check_form(form, needed, adapter)
    identity = identify_served(form, base, adapter, dtype=dtype)
    if is_finished(str(output)):
        if read_manifest(str(output), kind=KIND).fingerprint != identity:
            raise StoreError(f"{output} holds another export; remove it, or give another directory")
        return locate_served(output)
    changes = read_changes(adapter)
    find_weights(base).check(changes)
    output.mkdir(parents=True, exist_ok=True)
    counts = {"weights_changed": len(changes)}
    places: dict[str, str | None] = {"model": None, "adapter": None}
    if form == "lora":
        _copy_files(adapter, output, [file.name for file in adapter.iterdir() if file.name != MANIFEST])
        places["adapter"] = ""
    elif form == "merged":
        counts |= _write_model(base, adapter, changes, output, dtype=dtype, copy=copy)
        places["model"] = ""
    else:
        rows = {name: change for name, change in changes.items() if change.is_embedding}
        counts |= _write_model(base, adapter, rows, output / "base", dtype=dtype, copy=copy)
        places["model"] = "base"
        if len(rows) < len(changes):
            _write_rest(adapter, output / "adapter", base_model=output / "base")
            places["adapter"] = "adapter"
    details = {"form": form, "reason": needed.reason, "places": places}
    parents = {"model": identify_model(ModelConfig(path=str(base))), "adapter": hash_adapter(adapter)}
    commit(
        str(output),
        Manifest(
            kind=KIND, fingerprint=identity, root=identity, counts=counts, parents=parents, details=details
        ),
    )
    return locate_served(output)


def _check_form(form: Form, needed: ServingForm, adapter: Path) -> None:
    if needed.form == "whole":
        raise StoreError(
            f"{adapter}: {needed.reason}; there is nothing to export, serve its directory as it is"
        )
    if FORMS.index(form) < FORMS.index(needed.form):
        raise StoreError(
            f"{adapter} can't be served as {form}: {needed.reason}; export it as {needed.form}"
            f" (--form {needed.form})"
        )


def locate_served(output: Path) -> ServedFiles:
    """Return what lies in a finished directory of `write_served`.

    Raises:
        StoreError: It is unfinished, or something else.
    """
    details = read_manifest(str(output), kind=KIND).details
    found = {kind: output / name for kind, name in details["places"].items() if name is not None}
    return ServedFiles(form=details["form"], model=found.get("model"), adapter=found.get("adapter"))


def identify_served(form: Form, base: Path, adapter: Path, *, dtype: str) -> str:
    """Return a hash of what a form is made of."""
    return hash_text(form, dtype, identify_model(ModelConfig(path=str(base))), hash_adapter(adapter))


def hash_adapter(adapter: Path) -> str:
    """Return a hash of every file of an adapter, its manifest apart."""
    parts: list[str] = []
    for file in sorted(file for file in adapter.iterdir() if file.is_file() and file.name != MANIFEST):
        parts += [file.name, xxhash.xxh3_128_hexdigest(file.read_bytes())]
    return hash_text(*parts)


def _write_model(
    base: Path, adapter: Path, changes: Mapping[str, WeightChange], output: Path, *, dtype: str, copy: bool
) -> dict[str, int]:
    """Write a whole model with changed weights, and the tokenizer that names the adapter's tokens."""
    output.mkdir(exist_ok=True)
    files = find_weights(base)
    embeddings = [name for name, change in changes.items() if change.is_embedding]
    was_tied = bool(embeddings) and HEAD not in files.file_by_name
    counts = write_changed(
        files,
        changes,
        output,
        dtype=getattr(torch, dtype),
        new_head_from=embeddings[0] if was_tied else None,
        copy=copy,
    )
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    _copy_files(adapter if has_tokenizer else base, output, TOKENIZER_FILES)
    write_model_config(base, output, is_untied=bool(embeddings), adapter=hash_adapter(adapter))
    return counts


def write_model_config(
    base: Path, output: Path, *, is_untied: bool, dtype: str | None = None, adapter: str | None = None
) -> None:
    """Write the configs of a model that was made of a base.

    Args:
        base: The base's directory.
        output: The model's.
        is_untied: Whether its output head is no longer the input embedding.
        dtype: In which it is stored; None for the base's.
        adapter: The hash of what was merged, which tells models apart that differ in a few rows (`identify_model`).
    """
    config = json.loads((base / MODEL_CONFIG).read_text(encoding="utf-8"))
    if is_untied:
        config["tie_word_embeddings"] = False
        config["architectures"] = [untied_architecture(read_architecture(base))]
    config |= {name: dtype for name in ("dtype", "torch_dtype") if dtype and name in config}
    config |= {ADAPTER_KEY: adapter} if adapter else {}
    _copy_files(base, output, [GENERATION_CONFIG])
    write_text(output / MODEL_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_rest(adapter: Path, output: Path, *, base_model: Path) -> None:
    """Write an adapter without its rows of tokens."""
    output.mkdir(exist_ok=True)
    tensors = read_tensors(adapter)
    embeddings = {name.rpartition(".")[0] for name in tensors if name.endswith(EMBEDDING_ENDINGS)}
    names = {module.rpartition(".")[2] for module in embeddings}
    rest = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in embeddings}
    config = read_config(adapter) | {"base_model_name_or_path": str(base_model)}
    if isinstance(config["target_modules"], list):
        config["target_modules"] = [name for name in config["target_modules"] if name not in names]
    for pattern in ("rank_pattern", "alpha_pattern"):
        config[pattern] = {key: value for key, value in config.get(pattern, {}).items() if key not in names}
    write_tensors(output / WEIGHTS, rest, {"format": "pt"})
    write_text(output / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")


def _copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file():
            keep_file(source / name, target / name, copy=True)
