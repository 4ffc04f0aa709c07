"""What a pool takes of its candidates, decided chunk by chunk in a process of its own.

    StoredChunk | Batch | Screenings --Curator, StopRule--> spools of rows, rejections --write--> a finished pool

To know duplicates, what is remembered of accepted instructions grows with their number. So acceptance is an actor of
the cluster: the driver passes it addresses and sees counts, whatever the size of the pool. Rows and rejections wait on
the disk of its node. A source under `curate.select`, which sees all its rows at once, is in memory as a whole.

An acceptance that dies with its node is started anew and reads the stored chunks again, as a job does that was killed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

from delia.curate.settings import CurateConfig
from delia.curate.stopping import ENOUGH_ROWS, StopConfig, StopRule
from delia.errors import PoolError, StoreError
from delia.flow.curation import Curation, open_curation
from delia.flow.ledger import account, to_metrics
from delia.flow.placement import spread
from delia.flow.screening import Screenings, describe_other_directory, read_candidates
from delia.flow.workspace import Workspace
from delia.generate.calls import call
from delia.schema import Rejection, Row, SeedTask
from delia.store.candidates import (
    REJECTION_SCHEMA,
    ROW_SCHEMA,
    Cost,
    from_rejection_table,
    from_row_table,
    list_licences,
    to_rejection_table,
    to_row_table,
)
from delia.store.pools import write_pool
from delia.store.spool import Chain, Spool
from delia.store.tables import exists
from delia.synthesize.pipeline import Batch, StoredChunk

MEMORY = 2**30
"""Bytes that are asked for. A million rows take less, but for vectors (`curate.semantic`); a head that offers none is
spared, and a node that holds an acceptance is not idle to an autoscaler."""


class AcceptanceLostError(Exception):
    """The process that holds an acceptance died, or one that screens for it; what was decided can be decided again."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What has been decided so far; `ended` are the sources of the round that have what they are to give."""

    num_accepted: int
    num_rejected: int
    cost: Cost
    new_unique_rate: float
    ended: tuple[str, ...]

    @property
    def num_seen(self) -> int:
        """Return how many candidates were decided on."""
        return self.num_accepted + self.num_rejected

    def to_metrics(self) -> dict[str, float]:
        """Return what is logged of it."""
        return {
            "synthesize/candidates": self.num_seen,
            "synthesize/accepted": self.num_accepted,
            "synthesize/rejected": self.num_rejected,
            "synthesize/prompt_tokens": self.cost.prompt_tokens,
            "synthesize/output_tokens": self.cost.output_tokens,
            "synthesize/engine_seconds": self.cost.engine_seconds,
            "curate/new_unique_rate": self.new_unique_rate,
        }


@dataclass
class _Source:
    """A source that is open or closed: when it ends, and what was decided, in index order."""

    rule: StopRule
    rows: Spool
    rejections: Spool


class Acceptance:
    """Decides on candidates in index order a source, and writes what it decided; see `host_acceptance`."""

    def __init__(
        self,
        curate: CurateConfig,
        stop: StopConfig,
        space: Workspace,
        *,
        num_rows: Mapping[str, int],
        eval_rows: Sequence[SeedTask],
        allowed_modules: tuple[str, ...] = (),
    ) -> None:
        """Take the settings; `num_rows` is by source what the pool is to have of it, `eval_rows` are kept out of it."""
        self._stop, self._space = stop, space
        self._open_curation = partial(
            open_curation,
            curate,
            space,
            num_rows=num_rows,
            eval_rows=eval_rows,
            allowed_modules=allowed_modules,
        )
        self._sources: dict[str, _Source] = {}
        self._round: tuple[str, ...] = ()
        self._stopped: dict[str, str] = {}
        self._drawn: set[str] = set()
        self._cost = Cost()

    def begin(self, mark: str) -> None:
        """Build the curators; apart from the constructor, whose errors an actor hides.

        Args:
            mark: A file of `output_dir`, written by the driver.

        Raises:
            ConfigError: No such embedder, language or selector.
            StoreError: This node doesn't see the mark.
        """
        if not exists(mark):
            raise StoreError(describe_other_directory(self._space))
        self._curation: Curation = self._open_curation()

    def open(self, names: Sequence[str]) -> None:
        """Begin a round of sources."""
        self._round = tuple(names)
        for name in names:
            self._sources[name] = _Source(
                StopRule(self._stop, num_rows=self._curation.targets[name]),
                Spool(ROW_SCHEMA),
                Spool(REJECTION_SCHEMA),
            )

    def take(self, item: StoredChunk | Batch | Screenings) -> Progress:
        """Decide on the next candidates of a source; they are screened here, unless that was done.

        Raises:
            StoreError: The file of a chunk is missing or was changed.
        """
        source = self._sources[item.source]
        if source.rule.reason is None:  # else what is still under way is no part of the pool, nor of its cost
            if not isinstance(item, Screenings):
                item = Screenings(batch=read_candidates(item, self._space.chat, self._curation.config))
            self._cost += item.batch.cost
            curator = self._curation.curators[item.source]
            batch = item.batch
            decided = curator.feed(
                batch.candidates, rule=source.rule, screened=item.screened, spent=batch.spent
            )
            source.rows.add(to_row_table([row for row in decided if isinstance(row, Row)]))
            source.rejections.add(to_rejection_table([row for row in decided if isinstance(row, Rejection)]))
        return self._report()

    def check_supply(self, name: str) -> None:
        """Hold that a source that has been read gave what it was asked for.

        Raises:
            PoolError: It ended without reason, or with nothing: what it gave, and why not more.
        """
        rule = self._sources[name].rule
        if rule.reason and rule.num_accepted:
            return
        reasons = dict(self._curation.curators[name].counts)
        end = f"the stop rule {rule.reason!r} ended it" if rule.reason else "its candidates ran out"
        raise PoolError(
            f"source {name!r} gave {rule.num_accepted} of {rule.num_rows} rows before {end} (rejected: {reasons});"
            " raise max_candidates, loosen curate or stop, or ask for fewer rows"
        )

    def close(self, *, drawn: Sequence[str] = ()) -> None:
        """End the round: hold that each source gave what it was asked for, and select.

        Args:
            drawn: Those of its sources whose candidates are independent draws (`Dialogue.asks_alike`).

        Raises:
            PoolError: See `check_supply`.
        """
        self._drawn.update(drawn)
        for name in self._round:
            self.check_supply(name)
            rule = self._sources[name].rule
            if self._curation.selector is not None:
                self._select(name)
            if rule.reason != ENOUGH_ROWS:
                self._stopped[name] = self._describe_end(name)

    def _describe_end(self, name: str) -> str:
        """Say what the pool has of a source that the stop rule ended, and out of how many rows it was chosen."""
        source, wanted = self._sources[name], self._curation.num_rows[name]
        rule = source.rule
        choice = (
            f", chosen from {rule.num_accepted} accepted ones, not from {rule.num_rows}"
            if rule.num_rows > wanted
            else ""
        )
        return (
            f"{rule.reason}: {source.rows.num_rows} of {wanted} rows{choice}, {rule.num_output_tokens} output tokens,"
            f" {rule.new_share:.2f} of the last instructions new"
        )

    def read_rows(self, source: str) -> tuple[Row, ...]:
        """Return the accepted rows of a closed source: what later ones may feed on."""
        return tuple(row for table in self._sources[source].rows for row in from_row_table(table))

    def write(self, address: str, *, fingerprint: str) -> tuple[dict[str, float], int]:
        """Write and commit the pool; return what its diversity and its rows cost, and the number of candidates.

        Raises:
            StoreError: It can't be written.
        """
        progress = self._report()
        num_rows = progress.num_accepted
        sources = [self._sources[name] for name in sorted(self._sources)]
        rows = Chain(tuple(source.rows for source in sources))
        details, metrics = self._curation.describe(rows, num_rows, drawn=self._drawn)
        ledger = account(self._cost, num_rows)
        details |= {
            "template_hash": self._space.chat.template_hash,
            "cost": ledger,
            "licences": {name: list_licences(self._sources[name].rows) for name in sorted(self._sources)},
        }
        self._curation.score(address, rows)
        write_pool(
            address,
            rows=rows,
            rejections=Chain(tuple(source.rejections for source in sources)),
            fingerprint=fingerprint,
            parents={"model": self._space.model_id, "task": self._space.task.digest},
            details=details | ({"stopped": self._stopped} if self._stopped else {}),
        )
        return metrics | to_metrics(ledger), progress.num_seen

    def _report(self) -> Progress:
        return Progress(
            num_accepted=sum(source.rows.num_rows for source in self._sources.values()),
            num_rejected=sum(source.rejections.num_rows for source in self._sources.values()),
            cost=self._cost,
            new_unique_rate=self._curation.measure_new_unique_rate(self._round),
            ended=tuple(name for name in self._round if self._sources[name].rule.reason),
        )

    def _select(self, name: str) -> None:
        source = self._sources[name]
        kept, dropped = self._curation.select(name, self.read_rows(name))
        rejections = [item for table in source.rejections for item in from_rejection_table(table)]
        rejections = sorted((*rejections, *dropped), key=lambda item: item.index)
        source.rows, source.rejections = Spool(ROW_SCHEMA), Spool(REJECTION_SCHEMA)
        source.rows.add(to_row_table(kept))
        source.rejections.add(to_rejection_table(rejections))


@contextmanager
def host_acceptance(*args: Any, **options: Any) -> Iterator[Acceptance]:
    """Hold an `Acceptance` on some node of the cluster; takes what its constructor takes."""
    remote: Any = ray.remote(Acceptance)
    actor = remote.options(**spread(MEMORY)).remote(*args, **options)
    try:
        yield cast(Acceptance, _Calls(actor))
    finally:
        ray.kill(actor)


class _Calls:
    """Looks like the object that an actor holds, and waits for what is called."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._call, name)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        try:
            return call(getattr(self._actor, name), *args, **options)
        except (RayActorError, OutOfMemoryError, ObjectLostError) as error:
            if getattr(error, "actor_init_failed", False):
                raise
            raise AcceptanceLostError(str(error).strip().rpartition("\n")[2]) from error
