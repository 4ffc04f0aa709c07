"""Rows end to end: each sees itself alone, as if it were read by itself through transformers' own attention."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from delia.errors import TrainError
from delia.model import attention
from delia.model.attention import Segments, attend_segments, use_packed_attention

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
        segments=Segments(*LENGTHS),
    ).logits[0]
    for expected, logits in zip(alone, packed.split(LENGTHS), strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


MIXERS = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "mamba": {"state_size": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
}
"""Convolutions and state spaces, attention beside transformers' interface, and sinks, which no kernel here knows."""


@pytest.mark.parametrize("name", MIXERS)
def test_an_architecture_whose_packed_rows_would_see_each_other_or_less_than_alone_is_refused(
    make_shape, name
):
    model = make_shape(name, **MIXERS[name])
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.ones_(parameter)
    with pytest.raises(
        TrainError, match=r"reads rows that lie end to end otherwise than alone \(its states differ"
    ):
        use_packed_attention(model)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3_text", "olmo3", "phi3"])
def test_other_architectures_whose_layers_all_attend_are_taken(make_shape, name):
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2} if name == "mixtral" else {}
    use_packed_attention(make_shape(name, pad_token_id=0, **settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_not_taken_for_rows_that_see_each_other(make_shape, shape, dtype):
    use_packed_attention(make_shape(shape).to(dtype))


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
        segments = Segments(*(len(row) for row in rows))
        ids = torch.cat(rows)[None]
        return model(input_ids=ids, position_ids=positions[None], segments=segments).logits[0]

    other = (first + 1) % 96
    assert torch.equal(read(first, second)[5:], read(other, second)[5:])
    changed = torch.cat((second[:-1], (second[-1:] + 1) % 96))
    assert torch.equal(read(second)[:-1], read(changed)[:-1])
    assert not torch.equal(read(second)[-1], read(changed)[-1])


def test_a_row_s_gradient_is_its_own_and_changes_with_no_other_row(make_shape, shape):
    model = make_shape(shape)
    use_packed_attention(model)
    rows = make_rows(96)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]

    def read(rows: list[torch.Tensor], place: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return one row's logits, and the gradients of them by each row's embeddings."""
        inputs = model.get_input_embeddings()(torch.cat(rows)[None]).requires_grad_()
        logits = model(inputs_embeds=inputs, position_ids=positions, segments=Segments(*LENGTHS)).logits[0]
        own = logits.split(LENGTHS)[place]
        (gradient,) = torch.autograd.grad(own.square().sum(), inputs)
        return own, list(gradient[0].split(LENGTHS))

    for place in range(len(rows)):
        others_changed = [row if i == place else (row + 1) % 96 for i, row in enumerate(rows)]
        (logits, gradients), (same_logits, same) = read(rows, place), read(others_changed, place)
        assert torch.equal(logits, same_logits)
        assert torch.equal(gradients[place], same[place])
        assert [bool(gradient.any()) for gradient in gradients] == [i == place for i in range(len(rows))]


@pytest.mark.parametrize(
    ("device", "dtype", "settings", "kernel"),
    [
        ("cuda", torch.bfloat16, {}, "flash"),
        ("cuda", torch.float16, {"sliding_window": 4}, "flash"),
        ("cuda", torch.float32, {}, "rows"),
        ("cuda", torch.float64, {}, "rows"),
        ("cuda", torch.bfloat16, {"softcap": 2.0}, "rows"),
        ("cuda", torch.bfloat16, {"dropout": 0.1}, "rows"),
        ("cpu", torch.bfloat16, {}, "rows"),
        ("cpu", torch.float32, {"softcap": 2.0, "sliding_window": 4}, "rows"),
    ],
)
def test_the_flash_kernel_is_taken_where_it_can_and_rows_elsewhere(
    monkeypatch, device, dtype, settings, kernel
):
    """By tensors that have a device and no memory: no GPU is needed."""
    taken = set()
    monkeypatch.setattr(attention, "_attend_varlen", lambda *_: taken.add("flash"))
    monkeypatch.setattr(attention, "_attend", lambda query, *_: (taken.add("rows"), query)[1])
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, num_heads, sum(LENGTHS), 8, device=device, dtype=dtype) for num_heads in (4, 2, 2)
        )
        attend_segments(
            SimpleNamespace(), query, key, value, scaling=1.0, segments=Segments(*LENGTHS), **settings
        )
    assert taken == {kernel}


def test_flex_attention_has_no_backward_on_a_cpu():
    """Why it is not among the kernels; a torch that has one opens the choice again."""
    query, key, value = (torch.randn(1, 2, 8, 8, requires_grad=True) for _ in range(3))
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(query, key, value)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 4])
def test_the_flash_kernel_attends_as_the_loop_over_rows_does(window):
    """Forward and backward; a row's output has no gradient at all by another row."""
    torch.manual_seed(0)
    sizes = [(1, num_heads, sum(LENGTHS), 64) for num_heads in (4, 2, 2)]
    half = [torch.randn(size, device="cuda").bfloat16().requires_grad_() for size in sizes]
    full = [part.detach().float().requires_grad_() for part in half]
    settings = {"scaling": 0.125, "segments": Segments(*LENGTHS), "sliding_window": window}
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
