"""The search space: anchors are always there, and a trial's name decides its arm."""

from delia.recipes.starter import search_starter_sep
from delia.search.space import plan_trials, shorten


def test_ratio_zero_and_rows_only_are_always_among_the_trials() -> None:
    config = search_starter_sep().model_copy(update={"ratios": (5.0,)})
    trials = plan_trials(config)
    assert trials["ratio-0-rate-1"].mix.diverse_ratio == 0.0
    assert trials["rows-only"].train.lora is None
    assert [stage.parts for stage in trials["rows-only"].train.stages] == [("token_rows",)]
    assert trials["ratio-5-rate-1"].mix.diverse_ratio == 5.0


def test_the_recipe_is_repeated_under_other_seeds_to_measure_the_noise() -> None:
    config = search_starter_sep().model_copy(update={"num_anchor_seeds": 3})
    trials = plan_trials(config)
    seeds = {name: arm.train.seed for name, arm in trials.items() if name.startswith("anchor")}
    assert seeds == {"anchor-seed-1": 1, "anchor-seed-2": 2}


def test_learning_rate_factors_scale_every_stage() -> None:
    config = search_starter_sep().model_copy(update={"learning_rate_factors": (1.0, 0.5), "ratios": (3.0,)})
    trials = plan_trials(config)
    whole = [stage.learning_rate for stage in trials["ratio-3-rate-1"].train.stages]
    half = [stage.learning_rate for stage in trials["ratio-3-rate-0.5"].train.stages]
    assert half == [rate / 2 for rate in whole]


def test_a_rung_cuts_every_stage_to_its_share() -> None:
    arm = search_starter_sep().recipe.arm
    assert [stage.max_steps for stage in shorten(arm, 0.25).train.stages] == [
        round(stage.max_steps / 4) for stage in arm.train.stages
    ]
    assert shorten(arm, 1.0) == arm
