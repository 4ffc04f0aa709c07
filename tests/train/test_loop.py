"""The loop: gradients and loss by hand, stages, and the same run on one worker, on two, and in this process."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from delia.errors import TrainError
from delia.model.adapted import LoraConfig, attach
from delia.model.attention import use_packed_attention
from delia.model.loading import load_base
from delia.train.building import TrainInput, build_optimizer, build_order
from delia.train.head import HeadConfig, read_head
from delia.train.launch import run_training
from delia.train.loop import accumulate_gradients, clip_gradients
from delia.train.objective import prepare_loss
from delia.train.packing import pack_batch
from delia.train.rows import TASK, TrainRows, join_rows
from delia.train.settings import StageConfig, TrainConfig

# ---- loss and gradients


class Bigrams(nn.Module):
    """Three tokens; the logits of the next depend on the current one alone, whose one-hot is its hidden state."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        self.head.weight.data = torch.tensor(probabilities).log().T
        self.config = SimpleNamespace(vocab_size=3)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_decoder(self):
        return lambda input_ids, **_: SimpleNamespace(
            last_hidden_state=nn.functional.one_hot(input_ids, 3).float()
        )


def make_rows(tiny_llama, *rows) -> TrainInput:
    config = TrainConfig(stages=(StageConfig(max_steps=1),))
    joined = join_rows(rows, sources=[TASK] * len(rows), has_token=[True] * len(rows))
    return TrainInput(model=tiny_llama, config=config, rows=joined)


@pytest.fixture
def by_hand(tiny_llama):
    """Row 0: p(1|0) = 1/4 counts, p(2|1) = 1/2 doesn't. Row 1: p(0|2) = 1/8 and p(0|0) = 1/2 count."""
    rows = (((0, 1, 2), (False, True, False)), ((2, 0, 0), (False, True, True)))
    model = Bigrams([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.125, 0.375, 0.5]])
    prepare_loss(model, HeadConfig(softcap=None, scale=1.0))
    return model, make_rows(tiny_llama, *rows).rows


def test_the_loss_is_the_mean_over_trained_tokens(by_hand):
    """(ln 4 + ln 8 + ln 2) / 3 = 2 ln 2."""
    model, rows = by_hand
    loss = accumulate_gradients(model, rows, [[0, 1]], num_trained=3, num_workers=1)
    assert loss == pytest.approx(2 * math.log(2), rel=1e-6)


def test_the_gradient_is_that_of_the_mean_over_trained_tokens(by_hand):
    """Each counted token adds (probabilities - one-hot) / 3 to the row of its predecessor; row 1 has none."""
    model, rows = by_hand
    accumulate_gradients(model, rows, [[0], [1]], num_trained=3, num_workers=1)

    expected = [
        [(2 * 0.5 - 1) / 3, (2 * 0.25 - 1) / 3, 2 * 0.25 / 3],
        [0, 0, 0],
        [-0.875 / 3, 0.375 / 3, 0.5 / 3],
    ]
    torch.testing.assert_close(model.head.weight.grad.T, torch.tensor(expected), atol=1e-7, rtol=1e-6)


def test_a_worker_scales_by_the_number_of_workers_since_their_gradients_are_averaged(by_hand, monkeypatch):
    model, rows = by_hand
    accumulate_gradients(model, rows, [[0]], num_trained=3, num_workers=1)
    alone = model.head.weight.grad.clone()

    model.zero_grad()
    monkeypatch.setattr(
        "torch.distributed.all_reduce", lambda total: total.add_(math.log(16))
    )  # row 1's, elsewhere
    loss = accumulate_gradients(model, rows, [[0]], num_trained=3, num_workers=2)
    assert loss == pytest.approx(2 * math.log(2), rel=1e-6)
    assert torch.equal(model.head.weight.grad, 2 * alone)


def test_a_micro_batch_without_rows_adds_nothing(by_hand):
    model, rows = by_hand
    loss = accumulate_gradients(model, rows, [[]], num_trained=3, num_workers=1)
    assert loss == 0.0
    assert torch.equal(model.head.weight.grad, torch.zeros(3, 3))


@pytest.fixture(scope="module")
def adapted(tiny_llama):
    """A tiny Llama whose LoRA and rows have moved, so that every gradient is alive."""
    model = attach(load_base(tiny_llama), lora=LoraConfig(rank=4, alpha=8, dropout=0.0), token_ids=(7,))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or name.endswith("deltas_KD"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    use_packed_attention(model)
    prepare_loss(model, read_head(model))
    return model


def compute_gradients(model, rows: TrainRows, micro_batches: list[list[int]], num_trained: int):
    model.zero_grad()
    loss = accumulate_gradients(model, rows, micro_batches, num_trained=num_trained, num_workers=1)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("max_tokens", [1, 20, 45])
def test_micro_batches_add_up_to_the_batch(adapted, make_input, max_tokens):
    rows = make_input().rows
    batch = [0, 3, 5, 9, 14, 20, 21]
    num_trained = int(rows.num_trained_R[batch].sum())
    (parts,) = pack_batch(batch, rows.lengths_R.tolist(), num_workers=1, max_tokens=max_tokens)
    assert len(parts) > 1

    loss, expected = compute_gradients(adapted, rows, [batch], num_trained)
    loss_of_parts, gradients = compute_gradients(adapted, rows, parts, num_trained)
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert len(expected) == 2 * 4 * 2 + 1
    for name, gradient in expected.items():
        difference = (gradients[name] - gradient).norm() / gradient.norm()
        assert difference < 1e-5, name


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_told():
    """3, 4 and 12 have norm 13; clipped to 6.5, all are halved."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])

    assert clip_gradients(parameters, 6.5) == 13.0
    clipped = [value for p in parameters for value in p.grad.tolist()]
    assert clipped == pytest.approx([1.5, 2.0, 6.0], rel=1e-6)
    assert clip_gradients(parameters, 100.0) == pytest.approx(6.5, rel=1e-6)
    assert parameters[1].grad.tolist() == pytest.approx([6.0], rel=1e-6)


# ---- stages


def test_each_part_has_its_rate_and_only_lora_decays(adapted):
    stage = StageConfig(max_steps=1, learning_rate=0.1, token_learning_rate=0.3, weight_decay=0.5)
    lora, rows = build_optimizer(adapted, stage).param_groups
    assert (len(lora["params"]), lora["peak"], lora["weight_decay"]) == (16, 0.1, 0.5)
    assert (len(rows["params"]), rows["peak"], rows["weight_decay"]) == (1, 0.3, 0.0)


def test_a_stage_that_moves_what_is_not_there_is_refused(tiny_llama):
    model = attach(load_base(tiny_llama), lora=LoraConfig())
    with pytest.raises(TrainError, match=r"a stage moves \['token_rows'\], but none of them is attached"):
        build_optimizer(model, StageConfig(max_steps=1, parts=("token_rows",)))


def test_a_stage_on_token_rows_takes_the_rows_with_a_token(make_input):
    order = build_order(make_input(), StageConfig(max_steps=9, rows="token"))
    assert {row for step in range(9) for row in order.batch(step)} == {0, 3, 6, 9, 12, 15, 18, 21}


def test_a_stage_on_token_rows_without_any_is_refused(tiny_llama):
    task = make_rows(tiny_llama, ((1, 2), (False, True)))
    without = replace(task, rows=join_rows([((1, 2), (False, True))], sources=[TASK]))
    with pytest.raises(TrainError, match="rows with a declared token, but no row has one"):
        build_order(without, StageConfig(max_steps=1, rows="token"))


ROWS_STAGE = StageConfig(
    parts=("token_rows",), rows="token", max_steps=4, token_learning_rate=3e-2, warmup_steps=0
)
LORA_STAGE = StageConfig(parts=("lora",), max_steps=4, learning_rate=1e-2, warmup_steps=0)


def test_a_stage_of_rows_leaves_lora_as_it_started_and_the_next_leaves_the_rows(train_here, make_input):
    rows_only = train_here(make_input(stages=(ROWS_STAGE,))).tensors
    both = train_here(make_input(stages=(ROWS_STAGE, LORA_STAGE))).tensors

    b_names = {name for name in rows_only if "lora_B" in name}
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    assert len(b_names) == 8
    assert all(rows_only[name].eq(0).all() for name in b_names)
    assert all(both[name].abs().max() > 1e-3 for name in b_names)
    assert rows_only[f"{embedding}B"].abs().max() > 1e-2
    assert torch.equal(both[f"{embedding}B"], rows_only[f"{embedding}B"])
    assert both[f"{embedding}A"].nonzero().tolist() == [[0, 7]]


def test_saving_changes_nothing_in_any_stage(train_here, make_input):
    """A checkpoint in the first stage holds the second's optimizer; it must not count that as a step."""
    stages = (ROWS_STAGE, LORA_STAGE)
    seldom = train_here(make_input(stages=stages, checkpoint_every=100))
    often = train_here(make_input(stages=stages, checkpoint_every=1))
    assert (list(seldom.checkpoints), list(often.checkpoints)) == ([8], list(range(1, 9)))
    assert often.losses == seldom.losses
    assert all(torch.equal(often.tensors[name], value) for name, value in seldom.tensors.items())


def test_training_lowers_the_loss(train_here, make_input):
    stage = StageConfig(max_steps=60, learning_rate=2e-2, token_learning_rate=3e-2, warmup_steps=3)
    losses = train_here(make_input(stages=(stage,), log_every=10, global_batch_size=24)).losses
    assert list(losses) == [10, 20, 30, 40, 50, 60]
    assert losses[60] < losses[10] - 1.0


def test_a_loss_that_is_no_number_ends_the_run_with_its_step_and_the_way_out(train_here, make_input):
    stage = StageConfig(max_steps=5, learning_rate=1e30, token_learning_rate=1e30, warmup_steps=0)
    run = train_here(make_input(stages=(stage,), checkpoint_every=1))
    assert run.outcome.step == 1
    assert run.outcome.problem.startswith(
        "step 1: loss nan, gradient norm nan; lower train.stages.0.learning_rate"
    )
    assert list(run.checkpoints) == [1], "a model that is broken was kept"


def test_a_worker_stops_when_another_has_found_something_wrong(train_here, make_input, monkeypatch):
    others = iter((False, True))  # the memory is large enough; the first step's gradient is not finite there
    monkeypatch.setattr("delia.train.loop.agree", lambda flag: flag or next(others))
    outcome = train_here(make_input()).outcome
    assert (outcome.step, outcome.problem) == (0, "step 0: another worker stopped; see its log")


# ---- on Ray Train


def test_a_worker_of_ray_train_does_what_the_loop_does_here(run_of_one, train_here, make_input):
    here = train_here(make_input())
    assert list(here.losses) == list(run_of_one.losses) == list(range(1, 13))
    assert list(here.losses.values()) == pytest.approx(list(run_of_one.losses.values()), rel=1e-6)
    assert here.tensors.keys() == run_of_one.tensors.keys()
    for name, value in run_of_one.tensors.items():
        torch.testing.assert_close(
            here.tensors[name], value, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_workers_train_what_one_does(run_of_one, run_of_two, find_far):
    assert list(run_of_two.losses) == list(range(1, 13))
    assert list(run_of_two.losses.values()) == pytest.approx(list(run_of_one.losses.values()), rel=1e-5)
    assert find_far(run_of_two.tensors, run_of_one.tensors) == {}
    assert run_of_one.losses[12] != run_of_one.losses[1]


def test_a_run_that_can_not_go_on_is_a_train_error_with_the_reason(cluster, make_input, tmp_path):
    stage = StageConfig(max_steps=5, learning_rate=1e30, token_learning_rate=1e30, warmup_steps=0)
    task = make_input(stages=(stage,), max_failures=0)
    with pytest.raises(
        TrainError, match=r"training hopeless: step 1: loss nan.*; last good checkpoint: none yet"
    ):
        run_training(
            task,
            name="hopeless",
            storage=str(tmp_path / "storage"),
            output=str(tmp_path / "out"),
            log=lambda *_: None,
        )
    assert not (tmp_path / "out").exists()
