"""The interface of an inference engine: token ids in, token ids out, a seed for each request.

An engine is a class with `generate`; `EngineConfig.kind` names it. Text never crosses this line,
so a prompt can't be tokenised twice (and get two BOS).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from delia.config import FrozenConfig
from delia.store.models import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt. `adapter` is the address of an adapter directory, or empty for the base model."""

    request_id: str
    prompt_ids: tuple[int, ...]
    seed: int = 0
    adapter: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer; `finish_reason` is `stop` or `length`; the end token is not in `token_ids`.

    `logprobs` run parallel to `token_ids`, in nats, for greedy requests; sampled ones have none.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int = 0
    logprobs: tuple[float, ...] = ()


class SamplingConfig(FrozenConfig):
    """How tokens are drawn. Temperature 0 is greedy and ignores the seed."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256


class EngineConfig(FrozenConfig):
    """Which engine runs on how many replicas, and what one replica takes.

    `lora_rank` is the largest rank that requests may bring, None where none has an adapter.
    """

    kind: Literal["vllm", "scripted"] = "vllm"
    num_replicas: int = 1
    num_cpus_per_replica: float = 1.0
    num_gpus_per_replica: float = 0.0
    tensor_parallel_size: int = 1
    max_model_len: int = 512
    max_num_seqs: int = 256
    batch_size: int = 256
    lora_rank: int | None = None
    max_loras: int = 4
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: int = 1


class Engine(Protocol):
    """Anything that answers requests in their order."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, end_ids: Sequence[int]
    ) -> list[Completion]:
        """Return one completion a request, in order."""
        ...


def build_engine(model: ModelConfig, config: EngineConfig) -> Engine:
    """Start the engine that the settings name, with the model in it."""
    if config.kind == "scripted":
        from delia.generate.scripted import ScriptedEngine

        return ScriptedEngine(model, config)
    from delia.generate.vllm_engine import VllmEngine  # late: vLLM takes 8 s to import

    return VllmEngine(model, config)
