"""A base model with what is trained on it: LoRA matrices, rows of new tokens, or both.

The rows of new tokens are a delta on the *input* embedding. The output row stays as it was: an
instruction-only token is never to be emitted, and a tied head would make it so. LoRA layers are
PEFT's own. `collect` reads what was trained back as `AdapterTensors`, scaled so that alpha = rank.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from delia.config import FrozenConfig
from delia.errors import ConfigError
from delia.store.adapters import AdapterTensors

Part = Literal["lora", "token_rows"]
TokenInit = Literal["reserved_row", "mean_vocabulary", "mean_instruction", "stand_in"]
ADAPTER_NAME = "default"


class LoraConfig(FrozenConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) of the modules named by suffix."""

    rank: int = Field(default=16, gt=0)
    alpha: int = Field(default=16, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class TokenRows(nn.Module):
    """An input embedding whose rows of a few tokens carry a trained delta.

    Shapes: ids [B, T] -> [B, T, D]; `deltas_KD` belongs to `token_ids`, in order.
    """

    def __init__(self, embedding: nn.Embedding, token_ids: tuple[int, ...]) -> None:
        """Wrap an embedding; deltas start at zero, in float32."""
        super().__init__()
        self.embedding = embedding
        self.token_ids = token_ids
        self.deltas_KD = nn.Parameter(torch.zeros(len(token_ids), embedding.embedding_dim))

    @property
    def weight(self) -> Tensor:
        """Return the base's weight: what a tied output head shares."""
        return self.embedding.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embed ids; ids outside `token_ids` are embedded as the base does."""
        embedded_BTD: Tensor = self.embedding(ids_BT)
        scale = getattr(self.embedding, "embed_scale", 1.0)  # Gemma scales its rows as it embeds them
        for index, token_id in enumerate(self.token_ids):
            is_token_BT1 = (ids_BT == token_id).unsqueeze(-1)
            embedded_BTD = embedded_BTD + is_token_BT1 * (self.deltas_KD[index] * scale).to(
                embedded_BTD.dtype
            )
        return embedded_BTD


def attach(
    model: PreTrainedModel, *, lora: LoraConfig | None, token_ids: Iterable[int] = (), seed: int = 0
) -> PreTrainedModel:
    """Put LoRA layers and token rows on a frozen base, in place; a new adapter changes no output.

    Raises:
        ConfigError: Nothing is to be trained, or no module has a target's name.
    """
    ids = tuple(token_ids)
    if lora is None and not ids:
        raise ConfigError("nothing to train: set train.lora, or a task with a token, or both")
    if lora is not None:
        check_targets(model, lora.target_modules)
        torch.manual_seed(seed)
        peft_config = PeftLoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        )
        try:
            inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER_NAME)
        except ValueError as error:
            raise ConfigError(f"train.lora.target_modules {list(lora.target_modules)}: {error}") from error
    if ids:
        embedding = model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise ConfigError(f"token rows need a plain input embedding, this model has {type(embedding)}")
        model.set_input_embeddings(TokenRows(embedding, ids))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) is not None)
    return model


def check_targets(model: PreTrainedModel, targets: Iterable[str]) -> None:
    """Refuse a target that no module is named after; PEFT adapts the others and says nothing.

    Raises:
        ConfigError: With the names that there are.
    """
    names = [name for name, _ in model.named_modules()]
    missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing:
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        raise ConfigError(
            f"train.lora.target_modules {missing}: no module of {type(model).__name__} has such a name;"
            f" it has {sorted({name.rpartition('.')[2] for name in linear})}"
        )


def part_of(parameter_name: str) -> Part | None:
    """Return which trained part a parameter belongs to, None for the base's own."""
    if ".lora_A." in parameter_name or ".lora_B." in parameter_name:
        return "lora"
    return "token_rows" if parameter_name.endswith("deltas_KD") else None


@torch.no_grad()
def initialise_rows(
    model: PreTrainedModel,
    init: TokenInit,
    *,
    instruction_ids: Iterable[int] = (),
    stand_ins: Iterable[int | None] = (),
) -> None:
    """Set the token rows' starting point; deltas are measured from the base's own row.

    `mean_vocabulary` is the mean input embedding, `mean_instruction` the mean over the tokens of the
    long instruction that the token stands for, `stand_in` the row of the word in `stand_ins`, one a
    token; a token whose stand-in is None stays at its own row.

    Raises:
        ConfigError: `mean_instruction` without an instruction.
    """
    rows = model.get_input_embeddings()
    if not isinstance(rows, TokenRows) or init == "reserved_row":
        return
    weight_VD = rows.weight.float()
    if init == "stand_in":
        for index, (own, other) in enumerate(zip(rows.token_ids, stand_ins, strict=True)):
            if other is not None:
                rows.deltas_KD[index] = weight_VD[other] - weight_VD[own]
        return
    ids = sorted(set(instruction_ids))
    if init == "mean_instruction" and not ids:
        raise ConfigError("train.token_init=mean_instruction needs a task with a long_instruction")
    target_D = weight_VD.mean(0) if init == "mean_vocabulary" else weight_VD[ids].mean(0)
    rows.deltas_KD.copy_(target_D - weight_VD[list(rows.token_ids)])


def collect(model: PreTrainedModel, trained: Mapping[str, Tensor], *, scaling: float) -> AdapterTensors:
    """Sort a flat state of trained parameters into an adapter's tensors.

    Args:
        model: The adapted model; only its names are read, so sharded parameters are fine.
        trained: Parameter name -> whole tensor.
        scaling: LoRA's alpha / rank, folded into B.
    """
    embedding = model.get_input_embeddings()
    pairs: dict[str, dict[str, Tensor]] = {}
    deltas = None
    for name, value in trained.items():
        if name.endswith("deltas_KD"):
            deltas = value
        elif ".lora_A." in name or ".lora_B." in name:
            module, _, rest = name.partition(".lora_")
            pairs.setdefault(module, {})[rest[0]] = value
    names = {module: name for name, module in model.named_modules()}
    return AdapterTensors(
        lora_by_module={m: (pair["A"], pair["B"] * scaling) for m, pair in sorted(pairs.items())},
        embedding_module=names[embedding],
        token_ids=embedding.token_ids if isinstance(embedding, TokenRows) else (),
        row_deltas_KD=deltas,
    )
