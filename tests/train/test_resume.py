"""A run killed anywhere ends like one that was not: bit for bit, and within 1e-5 on other workers."""

import pytest
import torch

from delia.train.settings import StageConfig

STAGES = (
    StageConfig(parts=("token_rows",), rows="token", max_steps=4, token_learning_rate=3e-2, warmup_steps=2),
    StageConfig(max_steps=5, learning_rate=1e-2, warmup_steps=2, schedule="cosine", weight_decay=0.1),
)


def assert_equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


def test_a_run_resumed_after_any_step_ends_like_the_whole_one(train_here, make_input):
    """Two stages with dropout: parameters, both optimizers, order, schedule and seeds all have to be right."""
    task = make_input(stages=STAGES, checkpoint_every=1, dropout=0.2)
    whole = train_here(task)
    assert len(whole.checkpoints) == 9

    for step, checkpoint in whole.checkpoints.items():
        if step < 9:
            rest = train_here(task, checkpoint)
            assert rest.losses == {later: loss for later, loss in whole.losses.items() if later > step}
            assert_equal_tensors(rest.tensors, whole.tensors)


def test_dropout_is_drawn_anew_each_step_and_never_by_the_adapter_alone(train_here, make_input):
    """Without this the test above could pass with dropout that is off, or equal in every step."""
    stages = (StageConfig(max_steps=3, learning_rate=1e-9, token_learning_rate=1e-9, warmup_steps=0),)
    whole_batch = {"stages": stages, "global_batch_size": 24}
    still, wild = (train_here(make_input(dropout=share, **whole_batch)).tensors for share in (0.0, 0.9))
    b_name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert not torch.equal(still[b_name], wild[b_name])


def test_a_checkpoint_of_two_workers_goes_on_with_one(run_of_two, run_of_one, train_here, make_input):
    rest = train_here(make_input(), run_of_two.checkpoints[6])
    assert list(rest.losses) == list(range(7, 13))
    expected = [run_of_one.losses[step] for step in rest.losses]
    assert list(rest.losses.values()) == pytest.approx(expected, rel=1e-5)
    for name, value in rest.tensors.items():
        torch.testing.assert_close(value, run_of_two.tensors[name], atol=1e-4, rtol=0)


def test_a_finished_run_started_again_trains_nothing_and_leaves_the_same(
    train_on_ray, make_input, run_of_one
):
    storage = run_of_one.checkpoints[12].parents[1]
    again = train_on_ray(make_input(), storage=storage)
    assert again.losses == {}
    assert_equal_tensors(again.tensors, run_of_one.tensors)
