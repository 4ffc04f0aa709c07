"""Generation, side by side on the same prompts: this pipeline with its default filters against its peers, and with all of them.

    bare        one `vllm.LLM.generate` call in a process, with a seed for each row; and without seeds
    batches     the loop of the DELIA repository: `LLM.generate` on 128 prompts at a time
    ray.data    `ray.data.llm.build_processor`, one replica, its own defaults for concurrency
    datatrove   `InferenceRunner`, which starts `vllm serve` and asks it over HTTP
    pipeline    `build_pool`: Ray Data, seeds, the default rules of curation, the pool written; and with every rule

Each has one core for its engine. Seconds run from the first request that an engine takes to the last answer, for the
pipeline to the written pool; start-up is reported apart. A peer's accepted rows are counted after its clock has
stopped; the pipeline curates while it generates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import generation_peers
import generation_pipeline
import generation_setting
import ray
from generation_killed import ENGINES, Killed, measure_killed
from generation_peers import ask_bare, ask_datatrove, ask_ray_data, time_halves
from generation_pipeline import PipelineRun, measure_tail, run_pipeline, run_strict_pipeline, run_to_the_end
from generation_setting import ENGINE, MODEL, Answers, accept_questions, count_accepted, write_questions

from delia.flow.workspace import Workspace, open_workspace
from delia.schema import Message
from delia.store.tasks import TaskConfig, read_task

PART = 8
"""Peers are asked the first of so many parts of the prompts."""
ASKED_SHARE = 0.99
"""Rows that the pipeline is asked for, of those that bare vLLM's answers gave: its candidates must not run out."""

BARE, AGAIN = "bare, seeded", "bare, seeded, again"


@dataclass(frozen=True)
class Measured:
    """What one way of generating did; output tokens with the end tokens."""

    name: str
    num_prompts: int
    start_seconds: float
    seconds: float
    output_tokens: int
    num_accepted: int

    @property
    def rate(self) -> float:
        """Return output tokens a second."""
        return self.output_tokens / self.seconds

    @property
    def row_rate(self) -> float:
        """Return accepted unique rows a second."""
        return self.num_accepted / self.seconds


@dataclass(frozen=True)
class Tail:
    """How two engines ended; `idle` is the share of the run for which one had nothing left to do, their mean."""

    name: str
    seconds: float
    idle: float


Figure = TypeVar("Figure", Measured, Tail)


def report(figure: Figure) -> Figure:
    """Print a figure as soon as it is there: all of them take the better part of an hour."""
    print(figure, flush=True)
    return figure


@dataclass(frozen=True)
class Bench:
    """The questions that are asked, as text, as ids and as a file; `num_part` of them where all would take too long."""

    questions: list[str]
    prompts: list[list[int]]
    path: Path
    space: Workspace
    num_part: int

    def measure(
        self, name: str, ask: Callable[[list[list[int]]], Answers], num_prompts: int | None = None
    ) -> Measured:
        """Have a peer answer the first prompts, `num_part` unless told; count the rows that curation accepts."""
        num_prompts = num_prompts or self.num_part
        answers = ask(self.prompts[:num_prompts])
        num_accepted = count_accepted(self.questions[:num_prompts], answers, self.space)
        times = (answers.start_seconds, answers.seconds)
        return report(Measured(name, num_prompts, *times, answers.output_tokens, num_accepted))

    def measure_pipeline(self, bare: Measured) -> Measured:
        """Build a pool of answers to all prompts; ask for a few rows less than bare vLLM's answers gave."""
        num_rows = int(ASKED_SHARE * bare.num_accepted)
        run = run_pipeline(
            self.path, self.space, num_prompts=len(self.prompts), num_rows=num_rows, engine=ENGINE
        )
        return describe_run("pipeline", run)

    def measure_strict_pipeline(self, bare: Measured) -> Measured:
        """Build such a pool with every rule of curation; spend a few tokens less than bare vLLM did."""
        num_tokens = int(ASKED_SHARE * (bare.output_tokens - bare.num_prompts))
        run = run_strict_pipeline(self.questions, self.space, num_tokens=num_tokens, engine=ENGINE)
        return describe_run("pipeline, every filter", run)


def describe_run(name: str, run: PipelineRun) -> Measured:
    """Return the figures of a pool."""
    times = (run.start_seconds, run.seconds)
    return report(Measured(name, run.num_prompts, *times, run.output_tokens, run.num_accepted))


def open_bench(folder: Path, task: TaskConfig, num_prompts: int) -> Bench:
    """Draw, curate and encode the questions."""
    for module in (generation_setting, generation_peers, generation_pipeline):
        ray.cloudpickle.register_pickle_by_value(module)
    space = open_workspace(str(folder / "runs"), MODEL, read_task(task))
    questions = accept_questions(num_prompts, space, folder)
    path = folder / "questions.jsonl"
    write_questions(questions, path)
    prompts = [space.chat.encode_prompt((Message(role="user", content=text),)) for text in questions]
    return Bench(questions, prompts, path, space, num_prompts // PART)


def measure_all(bench: Bench, folder: Path) -> list[Measured]:
    """Return every way of generating, one after the other; bare vLLM again after the pipeline, as the machine drifts."""
    space, num_prompts = bench.space, len(bench.prompts)
    bare = bench.measure(BARE, lambda prompts: ask_bare(prompts, space), num_prompts)
    return [
        bare,
        bench.measure_pipeline(bare),
        bench.measure(AGAIN, lambda prompts: ask_bare(prompts, space), num_prompts),
        bench.measure("bare, no seeds", lambda prompts: ask_bare(prompts, space, seeded=False)),
        bench.measure("batches of 128", lambda prompts: ask_bare(prompts, space, size=128)),
        bench.measure("ray.data.llm", lambda prompts: ask_ray_data(prompts, space)),
        bench.measure("datatrove", lambda prompts: ask_datatrove(prompts, space, folder / "datatrove")),
        bench.measure(BARE, lambda prompts: ask_bare(prompts, space)),
    ]


def measure_filters(bench: Bench) -> list[Measured]:
    """Return the pipeline under the default rules and under all of them, bare vLLM before and after."""
    space, num_prompts = bench.space, len(bench.prompts)
    bare = bench.measure(BARE, lambda prompts: ask_bare(prompts, space), num_prompts)
    return [
        bare,
        bench.measure_pipeline(bare),
        bench.measure_strict_pipeline(bare),
        bench.measure(AGAIN, lambda prompts: ask_bare(prompts, space), num_prompts),
    ]


def measure_tails(bench: Bench, folder: Path, task: TaskConfig) -> list[Tail]:
    """Return how the pipeline's two replicas end, and two bare engines with half of the prompts each."""
    num_prompts = bench.num_part
    # a directory of its own: else the chunks of the first run would be found, and nothing generated
    space = open_workspace(str(folder / "tail"), MODEL, read_task(task))
    blocks = run_to_the_end(bench.path, space, num_prompts=num_prompts, engine=ENGINES)
    pipeline = report(Tail("pipeline, 2 replicas", *measure_tail(blocks)))
    halves = time_halves(bench.prompts[:num_prompts], bench.space)
    longest = max(halves)
    idle = 1 - sum(halves) / len(halves) / longest
    return [pipeline, report(Tail("bare, 2 engines, every second prompt each", longest, idle))]


def describe_rates(measured: list[Measured]) -> list[str]:
    """Return the table of rates; ratios are to bare vLLM with a seed for each row, on the same prompts.

    Where it ran twice on them, before and after the pipeline, the faster run is taken.
    """
    bases = [item for item in measured if item.name in (BARE, AGAIN)]
    compared = []
    for item in measured:
        size = min(base.num_prompts for base in bases if base.num_prompts >= item.num_prompts)
        base = max((base for base in bases if base.num_prompts == size), key=lambda base: base.rate)
        compared.append((item, base))
    return [
        "| | prompts | output tokens/s | ratio | accepted unique rows/s | ratio | start-up s | run s |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {item.name} | {item.num_prompts:,} | {item.rate:,.0f} | {item.rate / bare.rate:.2f}"
            f" | {item.row_rate:,.0f} | {item.row_rate / bare.row_rate:.2f}"
            f" | {item.start_seconds:.0f} | {item.seconds:.0f} |"
            for item, bare in compared
        ),
    ]


def describe_tails(tails: list[Tail], num_prompts: int) -> list[str]:
    """Return the table of tails."""
    return [
        f"Two engines on {num_prompts:,} prompts. Tail idle share: from the end of an engine's last answer to the last"
        " answer of all, mean of both engines, by the length of the run; bare engines are compared as if both had"
        " begun at once. `ray.data.llm` does not tell which replica answered a row.",
        "",
        "| | run s | tail idle share |",
        "|---|---|---|",
        *(f"| {tail.name} | {tail.seconds:.0f} | {tail.idle:.1%} |" for tail in tails),
    ]


def describe_generation(folder: Path, task: TaskConfig, num_prompts: int) -> str:
    """Run everything and return the section."""
    bench = open_bench(folder, task, num_prompts)
    measured = measure_all(bench, folder)
    tails = measure_tails(bench, folder, task)
    killed: Killed = measure_killed(
        bench.path,
        folder,
        task,
        num_prompts=bench.num_part,
        num_rows=int(ASKED_SHARE * measured[-1].num_accepted),
    )
    lines = [
        f"Generation: {num_prompts:,} different questions of the starter's world that curation accepts, T=1, one core an"
        f" engine; peers have the first {bench.num_part:,}. Ratios are to bare vLLM with seeds on the same prompts: the faster of its"
        " two runs on all, before and after the pipeline, or the last row; seconds run to the last answer,"
        f" for the pipeline to the written pool, and it is asked for {ASKED_SHARE:.0%} of the rows that the first row's answers"
        " gave, so that it ends with a pool. Peers' rows are curated after their clock has stopped. datatrove's runner starts"
        " `vllm serve` itself (`vllm`, 500 requests at a time, ids and seeds over HTTP); its start-up, and `ray.data.llm`'s,"
        " runs to the first answer.",
        "",
        *describe_rates(measured),
        "",
        *describe_tails(tails, bench.num_part),
        "",
        killed.describe(),
    ]
    return "\n".join(lines)


def describe_filters(folder: Path, task: TaskConfig, num_prompts: int) -> str:
    """Run the pipeline with more and more filters and return the section."""
    measured = measure_filters(open_bench(folder, task, num_prompts))
    lines = [
        f"The pipeline's filters: {num_prompts:,} questions as in `generation`, ratios to the faster run of bare vLLM. Every"
        " filter: those of language, refusals and semantic duplicates (cosines of the base's mean states) too. There the questions"
        f" are the task's rows, and the run ends once {ASKED_SHARE:.0%} of the tokens of the first row are spent; its rows are beside"
        " those of bare under the default rules.",
        "",
        *describe_rates(measured),
    ]
    return "\n".join(lines)
