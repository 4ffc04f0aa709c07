"""Generation, side by side on the same prompts: this pipeline with all its filters against its peers.

    bare        one `vllm.LLM.generate` call in a process, with a seed for each row; and without seeds
    batches     the loop of the DELIA repository: `LLM.generate` on 128 prompts at a time
    ray.data    `ray.data.llm.build_processor`, one replica, its own defaults for concurrency
    pipeline    `build_pool`: Ray Data, seeds, every rule of curation, the pool written

Each has one core. Seconds run from the first request that an engine takes to the last answer, for the
pipeline to the written pool; start-up is reported apart.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from delia.config import MethodConfig
from delia.curate.pipeline import CurateConfig
from delia.errors import PoolError
from delia.flow.pool import PoolConfig, build_pool
from delia.flow.workspace import Workspace, open_workspace
from delia.generate.attempts import Ask
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.generate.pipeline import Script, run_script, worker_environment
from delia.generate.vllm_engine import set_engine_environment
from delia.rng import derive_seed, make_random
from delia.schema import Message, Task
from delia.starter.world import draw_item
from delia.store.models import ModelConfig, resolve_model
from delia.store.tasks import TaskConfig
from delia.synthesize import pipeline
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

MODEL = ModelConfig(path="package://delia.starter/weights")
SAMPLING = SamplingConfig(max_tokens=96)
ENGINE = EngineConfig(num_replicas=1, max_model_len=512)
# a tiny world's sentences share most of their words: at 0.95 few are near duplicates
CURATE = CurateConfig(near_duplicate_threshold=0.95)
LLM_OPTIONS = {"max_model_len": 512, "max_num_seqs": ENGINE.max_num_seqs, "dtype": "float32"}


@dataclass(frozen=True)
class Measured:
    """What one way of generating did."""

    name: str
    start_seconds: float
    seconds: float
    output_tokens: int

    @property
    def rate(self) -> float:
        """Return output tokens a second."""
        return self.output_tokens / self.seconds


def draw_questions(count: int) -> list[str]:
    """Return different questions of the starter's world."""
    rng = make_random("bench questions")
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw_item(rng).prompt()[-1]["content"]] = None
    return list(found)


@ray.remote(num_cpus=1)
def generate_bare(
    prompts: list[list[int]], end_ids: list[int], *, seeded: bool, size: int | None
) -> tuple[float, float, int]:
    """Return start-up seconds, seconds and output tokens of vLLM alone, in calls of `size` prompts."""
    started = time.monotonic()
    set_engine_environment(ENGINE)
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=str(resolve_model(MODEL)), enforce_eager=True, enable_chunked_prefill=False, **LLM_OPTIONS
    )
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=SAMPLING.max_tokens,
            seed=derive_seed("bench", place) if seeded else None,
            stop_token_ids=end_ids,
            detokenize=False,
        )
        for place in range(len(prompts))
    ]
    inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    ready, tokens = time.monotonic(), 0
    for start in range(0, len(inputs), size or len(inputs)):
        stop = start + (size or len(inputs))
        outputs = llm.generate(inputs[start:stop], params[start:stop], use_tqdm=False)
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
    return ready - started, time.monotonic() - ready, tokens


def measure_ray_data(prompts: list[list[int]], space: Workspace) -> Measured:
    """Run the processor of `ray.data.llm` on the same ids, one replica on one core.

    Its engine is asked in its own defaults: batches of 32, up to 8 at a time, and one seed a row.
    """
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=str(resolve_model(MODEL)),
        engine_kwargs={**LLM_OPTIONS, "enforce_eager": True, "enable_chunked_prefill": False},
        placement_group_config={"bundles": [{"CPU": 1}]},
        log_engine_metrics=False,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        concurrency=1,
        runtime_env={
            "env_vars": {
                **worker_environment(),
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
        },
    )
    ends = list(space.chat.end_ids)

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        sampling = {
            "temperature": 1.0,
            "max_tokens": SAMPLING.max_tokens,
            "seed": row["seed"],
            "stop_token_ids": ends,
        }
        return {
            "prompt": "",
            "tokenized_prompt": row["ids"],
            "sampling_params": {**sampling, "detokenize": False},
        }

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        return {"count": row["num_generated_tokens"], "at": time.monotonic()}

    processor = build_processor(config, preprocess=prepare, postprocess=keep)
    rows = [
        {"ids": ids, "seed": derive_seed("bench", place) % (1 << 31)} for place, ids in enumerate(prompts)
    ]
    started = time.monotonic()
    first, tokens = 0.0, 0
    for row in processor(ray.data.from_items(rows)).iter_rows():
        first = min(first or row["at"], row["at"])
        tokens += row["count"]
    # the engine's own start can't be seen from outside: start-up runs to the first answer
    return Measured("ray.data.llm", first - started, time.monotonic() - first, tokens)


def measure_bare(name: str, prompts: list[list[int]], space: Workspace, **options: Any) -> Measured:
    """Run `generate_bare` in a process of its own."""
    actor = generate_bare.options(runtime_env={"env_vars": worker_environment()})
    return Measured(name, *ray.get(actor.remote(prompts, list(space.chat.end_ids), **options)))


@dataclass(frozen=True)
class Timed:
    """A script that notes when each of its blocks began."""

    script: Script

    def __call__(self, block: pa.Table, ask: Ask) -> pa.Table:
        began = time.monotonic()  # one clock for all processes of a machine
        table = self.script(block, ask)
        return table.append_column("began", pa.array([began] * table.num_rows))


def give_source(questions: list[str], folder: Path) -> SourceConfig:
    """Return a source that is a file of questions; a third of them, at least, are accepted."""
    path = folder / "questions.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "-"}]}
        for text in questions
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return SourceConfig(name="given", rows=TaskConfig(path=str(path)), num_rows=len(questions) // 3)


def accept_questions(given: SourceConfig, space: Workspace) -> list[str]:
    """Return the questions that curation accepts, in order: what all are asked to answer."""
    config = PoolConfig(synthesize=SynthesizeConfig(sources=(given,)), curate=CURATE)
    rows = build_pool(config, space, engine=None, log=lambda metrics, step: None).rows
    return [row.instruction for row in rows]


def measure_pipeline(given: SourceConfig, space: Workspace) -> Measured:
    """Build a pool of answers to the accepted questions, with all rules on."""
    answers = SourceConfig(
        name="answers",
        synthesizer=MethodConfig(method="delia.methods.synthesizer.answering.Answering"),
        feeds_on=("given",),
        num_rows=given.num_rows,
        max_candidates=given.num_rows,
    )
    config = PoolConfig(
        synthesize=SynthesizeConfig(sources=(given, answers), sampling=SAMPLING), curate=CURATE
    )
    began: list[float] = []
    tokens = 0

    def run_timed(script: Script, *args: Any, **options: Any) -> Any:
        nonlocal tokens
        for table in run_script(Timed(script), *args, **options):
            began.append(table["began"][0].as_py())
            tokens += (
                sum(table["spent_output_tokens"].to_pylist()) + table.num_rows
            )  # end tokens, as the peers count
            yield table.drop_columns(["began"])

    pipeline.run_script, kept = run_timed, pipeline.run_script
    started = time.monotonic()
    try:
        # some answers are rejected, so that every candidate is generated and decided on before it ends
        build_pool(config, space, engine=ENGINE, log=lambda metrics, step: None)
    except PoolError as error:
        if "its candidates ran out" not in str(error):
            raise
    finally:
        pipeline.run_script = kept
    return Measured("pipeline", min(began) - started, time.monotonic() - min(began), tokens)


def measure_all(folder: Path, task: Task, *, num_prompts: int) -> list[Measured]:
    """Return every way of generating, on the same prompts, one after the other."""
    space = open_workspace(str(folder / "runs"), MODEL, task)
    given = give_source(draw_questions(3 * num_prompts), folder)
    prompts = [
        space.chat.encode_prompt((Message(role="user", content=text),))
        for text in accept_questions(given, space)
    ]
    return [
        measure_bare("bare, seeded", prompts, space, seeded=True, size=None),
        measure_pipeline(given, space),
        measure_bare("bare, no seeds", prompts, space, seeded=False, size=None),
        measure_bare("batches of 128", prompts, space, seeded=True, size=128),
        measure_ray_data(prompts, space),
    ]
