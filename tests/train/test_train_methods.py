"""Research methods inside the loop: what they do to a run, and that resuming and workers change nothing."""

import pytest
import torch

from delia.config import MethodConfig
from delia.errors import ConfigError
from delia.methods.parameter_mask.hft import HFT
from delia.train.methods import build_methods
from delia.train.rows import TASK
from delia.train.settings import MetersConfig, RowScoresConfig, StageConfig

METHODS = "delia.methods"
HFT_OF_3 = MethodConfig(method=f"{METHODS}.parameter_mask.hft.HFT", knobs={"steps_per_round": 3})
MASKED = MethodConfig(method=f"{METHODS}.input_corruption.mft.MFT")
BY_PROBABILITY = MethodConfig(method=f"{METHODS}.token_weighter.dft.DFT")
ALL = {
    "parameter_mask": HFT_OF_3,
    "input_corruption": MASKED,
    "token_weighter": BY_PROBABILITY,
    "kl_weight": 0.5,
}


def make_stage(num_steps: int) -> tuple[StageConfig, ...]:
    """A constant rate, so that a shorter run is the beginning of a longer one."""
    rates = {"learning_rate": 1e-2, "token_learning_rate": 1e-2, "weight_decay": 0.1}
    return (StageConfig(max_steps=num_steps, warmup_steps=0, **rates),)


def name_unit(tensor: str) -> str:
    return tensor.removeprefix("base_model.model.").partition(".lora_")[0]


def test_what_a_round_freezes_is_bit_identical_after_it(train_here, make_input):
    """Decay and momentum of the round before would move it; the other half moves."""
    after = {
        steps: train_here(make_input(stages=make_stage(steps), parameter_mask=HFT_OF_3)).tensors
        for steps in (3, 6)
    }
    units = sorted({name_unit(name) for name in after[3] if "self_attn" in name})
    first, second = (HFT(steps_per_round=3)(units, seed=3, step=step) for step in (0, 3))
    assert (len(units), len(first), len(second)) == (8, 4, 4)
    for name in (name for name in after[3] if "self_attn" in name):
        assert torch.equal(after[3][name], after[6][name]) == (name_unit(name) in second), name
        if "lora_B" in name:
            assert bool(after[3][name].eq(0).all()) == (name_unit(name) in first), name


def test_the_units_that_are_frozen_are_named_alike_by_the_model(make_input, train_here):
    """The test above names units by the export; this one holds that the mask was asked about those names."""
    seen: list[tuple[str, ...]] = []
    task = make_input()
    methods = build_methods(task, vocab_size=64)
    assert methods.mask is None
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(2, 2), "other": torch.nn.Linear(2, 2)})
    object.__setattr__(methods, "mask", lambda units, seed, step: seen.append(units) or frozenset())
    methods.freeze(model, list(model["q"].parameters()), 0)
    assert seen == [("q.weight", "q.bias")], "what another stage moves is none of a mask's business"


def test_a_run_with_every_method_resumed_after_any_step_ends_like_the_whole_one(train_here, make_input):
    task = make_input(stages=make_stage(7), checkpoint_every=2, dropout=0.2, **ALL)
    whole = train_here(task)
    for step, checkpoint in whole.checkpoints.items():
        if step < 7:
            rest = train_here(task, checkpoint)
            assert rest.losses == {later: loss for later, loss in whole.losses.items() if later > step}
            assert all(torch.equal(rest.tensors[name], value) for name, value in whole.tensors.items())
    plain = train_here(make_input(stages=make_stage(7), dropout=0.2))
    assert plain.losses[1] != whole.losses[1]


def test_micro_batches_and_packing_change_no_method(train_here, make_input):
    runs = [
        train_here(make_input(stages=make_stage(5), max_tokens_per_micro_batch=size, **ALL))
        for size in (12, 500)
    ]
    assert list(runs[0].losses.values()) == pytest.approx(list(runs[1].losses.values()), rel=1e-4)


def test_two_workers_with_every_method_and_the_meters_do_what_one_does(
    train_here, train_together, make_input
):
    settings = {"stages": make_stage(6), "meters": MetersConfig(every=3, num_rows=4), **ALL}
    one = train_here(make_input(**settings))
    two = train_together(make_input(num_workers=2, **settings))

    assert list(two.losses.values()) == pytest.approx(list(one.losses.values()), rel=1e-5)
    for step, by_source in one.by_source.items():
        assert by_source.keys() == {TASK, "diverse"}
        for source, loss in by_source.items():
            assert two.by_source[step][source] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert list(two.readings) == list(one.readings) == [0, 3]
    for step, expected in one.readings.items():
        assert two.readings[step].keys() == expected.keys()
        for name in (name for name in expected if "meter" not in name):
            assert two.readings[step][name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), (step, name)
    for name, value in two.tensors.items():
        torch.testing.assert_close(value, one.tensors[name], atol=1e-4, rtol=0)


def test_the_loss_by_source_adds_up_to_the_step_s(train_here, make_input):
    task = make_input(stages=make_stage(3), global_batch_size=24)
    run = train_here(task)
    counts = {
        source: int(task.rows.num_trained_R[task.rows.source_R == place].sum())
        for place, source in enumerate(task.rows.sources)
    }
    for step, by_source in run.by_source.items():
        mean = sum(by_source[source] * count for source, count in counts.items()) / sum(counts.values())
        assert mean == pytest.approx(run.losses[step], rel=1e-5)
        assert abs(by_source[TASK] - by_source["diverse"]) > 1e-3


def test_scores_that_no_method_reads_are_refused(make_input):
    scores = RowScoresConfig(path="scores.parquet", column="doubt")
    with pytest.raises(ConfigError, match=r"set train\.token_weighter"):
        build_methods(make_input(row_scores=scores), vocab_size=64)


def test_a_method_of_elsewhere_needs_leave(make_input):
    foreign = MethodConfig(method="my_lab.weights.Mine")
    with pytest.raises(ConfigError, match=r"outside delia\.methods"):
        build_methods(make_input(token_weighter=foreign), vocab_size=64)
