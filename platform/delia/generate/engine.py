"""The interface of an inference engine: token ids in, token ids out, a seed for each request.

An engine is a class with `generate`; `EngineConfig.kind` names it. Text never crosses this line,
so a prompt can't be tokenised twice (and get two BOS).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from pydantic import Field, model_validator

from delia.config import FrozenConfig
from delia.store.models import ModelConfig

PROMPT_TOO_LONG = "prompt_too_long"
ENGINE_FAULT = "engine_fault"
FAULTS = frozenset((PROMPT_TOO_LONG, ENGINE_FAULT))
"""Why a request was not answered: no room in the context, or the engine died of it again and again."""

RESERVED_RESOURCES = frozenset(("CPU", "GPU", "memory", "object_store_memory"))
"""Resources of a node that are no custom ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt.

    `adapter` is the address of an adapter directory, or empty for the base model. `temperature` and
    `max_tokens` take the place of the stage's sampling for this request; `end_ids` end its answer beside the
    stage's. With `json_schema`, a JSON schema as text, the engine's grammar admits no other answer; one that
    is cut may still be unfinished.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    seed: int = 0
    adapter: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    json_schema: str = ""
    end_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One answer; `finish_reason` is `stop` or `length`; the end token is not in `token_ids`.

    A request that was not answered has `finish_reason` in `FAULTS`, no tokens, and `error` says why.
    `logprobs` run parallel to `token_ids`, in nats, for greedy requests; sampled ones have none.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int = 0
    logprobs: tuple[float, ...] = ()
    error: str = ""


class SamplingConfig(FrozenConfig):
    """How tokens are drawn. Temperature 0 is greedy and ignores the seed."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=256, gt=0)


class ScriptedConfig(FrozenConfig):
    """How the scripted engine misbehaves, for fault tests.

    It ends its process at a prompt that holds `fatal_id`, and takes `seconds_per_request`.
    """

    fatal_id: int | None = None
    seconds_per_request: float = 0.0


class EngineConfig(FrozenConfig):
    """Which engine runs on how many replicas, and what one replica takes.

    `max_concurrent_batches` of `batch_size` requests are in one engine at a time, so that it has work
    while the last answers of a batch come in. `lora_rank` is the largest rank that requests may bring,
    None where none has an adapter. A model lies on all GPUs of its replica: `tensor_parallel_size` is their
    number; without GPUs each shard is a process that needs a CPU. `max_quarantined` requests may be given up
    because the engine dies of them; one more ends the job. `resources_per_replica` are custom resources of Ray's
    that a replica takes of its node, so that it sits on nodes that have them; every node with a GPU of a known
    type has one of `accelerator_type:TYPE`. Where no node is large enough for a replica, `node_wait_seconds` are
    left for one to join.
    """

    kind: Literal["vllm", "scripted"] = "vllm"
    num_replicas: int = 1
    num_cpus_per_replica: float = 1.0
    num_gpus_per_replica: float = 0.0
    resources_per_replica: dict[str, float] = {}
    tensor_parallel_size: int = Field(default=1, gt=0)
    max_model_len: int = 512
    max_num_seqs: int = 256
    batch_size: int = 256
    max_concurrent_batches: int = Field(default=8, gt=0)
    max_quarantined: int = Field(default=16, ge=0)
    node_wait_seconds: float = Field(default=600.0, ge=0.0)
    lora_rank: int | None = None
    max_loras: int = 4
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: int = 1
    scripted: ScriptedConfig = ScriptedConfig()

    @property
    def num_devices(self) -> float:
        """Return the GPUs of a replica, or its CPUs where it has none."""
        return self.num_gpus_per_replica or self.num_cpus_per_replica

    @model_validator(mode="after")
    def _give_each_shard_a_device(self) -> Self:
        size, num_gpus = self.tensor_parallel_size, self.num_gpus_per_replica
        if num_gpus > 0 and size != max(1.0, num_gpus):
            raise ValueError(
                f"tensor_parallel_size is the number of a replica's GPUs, 1 on a part of one; it is {size} with"
                f" num_gpus_per_replica={num_gpus:g}; change one of the two"
            )
        if num_gpus == 0 and size > max(1.0, self.num_cpus_per_replica):
            raise ValueError(
                "without GPUs each of tensor_parallel_size processes needs a CPU of the replica; it is"
                f" {size} with num_cpus_per_replica={self.num_cpus_per_replica:g}; raise num_cpus_per_replica, set"
                f" num_gpus_per_replica={size}, or take tensor_parallel_size=1"
            )
        return self

    @model_validator(mode="after")
    def _ask_for_what_there_may_be(self) -> Self:
        for name, amount in self.resources_per_replica.items():
            if name in RESERVED_RESOURCES:
                raise ValueError(
                    f"resources_per_replica={self.resources_per_replica} names {name}, which Ray counts itself; set"
                    " num_cpus_per_replica or num_gpus_per_replica, and name custom resources of nodes alone here"
                )
            if amount <= 0 or (amount > 1 and amount != int(amount)):
                raise ValueError(
                    f"resources_per_replica[{name}] is a part of one or a whole number, got {amount:g}; take 0.001 to"
                    " choose nodes and leave room for others, or leave it out"
                )
        return self


class Engine(Protocol):
    """Anything that answers requests in their order; several threads may ask at a time."""

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, *, end_ids: Sequence[int]
    ) -> list[Completion]:
        """Return one completion a request, in order."""
        ...


def apply_overrides(sampling: SamplingConfig, request: Request) -> SamplingConfig:
    """Return the stage's sampling with what the request says instead."""
    own = {"temperature": request.temperature, "max_tokens": request.max_tokens}
    return sampling.model_copy(update={name: value for name, value in own.items() if value is not None})


def refuse_long(request: Request, max_model_len: int) -> Completion:
    """Return the completion of a prompt that leaves no room for an answer."""
    num_ids = len(request.prompt_ids)
    return Completion(
        request_id=request.request_id,
        token_ids=(),
        finish_reason=PROMPT_TOO_LONG,
        num_prompt_tokens=num_ids,
        error=f"the prompt has {num_ids} ids, engine.max_model_len={max_model_len} leaves no room",
    )


def build_engine(model: ModelConfig, config: EngineConfig) -> Engine:
    """Start the engine that the settings name, with the model in it."""
    if config.kind == "scripted":
        from delia.generate.scripted import ScriptedEngine

        return ScriptedEngine(model, config)
    from delia.generate.vllm_engine import VllmEngine  # late: vLLM takes 8 s to import

    return VllmEngine(model, config)
