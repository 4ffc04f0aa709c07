"""The tracking store: which one, created once, and an experiment in it.

    a setting, MLFLOW_TRACKING_URI or a local file  ->  (client, URI, experiment id)

A server (HTTP) is for several machines; SQLite in the output directory needs nothing.
"""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from delia.errors import ConfigError
from delia.track.masking import hide_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DATABASE = re.compile(r"(postgresql|mysql|mssql)(\+\w+)?://")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """An open store and the experiment that runs go to."""

    client: "MlflowClient"
    uri: str
    experiment_id: str


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock that other processes on this filesystem wait for; the kernel frees it at death."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def resolve_uri(tracking_uri: str | None, *, default_store: str, artifact_root: str | None) -> str:
    """Return the tracking URI: the setting, the environment, or a local SQLite file.

    Args:
        tracking_uri: The setting; None: not set.
        default_store: Path of the SQLite file, plain or after `sqlite:///`.
        artifact_root: The setting; a bare database has no place of its own.

    Raises:
        ConfigError: Not a server, a database with a place for artifacts, or an absolute SQLite file.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    file = default_store.removeprefix("sqlite:///")
    if not uri and "://" in file:
        raise ConfigError(
            f"without a tracking server runs are kept in SQLite, which needs a local file, got"
            f" {default_store!r}; set track.tracking_uri or MLFLOW_TRACKING_URI"
        )
    uri = uri or f"sqlite:///{Path(file).absolute()}"
    if _DATABASE.match(uri) and artifact_root is None:
        raise ConfigError(
            f"the database {hide_secrets(uri)!r} keeps no artifacts; set track.artifact_root to a shared"
            " directory or a bucket"
        )
    if not (uri.startswith(("http://", "https://", "sqlite:////")) or _DATABASE.match(uri)):
        raise ConfigError(
            f"runs go to http(s)://, postgresql:// or sqlite:////absolute/path, got {hide_secrets(uri)!r};"
            " change track.tracking_uri or MLFLOW_TRACKING_URI"
        )
    return uri


def connect(uri: str, *, experiment: str, artifact_root: str | None) -> Connection:
    """Open the store, and create it and the experiment where they are missing.

    Args:
        uri: What `resolve_uri` returned.
        experiment: Its name.
        artifact_root: Where a new experiment keeps its artifacts; None: the server's own place, or
            `artifacts/` beside a SQLite file.

    Raises:
        ConfigError: The experiment is deleted.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["DO_NOT_TRACK"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # else each migration is announced
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    # MLflow locks its first migration in this machine's /tmp; a shared directory needs more, and
    # without a lock two drivers also race for the experiment.
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:") else None
    root = artifact_root or (str(file.with_name("artifacts")) if file else None)
    with lock_file(file.with_name(f"{file.name}.lock")) if file else nullcontext():
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return Connection(client=client, uri=uri, experiment_id=_open_experiment(client, experiment, root))


def _open_experiment(client: "MlflowClient", name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_root)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another driver on the same server was faster
    if found is None or found.lifecycle_stage == "deleted":
        raise ConfigError(
            f"experiment {name!r} is deleted; restore it with `mlflow experiments restore` or set"
            " track.experiment"
        )
    return str(found.experiment_id)
