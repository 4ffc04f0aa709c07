"""LoRA layers on a base: which modules, which variant, and where their matrices start.

    base + settings + seed (+ task rows) -> PEFT's layers, in place; the output is still the base's

    default           A random, B zero: Hu et al. 2021, arXiv 2106.09685
    pissa             the weight's largest singular vectors: Meng et al. 2024, arXiv 2404.02948
    pissa_niter_16    the same by a randomised decomposition of 16 iterations, for large weights
    olora             the first columns of the weight's QR decomposition: Büyükakyüz 2024, arXiv 2406.01775
    corda             singular vectors of weight x covariance of its inputs: Yang et al. 2024, arXiv 2406.05223
    eva               A from the principal directions of the inputs, B zero: Paischer et al. 2024, arXiv 2410.07170
    loftq             what quantising to four bits lost, W - Q: Li et al. 2023, arXiv 2310.08659

All but the last are PEFT's own. PiSSA, OLoRA and CorDA take their start out of the base: W' = W - s B0 A0. What is
trained over W' is plain LoRA of twice the rank over W, [B, -B0] [A; A0], so A0 and B0 stay with the layer
as buffers. Neither shards nor checkpoints hold these: each start of a run makes them anew from the same
seed, base and rows. EVA differs from its paper: no module gives rank to another.

LoftQ starts over W' = Q, which quantising has made, so that Q + s B0 A0 is the nearest to W that the rank allows
(one step of the paper's alternation, as PEFT's `replace_lora_weights_loftq` does it, which leaves out s). It is
exported alike: what training changed, s (B A - B0 A0), over W. That is what was trained but for
W - Q - s B0 A0, which no rank could hold; over a quantised base without LoftQ all of W - Q is missing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from peft import EvaConfig, get_eva_state_dict, inject_adapter_in_model
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.integrations import dequantize_bnb_weight
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from delia.config import FrozenConfig
from delia.errors import ConfigError

LoraInit = Literal["default", "pissa", "pissa_niter_16", "olora", "corda", "eva", "loftq"]
ALL_LINEAR = "all-linear"
ADAPTER_NAME = "default"
MOVES_BASE: frozenset[LoraInit] = frozenset({"pissa", "pissa_niter_16", "olora", "corda"})
"""The starts that are taken out of the base's weight."""
STARTS_ELSEWHERE: frozenset[LoraInit] = MOVES_BASE | {"loftq"}
"""The starts over another weight than the base's, to which the export goes back."""
READS_ROWS: frozenset[LoraInit] = frozenset({"corda", "eva"})
"""The starts that read the task's rows."""
MAX_ROWS = 256
"""Rows that are read at most; CorDA's authors found as many to do at a width of 4096."""
EVA_BATCH_TOKENS = 2048
"""The least tokens of one step of EVA's incremental decomposition, where the rows have as many."""


class LoraConfig(FrozenConfig):
    """Low-rank adaptation of linear layers.

    `target_modules` are suffixes of module names, or "all-linear": every linear layer but the output
    head. `use_dora` also trains each output's magnitude (Liu et al. 2024, arXiv 2402.09353), `use_rslora`
    scales by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732), `init` says where A and B start.
    """

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "k_proj", "v_proj", "o_proj")
    use_dora: bool = False
    use_rslora: bool = False
    init: LoraInit = "default"

    @property
    def scaling(self) -> float:
        """Return the factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def inject_lora(
    model: PreTrainedModel,
    lora: LoraConfig,
    *,
    seed: int,
    task_rows: Sequence[Sequence[int]] = (),
    whole: PreTrainedModel | None = None,
) -> None:
    """Put LoRA layers on a base, in place.

    Args:
        model: The base, whole on this worker.
        lora: The settings.
        seed: All that a random start depends on.
        task_rows: Token ids of the task's rows, read by the starts corda and eva.
        whole: The base before it was quantised, read by the start loftq.

    Raises:
        ConfigError: A target that is no linear layer of the model or its head, a rank that a target has no
            room for, or a start without rows.
    """
    targets = find_targets(model, lora.target_modules)
    rows = [list(row) for row in task_rows[:MAX_ROWS]]
    check_start(lora, targets, rows)
    init: Any = True if lora.init in ("default", "loftq") else lora.init
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        init_lora_weights=init,
        # PEFT's standard rho, 2, lets modules give each other rank
        eva_config=EvaConfig(rho=1.0) if lora.init == "eva" else None,
        corda_config=CordaConfig(corda_method="ipm") if lora.init == "corda" else None,
    )
    torch.manual_seed(seed)
    try:
        directions = _read_rows(model, config, rows)
        inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        raise ConfigError(f"train.lora ({lora}): {error}") from error
    for name, direction_RI in directions.items():
        layer: Any = model.get_submodule(name)
        layer.lora_A[ADAPTER_NAME].weight.data.copy_(direction_RI)
    if lora.init == "loftq":
        assert whole is not None  # `check_quantisation` has seen a quantised base
        _fit_loss(model, whole, lora)
    if lora.init != "default":
        _settle_start(model, moves_base=lora.init in MOVES_BASE, keeps_start=lora.init in STARTS_ELSEWHERE)


def find_targets(model: PreTrainedModel, targets: tuple[str, ...] | str) -> dict[str, nn.Linear]:
    """Return the linear layers that are adapted, by name.

    Raises:
        ConfigError: A suffix that no linear layer has (PEFT adapts the others and says nothing), or the
            output head's.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    if targets == ALL_LINEAR:
        return {name: module for name, module in linear.items() if module is not head}
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if missing:
        raise ConfigError(
            f"train.lora.target_modules {missing}: no linear layer of {type(model).__name__} has such a name;"
            f" it has {sorted({name.rpartition('.')[2] for name in linear})}"
        )
    suffixes = tuple(f".{target}" for target in targets)
    chosen = {name: module for name, module in linear.items() if f".{name}".endswith(suffixes)}
    heads = [name for name, module in chosen.items() if module is head]
    if heads:
        raise ConfigError(
            f"train.lora.target_modules: {heads} is the output head, which stays as it is: a trained token is read"
            " and never written; leave it out"
        )
    return chosen


def check_start(
    lora: LoraConfig, targets: Mapping[str, nn.Linear], task_rows: Sequence[Sequence[int]]
) -> None:
    """Refuse a start that PEFT would answer with matrices of another rank or, EVA's, with an endless loop.

    Raises:
        ConfigError: With the numbers.
    """
    num_tokens = sum(map(len, task_rows))
    least = {"corda": 1, "eva": 2 * lora.rank}.get(lora.init, 0)
    if num_tokens < least:
        raise ConfigError(
            f"train.lora.init={lora.init} at rank {lora.rank} starts from {least} or more tokens of the task's"
            f" rows, there are {num_tokens}; lower train.lora.rank, or take another init"
        )
    if lora.init == "default":
        return
    for name, module in targets.items():
        # EVA's randomised decomposition works on twice as many directions as it keeps
        room = module.in_features // 2 if lora.init == "eva" else min(module.in_features, module.out_features)
        if lora.rank > room:
            raise ConfigError(
                f"train.lora.rank={lora.rank}: {name} ({module.in_features} -> {module.out_features}) has room"
                f" for {room} at train.lora.init={lora.init}; lower the rank, or leave the module out"
            )


def _read_rows(
    model: PreTrainedModel, config: PeftLoraConfig, rows: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Run the base over the rows; return EVA's A by module, and leave CorDA's vectors on the modules."""
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, run_model=lambda: _run(model, rows))
    if config.init_lora_weights != "eva":
        return {}
    # every worker reads the same rows: there is nothing to gather
    directions: dict[str, Tensor] = get_eva_state_dict(
        model,
        _batch_rows(rows, least=2 * config.r),
        config,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    return directions


@torch.no_grad()
def _run(model: PreTrainedModel, rows: Iterable[Sequence[int]]) -> None:
    """Pass rows through the model one by one: PEFT's covariance knows no padding."""
    for row in rows:
        model(input_ids=torch.tensor([row], device=model.device))


def _batch_rows(rows: Sequence[Sequence[int]], *, least: int) -> list[dict[str, Tensor]]:
    """Return padded batches in the rows' order, none with fewer tokens than `least`."""
    batches: list[list[Tensor]] = [[]]
    for row in rows:
        if sum(map(len, batches[-1])) >= max(least, EVA_BATCH_TOKENS):
            batches.append([])
        batches[-1].append(torch.tensor(row))
    if len(batches) > 1 and sum(map(len, batches[-1])) < least:
        batches[-2] += batches.pop()
    return [
        {
            "input_ids": pad_sequence(batch, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in batch], batch_first=True),
        }
        for batch in batches
    ]


@torch.no_grad()
def _fit_loss(model: PreTrainedModel, whole: PreTrainedModel, lora: LoraConfig) -> None:
    """Start every layer at the largest singular vectors of what quantising took from its weight."""
    layers: dict[str, Any] = {n: layer for n, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    for name, layer in layers.items():
        kept_OI = dequantize_bnb_weight(layer.get_base_layer().weight)
        base = cast(nn.Linear, whole.get_submodule(name))
        lost_OI = base.weight.to(kept_OI.device, torch.float32) - kept_OI.float()
        left_OK, values_K, right_KI = torch.linalg.svd(lost_OI / lora.scaling, full_matrices=False)
        roots_R = values_K[: lora.rank].sqrt()
        layer.lora_A[ADAPTER_NAME].weight.copy_(roots_R[:, None] * right_KI[: lora.rank])
        layer.lora_B[ADAPTER_NAME].weight.copy_(left_OK[:, : lora.rank] * roots_R)


@torch.no_grad()
def _settle_start(model: nn.Module, *, moves_base: bool, keeps_start: bool) -> None:
    """Give all workers the first one's start, and keep A0 and B0 where the base gave them up.

    Two machines may round a singular vector to opposite signs; shards of both would fit nowhere.
    """
    is_shared = dist.is_initialized() and dist.get_world_size() > 1
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name, parameter in layer.named_parameters():
            if is_shared and (moves_base or not name.startswith("base_layer.")):
                dist.broadcast(parameter.data, src=0)
        if keeps_start:
            for matrix in "AB":
                weight = getattr(layer, f"lora_{matrix}")[ADAPTER_NAME].weight
                layer.register_buffer(f"start_{matrix}", weight.detach().clone(), persistent=False)
