"""MLflow runs: open, resume and close them; write parameters, metrics, datasets and artifacts.

    settings + values  ->  one MLflow run for each job or trial

Used by the driver alone: workers send it their values. Nothing touches MLflow's global state (the
active run, the tracking URI), so many runs may be open at once. Metrics are buffered, so that a
training step pays no request. This room is the only importer of mlflow, and imports it late: it
takes over a second.
"""

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from delia.config import FrozenConfig
from delia.errors import ConfigError
from delia.metrics import check_metric, score_name
from delia.track.connection import connect, resolve_uri
from delia.track.exporter import Exporter
from delia.track.masking import hide_secrets, render_value

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

FINGERPRINT_TAG = "delia.fingerprint"
ERROR_TAG = "delia.error"
CHANGED_TAG = "delia.changed"
PARENT_TAG = "mlflow.parentRunId"

_MAX_PARAMS_PER_BATCH = 100
_MAX_METRICS_PER_BATCH = 1000
_MAX_DIGEST_LENGTH = 36
_FINGERPRINT = re.compile(r"[\w.:-]+")

log = logging.getLogger(__name__)


class TrackConfig(FrozenConfig):
    """Where runs are tracked.

    `tracking_uri` None: MLFLOW_TRACKING_URI, else a SQLite file of the job.
    `artifact_root` is for an experiment that does not exist yet; None: the server's own, or a
    directory beside the SQLite file. Metrics leave when there are `max_buffered` of them or the
    oldest is `flush_seconds` old.
    """

    tracking_uri: str | None = None
    experiment: str = "delia"
    registered_name: str | None = None
    artifact_root: str | None = None
    max_buffered: int = Field(default=500, ge=1)
    flush_seconds: float = Field(default=5.0, ge=0)


class Run:
    """An open run; get one from `Tracker.run` or `Tracker.resume`."""

    def __init__(self, client: "MlflowClient", run: "MlflowRun", config: TrackConfig) -> None:
        """Take over a run that is open in the store, with the parameters that it has."""
        self.run_id: str = run.info.run_id
        self.name: str = run.info.run_name
        self._client = client
        self._config = config
        self._params: dict[str, str] = dict(run.data.params)
        self._metrics: list[tuple[str, float, int, int]] = []
        self._exporter = Exporter(self.name)
        self._patience = 1  # doubles while the server is away
        self._flushed_at = time.monotonic()

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Buffer values of one step, and send what is due.

        A server that is away delays the values and does not end the training; `flush` and the end
        of the run do raise.

        Raises:
            ConfigError: A name is not in `delia.metrics`; nothing of the step is kept.
        """
        from mlflow.exceptions import MlflowException

        now = int(time.time() * 1000)
        self._metrics += [(check_metric(name), float(value), now, step) for name, value in values.items()]
        self._exporter.export(values)
        waited = time.monotonic() - self._flushed_at
        is_full = len(self._metrics) >= self._config.max_buffered * self._patience
        if not is_full and waited < self._config.flush_seconds * self._patience:
            return
        try:
            self.flush()
        except MlflowException as error:
            self._patience *= 2
            self._flushed_at = time.monotonic()
            log.warning("metrics are kept, the tracking server is away: %s", hide_secrets(str(error)))

    def log_scores(self, scores: Mapping[tuple[str, str], float]) -> None:
        """Log scores by (suite, metric): in MLflow each under its own name.

        Raises:
            ConfigError: A suite's name can't be part of a metric's.
        """
        self.log_metrics({score_name(*parts): value for parts, value in scores.items()}, step=0)
        for parts, value in scores.items():
            self._exporter.export_score(*parts, value)

    def flush(self) -> None:
        """Send the buffered metrics; what could not be sent stays in the buffer.

        Raises:
            mlflow.exceptions.MlflowException: The server is away or refuses.
        """
        from mlflow.entities import Metric

        while self._metrics:
            batch = self._metrics[:_MAX_METRICS_PER_BATCH]
            self._client.log_batch(self.run_id, metrics=[Metric(*item) for item in batch], synchronous=True)
            del self._metrics[: len(batch)]
        self._patience = 1
        self._flushed_at = time.monotonic()

    def log_params(self, params: Mapping[str, object]) -> None:
        """Write flat settings. Secrets are masked, long values cut with a hash.

        MLflow never changes a parameter, so a value that a resumed run brings anew goes to the tag
        `delia.changed.<name>`, and the log says so.
        """
        from mlflow.entities import Param

        texts = {name: render_value(name, value) for name, value in params.items()}
        fresh = [Param(name, text) for name, text in texts.items() if name not in self._params]
        for start in range(0, len(fresh), _MAX_PARAMS_PER_BATCH):
            batch = fresh[start : start + _MAX_PARAMS_PER_BATCH]
            self._client.log_batch(self.run_id, params=batch, synchronous=True)
        changed = {name: text for name, text in texts.items() if self._params.get(name, text) != text}
        if changed:
            log.warning("run %s goes on with other parameters: %s", self.run_id, sorted(changed))
            self.set_tags({f"{CHANGED_TAG}.{name}": text for name, text in changed.items()})
        self._params.update((param.key, param.value) for param in fresh)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Write tags; later values replace earlier ones."""
        from mlflow.entities import RunTag

        texts = [RunTag(name, render_value(name, value)) for name, value in tags.items()]
        for start in range(0, len(texts), _MAX_PARAMS_PER_BATCH):
            batch = texts[start : start + _MAX_PARAMS_PER_BATCH]
            self._client.log_batch(self.run_id, tags=batch, synchronous=True)

    def log_artifacts(self, local_dir: str | Path, artifact_path: str | None = None) -> None:
        """Copy a local directory's content into the run's artifacts."""
        self._client.log_artifacts(self.run_id, str(local_dir), artifact_path)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Write one text file into the run's artifacts; the text is not searched for secrets."""
        self._client.log_text(self.run_id, text, artifact_file)

    def log_dataset(self, name: str, *, digest: str, source: str, context: str) -> None:
        """Name a dataset that the run read, such as a pool by its Merkle root.

        Args:
            name: What it is, for people.
            digest: Its content hash, at most 36 characters.
            source: The address that it was read from.
            context: What for: `training`, `evaluation`.

        Raises:
            ConfigError: The digest is longer than MLflow keeps.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if not 0 < len(digest) <= _MAX_DIGEST_LENGTH:
            raise ConfigError(
                f"a dataset digest has 1 to {_MAX_DIGEST_LENGTH} characters, got {digest!r}; pass a root"
            )
        place = json.dumps({"uri": hide_secrets(source)})
        dataset = Dataset(name=name, digest=digest, source_type="delia", source=place)
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self.run_id, [DatasetInput(dataset, [tag])])


class Tracker:
    """The driver's connection to one experiment. `client` and `uri` are for this room alone."""

    def __init__(self, config: TrackConfig, default_store: str) -> None:
        """Connect, and create the store and the experiment where they are missing.

        Args:
            config: The settings.
            default_store: The SQLite file to use when nothing names a server, such as
                `<output_dir>/mlflow.db`; artifacts go to `artifacts/` beside it.

        Raises:
            ConfigError: The URI can't be used, or the experiment is deleted.
        """
        self.config = config
        uri = resolve_uri(
            config.tracking_uri, default_store=default_store, artifact_root=config.artifact_root
        )
        opened = connect(uri, experiment=config.experiment, artifact_root=config.artifact_root)
        self.client, self.uri, self.experiment_id = opened.client, opened.uri, opened.experiment_id

    @contextmanager
    def run(
        self,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        fingerprint: str | None = None,
    ) -> Iterator[Run]:
        """Open a run, or reopen the unfinished one of the same name, parent and fingerprint.

        It ends FINISHED; FAILED on an exception; KILLED on KeyboardInterrupt and SystemExit. The
        exception goes on its way, and of it only the type is kept: its text may hold a secret. Two
        live jobs with one fingerprint would share a run: whoever calls has locked the job.

        Args:
            name: The run's name, such as `train`.
            parent: The run id of the parent, or None.
            params: Flat settings, as `delia.config.flatten` gives them.
            tags: Free texts.
            fingerprint: The job's content hash; None always opens a new run.
        """
        found = self._find_unfinished(name, parent, fingerprint) if fingerprint else None
        if found is None:
            system = {PARENT_TAG: parent, FINGERPRINT_TAG: fingerprint}
            given = {key: value for key, value in system.items() if value}
            found = self.client.create_run(self.experiment_id, tags=given, run_name=name)
        with self._closing(found) as run:
            run.log_params(params or {})
            run.set_tags(tags or {})
            yield run

    @contextmanager
    def resume(self, run_id: str) -> Iterator[Run]:
        """Reopen a run by its id, whatever its status."""
        with self._closing(self.client.get_run(run_id)) as run:
            yield run

    def _find_unfinished(self, name: str, parent: str | None, fingerprint: str) -> "MlflowRun | None":
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise ConfigError(f"a fingerprint is of letters, digits and `._:-`, got {fingerprint!r}")
        runs = self.client.search_runs(
            [self.experiment_id],
            f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}' and attributes.status != 'FINISHED'",
            order_by=["attributes.start_time DESC"],
        )
        same = (run for run in runs if run.info.run_name == name and run.data.tags.get(PARENT_TAG) == parent)
        return next(same, None)

    @contextmanager
    def _closing(self, found: "MlflowRun") -> Iterator[Run]:
        if found.info.status != "RUNNING":
            self.client.update_run(found.info.run_id, status="RUNNING")
        run = Run(self.client, found, self.config)
        try:
            yield run
            run.flush()
        except (KeyboardInterrupt, SystemExit) as error:
            self._close_broken(run, "KILLED", error)
            raise
        except BaseException as error:
            self._close_broken(run, "FAILED", error)
            raise
        self.client.set_terminated(run.run_id, "FINISHED")

    def _close_broken(self, run: Run, status: str, error: BaseException) -> None:
        from mlflow.exceptions import MlflowException

        try:
            run.flush()
            run.set_tags({ERROR_TAG: type(error).__name__})
            self.client.set_terminated(run.run_id, status)
        except MlflowException as second:  # the first error is the one that matters
            log.warning("run %s could not be closed as %s: %s", run.run_id, status, hide_secrets(str(second)))
