"""The loss by chunks: equal to the textbook's, on every architecture, whatever the chunk, and never whole."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from delia.errors import TrainError
from delia.model.adapted import LoraConfig, attach
from delia.model.attention import use_packed_attention
from delia.train import head as heads
from delia.train.head import Head, HeadConfig, read_head
from delia.train.loop import accumulate_gradients
from delia.train.objective import prepare_loss, sum_cross_entropy
from delia.train.packing import Stream, join_stream
from delia.train.rows import TASK, join_rows
from delia.train.weighting import TrainedTokens, weigh_equally

TOKEN = 7


def make_rows():
    rng = random.Random(3)
    rows = []
    for length in (4, 15, 9, 2, 11):
        ids = [rng.randrange(10, 96) for _ in range(length)]
        ids[0] = TOKEN
        start = rng.randint(1, length - 1)
        rows.append((ids, [False] * start + [True] * (length - start)))
    return join_rows(rows, sources=[TASK] * len(rows), has_token=[True] * len(rows))


def move(model) -> None:
    """Let LoRA and rows differ from nothing, so that every gradient is alive."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or name.endswith("deltas_KD"):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


def read_alone(model, rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the mean loss over trained tokens and its gradients, a row at a time, by transformers alone."""
    total, num_trained = torch.zeros(()), 0
    for place in range(len(rows)):
        ids, mask = (torch.tensor(part.tolist()) for part in rows[place])
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + functional.cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum")
        num_trained += int(mask[1:].sum())
    model.zero_grad()
    (total / num_trained).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(total.detach()) / num_trained, gradients


def read_packed(model, rows, micro_batches) -> float:
    """Return the mean loss over trained tokens as training computes it; the model has its gradients."""
    use_packed_attention(model)
    prepare_loss(model, read_head(model))
    model.zero_grad()
    num_trained = int(rows.num_trained_R.sum())
    return accumulate_gradients(model, rows, micro_batches, num_trained=num_trained, num_workers=1)


@pytest.mark.parametrize("chunk", [3, 1000])
def test_packed_gradients_are_those_of_each_row_alone(make_shape, monkeypatch, shape, chunk):
    """Float32, dropout 0, 1e-5 relative; the chunk is given in tokens."""
    monkeypatch.setitem(heads.CHUNK_BYTES, "cpu", chunk * 4 * 96)
    rows = make_rows()
    model = attach(make_shape(shape), lora=LoraConfig(rank=4, alpha=8, dropout=0.0), token_ids=(TOKEN,))
    move(model)
    expected_loss, expected = read_alone(model, rows)

    assert read_packed(model, rows, [list(range(5))]) == pytest.approx(expected_loss, rel=1e-5)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert len(expected) == 2 * 4 * 2 + 1
    for parameter, gradient in expected.items():
        assert (gradients[parameter] - gradient).norm() <= 1e-5 * gradient.norm(), parameter


def test_full_tuning_s_packed_gradients_are_those_of_each_row_alone(make_shape, shape):
    """Of every parameter, a tied embedding's too, whose gradient comes from both its ends."""
    rows = make_rows()
    model = attach(make_shape(shape), lora=None, token_ids=(TOKEN,), trains_base=True)
    move(model)
    expected_loss, expected = read_alone(model, rows)

    assert read_packed(model, rows, [[0, 3], [1, 2, 4]]) == pytest.approx(expected_loss, rel=1e-5)
    parameters = dict(model.named_parameters())
    assert expected.keys() == parameters.keys()
    for name, gradient in expected.items():
        assert (parameters[name].grad - gradient).norm() <= 1e-5 * gradient.norm(), name


def make_head(num_tokens: int = 7, *, softcap: float | None = None, scale: float = 1.0):
    """Return hidden states that lie in a row of their own each, a head, and labels."""
    generator = torch.Generator().manual_seed(1)
    hidden_ND = torch.randn((num_tokens, 5), generator=generator).requires_grad_()
    weight_VD = torch.randn((11, 5), generator=generator).requires_grad_()
    bias_V = torch.randn(11, generator=generator).requires_grad_()
    labels_N = torch.randint(0, 11, (num_tokens,), generator=generator)
    logits_NV = (hidden_ND @ weight_VD.T + bias_V) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return hidden_ND, weight_VD, bias_V, labels_N, logits_NV, HeadConfig(softcap=softcap, scale=scale)


def run_chunks(hidden_ND, weight_VD, bias_V, labels_N, config, weigher=weigh_equally):
    stream = Stream(
        rows=(4,),
        lengths=(8,),
        ids_T=torch.arange(8),
        positions_T=torch.arange(8),
        places_N=torch.arange(7),
        labels_N=labels_N,
        row_N=torch.zeros(7, dtype=torch.long),
    )
    head = Head(weight_VD=weight_VD, bias_V=bias_V, config=config)
    return sum_cross_entropy(hidden_ND, head, stream, weigher)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (None, 0.25), (1.5, 3.0)])
def test_loss_and_gradients_are_autograd_s_whatever_the_head_and_the_chunk(
    monkeypatch, chunk, softcap, scale
):
    monkeypatch.setitem(heads.CHUNK_BYTES, "cpu", chunk * 4 * 11)
    hidden_ND, weight_VD, bias_V, labels_N, logits_NV, head = make_head(softcap=softcap, scale=scale)
    losses = functional.cross_entropy(logits_NV, labels_N, reduction="none")
    expected = torch.autograd.grad(losses.sum() * 0.3, (hidden_ND, weight_VD, bias_V))

    total, losses_N = run_chunks(hidden_ND, weight_VD, bias_V, labels_N, head)
    gradients = torch.autograd.grad(total * 0.3, (hidden_ND, weight_VD, bias_V))
    torch.testing.assert_close(losses_N, losses.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, losses.sum().detach(), rtol=1e-5, atol=0)
    for gradient, by_autograd in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, by_autograd, rtol=1e-5, atol=1e-6)


def test_weights_and_smoothing_are_torch_s_own(monkeypatch):
    monkeypatch.setitem(heads.CHUNK_BYTES, "cpu", 2 * 4 * 11)
    hidden_ND, weight_VD, bias_V, labels_N, logits_NV, head = make_head(softcap=2.0)
    seen: list[tuple[int, ...]] = []

    def weigh(tokens: TrainedTokens):
        seen.append(tokens.rows)
        return tokens.logprobs_n.exp(), torch.full_like(tokens.logprobs_n, 0.2)

    weights = logits_NV.log_softmax(-1).gather(1, labels_N[:, None])[:, 0].exp().detach()
    losses = functional.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=0.2)
    expected = torch.autograd.grad((losses * weights).sum(), (hidden_ND, weight_VD))

    total, plain_N = run_chunks(hidden_ND, weight_VD, bias_V, labels_N, head, weigh)
    gradients = torch.autograd.grad(total, (hidden_ND, weight_VD))
    assert float(total) == pytest.approx(float((losses * weights).sum()), rel=1e-5)
    torch.testing.assert_close(
        plain_N, functional.cross_entropy(logits_NV, labels_N, reduction="none").detach()
    )
    for gradient, by_autograd in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, by_autograd, rtol=1e-5, atol=1e-6)
    assert seen == [(4,)] * 4


def test_a_very_unlikely_label_has_a_finite_loss_and_gradient():
    hidden_ND = torch.tensor([[300.0]], requires_grad=True)
    weight_VD = torch.tensor([[1.0], [-1.0]])
    stream = join_stream(join_rows([((0, 1), (False, True))], sources=[TASK]), [0])
    head = Head(weight_VD=weight_VD, bias_V=None, config=HeadConfig(softcap=None, scale=1.0))
    total, _ = sum_cross_entropy(hidden_ND, head, stream, weigh_equally)
    (gradient,) = torch.autograd.grad(total, hidden_ND)
    assert (float(total), float(gradient)) == (600.0, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.15, 1.0])
def test_the_head_s_form_is_read_from_the_config_and_held_against_the_model(make_shape, dtype, spread):
    """In bfloat16 a capped logit is rounded four times."""
    gemma = make_shape("gemma2", initializer_range=spread).to(dtype)
    use_packed_attention(gemma)
    assert read_head(gemma) == HeadConfig(softcap=3.0, scale=1.0)

    # Llama's code knows no such thing
    llama = make_shape("llama", final_logit_softcapping=3.0, initializer_range=spread).to(dtype)
    use_packed_attention(llama)
    with pytest.raises(TrainError, match="logits of LlamaForCausalLM are not those of its last hidden state"):
        read_head(llama)


def test_an_output_head_that_is_no_linear_layer_is_refused(make_shape):
    model = make_shape("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(
        TrainError, match="output head of LlamaForCausalLM is a Sequential, a plain linear layer"
    ):
        read_head(model)
