"""This pipeline on the prompts of the benchmark, watched: when and where each block of prompts was answered.

questions --build_pool, the default rules of curation, or every one--> a written pool
blocks of two replicas --> the share of the run in which replicas had nothing left to do
"""

import os
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from generation_setting import CURATE, SAMPLING, STRICT, give_source

from delia.config import MethodConfig
from delia.curate.stopping import StopConfig
from delia.errors import PoolError
from delia.flow.pool import PoolConfig, build_pool
from delia.flow.workspace import Workspace
from delia.generate.attempts import Ask
from delia.generate.engine import Completion, EngineConfig, Request
from delia.generate.pipeline import Script, run_script
from delia.schema import Message, SeedTask
from delia.synthesize import pipeline
from delia.synthesize.sources import SourceConfig, SynthesizeConfig


@dataclass(frozen=True)
class Block:
    """Prompts that one replica answered together; times on the machine's one monotonic clock, in seconds."""

    process: int
    began: float
    ended: float
    num_prompts: int
    output_tokens: int


NAMES = tuple(Block.__dataclass_fields__)


@dataclass
class Counter:
    """Asks the engine, and counts prompts and output tokens; end tokens too, as the peers do."""

    ask: Ask
    num_prompts: int = 0
    output_tokens: int = 0

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        answers = self.ask(requests)
        self.num_prompts += len(requests)
        self.output_tokens += sum(len(item.token_ids) + (item.finish_reason == "stop") for item in answers)
        return answers


@dataclass(frozen=True)
class Timed:
    """A script that adds a column for each field of `Block`."""

    script: Script

    def __call__(self, block: pa.Table, ask: Ask) -> pa.Table:
        counter, began = Counter(ask), time.monotonic()
        table = self.script(block, counter)
        seen = Block(os.getpid(), began, time.monotonic(), counter.num_prompts, counter.output_tokens)
        for name in NAMES:
            table = table.append_column(name, pa.array([getattr(seen, name)] * table.num_rows))
        return table


@dataclass
class Watch:
    """Stands in the place of `run_script`; keeps when it was called, and the blocks in the order they came."""

    called: float = 0.0
    blocks: list[Block] = field(default_factory=list)

    def __call__(self, script: Script, *args: Any, **options: Any) -> Generator[pa.Table, None, None]:
        self.called = time.monotonic()
        with closing(run_script(Timed(script), *args, **options)) as tables:
            for table in tables:
                self.blocks.append(Block(*(table[name][0].as_py() for name in NAMES)))
                yield table.drop_columns(list(NAMES))


@dataclass(frozen=True)
class PipelineRun:
    """What one pool took; seconds run from the first block to the written pool."""

    start_seconds: float
    seconds: float
    num_accepted: int
    blocks: list[Block]

    @property
    def num_prompts(self) -> int:
        """Return the prompts of finished blocks."""
        return sum(block.num_prompts for block in self.blocks)

    @property
    def output_tokens(self) -> int:
        """Return the tokens of finished blocks, with end tokens."""
        return sum(block.output_tokens for block in self.blocks)


def plan_pool(questions: Path, *, num_prompts: int, num_rows: int) -> PoolConfig:
    """Return a pool of the first questions of a file and `num_rows` accepted answers to them, the default rules on."""
    answers = answer_source(num_prompts, num_rows=num_rows, feeds_on=("given",))
    sources = (give_source(questions, num_prompts), answers)
    return PoolConfig(synthesize=SynthesizeConfig(sources=sources, sampling=SAMPLING), curate=CURATE)


def answer_source(num_prompts: int, *, num_rows: int, feeds_on: tuple[str, ...] = ()) -> SourceConfig:
    """Return the source that answers the questions of another, or the task's."""
    return SourceConfig(
        name="answers",
        synthesizer=MethodConfig(method="delia.methods.synthesizer.answering.Answering"),
        feeds_on=feeds_on,
        num_rows=num_rows,
        max_candidates=num_prompts,
    )


def run_pipeline(
    questions: Path, space: Workspace, *, num_prompts: int, num_rows: int, engine: EngineConfig
) -> PipelineRun:
    """Build a pool of answers to the first questions of a file.

    Its engines start once the questions, which are rows of the pool too, are curated: start-up is counted
    from there.
    """
    config = plan_pool(questions, num_prompts=num_prompts, num_rows=num_rows)
    return _time_pool(config, space, engine=engine, num_given=num_prompts)


def run_strict_pipeline(
    questions: Sequence[str], space: Workspace, *, num_tokens: int, engine: EngineConfig
) -> PipelineRun:
    """Build a pool of answers to the train rows of a task, every rule of curation on, until tokens are spent.

    A pool's rules hold for all of its sources, and hours would pass until questions had passed these: they are
    the task's rows, which no rule looks at before they are answered.
    """
    reference = Message(role="assistant", content="-")
    rows = tuple(
        SeedTask(task_id=str(place), messages=(Message(role="user", content=text), reference))
        for place, text in enumerate(questions)
    )
    task = replace(space.task, digest="questions", rows_by_split={**space.task.rows_by_split, "train": rows})
    config = PoolConfig(
        synthesize=SynthesizeConfig(
            sources=(answer_source(len(rows), num_rows=len(rows)),), sampling=SAMPLING
        ),
        curate=STRICT,
        stop=StopConfig(max_output_tokens=num_tokens),
    )
    return _time_pool(config, replace(space, task=task), engine=engine, num_given=0)


def _time_pool(config: PoolConfig, space: Workspace, *, engine: EngineConfig, num_given: int) -> PipelineRun:
    watch = Watch()
    with patch.object(pipeline, "run_script", watch):
        pool = build_pool(config, space, engine=engine, log=lambda metrics, step: None)
    ended = time.monotonic()
    began = min(block.began for block in watch.blocks)
    num_accepted = pool.manifest.counts["accepted"] - num_given
    return PipelineRun(began - watch.called, ended - began, num_accepted, watch.blocks)


def run_to_the_end(
    questions: Path, space: Workspace, *, num_prompts: int, engine: EngineConfig
) -> list[Block]:
    """Have every prompt answered by asking for more rows than there can be; no pool is written."""
    config = plan_pool(questions, num_prompts=num_prompts, num_rows=num_prompts + 1)
    watch = Watch()
    try:
        with patch.object(pipeline, "run_script", watch):
            build_pool(config, space, engine=engine, log=lambda metrics, step: None)
    except PoolError as error:
        if "its candidates ran out" not in str(error):
            raise
    return watch.blocks


def measure_tail(blocks: Sequence[Block]) -> tuple[float, float]:
    """Return the seconds from the first block to the last answer, and the idle share of the tail.

    A replica is idle from the end of its last block to the end of the last block of all; the share is the
    mean of that over the replicas, by the length of the run.
    """
    last: dict[int, float] = {}
    for block in blocks:
        last[block.process] = max(last.get(block.process, 0.0), block.ended)
    end = max(last.values())
    seconds = end - min(block.began for block in blocks)
    return seconds, sum(end - ended for ended in last.values()) / len(last) / seconds
