"""The loss of trained tokens on a GPU: this loop's by chunks, Liger's fused kernel, and transformers' own way.

Each turns hidden states [N, 2048] and a frozen head [V, 2048], bfloat16, into the summed cross-entropy and its gradient
by the hidden states. The kernels are compared, not models: what comes before the head is the same for all.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from delia.train.head import Head, HeadConfig
from delia.train.objective import sum_cross_entropy
from delia.train.packing import Stream
from delia.train.weighting import weigh_equally

NUM_TOKENS, HIDDEN = 8192, 2048
VOCABULARIES = (32_000, 128_256)
NUM_RUNS = 10
TakeLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadFigures:
    """Milliseconds of a forward and backward pass, the bytes it takes beside its inputs, and its gradient's error."""

    name: str
    vocabulary: int
    milliseconds: float
    peak_bytes: int
    error: float


def take_own(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Take this loop's loss."""
    num = len(labels_N)
    rows_N = torch.zeros(num, dtype=torch.int64)
    stream = Stream(
        rows=(0,),
        lengths=(num,),
        ids_T=rows_N,
        positions_T=rows_N,
        places_N=rows_N,
        labels_N=labels_N,
        row_N=rows_N,
    )
    head = Head(weight_VD=weight_VD, bias_V=None, config=HeadConfig(softcap=None, scale=1.0))
    return sum_cross_entropy(hidden_ND, head, stream, weigh_equally)[0]


def take_whole(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Take the loss of all logits at once, as transformers does."""
    return functional.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N, reduction="sum")


def take_liger(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Take the loss by Liger's fused linear layer and cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden_ND, weight_VD, labels_N, reduction="sum")
    return loss


WAYS: dict[str, TakeLoss] = {"delia": take_own, "Liger": take_liger, "all logits": take_whole}


def measure_head(name: str, vocabulary: int) -> HeadFigures:
    """Run one way; the error is of the gradient, against float32 and all logits, by its norm."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(NUM_TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight_VD = torch.randn(vocabulary, HIDDEN, device="cuda", dtype=torch.bfloat16) / HIDDEN**0.5
    labels_N = torch.randint(vocabulary, (NUM_TOKENS,), device="cuda")

    def run(take: TakeLoss, given_ND: Tensor, weight: Tensor) -> Tensor:
        leaf_ND = given_ND.detach().requires_grad_()
        take(leaf_ND, weight, labels_N).backward()
        assert leaf_ND.grad is not None
        return leaf_ND.grad

    expected_ND = torch.cat(
        [
            run(
                lambda h, w, _, place=place: take_whole(h, w, labels_N[place : place + 1024]),
                hidden_ND[place : place + 1024].float(),
                weight_VD.float(),
            )
            for place in range(0, NUM_TOKENS, 1024)
        ]
    )
    given_ND = run(WAYS[name], hidden_ND, weight_VD)
    error = float((given_ND.float() - expected_ND).norm() / expected_ND.norm())
    del given_ND, expected_ND
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(NUM_RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(WAYS[name], hidden_ND, weight_VD)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return HeadFigures(
        name, vocabulary, statistics.median(times), torch.cuda.max_memory_allocated() - before, error
    )


def describe_heads() -> str:
    """Run all and return the table."""
    figures = [measure_head(name, vocabulary) for vocabulary in VOCABULARIES for name in WAYS]
    lines = [
        f"Cross-entropy of {NUM_TOKENS:,} trained tokens and its gradient, width {HIDDEN}, bfloat16, a frozen head; median of"
        f" {NUM_RUNS}. The error is the gradient's, by norm, against float32.",
        "",
        "| | vocabulary | ms | peak memory GB | error |",
        "|---|---|---|---|---|",
        *(
            f"| {item.name} | {item.vocabulary:,} | {item.milliseconds:.1f} | {item.peak_bytes / 1e9:.2f} | {item.error:.1e} |"
            for item in figures
        ),
    ]
    return "\n".join(lines)
