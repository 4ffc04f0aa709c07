"""What a worker will need of its device's memory, from the settings alone, before a model is loaded.

Per token and layer, what the backward pass of a Llama-like layer keeps (T tokens of a micro-batch, D hidden,
Q width of all query heads, K of all key heads, I of the feed-forward part, s bytes of a number):

    residual stream at two norms, in float32     2 D x 4
    queries, keys, values and what is attended   (2 Q + 2 K) x s
    gate, up and their product                   3 I x s
    input of each LoRA matrix                    its width x s, and of its dropout x 1 (x s on a CPU)
    where the base is trained: normalised states, and inputs of all linear layers   (4 D + Q + I) x s

A layer that is computed again keeps D x s instead. The backward pass needs `NUM_PASSING` layers' worth
beside: gradients, temporaries, and what is computed again. Held against the starter (`tests/train/test_memory.py`):
what is kept is estimated within a tenth; the growth of the resident set over one step of 8,192 and 16,384
tokens was 0.7 to 1.1 times the estimate.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from delia.model.adapted import Part
from delia.model.lora import ALL_LINEAR, find_targets
from delia.store.models import ModelConfig, Quantisation, resolve_model
from delia.train.building import TrainInput
from delia.train.head import CHUNK_BYTES
from delia.train.settings import TrainConfig

GIB = 1 << 30
OVERHEAD_BYTES = GIB
"""Libraries, the device's context, buffers of collectives, and what an allocator can't use."""
NUM_CHUNKS = 4
"""Arrays of a chunk of logits that exist at once."""
NUM_PASSING = 3
BYTES: dict[str, float] = {"int8": 1.0, "nf4": 0.57}
"""Of a number in a quantised linear layer; four bits, and a scale for each 64 of them."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that one worker needs.

    Attributes:
        loading: The whole base, which is read before it is sharded.
        parameters: The worker's shard of the base, and two layers gathered.
        trained: Trained parameters, their gradients and Adam's two moments in float32, sharded.
        kept: What the forward pass of the largest micro-batch keeps for the backward pass.
        passing: What comes and goes in the backward pass.
        logits: A chunk of them, and its gradients.
    """

    loading: int
    parameters: int
    trained: int
    kept: int
    passing: int
    logits: int

    @property
    def peak(self) -> int:
        """Return the most that exists at once."""
        training = self.parameters + self.trained + self.kept + self.passing + self.logits
        return OVERHEAD_BYTES + max(self.loading, training)


def estimate_memory(
    model: PretrainedConfig,
    config: TrainConfig,
    *,
    dtype: str,
    quantisation: Quantisation = "none",
    num_tokens: int = 0,
) -> MemoryEstimate:
    """Return what a worker needs to train a model of this form.

    Args:
        model: The base's own config; a model of its shapes is built without memory.
        config: How it is trained.
        dtype: The base's, by its torch name.
        quantisation: Of its linear layers.
        num_tokens: How many token rows are trained.
    """
    size, lora = getattr(torch, dtype).itemsize, config.lora
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(model)
    num_parameters = sum(parameter.numel() for parameter in shapes.parameters())
    num_linear = sum(module.weight.numel() for module in find_targets(shapes, ALL_LINEAR).values())
    base_bytes = (num_parameters - num_linear) * size + round(num_linear * (BYTES.get(quantisation) or size))
    num_layers = int(model.num_hidden_layers)
    num_embedded = shapes.get_input_embeddings().weight.numel()
    layer = (num_parameters - num_embedded) // num_layers
    targets = list(find_targets(shapes, lora.target_modules).values()) if lora else []
    num_inputs, num_outputs = sum(m.in_features for m in targets), sum(m.out_features for m in targets)
    magnitudes = num_outputs if lora and lora.use_dora else 0
    by_part: dict[Part, int] = {
        "token_rows": num_tokens * int(model.hidden_size),
        "lora": (lora.rank if lora else 0) * (num_inputs + num_outputs) + magnitudes,
        "base": num_parameters if config.trains_base else 0,
    }
    num_shards = config.shard_group or config.num_workers
    is_whole = num_shards == 1
    # a weight and its gradient, and two moments in each stage that moves it
    num_states = sum(
        by_part[part] * (2 + 2 * sum(part in s.parts for s in config.stages)) for part in by_part
    )
    batch_tokens = -(-config.global_batch_size * config.max_length // config.num_workers)
    micro_tokens = max(config.max_length, min(config.max_tokens_per_micro_batch, batch_tokens))
    dropped = (1 if config.use_gpu else size) if lora and lora.dropout else 0
    layer_bytes = _count_layer_bytes(model, size, is_trained=config.trains_base, length=config.max_length)
    layer_bytes += num_inputs // num_layers * (size + dropped)
    # DoRA keeps what its magnitudes scale: the change and, with dropout, the base's own output
    layer_bytes += magnitudes // num_layers * size * (3 if dropped else 2)
    kept = int(model.hidden_size) * size if config.gradient_checkpointing else layer_bytes
    device = "cuda" if config.use_gpu else "cpu"
    is_away = config.offload and config.use_gpu
    frozen = 0 if is_away or config.trains_base else base_bytes
    return MemoryEstimate(
        loading=base_bytes,
        parameters=frozen // num_shards + (0 if is_whole else 2 * layer * size),
        trained=0 if is_away else 4 * num_states // num_shards,
        kept=micro_tokens * num_layers * kept,
        passing=micro_tokens * NUM_PASSING * layer_bytes,
        logits=NUM_CHUNKS * max(CHUNK_BYTES[device], 16 * 4 * int(model.vocab_size)),
    )


def _count_layer_bytes(model: PretrainedConfig, size: int, *, is_trained: bool, length: int) -> int:
    """Return what autograd keeps of a layer for each token of a row of a length."""
    hidden, num_heads = int(model.hidden_size), int(model.num_attention_heads)
    width = int(getattr(model, "head_dim", None) or hidden // num_heads)
    num_keys = int(getattr(model, "num_key_value_heads", None) or num_heads)
    inner = int(getattr(model, "intermediate_size", None) or 4 * hidden)
    more = 4 * hidden + num_heads * width + inner if is_trained else 0
    is_capped = getattr(model, "attn_logit_softcapping", None) is not None
    # no kernel caps scores (`model.attention`): their tanh, float32 softmax and, in half precision, weights are kept
    scores = 8 * num_heads * length if is_capped else 0
    return scores + 2 * hidden * 4 + ((2 * num_heads + 2 * num_keys) * width + 3 * inner + more) * size


def read_device_bytes(config: TrainConfig, *, num_sharing: int) -> int | None:
    """Return the memory of this process's device; of the host, the part of one of `num_sharing` workers.

    None where training is to run on a GPU and there is none here.
    """
    if config.use_gpu:
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.is_file() else ""
    return min(total, int(limit) if limit.isdigit() else total) // num_sharing


def find_shortage(task: TrainInput, *, num_sharing: int) -> str:
    """Return why a task does not fit into this process's device, nothing where it does."""
    available = read_device_bytes(task.config, num_sharing=num_sharing)
    return describe_shortage(task.model, task.config, num_tokens=len(task.token_ids), available=available)


def describe_shortage(
    model: ModelConfig, config: TrainConfig, *, num_tokens: int = 0, available: int | None
) -> str:
    """Return what a training needs, what there is and the ways out; nothing where it fits.

    Args:
        model: The base.
        config: How it is trained.
        num_tokens: How many token rows are trained.
        available: Bytes that a worker has; None where nobody knows.
    """
    if available is None:
        return ""
    form = AutoConfig.from_pretrained(resolve_model(model), local_files_only=True)
    estimate = estimate_memory(
        form, config, dtype=model.dtype, quantisation=model.quantisation, num_tokens=num_tokens
    )
    if estimate.peak <= available:
        return ""
    parts = ", ".join(f"{name} {count / GIB:.1f}" for name, count in asdict(estimate).items())
    ways = [
        f"more than train.num_workers={config.num_workers}, on more machines",
        *([] if config.gradient_checkpointing else ["train.gradient_checkpointing=true"]),
        f"a train.max_tokens_per_micro_batch under {config.max_tokens_per_micro_batch}",
        *(["model.dtype=bfloat16"] if model.dtype == "float32" else []),
        *(["train.offload=true"] if config.use_gpu and not config.offload else []),
    ]
    return (
        f"training needs about {estimate.peak / GIB:.1f} GiB a worker ({parts}; {OVERHEAD_BYTES / GIB:.0f} beside"
        f" them), its device has {available / GIB:.1f}; set {', '.join(ways)}"
    )
