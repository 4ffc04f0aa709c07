"""A base model with what is trained on it: LoRA matrices, rows of new tokens, or both.

The rows of new tokens are a delta on the *input* embedding. The output row stays as it was: an
instruction-only token is never to be emitted, and a tied head would make it so. LoRA layers are
PEFT's own (`delia.model.lora`). `collect` reads what was trained back as `AdapterTensors`, scaled so that
alpha = rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from delia.errors import ConfigError
from delia.model.lora import LoraConfig, inject_lora
from delia.store.adapters import AdapterTensors

Part = Literal["lora", "token_rows", "base"]
TokenInit = Literal["reserved_row", "mean_vocabulary", "mean_instruction", "stand_in"]
MATRICES = (".lora_A.", ".lora_B.")
MAGNITUDE = ".lora_magnitude_vector."


class TokenRows(nn.Module):
    """An input embedding whose rows of a few tokens carry a trained delta, and are else not trained from here.

    Shapes: ids [B, T] -> [B, T, D]; `deltas_KD` belongs to `token_ids`, in order.
    """

    own_KD: Tensor
    other_squares_D: Tensor

    def __init__(self, embedding: nn.Embedding, token_ids: tuple[int, ...]) -> None:
        """Wrap an embedding; deltas start at zero, in float32."""
        super().__init__()
        self.embedding = embedding
        self.token_ids = token_ids
        self.deltas_KD = nn.Parameter(
            torch.zeros(len(token_ids), embedding.embedding_dim, device=embedding.weight.device)
        )

    @property
    def weight(self) -> Tensor:
        """Return the base's weight: what a tied output head shares."""
        return self.embedding.weight

    @torch.no_grad()
    def keep_norms(self) -> None:
        """Keep what `norm_columns` needs of the base, while it is whole."""
        weight_VD = self.embedding.weight
        own_KD = weight_VD[list(self.token_ids)].double()
        squares_D = torch.linalg.vector_norm(weight_VD, dim=0, dtype=torch.float64).square()
        self.register_buffer("own_KD", own_KD, persistent=False)
        self.register_buffer("other_squares_D", squares_D - own_KD.square().sum(0), persistent=False)

    def norm_columns(self, deltas_KD: Tensor) -> Tensor:
        """Return the norm over the vocabulary of each dimension, [D] float32, with deltas on the rows.

        PEFT gives every target of a DoRA adapter a magnitude, an embedding too; at this value it does nothing.
        """
        squares_D = (self.own_KD.cpu() + deltas_KD).square().sum(0) + self.other_squares_D.cpu()
        return squares_D.sqrt().float()

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embed ids; ids outside `token_ids` are embedded as the base does."""
        embedded_BTD: Tensor = self.embedding(ids_BT)
        if self.embedding.weight.requires_grad:  # where the head is tied, a token's own row is its output row
            is_own_BT1 = torch.isin(ids_BT, torch.tensor(self.token_ids, device=ids_BT.device)).unsqueeze(-1)
            embedded_BTD = torch.where(is_own_BT1, embedded_BTD.detach(), embedded_BTD)
        # Gemma scales its rows as it embeds them; PEFT scales an embedding LoRA alike, so deltas are stored bare
        scale = getattr(self.embedding, "embed_scale", 1.0)
        for index, token_id in enumerate(self.token_ids):
            is_token_BT1 = (ids_BT == token_id).unsqueeze(-1)
            embedded_BTD = embedded_BTD + is_token_BT1 * (self.deltas_KD[index] * scale).to(
                embedded_BTD.dtype
            )
        return embedded_BTD


def attach(
    model: PreTrainedModel,
    *,
    lora: LoraConfig | None,
    token_ids: Iterable[int] = (),
    trains_base: bool = False,
    seed: int = 0,
    task_rows: Sequence[Sequence[int]] = (),
    whole: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Put LoRA layers and token rows on a base, in place; a new adapter changes no output.

    Args:
        model: The base, whole: shards come later.
        lora: What is adapted, and how it starts; None for token rows alone.
        token_ids: Rows of the vocabulary that are trained.
        trains_base: Whether the base's own parameters are, which stay frozen otherwise.
        seed: All that a random start depends on.
        task_rows: Token ids of the task's own rows, in order; only `lora.init` corda and eva read them.
        whole: The base before it was quantised; only `lora.init` loftq reads it.

    Raises:
        ConfigError: Nothing is to be trained, or see `inject_lora`.
    """
    ids = tuple(token_ids)
    if lora is None and not ids and not trains_base:
        raise ConfigError(
            "nothing to train: set train.lora, a task with a token, both, or stages whose parts name the base"
        )
    if lora is not None:
        inject_lora(model, lora, seed=seed, task_rows=task_rows, whole=whole)
    if ids:
        embedding = model.get_input_embeddings()
        if not isinstance(embedding, nn.Embedding):
            raise ConfigError(f"token rows need a plain input embedding, this model has {type(embedding)}")
        rows = TokenRows(embedding, ids)
        if lora is not None and lora.use_dora:
            rows.keep_norms()
        model.set_input_embeddings(rows)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains_base or part_of(name) != "base")
    return model


def part_of(parameter_name: str) -> Part:
    """Return which part a parameter belongs to."""
    if any(mark in parameter_name for mark in (*MATRICES, MAGNITUDE)):
        return "lora"
    return "token_rows" if parameter_name.endswith("deltas_KD") else "base"


def takes_decay(parameter_name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay applies: to matrices, not to norms, biases, magnitudes and token rows."""
    is_matrix = part_of(parameter_name) == "base" and parameter.ndim > 1
    return is_matrix or any(mark in parameter_name for mark in MATRICES)


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
    """Sort a flat state of trained parameters into an adapter's tensors, over the unchanged base.

    A start that was taken out of the base (`delia.model.lora`) is put back by twice the rank:
    W' + s B A = W + s [B, -B0] [A; A0].

    Args:
        model: The adapted model; only its names and buffers are read, so sharded parameters are fine.
        trained: Parameter name -> whole tensor, on the CPU.
        scaling: LoRA's factor of B A (`LoraConfig.scaling`), folded into B.
    """
    embedding = model.get_input_embeddings()
    pairs: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    deltas = None
    for name, value in trained.items():
        module, _, rest = name.partition(".lora_")
        if name.endswith("deltas_KD"):
            deltas = value
        elif MAGNITUDE in name:
            magnitudes[module] = value
        elif any(mark in name for mark in MATRICES):
            pairs.setdefault(module, {})[rest[0]] = value
    starts = {name: value.cpu() for name, value in model.named_buffers() if ".start_" in name}
    lora = {}
    for module, pair in sorted(pairs.items()):
        a_RI, b_OR = pair["A"], pair["B"]
        if f"{module}.start_A" in starts:
            a_RI = torch.cat((a_RI, starts[f"{module}.start_A"]))
            b_OR = torch.cat((b_OR, -starts[f"{module}.start_B"]), 1)
        lora[module] = (a_RI, b_OR * scaling)
    embedding_module = {module: name for name, module in model.named_modules()}[embedding]
    if magnitudes and deltas is not None and isinstance(embedding, TokenRows):
        magnitudes[embedding_module] = embedding.norm_columns(deltas)
    return AdapterTensors(
        lora_by_module=lora,
        magnitude_by_module=magnitudes,
        embedding_module=embedding_module,
        token_ids=embedding.token_ids if isinstance(embedding, TokenRows) else (),
        row_deltas_KD=deltas,
    )
