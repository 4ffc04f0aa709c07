"""The settings of training, and the learning-rate schedules they name."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from delia.config import FrozenConfig, MethodConfig
from delia.model.adapted import Part, TokenInit
from delia.model.lora import LoraConfig

Schedule = Literal["constant", "linear", "cosine"]
HOW_ONLY = (
    "max_tokens_per_micro_batch",
    "max_loss_spike",
    "max_norm_spike",
    "num_workers",
    "use_gpu",
    "num_cpus_per_worker",
    "shard_group",
    "gradient_checkpointing",
    "offload",
    "compile",
    "checkpoint_every",
    "num_kept_checkpoints",
    "log_every",
    "max_failures",
    "meters",
)
"""Settings that say how a training is run and watched, not what is learnt; rounding and dropout's draws apart."""


class StageConfig(FrozenConfig):
    """One stretch of training: which parts move, on which rows, how fast, for how long.

    `learning_rate` is that of LoRA, or of the base's own parameters where `parts` names `base` (full tuning).
    `rows="token"` takes only the rows in which a declared token occurs: no other row has a gradient
    for the token rows.
    """

    parts: tuple[Part, ...] = Field(default=("lora", "token_rows"), min_length=1)
    rows: Literal["mixture", "token"] = "mixture"
    max_steps: int = Field(gt=0)
    learning_rate: float = Field(default=2e-4, ge=0)
    token_learning_rate: float = Field(default=1e-2, ge=0)
    warmup_steps: int = Field(default=25, ge=0)
    schedule: Schedule = "constant"
    weight_decay: float = Field(default=0.0, ge=0)


class RowScoresConfig(FrozenConfig):
    """A column of numbers by row id, read by a token weighter.

    `path` is the address of a Parquet table with a column `row_id`, such as a pool's `scores.parquet`.
    Rows that it lacks have the score `missing`; None refuses them.
    """

    path: str = Field(min_length=1)
    column: str = Field(min_length=1)
    missing: float | None = None


class MetersConfig(FrozenConfig):
    """DELIA's meters (`train.meters`): how often they are read, and on how much.

    They are read before every `every`-th step, the first included, on rows that stay the same: at most `num_rows`
    of the task and as many diverse ones, spread over all sources, so that a reading costs no more with more of
    them (but each has one row at least). The new token is measured among `num_words` words of the vocabulary, or
    all if that is as large. `seed` draws rows, words and permutations; `train/meter_share` says what it all costs.
    """

    every: int = Field(default=50, gt=0)
    num_rows: int = Field(default=16, gt=0)
    num_words: int = Field(default=256, gt=1)
    num_permutations: int = Field(default=999, gt=0)
    seed: int = 0


class TrainConfig(FrozenConfig):
    """How an adapter is trained; stages run one after the other on the same parameters.

    Stages whose parts name `base` train all parameters, without LoRA: what comes out is a model of its own.

    Parameters are sharded over all workers, or over groups of `shard_group` that hold a copy each (HSDP).
    `gradient_checkpointing` computes layers again in the backward pass, `offload` keeps shards in the host's
    memory: both give time for memory. `compile` lets torch.compile fuse what lies between matrix products;
    its first steps take minutes, and it needs a compiler. `max_loss_spike` and `max_norm_spike` end a training
    that goes wrong (see `train.guards`).

    `token_weighter`, `parameter_mask` and `input_corruption` name research methods. `kl_weight` has the
    diverse rows' trained tokens held to the base's whole distribution, with this weight, in the place of their
    labels: an explicit penalty, to compare DELIA with. `meters` measure while training, and change nothing.
    """

    lora: LoraConfig | None = LoraConfig()
    token_init: TokenInit = "reserved_row"
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    global_batch_size: int = Field(default=32, gt=0)
    max_tokens_per_micro_batch: int = Field(default=8192, gt=0)
    max_length: int = Field(default=512, gt=1)
    on_long: Literal["error", "drop", "truncate_prompt_left"] = "error"
    train_on: Literal["last", "all"] = "last"
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_loss_spike: float | None = Field(default=5.0, gt=1)
    max_norm_spike: float | None = Field(default=100.0, gt=1)
    seed: int = 0
    num_workers: int = Field(default=1, gt=0)
    use_gpu: bool = False
    num_cpus_per_worker: float = 1.0
    shard_group: int | None = Field(default=None, gt=0)
    gradient_checkpointing: bool = False
    offload: bool = False
    compile: bool = False
    checkpoint_every: int = Field(default=100, gt=0)
    num_kept_checkpoints: int = Field(default=2, gt=0)
    log_every: int = Field(default=10, gt=0)
    max_failures: int = Field(default=3, ge=0)
    token_weighter: MethodConfig | None = None
    row_scores: RowScoresConfig | None = None
    parameter_mask: MethodConfig | None = None
    input_corruption: MethodConfig | None = None
    kl_weight: float | None = Field(default=None, gt=0)
    meters: MetersConfig | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.trains_base and self.lora is not None:
            raise ValueError(
                "a stage moves the base itself, which a LoRA adapter belongs over as it was; set train.lora=null,"
                " or take 'base' out of the parts of train.stages"
            )
        if self.trains_base and self.kl_weight is not None:
            raise ValueError(
                f"kl_weight={self.kl_weight:g} needs the base as it was, and a stage moves the base itself; unset"
                " train.kl_weight, or train LoRA"
            )
        return self

    @property
    def trains_base(self) -> bool:
        """Tell whether any stage moves the base's own parameters."""
        return any("base" in stage.parts for stage in self.stages)

    @property
    def max_steps(self) -> int:
        """Return the optimizer steps of all stages together."""
        return sum(stage.max_steps for stage in self.stages)

    def name_content(self) -> "TrainConfig":
        """Return what decides the adapter, all else at its default: trainings of equal content are one run.

        So a run goes on where it stopped with more workers, other memory settings or another log.
        """
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].get_default() for name in HOW_ONLY})

    def locate(self, step: int) -> tuple[int, int]:
        """Return (stage index, step inside it) of a global step that starts at 0."""
        start = 0
        for index, stage in enumerate(self.stages):
            if step < start + stage.max_steps:
                return index, step - start
            start += stage.max_steps
        raise IndexError(f"step {step} is past the last stage")


def scale_rate(stage: StageConfig, step: int) -> float:
    """Return the factor of the peak learning rate at a step of the stage, the first being 0."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    progress = (step - stage.warmup_steps) / max(1, stage.max_steps - stage.warmup_steps)
    return 1.0 - progress if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
