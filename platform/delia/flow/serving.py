"""An adapter as the engines of a job are asked for it; what they can't load as it is, is materialised.

    adapter --choose_form--> the base and the adapter, or output_dir/served/FP and its LoRA part or none,
                             or, after full tuning, the directory itself

A served directory is named by its content, so it is made once a workspace; its links to the base's
files hold where the base lies in one place on every node.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import ray

from delia.flow.workspace import Workspace
from delia.store.adapters import fetch_adapter, read_traits
from delia.store.directories import upload_directory
from delia.store.forms import Form, ServingForm, choose_form
from delia.store.models import ModelConfig, place_model, resolve_model
from delia.store.serving import KIND, identify_served, read_architecture, write_served
from delia.store.tables import MANIFEST, is_finished, join, read_manifest, write_bytes


@dataclass(frozen=True, kw_only=True)
class Served:
    """What an engine loads, and the address of the adapter that its requests bring, empty for none."""

    model: ModelConfig
    adapter: str = ""
    rank: int = 1


def choose_serving(address: str, model: ModelConfig) -> ServingForm:
    """Return the form in which vLLM serves an adapter of a base."""
    return choose_form(read_architecture(resolve_model(model)), read_traits(fetch_adapter(address)))


def serve(address: str, space: Workspace) -> Served:
    """Bring an adapter into the form that vLLM serves; an empty address is the base.

    Raises:
        EngineError, StoreError: No form serves it, or it does not fit the base.
    """
    if not address:
        return Served(model=space.model)
    needed = choose_serving(address, space.model)
    rank = read_traits(fetch_adapter(address)).rank
    if needed.form == "lora":
        return Served(model=space.model, adapter=address, rank=rank)
    if needed.form == "whole":
        return Served(model=place_model(space.model, address))
    name = identify_served(
        needed.form, resolve_model(space.model), fetch_adapter(address), dtype=space.model.dtype
    )
    place = space.address("served", name)
    if not is_finished(place):
        ray.get(_materialise.remote(needed.form, space.model, address, place))
    places = read_manifest(place, kind=KIND).details["places"]
    return Served(
        model=place_model(space.model, join(place, places["model"])),
        adapter=join(place, places["adapter"]) if places["adapter"] else "",
        rank=rank,
    )


@ray.remote(num_cpus=1)
def _materialise(form: Form, model: ModelConfig, address: str, place: str) -> None:
    materialise(form, model, address, place)


def materialise(form: Form, model: ModelConfig, address: str, place: str) -> None:
    """Write a form of an adapter to an address; a bucket, which has no links, gets every file."""
    base, adapter = resolve_model(model), fetch_adapter(address)
    if "://" not in place:
        write_served(form, base, adapter, Path(place), dtype=model.dtype)
        return
    with tempfile.TemporaryDirectory(prefix="delia-served-") as folder:
        local = Path(folder) / "served"
        write_served(form, base, adapter, local, dtype=model.dtype)
        manifest = (local / MANIFEST).read_bytes()
        (local / MANIFEST).unlink()
        upload_directory(local, place)
        write_bytes(join(place, MANIFEST), manifest)
