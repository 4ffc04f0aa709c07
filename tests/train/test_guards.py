"""What ends a training and what may not begin one: spikes by hand, and rows that would teach wrongly."""

import math
from collections.abc import Callable
from itertools import count

import pytest

from delia.errors import TrainError
from delia.train import loop
from delia.train.guards import (
    MIN_STEPS,
    WINDOW,
    LossWatch,
    check_left,
    check_template,
    check_trained,
)
from delia.train.settings import StageConfig, TrainConfig


def make_config(*num_steps: int, **settings) -> TrainConfig:
    return TrainConfig(
        stages=tuple(StageConfig(max_steps=count) for count in num_steps or (100,)), **settings
    )


def watch_losses(losses: list[float], config: TrainConfig | None = None, *, norm: float = 0.5) -> list[str]:
    watch = LossWatch(config or make_config())
    return [watch.see(step, loss, norm) for step, loss in enumerate(losses)]


# ---- spikes


def test_a_loss_over_five_times_the_median_of_the_last_steps_is_a_spike():
    """The median of 2, ..., 2 is 2: 10 is not over 5 x 2, 10.1 is."""
    assert watch_losses([2.0] * 20 + [10.0]) == [""] * 21
    *before, problem = watch_losses([2.0] * 20 + [10.1])
    assert before == [""] * 20
    assert problem.startswith("step 20: loss 10.1 is over 10, train.max_loss_spike=5 times")
    assert "lower train.stages.0.learning_rate" in problem


def test_a_learnt_loss_counts_as_a_nat_so_that_one_hard_batch_is_no_spike():
    assert watch_losses([0.001] * 20 + [5.0]) == [""] * 21
    assert watch_losses([0.001] * 20 + [5.1])[-1] != ""


def test_a_loss_that_falls_fast_from_a_high_start_is_no_spike():
    assert not any(watch_losses([9.0 * 0.7**step for step in range(60)]))


def test_the_first_steps_of_a_stage_are_not_compared_with_those_of_another():
    losses = [1.0] * 40 + [30.0] * 10
    assert not any(watch_losses(losses, make_config(40, 10)))
    assert watch_losses(losses, make_config(100))[40] != ""


def test_only_so_many_last_steps_count():
    """After a window of losses of 10 the earlier 1 are forgotten."""
    slow = [1.0] * 40 + [4.0] * WINDOW + [19.0]
    assert not any(watch_losses(slow))
    assert watch_losses([1.0] * 40 + [4.0] * 3 + [19.0])[-1] != ""


def test_there_is_no_spike_before_there_is_something_to_compare_with():
    assert not any(watch_losses([1.0] * (MIN_STEPS - 1) + [100.0]))
    assert watch_losses([1.0] * MIN_STEPS + [100.0])[-1] != ""


def test_a_gradient_norm_is_a_spike_over_its_own_factor_and_never_under_what_is_clipped():
    """Norms of 0.01 count as the clipping norm of 2: 200 is the bound at a factor of 100."""
    for norm, is_spike in ((200.0, False), (201.0, True)):
        watch = LossWatch(make_config(max_grad_norm=2.0))
        assert not any(watch.see(step, 1.0, 0.01) for step in range(20))
        problem = watch.see(20, 1.0, norm)
        assert bool(problem) == is_spike
    assert problem.startswith("step 20: gradient norm 201 is over 200, train.max_norm_spike=100 times")


def test_limits_are_off_by_setting_but_a_number_is_always_wanted():
    free = make_config(max_loss_spike=None, max_norm_spike=None)
    assert not any(watch_losses([1.0] * 20 + [1e30], free))
    assert watch_losses([1.0, math.nan], free)[1].startswith("step 1: loss nan, gradient norm 0.5; lower")
    assert LossWatch(free).see(0, 1.0, math.inf) != ""


@pytest.fixture
def spike_at(monkeypatch) -> Callable[[int], None]:
    """Return a function that lets the loss of one step to come, the next being 0, be 100 nats."""
    real = loop.accumulate_gradients

    def put(step: int) -> None:
        coming = count()

        def accumulate(*args, **settings) -> float:
            loss = real(*args, **settings)
            return 100.0 if next(coming) == step else loss

        monkeypatch.setattr(loop, "accumulate_gradients", accumulate)

    return put


def test_a_run_that_spikes_ends_before_that_step_is_taken_and_keeps_its_last_checkpoint(
    train_here, make_input, spike_at
):
    """Resumed two steps before the spike it ends in the same place: what was seen is in the checkpoint."""
    task = make_input(checkpoint_every=1)
    spike_at(11)
    run = train_here(task)
    assert run.outcome.step == 11
    assert "step 11: loss 100 is over" in run.outcome.problem
    assert list(run.checkpoints) == list(range(1, 12))
    assert run.adapter is None

    spike_at(2)
    resumed = train_here(task, run.checkpoints[9])
    assert resumed.outcome == run.outcome


# ---- rows


def test_a_row_that_trains_nothing_or_never_ends_is_refused():
    ids, ends = (5, 6, 7, 2), (2, 3)
    check_trained(ids, (False, False, True, True), end_ids=ends, name="row 3")
    with pytest.raises(TrainError, match="row 3 has no trained token"):
        check_trained(ids, (False,) * 4, end_ids=ends, name="row 3")
    with pytest.raises(TrainError, match=r"last trained token of row 3 is 7, .*\[2, 3\] do"):
        check_trained(ids, (False, True, True, False), end_ids=ends, name="row 3")


def test_a_pool_of_another_template_is_refused():
    check_template("abc", "abc")
    check_template(None, "abc")  # rows from a file were sampled from no template
    with pytest.raises(TrainError, match="template hash abc, training has xyz"):
        check_template("abc", "xyz")


def test_a_mixture_that_the_policy_of_long_rows_empties_is_refused_with_the_counts():
    config = make_config(max_length=16, on_long="drop")
    check_left(["task"], ["task", "magpie"], config)
    check_left(["magpie"], ["magpie"] * 2, config)
    with pytest.raises(TrainError, match=r"of 2 rows none is left under train\.max_length=16"):
        check_left([], ["task", "magpie"], config)
    with pytest.raises(TrainError, match="of 3 task rows none is left"):
        check_left(["magpie"], ["task", "magpie", "task", "task"], config)
