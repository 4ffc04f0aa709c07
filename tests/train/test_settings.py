"""Settings of training: schedules worked by hand, and which stage a step is in."""

import pytest

from delia.config import validate
from delia.errors import ConfigError
from delia.train.settings import StageConfig, TrainConfig, scale_rate


def list_rates(**settings) -> list[float]:
    stage = StageConfig(**settings)
    return [scale_rate(stage, step) for step in range(stage.max_steps)]


def test_a_constant_rate_warms_up_in_equal_parts_and_the_first_step_moves():
    assert list_rates(max_steps=6, warmup_steps=4, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_rate_falls_to_one_part_before_zero():
    """After two steps of warm-up four remain: 1, 3/4, 2/4, 1/4; zero would come with step 6."""
    assert list_rates(max_steps=6, warmup_steps=2, schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_cosine_rate_is_half_at_the_middle():
    """Four steps: cos 0, cos 45, cos 90, cos 135 degrees -> 1, (2 + sqrt 2) / 4, 1/2, (2 - sqrt 2) / 4."""
    root = 2**0.5
    expected = [1.0, (2 + root) / 4, 0.5, (2 - root) / 4]
    assert list_rates(max_steps=4, warmup_steps=0, schedule="cosine") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_stage_shorter_than_its_warm_up_only_warms_up(schedule):
    assert list_rates(max_steps=3, warmup_steps=4, schedule=schedule) == [0.25, 0.5, 0.75]


def test_a_step_is_found_in_its_stage():
    config = TrainConfig(stages=tuple(StageConfig(max_steps=count) for count in (2, 1, 3)))
    assert config.max_steps == 6
    assert [config.locate(step) for step in range(6)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]


def test_a_step_past_the_last_stage_is_in_none():
    with pytest.raises(IndexError, match="step 2 is past the last stage"):
        TrainConfig(stages=(StageConfig(max_steps=2),)).locate(2)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"stages": []}, "stages"),
        ({"stages": [{"max_steps": 0}]}, "stages.0.max_steps"),
        ({"stages": [{"max_steps": 1}], "global_batch_size": 0}, "global_batch_size"),
        ({"stages": [{"max_steps": 1}], "max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch"),
        ({"stages": [{"max_steps": 1}], "num_workers": 0}, "num_workers"),
        ({"stages": [{"max_steps": 1}], "max_length": 0}, "max_length"),
        ({"stages": [{"max_steps": 1, "parts": ["head"]}]}, "stages.0.parts.0"),
    ],
)
def test_settings_that_train_nothing_are_refused_by_name(settings, name):
    with pytest.raises(ConfigError, match=f"setting '{name}'"):
        validate(TrainConfig, settings)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"log_every": 0}, "log_every"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"num_kept_checkpoints": 0}, "num_kept_checkpoints"),
        ({"max_failures": -1}, "max_failures"),
        ({"stages": [{"max_steps": 1, "parts": []}]}, "stages.0.parts"),
        ({"stages": [{"max_steps": 1, "warmup_steps": -1}]}, "stages.0.warmup_steps"),
        ({"lora": {"rank": 0}}, "lora.rank"),
    ],
)
def test_numbers_that_would_break_a_run_half_way_are_refused_before_it(settings, name):
    with pytest.raises(ConfigError, match=f"setting '{name}'"):
        validate(TrainConfig, {"stages": [{"max_steps": 1}], **settings})
