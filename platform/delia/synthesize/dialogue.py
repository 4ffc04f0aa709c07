"""What a replica does with a chunk: open every candidate, answer it turn by turn, close it.

(source, start, stop) --method, engine, method, ...--> candidates with what each cost
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa

from delia.chat import ChatEncoder, load_chat
from delia.config import build_method, describe_method, fingerprint
from delia.errors import ChatError, ConfigError, PoolError
from delia.generate.attempts import Ask
from delia.generate.engine import FAULTS, PROMPT_TOO_LONG, Completion, Request, SamplingConfig
from delia.rng import hash_text
from delia.schema import TEMPLATE_LEAK, Rejection, Row, SeedTask, hash_messages
from delia.store.candidates import COST_SCHEMA, Candidate, to_candidate_table
from delia.store.models import ModelConfig, identify_model, resolve_model
from delia.synthesize.socket import SynthesisContext, Synthesizer
from delia.synthesize.sources import SourceConfig

_ONE_THREAD = threading.Lock()
"""A replica works on several chunks; templates and tokenizers of `transformers` serve one thread at a time."""

MAX_TURNS = 16
"""No method needs more; one that never closes a candidate would run for ever."""

_NUM_ASKED = 8
"""Candidates whose first requests are compared."""


UNRENDERABLE = "unrenderable"
"""Why a candidate is not asked further, or an imported row not taken: the chat template can't write the chat."""


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """The methods of a round's sources, rebuilt on each replica from what can be sent there.

    `task_tokens` are those that the model has rows for, `tokens` those that the task declares.
    """

    sources: tuple[SourceConfig, ...]
    sampling: SamplingConfig
    model: ModelConfig
    max_length: int
    task_tokens: dict[str, int] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    seed_tasks: tuple[SeedTask, ...] = ()
    long_instruction: str = ""
    closed: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    allowed_modules: tuple[str, ...] = ()
    _parts: dict[str, tuple[Synthesizer, SynthesisContext]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, object]:
        """Leave tokenizers and methods behind; each process builds its own."""
        return {**self.__dict__, "_parts": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Build them on arrival: a replica does so as it starts, and not while its engine waits for work."""
        self.__dict__.update(state)
        self.part(self.sources[0].name)

    def part(self, source: str) -> tuple[Synthesizer, SynthesisContext]:
        """Return a source's method and context."""
        if not self._parts:
            chat = load_chat(
                str(resolve_model(self.model)),
                chat_template=self.model.chat_template,
                task_tokens=self.task_tokens,
            )
            self._parts.update({item.name: self._build_part(item, chat) for item in self.sources})
        return self._parts[source]

    def _build_part(self, source: SourceConfig, chat: ChatEncoder) -> tuple[Synthesizer, SynthesisContext]:
        if source.synthesizer is None:
            raise ConfigError(f"source {source.name!r} has no synthesizer")
        method = build_method(source.synthesizer, allowed_modules=self.allowed_modules)
        closed = tuple(row for name in source.feeds_on for row in self.closed[name])
        # what a method does not read is kept from it, and decides nothing
        reads_task = getattr(method, "reads_task", True)
        seed_tasks = self.seed_tasks if reads_task else ()
        long_instruction = self.long_instruction if reads_task else ""
        contents = ((row.task_id, row.phrasing, hash_messages(row.messages)) for row in seed_tasks)
        texts = [long_instruction, *self.tokens, *(text for content in contents for text in content)]
        if closed:
            texts.append(hash_text(*(row.leaf for row in closed)))
        context = SynthesisContext(
            source=source.name,
            recipe=fingerprint(
                describe_method(source.synthesizer, method),
                self.sampling,
                str(self.max_length),
                identify_model(self.model),
                self.model.dtype,
                chat.template_hash,
                hash_text(*texts),
            ),
            chat=chat,
            seed_tasks=seed_tasks,
            token=next(iter(self.tokens), ""),
            long_instruction=long_instruction,
            closed=closed,
        )
        return method, context

    def check_opening(self, source: str, indices: Iterable[int]) -> None:
        """Hold that some candidate of a source can be asked for: what the template refuses of all is a setting's fault.

        Raises:
            ChatError: None can, with the first reason.
        """
        method, context = self.part(source)
        refused: ChatError | None = None
        for index in indices:
            try:
                if not isinstance(method(context, index, ()), Rejection):
                    return
            except ChatError as error:
                refused = refused or error
        if refused is not None:
            raise ChatError(f"source {source!r}: no candidate of it can be asked for: {refused}") from refused

    def asks_alike(self, source: str) -> bool:
        """Tell whether all candidates of a source begin with one prompt: then they are draws from one distribution.

        Those of a method that walks a list or a grid begin with another prompt each; the first few tell.
        """
        method, context = self.part(source)
        steps = [self._step(method, context, index, []) for index in range(_NUM_ASKED)]
        asked = {replace(step, request_id="", seed=0) for step in steps if isinstance(step, Request)}
        return len(asked) == 1 and all(isinstance(step, Request) for step in steps)

    def __call__(self, block: pa.Table, ask: Ask) -> pa.Table:
        """Make the candidates of one chunk.

        Raises:
            PoolError: The method asked for more than `MAX_TURNS` turns.
        """
        (chunk,) = block.to_pylist()
        with _ONE_THREAD:
            method, context = self.part(chunk["source"])
        indices = range(chunk["start"], chunk["stop"])
        said: dict[int, list[Completion]] = {index: [] for index in indices}
        closed: dict[int, Candidate] = {}
        for _ in range(MAX_TURNS + 1):
            requests: dict[int, Request] = {}
            with _ONE_THREAD:
                for index in indices:
                    if index not in closed:
                        step = self._step(method, context, index, said[index])
                        if isinstance(step, Request):
                            requests[index] = step
                        else:
                            closed[index] = step
            if not requests:
                return _to_table([closed[index] for index in indices], [said[index] for index in indices])
            answers = ask(list(requests.values()))
            for index, answer in zip(requests, answers, strict=True):
                said[index].append(answer)
        raise PoolError(
            f"source {chunk['source']!r}: {type(method).__name__} asked for more than {MAX_TURNS} turns of one"
            " candidate; a method must close its candidates"
        )

    def _step(
        self, method: Synthesizer, context: SynthesisContext, index: int, said: list[Completion]
    ) -> Request | Candidate:
        """Take a candidate one turn further; a chat that the template refuses costs this candidate alone."""
        for answer in said[-1:]:
            if answer.finish_reason in FAULTS:
                return context.reject(index, answer.finish_reason, answer.error, said)
            if leak := context.chat.find_leak(answer.token_ids):
                return context.reject(index, TEMPLATE_LEAK, leak, said)
        try:
            step = method(context, index, said)
        except ChatError as error:
            return context.reject(index, UNRENDERABLE, str(error), said)
        return self._fit(context, index, step, said) if isinstance(step, Request) else step

    def _fit(
        self, context: SynthesisContext, index: int, request: Request, said: list[Completion]
    ) -> Request | Rejection:
        """Bound an answer by the room that its prompt leaves, or reject a prompt that leaves none."""
        num_ids = len(request.prompt_ids)
        room = self.max_length - num_ids
        if room < 1:
            text = f"the prompt has {num_ids} ids, synthesize.max_length={self.max_length} leaves no room"
            return context.reject(index, PROMPT_TOO_LONG, text, said)
        wanted = self.sampling.max_tokens if request.max_tokens is None else request.max_tokens
        return replace(request, max_tokens=room) if wanted > room else request


def _to_table(candidates: list[Candidate], said: list[list[Completion]]) -> pa.Table:
    """Return candidates beside the tokens of all their turns."""
    table = to_candidate_table(candidates)
    spent = (
        [sum(answer.num_prompt_tokens for answer in answers) for answers in said],
        [sum(len(answer.token_ids) for answer in answers) for answers in said],
    )
    for name, values in zip(COST_SCHEMA.names, spent, strict=False):
        table = table.append_column(name, pa.array(values, pa.int64()))
    return table
