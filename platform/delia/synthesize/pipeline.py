"""Seeds -> candidates, chunk by chunk, each chunk a file as soon as it is whole.

    sources x indices --Synthesis: Dialogue on engine replicas--> chunk of Rows and Rejections --> a file

A killed job keeps every finished chunk; started again, it generates the others. Chunks are kept by
the hash of their recipe, so another pool of the same recipe, larger or curated otherwise, reuses
them. Their addresses are yielded in index order a source, so what is accepted from them does not depend on
which finished first; whoever decides on a chunk reads what was stored.
"""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import pyarrow as pa

from delia.errors import StoreError, TaskFileError
from delia.generate.engine import EngineConfig
from delia.generate.pipeline import run_script
from delia.rng import hash_text
from delia.schema import MAX_REJECTED_TEXT, Rejection, Row, hash_messages
from delia.store.candidates import Candidate, Cost, from_candidate_table, read_spent, sum_cost
from delia.store.tables import join, list_names, read_table, write_table
from delia.store.tasks import Imported, read_import
from delia.synthesize.dialogue import Dialogue
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

MALFORMED = "malformed"
"""Why a row of a file that can't be read is not taken."""


@dataclass(frozen=True, order=True)
class Chunk:
    """Consecutive candidates of one source; sorts by how far into its source it lies."""

    progress: float
    source: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return f"{self.start:09d}-{self.stop:09d}.parquet"

    def to_block(self) -> pa.Table:
        """Return what a replica needs to know."""
        return pa.table({"source": [self.source], "start": [self.start], "stop": [self.stop]})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Candidates of one source in index order, and what they cost when they were made.

    `spent` are the output tokens of each, in all its turns; empty where none cost any.
    """

    source: str
    candidates: tuple[Candidate, ...]
    cost: Cost = field(default_factory=Cost)
    spent: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoredChunk:
    """A chunk of candidates that is whole: where it lies, and what its source is called here."""

    source: str
    address: str
    num_candidates: int

    def read(self) -> Batch:
        """Read the candidates; the job that stored them may have called the source otherwise.

        Raises:
            StoreError: The file is missing, not whole, or was changed.
        """
        table = read_table(self.address)
        if table.num_rows != self.num_candidates:
            raise StoreError(
                f"{self.address!r} holds {table.num_rows} candidates of {self.num_candidates}; remove it and run its"
                " job again, which makes it anew"
            )
        candidates = from_candidate_table(table, address=self.address)
        own = tuple(replace(item, source=self.source) for item in candidates)
        return Batch(source=self.source, candidates=own, cost=sum_cost(table), spent=read_spent(table))


def plan_chunks(sources: Sequence[SourceConfig], chunk_size: int) -> list[Chunk]:
    """Return all chunks that may be generated, sources interleaved in proportion to their rows."""
    chunks = []
    for source in sources:
        wanted = source.count_candidates(source.num_rows)
        for start in range(0, wanted, chunk_size):
            progress = (start + chunk_size / 2) / source.num_rows
            chunks.append(Chunk(progress, source.name, start, start + chunk_size))
    return sorted(chunks)


def plan_rounds(config: SynthesizeConfig) -> list[tuple[SourceConfig, ...]]:
    """Return the sources in rounds: one feeds on earlier rounds alone, and one model serves a round.

    Files are the first round: one that has too few rows is found before any engine starts.
    """
    depth: dict[str, int] = {}
    rounds: dict[tuple[int, str], list[SourceConfig]] = {}
    for source in config.sources:
        depth[source.name] = max((depth[name] + 1 for name in source.feeds_on), default=0)
        served_by = source.model.model_dump_json() if source.model else ""
        key = (-1, "") if source.rows else (depth[source.name], served_by)
        rounds.setdefault(key, []).append(source)
    return [tuple(rounds[key]) for key in sorted(rounds, key=lambda key: key[0])]


class Synthesis:
    """The candidates of one round of sources: those that are stored, then those that are still to be generated."""

    def __init__(
        self, dialogue: Dialogue, *, chunk_size: int, address: str, ended: Collection[str] = ()
    ) -> None:
        """See what is stored.

        Args:
            dialogue: The round's sources, and what their methods may use.
            chunk_size: Candidates of a chunk.
            address: Directory of all candidates; a recipe's finished chunks lie in a folder of their own.
            ended: Sources that need no more, which the reader adds to: their chunks are no longer yielded, nor begun.
        """
        self._dialogue, self._ended = dialogue, ended
        self._end_ids = dialogue.part(dialogue.sources[0].name)[1].chat.end_ids
        names = [source.name for source in dialogue.sources]
        self._folders = {name: join(address, dialogue.part(name)[1].recipe) for name in names}
        finished = {(source, name) for source, folder in self._folders.items() for name in list_names(folder)}
        chunks = plan_chunks(dialogue.sources, chunk_size)
        self._is_stored = {chunk: (chunk.source, chunk.name) in finished for chunk in chunks}
        self._ready = _Ready(self._folders, chunk_size, ended)

    def read_stored(self) -> Iterator[StoredChunk]:
        """Yield where the stored candidates lie, in index order a source."""
        for chunk, is_stored in self._is_stored.items():
            if is_stored:
                yield from self._ready.add(chunk)

    def generate(self, engine: EngineConfig) -> Generator[StoredChunk, None, None]:
        """Generate the others and yield where they lie, in index order a source; stop reading to stop generating.

        Call it once `read_stored` is at its end, and what it yielded decided on: no engine starts before.

        Args:
            engine: How the model is served; changes no text.

        Raises:
            ChatError: The template can write no candidate of a source.
        """
        missing = [
            chunk
            for chunk, is_stored in self._is_stored.items()
            if not is_stored and chunk.source not in self._ended
        ]
        for name in dict.fromkeys(chunk.source for chunk in missing):
            own = (chunk for chunk in self._is_stored if chunk.source == name)
            self._dialogue.check_opening(name, (i for chunk in own for i in range(chunk.start, chunk.stop)))
        by_start = {(chunk.source, chunk.start): chunk for chunk in missing}
        tables = run_script(
            self._dialogue,
            [chunk.to_block() for chunk in missing],
            model=self._dialogue.model,
            engine=engine,
            sampling=self._dialogue.sampling,
            end_ids=self._end_ids,
            skip=self._ended,
        )
        with closing(tables):  # an error's traceback would keep them, and their engines
            for table in tables:
                chunk = by_start[table["source"][0].as_py(), table["index"][0].as_py()]
                write_table(join(self._folders[chunk.source], chunk.name), table)
                yield from self._ready.add(chunk)


def read_imports(config: SynthesizeConfig) -> dict[str, Imported]:
    """Read the sources that are files, by their names; of a task that has splits the train rows.

    Raises:
        TaskFileError: A file can't be read, or no row of it.
    """
    return {source.name: read_import(source.rows) for source in config.sources if source.rows is not None}


def digest_imported(imported: Imported) -> str:
    """Return the hash of all that a source takes of its file: rows in their order, and where one is malformed."""
    return hash_text(
        imported.licence,
        *(
            MALFORMED
            if isinstance(item, TaskFileError)
            else hash_text(item.licence, hash_messages(item.messages))
            for item in imported.items
        ),
    )


def batch_imported(source: str, imported: Imported, *, size: int) -> Iterator[Batch]:
    """Yield all rows of a source that is a file, in the file's order; they cost nothing.

    An imported row is known by its content: its id is the hash of source, messages and the licence that it states
    itself; what settings say of all rows names none. One that can't be read is a rejection, known by its index, with
    what is wrong and where as its text.
    """
    candidates: list[Candidate] = []
    for index, item in enumerate(imported.items):
        if isinstance(item, TaskFileError):
            candidates.append(
                Rejection(
                    row_id=hash_text(source, MALFORMED, str(index)),
                    index=index,
                    source=source,
                    reason=MALFORMED,
                    text=str(item)[:MAX_REJECTED_TEXT],
                )
            )
        else:
            row_id = hash_text(source, item.licence, hash_messages(item.messages))
            licence = item.licence or imported.licence
            row = Row(row_id=row_id, index=index, source=source, messages=item.messages, licence=licence)
            candidates.append(row)
    for start in range(0, len(candidates), size):
        yield Batch(source=source, candidates=tuple(candidates[start : start + size]))


class _Ready:
    """Holds back chunks until all earlier ones of their source have come, and all of sources that have ended."""

    def __init__(self, folders: Mapping[str, str], size: int, ended: Collection[str]) -> None:
        self._folders, self._size, self._ended = folders, size, ended
        self._next = dict.fromkeys(folders, 0)
        self._waiting: dict[tuple[str, int], Chunk] = {}

    def add(self, chunk: Chunk) -> Iterator[StoredChunk]:
        self._waiting[chunk.source, chunk.start] = chunk
        # a source may end while its chunks are read
        while chunk.source not in self._ended and (
            (key := (chunk.source, self._next[chunk.source])) in self._waiting
        ):
            self._next[chunk.source] += self._size
            ready = self._waiting.pop(key)
            yield StoredChunk(
                source=ready.source,
                address=join(self._folders[ready.source], ready.name),
                num_candidates=ready.stop - ready.start,
            )
