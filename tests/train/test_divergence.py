"""Explicit KL to the base: its value and gradient, the base inside an adapted model, and what it holds."""

import pytest
import torch
from torch.nn import functional

from delia.errors import TrainError
from delia.model.adapted import LoraConfig, attach
from delia.model.attention import Segments, use_packed_attention
from delia.model.loading import load_base
from delia.model.logprobs import load_adapted, mean_kl
from delia.model.original import base_alone, check_base_is_there
from delia.train import head as heads
from delia.train.divergence import HeldTokens, sum_divergence
from delia.train.head import Head, HeadConfig, read_head
from delia.train.objective import prepare_loss
from delia.train.packing import join_stream
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig
from delia.train.weighting import weigh_equally

TOKEN = 7


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (1.5, 0.5)])
def test_value_and_gradient_are_autograd_s_whatever_the_head_and_the_chunk(
    monkeypatch, chunk, softcap, scale
):
    monkeypatch.setitem(heads.CHUNK_BYTES, "cpu", chunk * 8 * 11)
    generator = torch.Generator().manual_seed(0)
    hidden_ND, original_ND = (torch.randn((7, 5), generator=generator) for _ in range(2))
    weight_VD, bias_V = torch.randn((11, 5), generator=generator), torch.randn(11, generator=generator)
    hidden_ND.requires_grad_()

    def score(states_ND):
        logits_NV = (states_ND @ weight_VD.T + bias_V) * scale
        return (logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)).log_softmax(-1)

    expected_N = functional.kl_div(
        score(hidden_ND), score(original_ND), log_target=True, reduction="none"
    ).sum(-1)
    (expected,) = torch.autograd.grad(0.3 * expected_N.sum(), hidden_ND)

    head = Head(weight_VD=weight_VD, bias_V=bias_V, config=HeadConfig(softcap=softcap, scale=scale))
    total, nats_N = sum_divergence(hidden_ND, original_ND, head)
    (gradient,) = torch.autograd.grad(0.3 * total, hidden_ND)
    torch.testing.assert_close(nats_N, expected_N.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total.detach(), nats_N.sum())
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def make_adapted(tiny_llama, *, moves: bool = True):
    model = attach(load_base(tiny_llama), lora=LoraConfig(rank=4, alpha=8, dropout=0.0), token_ids=(TOKEN,))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moves and (".lora_B." in name or name.endswith("deltas_KD")):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    use_packed_attention(model)
    prepare_loss(model, read_head(model))
    return model


def test_inside_the_context_an_adapted_model_is_its_base_and_afterwards_itself(tiny_llama):
    model, ids = make_adapted(tiny_llama), torch.tensor([[3, TOKEN, 9, 20]])
    needed = {name for name, p in model.named_parameters() if p.requires_grad}

    def answer(of, **options):
        with torch.no_grad():
            return of(input_ids=ids, **options).logits

    before = answer(model, segments=Segments(4))
    with base_alone(model):
        torch.testing.assert_close(answer(model, segments=Segments(4)), answer(load_base(tiny_llama)))
    assert torch.equal(answer(model, segments=Segments(4)), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == needed
    assert not torch.allclose(before, answer(load_base(tiny_llama)))


def test_a_base_that_is_trained_or_gave_up_its_start_is_refused(tiny_llama):
    model = make_adapted(tiny_llama)
    check_base_is_there(model)
    model.model.norm.weight.requires_grad_()
    with pytest.raises(TrainError, match=r"'model\.norm\.weight' says it is not; leave it out"):
        check_base_is_there(model)
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].register_buffer("start_A", torch.zeros(1))
    with pytest.raises(TrainError, match=r"layers\.0\.start_A"):
        check_base_is_there(model)


def test_held_tokens_have_the_divergence_and_the_others_their_loss(tiny_llama):
    """Against two forward passes of two models by transformers."""
    model, base = make_adapted(tiny_llama), load_base(tiny_llama)
    rows = [((3, TOKEN, 9, 20, 31), (False, False, True, True, True)), ((5, 40, 41), (False, True, True))]
    stream = join_stream(join_rows(rows, sources=[TASK, "d"]), [0, 1])
    is_held_N = torch.tensor([False, False, False, True, True])

    loss, losses_N = model.compute_loss(stream, weigh_equally, HeldTokens(is_held_N=is_held_N, weight=0.7))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    logits, nats = [], []
    for ids, _ in rows:
        packed = model(input_ids=torch.tensor([ids]), segments=Segments(len(ids))).logits[0].log_softmax(-1)
        with torch.no_grad():
            target = base(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        logits.append(packed)
        nats.append((target.exp() * (target - packed)).sum(-1))
    told_n = -logits[0][[1, 2, 3], [9, 20, 31]]
    held_n = nats[1][:2]
    torch.testing.assert_close(losses_N, torch.cat((told_n, held_n)).detach(), rtol=1e-4, atol=1e-5)
    expected = told_n.sum() + 0.7 * held_n.sum()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            difference = (gradients[name] - parameter.grad).norm()
            assert difference <= 1e-4 * parameter.grad.norm() + 1e-7, name


def test_a_new_adapter_diverges_nowhere_and_is_not_pulled(tiny_llama):
    model = make_adapted(tiny_llama, moves=False)
    rows = join_rows([((3, 9, 20, 31), (False, True, True, True))], sources=["d"])
    held = HeldTokens(is_held_N=torch.ones(3, dtype=torch.bool))
    loss, losses_N = model.compute_loss(join_stream(rows, [0]), weigh_equally, held)
    loss.backward()
    assert losses_N.abs().max() < 1e-6
    assert all(p.grad.abs().max() < 1e-5 for p in model.parameters() if p.requires_grad)


def test_the_base_is_read_without_its_own_dropout_and_training_goes_on_with_it(make_shape, monkeypatch):
    model = make_shape("llama", attention_dropout=0.5)
    model = attach(model, lora=LoraConfig(rank=4, alpha=8, dropout=0.0), token_ids=(TOKEN,))
    use_packed_attention(model)
    prepare_loss(model, read_head(model))
    stream = join_stream(join_rows([((3, 9, 20, 31), (False, True, True, True))], sources=["d"]), [0])
    expected_TD = model.get_decoder()(input_ids=stream.ids_T[None], segments=Segments(4)).last_hidden_state[0]
    held, seen = HeldTokens(is_held_N=torch.ones(3, dtype=torch.bool)), []

    def see(hidden_ND, original_ND, head):
        seen.append((hidden_ND.detach(), original_ND))
        return sum_divergence(hidden_ND, original_ND, head)

    monkeypatch.setattr("delia.train.objective.sum_divergence", see)
    model.train()
    model.compute_loss(stream, weigh_equally, held)
    ((hidden_ND, original_ND),) = seen
    torch.testing.assert_close(original_ND, expected_TD[:3].detach())
    assert (hidden_ND - original_ND).abs().max() > 1e-3
    assert all(module.training for module in model.modules())


def test_held_to_the_base_off_the_task_a_run_leaves_it_less_than_plain_tuning(
    train_here, make_input, tiny_llama
):
    """KL off the task, on prompts that neither run saw; the task is learnt by both."""
    stage = StageConfig(max_steps=40, learning_rate=2e-2, token_learning_rate=1e-2, warmup_steps=3)
    settings = {"stages": (stage,), "global_batch_size": 24, "max_tokens_per_micro_batch": 500}
    held = train_here(make_input(kl_weight=10.0, **settings))
    task = make_input(**settings)
    rows = join_rows(
        [(ids.tolist(), mask.tolist()) for ids, mask in map(task.rows.__getitem__, range(8))],
        sources=[TASK] * 8,
    )
    object.__setattr__(task, "rows", rows)
    plain = train_here(task)

    generator = torch.Generator().manual_seed(9)
    unseen = [(torch.randint(30, 60, (12,), generator=generator).tolist(), [True] * 12) for _ in range(16)]
    base = load_base(tiny_llama)
    kl_held, kl_plain = (
        mean_kl(base, load_adapted(tiny_llama, run.adapter), unseen) for run in (held, plain)
    )
    assert kl_held < 0.75 * kl_plain
    assert held.by_source[40][TASK] < held.by_source[10][TASK] - 0.5
