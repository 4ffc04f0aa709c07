"""Attention over rows that lie end to end in one stream: each sees itself alone, and no mask is made.

Registered with transformers under `PACKED`, so that every architecture that goes through its attention
interface takes it. A model is called with the rows' lengths:

    use_packed_attention(model); model(input_ids, position_ids=..., segments=Segments(12, 7, 30))

What attends, by availability: torch's flash kernel for rows of different lengths where it can (a GPU, half
precision, no cap of the scores, no dropout), else row by row. torch's flex attention, one kernel for caps, windows
and rows, is not between the two. On a CPU torch 2.13 has no backward of it (pytorch/pytorch#169646), and its dense
reference took 410 ms for both passes where row by row took 18 (5 rows, 1,934 tokens, 2 heads of 28, one thread). On a
GPU it is a kernel only under torch.compile, which has not been seen to work there with this loop; without it [T, T]
is made. A test fails once a CPU has the backward: the choice is open again then.

Legend: H query heads, G key heads, T tokens of the stream, L of one row, E a head's width.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from delia.errors import TrainError

PACKED = "delia_packed"
HALF = (torch.bfloat16, torch.float16)  # what the flash kernel takes
ROUNDING = 0.05
"""By how much of their norm two kernels' states may differ in half precision; rows that see each other: by more."""


class Segments:
    """The lengths of the rows of a stream.

    A tuple in its place would be looked into by torch.compile, which makes a layer anew for each number of rows.
    """

    def __init__(self, *lengths: int) -> None:
        """Take the lengths in the order of the rows."""
        self.lengths = list(lengths)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # lengths change with each call, and each would be compiled anew
def attend_segments(
    module: nn.Module,
    query_1HTE: Tensor,
    key_1GTE: Tensor,
    value_1GTE: Tensor,
    attention_mask: None = None,
    *,
    scaling: float,
    segments: Segments,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return causal attention inside each segment, [1, T, H, E], and no weights.

    Args:
        module: The layer that attends; not used.
        query_1HTE: Queries of the whole stream.
        key_1GTE: Keys; G divides H.
        value_1GTE: Values.
        attention_mask: None: segments take its place.
        scaling: Factor of the scores.
        segments: Lengths of the rows, which sum to T.
        dropout: Of the attention weights.
        options: `sliding_window`, how many tokens a token sees, itself included; `softcap`, the bound of
            the scores, c tanh(s / c) (Gemma 2, arXiv 2408.00118); others are for other kernels.
    """
    sliding_window, softcap = options.get("sliding_window"), options.get("softcap")
    if query_1HTE.is_cuda and query_1HTE.dtype in HALF and softcap is None and not dropout:
        return _attend_varlen(
            query_1HTE, key_1GTE, value_1GTE, scaling, segments.lengths, sliding_window
        ), None
    parts = zip(
        query_1HTE.split(segments.lengths, 2),
        key_1GTE.split(segments.lengths, 2),
        value_1GTE.split(segments.lengths, 2),
        strict=True,
    )
    attended = [_attend(*part, scaling, dropout, sliding_window, softcap) for part in parts]
    return torch.cat(attended, 2).transpose(1, 2), None


def _attend(
    query_1HLE: Tensor,
    key_1GLE: Tensor,
    value_1GLE: Tensor,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return the attention of one row, [1, H, L, E]."""
    length = query_1HLE.shape[2]
    is_plain = sliding_window is None or length <= sliding_window
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query_1HLE,
            key_1GLE,
            value_1GLE,
            attn_mask=None if is_plain else _see(length, sliding_window, query_1HLE.device),
            dropout_p=dropout,
            is_causal=is_plain,
            scale=scaling,
            enable_gqa=query_1HLE.shape[1] != key_1GLE.shape[1],
        )
    num_shared = query_1HLE.shape[1] // key_1GLE.shape[1]
    key_1HLE, value_1HLE = (part.repeat_interleave(num_shared, 1) for part in (key_1GLE, value_1GLE))
    scores_1HLL = softcap * torch.tanh(query_1HLE @ key_1HLE.transpose(2, 3) * (scaling / softcap))
    scores_1HLL = scores_1HLL.masked_fill(~_see(length, sliding_window, query_1HLE.device), float("-inf"))
    weights_1HLL = scores_1HLL.softmax(-1, dtype=torch.float32).to(query_1HLE.dtype)
    return functional.dropout(weights_1HLL, dropout) @ value_1HLE


def _see(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Return which key [., L] a query [L, .] sees."""
    places_L = torch.arange(length, device=device)
    behind_LL = places_L[:, None] - places_L[None, :]
    return (behind_LL >= 0) & (behind_LL < (sliding_window or length))


def _attend_varlen(
    query_1HTE: Tensor,
    key_1GTE: Tensor,
    value_1GTE: Tensor,
    scaling: float,
    lengths: Sequence[int],
    sliding_window: int | None,
) -> Tensor:
    """Return all rows at once by torch's flash kernel for rows of different lengths, [1, T, H, E]."""
    ends = torch.tensor([0, *lengths], device=query_1HTE.device).cumsum(0).to(torch.int32)
    query_THE, key_TGE, value_TGE = (part[0].transpose(0, 1) for part in (query_1HTE, key_1GTE, value_1GTE))
    attended = varlen_attn(
        query_THE,
        key_TGE,
        value_TGE,
        ends,
        ends,
        max(lengths),
        max(lengths),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query_1HTE.shape[1] != key_1GTE.shape[1],
    )
    assert isinstance(attended, Tensor)  # no auxiliary output was asked for
    return attended[None]


def _make_no_mask(*_: Any, **__: Any) -> None:
    """Segments say all that a mask would; [T, T] is never made."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let every layer attend by `attend_segments`; the model must then be called with `segments`.

    Layers that mix tokens otherwise (convolutions, state spaces, linear attention) know of no segments, and some
    architectures ask their kernels for more than is known here (attention sinks) or do not go through the interface at
    all; so two rows end to end are compared with each alone, as the model read it before.

    Raises:
        TrainError: They are not the same.
    """
    rows = [torch.arange(*ends) % model.config.get_text_config().vocab_size for ends in ((0, 9), (9, 23))]
    alone = [_read(model, row, torch.arange(len(row))) for row in rows]
    AttentionInterface.register(PACKED, attend_segments)
    AttentionMaskInterface.register(PACKED, _make_no_mask)
    model.set_attn_implementation(PACKED)
    lengths = [len(row) for row in rows]
    places = torch.cat([torch.arange(length) for length in lengths])
    packed = _read(model, torch.cat(rows), places, segments=Segments(*lengths)).split(lengths)
    far = max(
        float((got - expected).norm() / expected.norm()) for got, expected in zip(packed, alone, strict=True)
    )
    if not far <= (1e-3 if model.dtype == torch.float32 else ROUNDING):
        raise TrainError(
            f"{type(model).__name__} reads rows that lie end to end otherwise than alone (its states differ by"
            f" {far:.2g} of their norm), and training here packs rows; take a base all of whose layers attend"
        )


@torch.no_grad()
def _read(model: PreTrainedModel, ids_T: Tensor, places_T: Tensor, **options: Any) -> Tensor:
    """Return the last hidden states of a stream, float32 [T, D]."""
    device = model.device
    states = model.get_decoder()(
        input_ids=ids_T[None].to(device), position_ids=places_T[None].to(device), use_cache=False, **options
    )
    return cast(Tensor, states.last_hidden_state[0].float())
