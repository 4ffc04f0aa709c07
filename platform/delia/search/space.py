"""The search space: a recipe's arm at several ratios and learning rates, and the anchors beside it.

    AdaptConfig + SearchConfig -> named arms, always the same for the same settings

Ratio 0 (plain tuning) and rows-only are always among them; the recipe's own arm is repeated under
other seeds, so that the noise floor is measured and not assumed.
"""

from pydantic import Field

from delia.config import FrozenConfig
from delia.flow.adapt import AdaptConfig
from delia.flow.trial import ArmConfig
from delia.train.settings import StageConfig, TrainConfig


class SearchConfig(FrozenConfig):
    """What is searched on one pool, and what counts as the task and as not forgetting.

    `learning_rate_factors` scale the recipe's LoRA rates. `rungs` are shares of the recipe's steps at
    which a trial is scored; with `scheduler="asha"` the worse half stops at each, with "none" every trial
    runs to the end.
    """

    recipe: AdaptConfig
    ratios: tuple[float, ...] = (0.0, 3.0, 10.0)
    learning_rate_factors: tuple[float, ...] = (1.0,)
    num_anchor_seeds: int = Field(default=2, gt=0)
    task_suites: tuple[str, ...] = ("follow", "transfer")
    kept_suites: tuple[str, ...] = ("negated_same", "negated_other", "absent", "general")
    scheduler: str = Field(default="none", pattern="^(none|asha)$")
    rungs: tuple[float, ...] = (1.0,)
    max_concurrent_trials: int = Field(default=1, gt=0)


def plan_trials(config: SearchConfig) -> dict[str, ArmConfig]:
    """Return the arms by name: the grid, and the anchors under several seeds."""
    arm = config.recipe.arm
    trials = {
        f"ratio-{ratio:g}-rate-{factor:g}": _scale(arm, ratio=ratio, factor=factor)
        for ratio in dict.fromkeys((0.0, *config.ratios))
        for factor in config.learning_rate_factors
    }
    rows_only = _rows_only(arm)
    if rows_only is not None:
        trials["rows-only"] = rows_only
    for seed in range(1, config.num_anchor_seeds):
        seeded = arm.train.model_copy(update={"seed": arm.train.seed + seed})
        trials[f"anchor-seed-{seed}"] = arm.model_copy(update={"train": seeded})
    return trials


def shorten(arm: ArmConfig, share: float) -> ArmConfig:
    """Return the arm with every stage cut to a share of its steps, at least one step each."""
    stages = tuple(
        stage.model_copy(update={"max_steps": max(1, round(stage.max_steps * share))})
        for stage in arm.train.stages
    )
    return arm.model_copy(update={"train": arm.train.model_copy(update={"stages": stages})})


def _scale(arm: ArmConfig, *, ratio: float, factor: float) -> ArmConfig:
    stages = tuple(
        stage.model_copy(update={"learning_rate": stage.learning_rate * factor}) for stage in arm.train.stages
    )
    return ArmConfig(
        mix=arm.mix.model_copy(update={"diverse_ratio": ratio}),
        train=arm.train.model_copy(update={"stages": stages}),
    )


def _rows_only(arm: ArmConfig) -> ArmConfig | None:
    """Return the arm with its token rows alone moving, None where it moves none."""
    moving = [stage for stage in arm.train.stages if "token_rows" in stage.parts]
    if not moving:
        return None
    stage: StageConfig = moving[0].model_copy(update={"parts": ("token_rows",), "rows": "token"})
    train: TrainConfig = arm.train.model_copy(update={"lora": None, "stages": (stage,)})
    return ArmConfig(mix=arm.mix.model_copy(update={"diverse_ratio": 0.0}), train=train)
