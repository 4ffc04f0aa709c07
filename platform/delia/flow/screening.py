"""Candidates are screened in processes of their own, ahead of the one that accepts them.

    StoredChunk | Batch --a screener's process--> Screenings --> Acceptance, in the order in which they came

To tell a row's language and to embed its instruction takes milliseconds, and depends on no other row; the one process
that accepts would hold back the engines of a whole cluster. Where no rule is costly there is none of these, and the
process that accepts screens; as it does where no node has room for one.
"""

import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray

from delia.chat import ChatEncoder
from delia.curate.rejection import reject
from delia.curate.screening import Screened, Screener
from delia.curate.settings import CurateConfig
from delia.errors import ChatError, StoreError
from delia.flow.curation import open_screener
from delia.flow.placement import spread
from delia.flow.workspace import Workspace
from delia.schema import MAX_REJECTED_TEXT, TEMPLATE_LEAK, Rejection, Row, SeedTask
from delia.store.tables import exists
from delia.synthesize.dialogue import UNRENDERABLE
from delia.synthesize.pipeline import Batch, StoredChunk
from delia.synthesize.socket import measure_row

logger = logging.getLogger(__name__)

MEMORY = 2**30
"""Bytes that are asked for, as by an acceptance."""
AHEAD = 2
"""Batches a screener: one that it works on, and one that waits."""
MAX_TRIES = 3
"""How often a batch is sent to a process that dies while it has it."""
PATIENCE = 60.0
"""Seconds that a pool waits for the first one to run; one that is placed takes a few."""


@dataclass(frozen=True, kw_only=True)
class Screenings:
    """Candidates, and what they show; None: they were not screened yet."""

    batch: Batch
    screened: Screened | None = None

    @property
    def source(self) -> str:
        """Return the name of their source."""
        return self.batch.source


def read_candidates(item: StoredChunk | Batch, chat: ChatEncoder, curate: CurateConfig) -> Batch:
    """Return the candidates of a chunk; or rows of a file, measured, those that can't be taken as rejections.

    No one can train on a chat that the template refuses; the rejection's text says why. A file that spells a task
    token doesn't mean it, and the chat would be encoded with it: a template leak (`curate.leaks`).

    Raises:
        StoreError: The file of a chunk is missing or was changed.
    """
    if isinstance(item, StoredChunk):
        return item.read()
    leaks = frozenset(chat.token_ids.values()) if curate.reject_template_leaks else frozenset()
    return replace(item, candidates=tuple(_render(candidate, chat, leaks) for candidate in item.candidates))


def _render(candidate: Row | Rejection, chat: ChatEncoder, leaks: frozenset[int]) -> Row | Rejection:
    if isinstance(candidate, Rejection):
        return candidate
    try:
        encoded = chat.encode_chat(candidate.messages)
    except ChatError as error:
        return replace(reject(candidate, UNRENDERABLE), text=str(error)[:MAX_REJECTED_TEXT])
    leaks_token = not leaks.isdisjoint(encoded.input_ids)
    return reject(candidate, TEMPLATE_LEAK) if leaks_token else measure_row(candidate, encoded)


def describe_other_directory(space: Workspace) -> str:
    """Return what to say on a node that doesn't see what the driver wrote."""
    return (
        f"output_dir={space.output_dir!r} is another directory on another node: candidates are decided on where there"
        " is room; set output_dir to a directory or a bucket that all nodes share"
    )


class ScreenerActor:
    """One process that screens; its errors are raised where its result is taken."""

    def __init__(self, curate: CurateConfig, space: Workspace, *, eval_rows: Sequence[SeedTask]) -> None:
        """Take the settings; models are loaded at their first use."""
        self._curate, self._space, self._eval_rows = curate, space, eval_rows
        self._screener: Screener | None = None

    def screen(self, item: StoredChunk | Batch) -> Screenings:
        """Read candidates and screen them.

        Raises:
            ConfigError: No such embedder or language.
            StoreError: The file of a chunk is missing or was changed, or this node doesn't see it.
        """
        if self._screener is None:  # apart from the constructor, whose errors an actor hides
            if isinstance(item, StoredChunk) and not exists(item.address):
                raise StoreError(describe_other_directory(self._space))
            self._screener = open_screener(self._curate, self._space, eval_rows=self._eval_rows)
        batch = read_candidates(item, self._space.chat, self._curate)
        return Screenings(batch=batch, screened=self._screener.screen(batch.candidates))


class Screeners:
    """The processes that screen; each batch goes to one that has the fewest under way."""

    def __init__(self, actors: Sequence[Any]) -> None:
        """Take the actors, which get work once they run; without one that does, batches pass as they are."""
        self._starting: dict[Any, Any] = {actor.__ray_ready__.remote(): actor for actor in actors}
        self._under_way: dict[Any, list[Any]] = {}

    def wait(self) -> None:
        """Wait for the first one to run: acceptance would load the same models for the first batches."""
        if not self._starting:
            return
        self._admit(timeout=PATIENCE)
        if not self._under_way:
            logger.warning(
                "no node has room for a process that screens (%d bytes of memory); rows are screened by the process"
                " that accepts them, which is slower; see `ray status`, or lower curate.num_screeners",
                MEMORY,
            )

    def screen_ahead(self, items: Iterable[StoredChunk | Batch], ended: Collection[str]) -> Iterator[Any]:
        """Yield what `Acceptance.take` takes of each item, in their order, but of sources that have ended.

        Items are read on as long as the first one is not screened, up to `AHEAD` a process.
        """
        waiting: deque[tuple[str, Any]] = deque()
        for item in items:
            waiting.append((item.source, self._begin(item)))
            while waiting:
                source, result = waiting[0]
                if source not in ended:
                    if len(waiting) <= AHEAD * len(self._under_way) and not _is_done(result):
                        break
                    yield result
                waiting.popleft()
        yield from (result for source, result in waiting if source not in ended)

    def _begin(self, item: StoredChunk | Batch) -> Any:
        self._admit(timeout=0)
        if not self._under_way:
            return item
        for actor, refs in self._under_way.items():
            self._under_way[actor] = [ref for ref in refs if not _is_done(ref)]
        actor = min(self._under_way, key=lambda actor: len(self._under_way[actor]))
        ref = actor.screen.remote(item)
        self._under_way[actor].append(ref)
        return ref

    def _admit(self, timeout: float) -> None:
        """Give work to those that run by now, from here on."""
        if self._starting:
            for ref in ray.wait(list(self._starting), num_returns=1, timeout=timeout)[0]:
                self._under_way[self._starting.pop(ref)] = []


def _is_done(result: Any) -> bool:
    return not isinstance(result, ray.ObjectRef) or bool(ray.wait([result], timeout=0, fetch_local=False)[0])


@contextmanager
def host_screeners(
    curate: CurateConfig, space: Workspace, *, eval_rows: Sequence[SeedTask]
) -> Iterator[Screeners]:
    """Hold `curate.num_screeners` processes on nodes of the cluster where a rule is costly, else none."""
    remote: Any = ray.remote(ScreenerActor)
    options = spread(MEMORY) | {"max_restarts": -1, "max_task_retries": MAX_TRIES - 1}
    number = curate.num_screeners if curate.is_costly else 0
    # one copy for all; and one that is restarted finds it as long as it is held here
    shared = {name: ray.put(value) for name, value in (("space", space), ("eval_rows", eval_rows)) if number}
    actors = [remote.options(**options).remote(curate, **shared) for _ in range(number)]
    try:
        screeners = Screeners(actors)
        screeners.wait()
        yield screeners
    finally:
        for actor in actors:
            ray.kill(actor)
