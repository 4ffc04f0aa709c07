"""vLLM in this process: the engine on CPU (its CPU build) and on GPU alike.

One in-process engine with the `uni` executor, or tensor parallel inside the node by setting. One thread
steps it; batches of several callers are in it at a time, so it has work while the last answers of a batch
come in. vLLM's own engine seed is 0, so requests without a seed would repeat each other on every
replica: each has one.
"""

import itertools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from delia.errors import EngineDiedError, EngineError
from delia.generate.engine import (
    ENGINE_FAULT,
    Completion,
    EngineConfig,
    Request,
    SamplingConfig,
    apply_overrides,
    refuse_long,
)
from delia.store.adapters import check_servable, fetch_adapter
from delia.store.forms import fit_rank
from delia.store.models import ModelConfig, resolve_model
from delia.store.serving import read_architecture

logger = logging.getLogger(__name__)


def set_engine_environment(config: EngineConfig) -> None:
    """Set what vLLM reads at import: in-process engine, no telemetry, free thread placement on CPU."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if config.tensor_parallel_size > 1 else "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    if config.num_gpus_per_replica == 0:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.cpu_kv_cache_gib)
        # `auto` pins every replica of a machine to the same core
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def engine_options(config: EngineConfig) -> dict[str, Any]:
    """Return what vLLM is started with, beside the model."""
    on_gpu = config.num_gpus_per_replica > 0
    options: dict[str, Any] = {
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "gpu_memory_utilization": config.gpu_memory_utilization if on_gpu else 0.9,
        "enforce_eager": not on_gpu,
        "disable_log_stats": True,
        # vLLM 0.32 rewinds the generator of a seeded request after a partial prefill, which a CPU
        # generator can't do: on CPU prompts are prefilled whole
        "enable_chunked_prefill": on_gpu,
        # white space between the parts of a JSON answer has no end: a small model fills its limit with it
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if config.tensor_parallel_size > 1:
        # inside a placement group vLLM would take Ray's executor, and ask for GPUs that this replica holds
        options["distributed_executor_backend"] = "mp"
    if config.lora_rank is not None:
        options |= {
            "enable_lora": True,
            "max_loras": config.max_loras,
            "max_lora_rank": fit_rank(config.lora_rank),
        }
    return options


@lru_cache
def check_schema(schema: str) -> None:
    """Refuse a JSON schema of which no grammar can be made: vLLM finds out as it steps, and dies.

    Raises:
        EngineError: With the reason.
    """
    import xgrammar

    try:
        xgrammar.Grammar.from_json_schema(schema)
    except RuntimeError as error:
        raise EngineError(
            f"json_schema {schema[:200]!r} makes no grammar: {error}; mend the schema"
        ) from error


class VllmEngine:
    """One vLLM engine; see `delia.generate.engine.Engine`."""

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        """Load the model; 3-9 s in process for a small one."""
        set_engine_environment(config)
        import vllm

        path = resolve_model(model)
        self._architecture = read_architecture(path)
        self._adapter_ids: dict[str, int] = {}
        self._adapters_lock = threading.Lock()
        self._max_model_len = config.max_model_len
        self._numbers = itertools.count()
        self._inbox: SimpleQueue[_Batch] = SimpleQueue()
        self._llm = vllm.LLM(
            model=str(path),
            dtype=model.dtype,  # type: ignore[arg-type]  # checked by vLLM itself
            **engine_options(config),
        )
        threading.Thread(target=self._serve, name="vllm", daemon=True).start()

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, end_ids: Sequence[int]
    ) -> list[Completion]:
        """Return one completion a request, in order; what vLLM would die of is refused before it sees it."""
        for schema in {request.json_schema for request in requests} - {""}:
            check_schema(schema)
        batch = _Batch(
            requests=tuple(requests),
            sampling=sampling,
            end_ids=tuple(end_ids),
            loras=[self._lora_request(request.adapter) for request in requests],
        )
        self._inbox.put(batch)
        return batch.result.result()

    def _serve(self) -> None:
        """Add what has come, step, hand out what is finished; the only thread that touches the engine."""
        engine = self._llm.llm_engine
        waiting: dict[str, tuple[_Batch, int]] = {}
        open_batches: list[_Batch] = []
        try:
            while True:
                while not self._inbox.empty() or not waiting:
                    batch = self._inbox.get()
                    open_batches.append(batch)
                    waiting |= {number: (batch, place) for number, place in self._submit(batch)}
                    batch.settle()
                for output in engine.step():
                    batch, place = waiting.pop(output.request_id)
                    batch.answer(place, output)
                open_batches = [batch for batch in open_batches if not batch.settle()]
        except Exception as error:  # an engine that failed once is not to be trusted again
            logger.exception("vLLM failed")
            failure = EngineDiedError(f"vLLM failed: {error!r}")
            for batch in open_batches:
                if not batch.result.done():
                    batch.result.set_exception(failure)
            while True:
                self._inbox.get().result.set_exception(failure)

    def _submit(self, batch: "_Batch") -> Iterator[tuple[str, int]]:
        """Add a batch's requests; yield the engine's name and the place of each that has room."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt

        for place, request in enumerate(batch.requests):
            if len(request.prompt_ids) >= self._max_model_len:
                batch.completions[place] = refuse_long(request, self._max_model_len)
                continue
            number = str(next(self._numbers))
            try:
                self._llm.llm_engine.add_request(
                    number,
                    TokensPrompt(prompt_token_ids=list(request.prompt_ids)),
                    _to_params(request, batch.sampling, batch.end_ids),
                    lora_request=batch.loras[place],
                )
            except (ValueError, VLLMValidationError) as error:  # of this request; the engine is whole
                batch.completions[place] = Completion(
                    request_id=request.request_id,
                    token_ids=(),
                    finish_reason=ENGINE_FAULT,
                    num_prompt_tokens=len(request.prompt_ids),
                    error=str(error),
                )
                continue
            yield number, place

    def _lora_request(self, address: str):  # type: ignore[no-untyped-def]  # vLLM's type, imported late
        if not address:
            return None
        from vllm.lora.request import LoRARequest

        with self._adapters_lock:  # two callers must not give one number to two adapters
            if address not in self._adapter_ids:
                # an adapter that vLLM refuses kills the whole engine, so it is checked before
                check_servable(fetch_adapter(address), self._architecture)
                self._adapter_ids[address] = len(self._adapter_ids) + 1
            number = self._adapter_ids[address]
        return LoRARequest(f"adapter-{number}", number, str(Path(fetch_adapter(address))))


class _Batch:
    """What one caller asked for; settled once every place is filled."""

    def __init__(
        self,
        *,
        requests: tuple[Request, ...],
        sampling: SamplingConfig,
        end_ids: tuple[int, ...],
        loras: list[Any],
    ) -> None:
        self.requests, self.sampling, self.end_ids, self.loras = requests, sampling, end_ids, loras
        self.completions: list[Completion | None] = [None] * len(requests)
        self.result: Future[list[Completion]] = Future()

    def answer(self, place: int, output) -> None:  # type: ignore[no-untyped-def]  # vLLM's type, imported late
        self.completions[place] = _to_completion(self.requests[place], output.outputs[0])

    def settle(self) -> bool:
        if not self.result.done() and None not in self.completions:
            self.result.set_result([item for item in self.completions if item is not None])
        return self.result.done()


def _to_params(request: Request, stage: SamplingConfig, end_ids: Sequence[int]):  # type: ignore[no-untyped-def]
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    sampling = apply_overrides(stage, request)
    schema = request.json_schema
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=request.seed if sampling.temperature > 0 else None,
        stop_token_ids=[*end_ids, *request.end_ids],
        detokenize=False,
        logprobs=0 if sampling.temperature == 0 else None,  # 0 more than the chosen token's own
        structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # no other request has it, and vLLM's deep copy costs more than adding the request
    )


def _to_completion(request: Request, output) -> Completion:  # type: ignore[no-untyped-def]
    ids = tuple(output.token_ids)
    if (
        output.finish_reason == "stop"
    ):  # at its last token, which may be an end that the model's own files name
        ids = ids[:-1]
    places = zip(ids, output.logprobs or (), strict=False)  # the end token's place is left over
    return Completion(
        request_id=request.request_id,
        token_ids=ids,
        finish_reason=str(output.finish_reason),
        num_prompt_tokens=len(request.prompt_ids),
        logprobs=tuple(place[token].logprob for token, place in places),
    )
