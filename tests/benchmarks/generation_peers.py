"""Other ways to have the same prompts answered, one core an engine: bare vLLM, `ray.data.llm`, datatrove.

Each takes the prompts' ids and gives `Answers`. Seconds run from the first request that an engine takes, or
where that can't be seen from outside from the first answer, to the last answer.
"""

import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ray
from generation_setting import ENGINE, LLM_OPTIONS, MODEL, SAMPLING, Answers

from delia.flow.workspace import Workspace
from delia.generate.pipeline import worker_environment
from delia.generate.vllm_engine import set_engine_environment
from delia.rng import derive_seed
from delia.store.models import resolve_model

Prompts = list[list[int]]
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""For engines that start in processes of their own."""


def seed_row(place: int) -> int:
    """Return the seed of a prompt."""
    return derive_seed("bench", place)


# ---- bare vLLM


@ray.remote(num_cpus=1, max_calls=1)  # a process that imported vLLM before would start sooner
def generate_bare(
    prompts: Prompts, end_ids: list[int], *, seeded: bool, size: int | None
) -> tuple[float, float, list[list[int]], list[str]]:
    """Return start-up seconds, seconds, ids and finish reasons of vLLM alone, in calls of `size` prompts."""
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
            seed=seed_row(place) if seeded else None,
            stop_token_ids=end_ids,
            detokenize=False,
        )
        for place in range(len(prompts))
    ]
    inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    ready = time.monotonic()
    answers = []
    for start in range(0, len(inputs), size or len(inputs)):
        stop = start + (size or len(inputs))
        outputs = llm.generate(inputs[start:stop], params[start:stop], use_tqdm=False)
        answers += [output.outputs[0] for output in outputs]
    seconds = time.monotonic() - ready
    return (
        ready - started,
        seconds,
        [list(item.token_ids) for item in answers],
        [str(item.finish_reason) for item in answers],
    )


def ask_bare(prompts: Prompts, space: Workspace, *, seeded: bool = True, size: int | None = None) -> Answers:
    """Run `generate_bare` in a process of its own."""
    actor = generate_bare.options(runtime_env={"env_vars": worker_environment()})
    start_seconds, seconds, ids, reasons = ray.get(
        actor.remote(prompts, list(space.chat.end_ids), seeded=seeded, size=size)
    )
    return to_answers(start_seconds, seconds, ids, reasons, space)


def time_halves(prompts: Prompts, space: Workspace) -> list[float]:
    """Return the seconds of two bare engines side by side, each with every second prompt."""
    actor = generate_bare.options(runtime_env={"env_vars": worker_environment()})
    ends = list(space.chat.end_ids)
    runs = [actor.remote(prompts[first::2], ends, seeded=True, size=None) for first in range(2)]
    return [seconds for _, seconds, *_ in ray.get(runs)]


def to_answers(
    start_seconds: float, seconds: float, ids: Prompts, reasons: list[str], space: Workspace
) -> Answers:
    """Decode ids, after the clock has stopped."""
    ends = frozenset(space.chat.end_ids)
    texts = [space.chat.decode(tuple(item[:-1] if item and item[-1] in ends else item)) for item in ids]
    return Answers(start_seconds, seconds, sum(map(len, ids)), texts, reasons)


# ---- ray.data.llm


def ask_ray_data(prompts: Prompts, space: Workspace) -> Answers:
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
        runtime_env={"env_vars": worker_environment() | CPU_ENVIRONMENT},
    )
    ends = list(space.chat.end_ids)

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        sampling = {
            "temperature": 1.0,
            "max_tokens": SAMPLING.max_tokens,
            "seed": row["seed"],
            "stop_token_ids": ends,
            "detokenize": False,
        }
        return {
            "place": row["place"],
            "prompt": "",
            "tokenized_prompt": row["ids"],
            "sampling_params": sampling,
        }

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        return {"place": row["place"], "ids": row["generated_tokens"], "at": time.monotonic()}

    processor = build_processor(config, preprocess=prepare, postprocess=keep)
    rows = [
        {"place": place, "ids": ids, "seed": seed_row(place) % (1 << 31)} for place, ids in enumerate(prompts)
    ]
    started = time.monotonic()
    found: list[list[int]] = [[] for _ in prompts]
    first = 0.0
    for row in processor(ray.data.from_items(rows)).iter_rows():
        first = min(first or row["at"], row["at"])
        found[row["place"]] = list(row["ids"])
    # the engine's own start can't be seen from outside: start-up runs to the first answer
    seconds = time.monotonic() - first
    reasons = ["stop" if len(ids) < SAMPLING.max_tokens else "length" for ids in found]
    return to_answers(first - started, seconds, found, reasons, space)


# ---- datatrove


def name_vllm(folder: Path) -> None:
    """Give the CPU build's distribution, `vllm-cpu`, its usual name: the runner and `vllm serve` ask for that."""
    try:
        version("vllm")
    except PackageNotFoundError:
        number = f"{version('vllm-cpu')}+cpu"
        named = folder / f"vllm-{number}.dist-info"
        named.mkdir(parents=True)
        (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
        sys.path.append(str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))


@ray.remote(num_cpus=1, max_calls=1)  # a process that imported vLLM before would start sooner
def generate_datatrove(
    prompts: Prompts, end_ids: list[int], folder: str
) -> tuple[float, float, list[tuple[int, int, str, str]]]:
    """Return start-up seconds, seconds, and place, tokens, text and finish reason of each answer.

    Its runner starts `vllm serve` and asks it over HTTP, up to 500 requests at a time (its default).
    """
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["VLLM_COMPILE_LOCK_DIR"] = folder  # else it leaves locks in the home directory
    from datatrove.data import Document
    from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
    from datatrove.pipeline.writers import JsonlWriter

    name_vllm(Path(folder))
    config = InferenceConfig(
        server_type="vllm",
        model_name_or_path=str(resolve_model(MODEL)),
        model_max_context=LLM_OPTIONS["max_model_len"],
        use_chat=False,
        default_generation_params={
            "temperature": 1.0,
            "max_tokens": SAMPLING.max_tokens,
            "stop_token_ids": end_ids,
        },
        model_kwargs={
            "host": "127.0.0.1",
            "dtype": LLM_OPTIONS["dtype"],
            "max-num-seqs": LLM_OPTIONS["max_num_seqs"],
            "enforce-eager": True,
            "enable-chunked-prefill": False,
            "generation-config": "vllm",
            "disable-log-stats": True,
        },
        server_ready_delay_sec=1.0,
    )
    found: list[tuple[int, int, str, str]] = []
    stamps: list[float] = []

    async def ask(document: Any, generate: Any) -> Any:
        place = int(document.id)
        result = await generate({"prompt": prompts[place], "seed": seed_row(place)})
        stamps.append(time.monotonic())
        found.append((place, result.usage["completion_tokens"], result.text, result.finish_reason))
        return result

    documents = [Document(text="-", id=str(place)) for place in range(len(prompts))]
    started = time.monotonic()
    InferenceRunner(ask, config, JsonlWriter(folder, compression=None)).run(documents)
    # start-up runs to the first answer, as for `ray.data.llm`
    return stamps[0] - started, stamps[-1] - stamps[0], found


def ask_datatrove(prompts: Prompts, space: Workspace, folder: Path) -> Answers:
    """Run `generate_datatrove` in a process of its own; its answers are text already, after a space."""
    actor = generate_datatrove.options(runtime_env={"env_vars": worker_environment() | CPU_ENVIRONMENT})
    start_seconds, seconds, found = ray.get(actor.remote(prompts, list(space.chat.end_ids), str(folder)))
    found.sort()
    texts, reasons = [item[2].strip() for item in found], [item[3] for item in found]
    return Answers(start_seconds, seconds, sum(item[1] for item in found), texts, reasons)
