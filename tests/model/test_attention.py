"""Rows end to end: each sees itself alone, as if it were read by itself through transformers' own attention."""

import random
from types import SimpleNamespace

import pytest
import torch

from delia.model.attention import attend_segments, use_packed_attention

LENGTHS = (5, 17, 1, 9)


def make_rows(num_ids: int) -> list[torch.Tensor]:
    rng = random.Random(1)
    return [torch.tensor([rng.randrange(num_ids) for _ in range(length)]) for length in LENGTHS]


def test_every_architecture_reads_packed_rows_as_it_reads_them_alone(make_shape, shape):
    model = make_shape(shape)
    rows = make_rows(96)
    alone = [model(input_ids=row[None]).logits[0] for row in rows]

    use_packed_attention(model)
    packed = model(
        input_ids=torch.cat(rows)[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
        segments=LENGTHS,
    ).logits[0]
    for expected, logits in zip(alone, packed.split(LENGTHS), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "mistral", "llama"])
def test_what_makes_an_architecture_special_is_seen_in_its_logits(make_shape, name):
    """Without this, the test above could hold for rows that no window and no bound ever touches."""
    plain = make_shape(name, sliding_window=128, attn_logit_softcapping=None)
    row = make_rows(96)[1]
    difference = (make_shape(name)(input_ids=row[None]).logits - plain(input_ids=row[None]).logits).abs()
    assert (float(difference.max()) > 1e-3) == (name != "llama")


def test_a_row_before_changes_nothing_and_no_place_sees_what_follows(make_shape):
    model = make_shape("llama")
    use_packed_attention(model)
    first, second = make_rows(96)[:2]

    def read(*rows: torch.Tensor) -> torch.Tensor:
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        lengths = tuple(len(row) for row in rows)
        return model(input_ids=torch.cat(rows)[None], position_ids=positions[None], segments=lengths).logits[
            0
        ]

    other = (first + 1) % 96
    assert torch.equal(read(first, second)[5:], read(other, second)[5:])
    changed = torch.cat((second[:-1], (second[-1:] + 1) % 96))
    assert torch.equal(read(second)[:-1], read(changed)[:-1])
    assert not torch.equal(read(second)[-1], read(changed)[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
def test_the_flash_kernel_attends_as_the_loop_over_rows_does(window):
    """Forward and backward; a row's output has no gradient at all by another row."""
    torch.manual_seed(0)
    sizes = [(1, num_heads, sum(LENGTHS), 64) for num_heads in (4, 2, 2)]
    half = [torch.randn(size, device="cuda").bfloat16().requires_grad_() for size in sizes]
    full = [part.detach().float().requires_grad_() for part in half]
    settings = {"scaling": 0.125, "segments": LENGTHS, "sliding_window": window}
    by_kernel, _ = attend_segments(SimpleNamespace(), *half, **settings)
    by_rows, _ = attend_segments(SimpleNamespace(), *full, **settings)
    torch.testing.assert_close(by_kernel.float(), by_rows, atol=2e-2, rtol=2e-2)

    weights = torch.randn_like(by_rows)
    weights[:, : LENGTHS[0]] = 0
    (by_kernel * weights).sum().backward()
    (by_rows * weights).sum().backward()
    for one, other in zip(half, full, strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad, atol=4e-2, rtol=4e-2)
        assert not one.grad[:, :, : LENGTHS[0]].any()
        assert one.grad.any()
