"""vLLM in this process: the engine on CPU (its CPU build) and on GPU alike.

One in-process engine with the `uni` executor, or tensor parallel inside the node by setting. vLLM's
own engine seed is 0, so requests without a seed would repeat each other on every replica: each has one.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delia.errors import EngineError
from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig
from delia.store.adapters import check_servable, fetch_adapter
from delia.store.models import ModelConfig, resolve_model

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM 0.32 accepts as `max_lora_rank`."""


def set_engine_environment(config: EngineConfig) -> None:
    """Set what vLLM reads at import: in-process engine, no telemetry, free thread placement on CPU."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if config.tensor_parallel_size > 1 else "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    if config.num_gpus_per_replica == 0:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.cpu_kv_cache_gib)
        # `auto` pins every replica of a machine to the same core
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def _served_rank(rank: int) -> int:
    allowed = [size for size in VLLM_RANKS if size >= rank]
    if not allowed:
        raise EngineError(
            f"LoRA rank {rank} is over vLLM's largest, {VLLM_RANKS[-1]}; merge the adapter first"
        )
    return allowed[0]


class VllmEngine:
    """One vLLM engine; see `delia.generate.engine.Engine`."""

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        """Load the model; 3-9 s in process for a small one."""
        set_engine_environment(config)
        import vllm

        self._adapter_ids: dict[str, int] = {}
        lora: dict[str, Any] = {}
        if config.lora_rank is not None:
            lora = {
                "enable_lora": True,
                "max_loras": config.max_loras,
                "max_lora_rank": _served_rank(config.lora_rank),
            }
        on_gpu = config.num_gpus_per_replica > 0
        self._llm = vllm.LLM(
            model=str(resolve_model(model)),
            dtype=model.dtype,  # type: ignore[arg-type]  # checked by vLLM itself
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization if on_gpu else 0.9,
            enforce_eager=not on_gpu,
            disable_log_stats=True,
            # vLLM 0.32 rewinds the generator of a seeded request after a partial prefill, which a CPU
            # generator can't do: on CPU prompts are prefilled whole
            enable_chunked_prefill=on_gpu,
            **lora,
        )

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, end_ids: Sequence[int]
    ) -> list[Completion]:
        """Return one completion a request, in order."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=list(request.prompt_ids)) for request in requests]
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=request.seed if sampling.temperature > 0 else None,
                stop_token_ids=list(end_ids),
                detokenize=False,
                logprobs=0 if sampling.temperature == 0 else None,  # 0 more than the chosen token's own
            )
            for request in requests
        ]
        adapters = [self._lora_request(request.adapter) for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        return [
            _to_completion(request, output.outputs[0], end_ids=frozenset(end_ids))
            for request, output in zip(requests, outputs, strict=True)
        ]

    def _lora_request(self, address: str):  # type: ignore[no-untyped-def]  # vLLM's type, imported late
        if not address:
            return None
        from vllm.lora.request import LoRARequest

        if address not in self._adapter_ids:
            # an adapter that vLLM refuses kills the whole engine, so it is checked before
            check_servable(fetch_adapter(address))
            self._adapter_ids[address] = len(self._adapter_ids) + 1
        number = self._adapter_ids[address]
        return LoRARequest(f"adapter-{number}", number, str(Path(fetch_adapter(address))))


def _to_completion(request: Request, output, *, end_ids: frozenset[int]) -> Completion:  # type: ignore[no-untyped-def]
    ids = tuple(output.token_ids)
    if ids and ids[-1] in end_ids:
        ids = ids[:-1]
    places = zip(ids, output.logprobs or (), strict=False)  # the end token's place is left over
    return Completion(
        request_id=request.request_id,
        token_ids=ids,
        finish_reason=str(output.finish_reason),
        num_prompt_tokens=len(request.prompt_ids),
        logprobs=tuple(place[token].logprob for token, place in places),
    )
