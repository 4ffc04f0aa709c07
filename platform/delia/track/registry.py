"""The model registry: register an adapter directory, name a version, fetch it anywhere.

    adapter directory  ->  models:/NAME/3 (version), models:/NAME@champion (alias)  ->  a local directory

The directory goes up as it is and comes back byte for byte: a digest travels as a tag and is checked.
`mlflow.transformers.log_model` is not used, since it stores wrong weights for a PEFT model over a
local base. Who moves `champion` is `delia.flow.gate` alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from delia.errors import ConfigError, StoreError
from delia.rng import hash_text
from delia.track.masking import render_value
from delia.track.runs import Run, Tracker

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

ARTIFACT_PATH = "adapter"
DIGEST_TAG = "delia.adapter_digest"
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]+)(/(?P<version>\d+)|@(?P<alias>[\w-]+))")


@dataclass(frozen=True, kw_only=True)
class ModelVersionInfo:
    """A registered version; `uri` names it for good, as no alias does."""

    name: str
    version: str
    uri: str
    run_id: str
    tags: dict[str, str]


def digest_directory(directory: Path) -> str:
    """Return a content hash of every file below a directory and its relative path, 32 hex digits."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    parts: list[str] = []
    for path in files:
        content = xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        parts += [path.relative_to(directory).as_posix(), content.hexdigest()]
    return hash_text(*parts)


def register_adapter(
    tracker: Tracker, run: Run, adapter_dir: str | Path, *, name: str, tags: Mapping[str, str]
) -> ModelVersionInfo:
    """Log an adapter directory into a run and register it from there; a second call finds the first.

    Args:
        tracker: The connection.
        run: The open run that made the adapter.
        adapter_dir: A local PEFT directory, or the model that full tuning left.
        name: The registered model's name; created if missing.
        tags: Base and commit, template hash, mixture root, scores, licence: all as text.

    Raises:
        StoreError: Not an adapter directory, or the run has already registered another content.
    """
    directory = Path(adapter_dir)
    if not any((directory / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise StoreError(
            f"{str(directory)!r} has no adapter_config.json and no config.json; register an adapter's directory, or the"
            " model that full tuning left"
        )
    digest = digest_directory(directory)
    earlier = [_describe(item) for item in tracker.client.search_model_versions(f"run_id='{run.run_id}'")]
    for version in earlier:
        # Artifacts of a run are shared by its versions: new content would change an old version.
        if version.tags.get(DIGEST_TAG) != digest:
            raise StoreError(
                f"run {run.run_id} registered {version.uri} with digest {version.tags.get(DIGEST_TAG)}, and"
                f" {str(directory)!r} has {digest}; register a changed adapter from a new run"
            )
    if not earlier:
        run.log_artifacts(directory, ARTIFACT_PATH)
    same = [version for version in earlier if version.name == name]
    if same:
        return same[0]
    _create_model(tracker, name)
    texts = {key: render_value(key, value) for key, value in tags.items()}
    source = f"runs:/{run.run_id}/{ARTIFACT_PATH}"
    created = tracker.client.create_model_version(
        name, source=source, run_id=run.run_id, tags={**texts, DIGEST_TAG: digest}
    )
    return _describe(created)


def set_alias(tracker: Tracker, name: str, alias: str, version: str) -> None:
    """Point an alias at a version; the last writer wins, so `champion` is moved by the gate, locked."""
    tracker.client.set_registered_model_alias(name, alias, version)


def get_version_by_alias(tracker: Tracker, name: str, alias: str) -> ModelVersionInfo | None:
    """Return the version that an alias points at; None if the model or its alias does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return _describe(tracker.client.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def get_version(tracker: Tracker, uri: str) -> ModelVersionInfo:
    """Look up `models:/NAME/3` or `models:/NAME@alias`.

    Raises:
        ConfigError: Not such a URI.
        StoreError: Nothing is registered there.
    """
    from mlflow.exceptions import MlflowException

    parts = _MODEL_URI.fullmatch(uri)
    if parts is None:
        raise ConfigError(f"a registered adapter is models:/NAME/3 or models:/NAME@alias, got {uri!r}")
    if parts["alias"]:
        found = get_version_by_alias(tracker, parts["name"], parts["alias"])
        if found is None:
            raise StoreError(f"no version at {uri!r}; register one, or promote one to {parts['alias']!r}")
        return found
    try:
        return _describe(tracker.client.get_model_version(parts["name"], parts["version"]))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise StoreError(f"no version at {uri!r}; `mlflow models` lists what is registered") from error
        raise


def fetch_adapter(tracker: Tracker, uri: str, directory: Path) -> Path:
    """Download a registered adapter below a directory, for PEFT or vLLM; one that is there is kept.

    Returns:
        `<directory>/<name>-<version>/adapter`.

    Raises:
        ConfigError: Not a registry URI.
        StoreError: Nothing is registered there, or the files are not the ones that were registered.
    """
    from mlflow.artifacts import download_artifacts

    version = get_version(tracker, uri)
    expected = version.tags.get(DIGEST_TAG)
    target = directory / f"{version.name}-{version.version}"
    kept = target / ARTIFACT_PATH
    if expected and kept.is_dir() and digest_directory(kept) == expected:
        return kept
    source = tracker.client.get_model_version_download_uri(version.name, version.version)
    local = Path(
        download_artifacts(
            artifact_uri=source, dst_path=str(target), tracking_uri=tracker.uri, registry_uri=tracker.uri
        )
    )
    if expected and digest_directory(local) != expected:
        raise StoreError(
            f"{version.uri} was registered with digest {expected}, {str(local)!r} has"
            f" {digest_directory(local)}; delete {str(target)!r} and fetch again, else register anew"
        )
    return local


def _create_model(tracker: Tracker, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tracker.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _describe(found: "ModelVersion") -> ModelVersionInfo:
    return ModelVersionInfo(
        name=found.name,
        version=str(found.version),
        uri=f"models:/{found.name}/{found.version}",
        run_id=found.run_id or "",
        tags=dict(found.tags),
    )
