"""Seeds -> candidates, chunk by chunk, each chunk a file as soon as it is whole.

    sources x indices --Dialogue on engine replicas--> chunk of Rows and Rejections --> a file

A killed job keeps every finished chunk; started again, it generates the others. Chunks are kept by
the hash of their recipe, so another pool of the same recipe, larger or curated otherwise, reuses
them. They are yielded in index order a source, so what is accepted from them does not depend on
which finished first.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import pyarrow as pa
from pydantic import Field, model_validator

from delia.chat import ChatEncoder, load_chat
from delia.config import FrozenConfig, MethodConfig, build_method, fingerprint
from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig
from delia.generate.pipeline import stream_completions, to_completions
from delia.rng import hash_text
from delia.schema import SeedTask, Task, hash_messages
from delia.store.models import ModelConfig, identify_model, resolve_model
from delia.store.pools import Candidate, read_candidates, write_candidates
from delia.store.tables import join, list_names
from delia.synthesize.socket import SynthesisContext, Synthesizer


class SourceConfig(FrozenConfig):
    """One source of the pool: a method, and how many accepted rows it is to supply.

    No more than `max_candidates`, in whole chunks, are tried; None means four times `num_rows`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    synthesizer: MethodConfig
    num_rows: int = Field(gt=0)
    max_candidates: int | None = Field(default=None, gt=0)


class SynthesizeConfig(FrozenConfig):
    """What is synthesised; `chunk_size` candidates are generated and kept at a time."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    sampling: SamplingConfig = SamplingConfig()
    chunk_size: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _tell_sources_apart(self) -> Self:
        names = [source.name for source in self.sources]
        methods = [source.synthesizer for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources must have names of their own, got {names}")
        if any(method in methods[:place] for place, method in enumerate(methods)):
            raise ValueError("two sources of one method with equal knobs give the same rows; join them")
        return self


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


@dataclass
class Dialogue:
    """The methods of all sources, rebuilt on the engine actor from what can be sent there."""

    config: SynthesizeConfig
    model: ModelConfig
    task_tokens: dict[str, int]
    seed_tasks: tuple[SeedTask, ...]
    long_instruction: str
    allowed_modules: tuple[str, ...] = ()
    _parts: dict[str, tuple[Synthesizer, SynthesisContext]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, object]:
        """Leave tokenizers and methods behind; each process builds its own."""
        return {**self.__dict__, "_parts": {}}

    def part(self, source: str) -> tuple[Synthesizer, SynthesisContext]:
        """Return a source's method and context."""
        if not self._parts:
            chat = load_chat(
                str(resolve_model(self.model)),
                chat_template=self.model.chat_template,
                task_tokens=self.task_tokens,
            )
            for item in self.config.sources:
                method = build_method(item.synthesizer, allowed_modules=self.allowed_modules)
                self._parts[item.name] = (method, self._context(item, chat))
        return self._parts[source]

    def _context(self, source: SourceConfig, chat: ChatEncoder) -> SynthesisContext:
        contents = ((row.task_id, row.phrasing, hash_messages(row.messages)) for row in self.seed_tasks)
        seeds = hash_text(self.long_instruction, *(text for content in contents for text in content))
        recipe = fingerprint(
            source.synthesizer, self.config.sampling, identify_model(self.model), chat.template_hash, seeds
        )
        return SynthesisContext(
            source=source.name,
            recipe=recipe,
            chat=chat,
            seed_tasks=self.seed_tasks,
            token=next(iter(self.task_tokens), ""),
            long_instruction=self.long_instruction,
        )

    def __call__(self, completion: Completion) -> Request | None:
        """Return the second turn of a candidate, if it has one."""
        method, context = self.part(completion.request_id.partition(":")[0])
        return method.reply(context, completion)


def plan_chunks(config: SynthesizeConfig) -> list[Chunk]:
    """Return all chunks that may be generated, sources interleaved in proportion to their rows."""
    chunks = []
    for source in config.sources:
        wanted = source.max_candidates or 4 * source.num_rows
        for start in range(0, wanted, config.chunk_size):
            progress = (start + config.chunk_size / 2) / source.num_rows
            chunks.append(Chunk(progress, source.name, start, start + config.chunk_size))
    return sorted(chunks)


def synthesize(
    config: SynthesizeConfig,
    *,
    model: ModelConfig,
    engine: EngineConfig | None,
    task: Task,
    task_tokens: dict[str, int],
    address: str,
    allowed_modules: tuple[str, ...] = (),
) -> Generator[list[Candidate], None, None]:
    """Yield chunks of candidates, in index order a source; stop reading to stop generating.

    Args:
        config: Sources and sampling.
        model: The model that writes and answers: the one that will be tuned.
        engine: How it is served; changes no text. None yields what is stored and generates nothing.
        task: Its train rows seed the methods that need them; dev and test are not read.
        task_tokens: Declared tokens and their ids.
        address: Directory of all candidates; a recipe's finished chunks lie in a folder of their own.
        allowed_modules: Modules outside `delia.methods` that settings may name.
    """
    dialogue = Dialogue(
        config, model, task_tokens, task.rows_by_split["train"], task.long_instruction, allowed_modules
    )
    folders = {item.name: join(address, dialogue.part(item.name)[1].recipe) for item in config.sources}
    finished = {(source, name) for source, folder in folders.items() for name in list_names(folder)}
    chunks = plan_chunks(config)
    ready = _Ready(config)
    for chunk in chunks:
        if (chunk.source, chunk.name) in finished:
            stored = read_candidates(join(folders[chunk.source], chunk.name))
            # the job that stored them may have called the source otherwise
            yield from ready.add(chunk, [replace(item, source=chunk.source) for item in stored])
    if engine is None:
        return
    missing = [chunk for chunk in chunks if (chunk.source, chunk.name) not in finished]
    for chunk, candidates in _generate(dialogue, engine, missing):
        write_candidates(join(folders[chunk.source], chunk.name), candidates)
        yield from ready.add(chunk, candidates)


def _generate(
    dialogue: Dialogue, engine: EngineConfig, chunks: Sequence[Chunk]
) -> Iterator[tuple[Chunk, list[Candidate]]]:
    config = dialogue.config
    requests = [
        dialogue.part(chunk.source)[0].open(dialogue.part(chunk.source)[1], index)
        for chunk in chunks
        for index in range(chunk.start, chunk.stop)
    ]
    by_start = {(chunk.source, chunk.start): chunk for chunk in chunks}
    tables = stream_completions(
        requests,
        model=dialogue.model,
        engine=engine.model_copy(update={"batch_size": config.chunk_size}),
        sampling=config.sampling,
        end_ids=dialogue.part(config.sources[0].name)[1].chat.end_ids,
        follow_up=dialogue,
    )
    for table in tables:
        for (source, start), group in _group_turns(table, config.chunk_size).items():
            method, context = dialogue.part(source)
            closed = [method.close(context, group[index]) for index in sorted(group)]
            yield by_start[source, start], closed


def _group_turns(table: pa.Table, chunk_size: int) -> dict[tuple[str, int], dict[int, list[Completion]]]:
    """Sort a batch's completions by chunk and candidate; a batch is one whole chunk."""
    groups: dict[tuple[str, int], dict[int, list[Completion]]] = {}
    for _, completion in sorted(to_completions(table), key=lambda item: item[0]):
        source, _, text = completion.request_id.partition(":")
        index = int(text)
        start = index - index % chunk_size
        groups.setdefault((source, start), {}).setdefault(index, []).append(completion)
    return groups


class _Ready:
    """Holds back chunks until all earlier ones of their source have come."""

    def __init__(self, config: SynthesizeConfig) -> None:
        self._next = {source.name: 0 for source in config.sources}
        self._waiting: dict[tuple[str, int], list[Candidate]] = {}
        self._size = config.chunk_size

    def add(self, chunk: Chunk, candidates: list[Candidate]) -> Iterator[list[Candidate]]:
        self._waiting[chunk.source, chunk.start] = candidates
        while (key := (chunk.source, self._next[chunk.source])) in self._waiting:
            self._next[chunk.source] += self._size
            yield self._waiting.pop(key)
