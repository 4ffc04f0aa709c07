"""Recipes on the embedded starter model: minutes on two CPU cores, the same code as on a cluster."""

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.flow.adapt import AdaptConfig
from delia.flow.pool import PoolConfig
from delia.flow.promotion import PromoteConfig
from delia.flow.reproduction import ReproduceConfig
from delia.flow.trial import ArmConfig
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.mix.mixture import MixConfig
from delia.model.adapted import TokenInit
from delia.model.lora import LoraConfig
from delia.search.space import SearchConfig
from delia.store.models import ModelConfig
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig
from delia.train.settings import StageConfig, TrainConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
ENGINE = EngineConfig(num_replicas=2, max_model_len=512, batch_size=256)
LORA = LoraConfig(rank=16, alpha=16, dropout=0.05)
SELF_SAMPLED = MixConfig(diverse_ratio=10.0, shares={"magpie": 1.0})
# sentences of a tiny world share most of their words: only equal instructions are duplicates or overlap
CURATE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None)


def _magpie(num_rows: int) -> SourceConfig:
    return SourceConfig(
        name="magpie",
        synthesizer=MethodConfig(method="delia.methods.synthesizer.magpie.Magpie"),
        num_rows=num_rows,
    )


def _joint_stage(num_steps: int, *, learning_rate: float) -> StageConfig:
    return StageConfig(
        parts=("lora", "token_rows"),
        max_steps=num_steps,
        learning_rate=learning_rate,
        token_learning_rate=3e-2,
        warmup_steps=min(25, num_steps),
        schedule="linear",
    )


def _rows_stage(num_steps: int, *, token_learning_rate: float) -> StageConfig:
    return StageConfig(
        parts=("token_rows",),
        rows="token",
        max_steps=num_steps,
        token_learning_rate=token_learning_rate,
        schedule="linear",
    )


def _plain_arm(num_steps: int, learning_rate: float) -> ArmConfig:
    """Return plain tuning; the token starts at the mean of the words that it stands for."""
    stage = _joint_stage(num_steps, learning_rate=learning_rate)
    train = TrainConfig(lora=LORA, token_init="mean_instruction", stages=(stage,))
    return ArmConfig(mix=MixConfig(diverse_ratio=0.0), train=train)


ROWS_ONLY = TrainConfig(
    lora=None, token_init="mean_instruction", stages=(_rows_stage(100, token_learning_rate=1e-2),)
)


def starter_sep() -> AdaptConfig:
    """Condense a long format instruction into `<sep>`: the quickstart."""
    plain = _plain_arm(200, learning_rate=5e-3)
    return AdaptConfig(
        name="starter_sep",
        model=STARTER,
        task=TaskConfig(path="package://delia.starter/tasks/sep"),
        pool=PoolConfig(
            synthesize=SynthesizeConfig(sources=(_magpie(1200),), sampling=SamplingConfig(max_tokens=96)),
            curate=CURATE,
        ),
        arm=ArmConfig(
            mix=SELF_SAMPLED,
            train=TrainConfig(
                lora=LORA,
                token_init="stand_in",
                stages=(
                    _rows_stage(60, token_learning_rate=3e-3),
                    StageConfig(parts=("lora",), max_steps=100, learning_rate=5e-4, schedule="linear"),
                ),
            ),
        ),
        baselines={
            "plain": plain,
            "delia": plain.model_copy(update={"mix": SELF_SAMPLED}),
            "rows_only": ArmConfig(mix=MixConfig(diverse_ratio=0.0), train=ROWS_ONLY),
        },
        engine=ENGINE,
        split="test",
        max_concurrent_arms=2,
    )


def starter_lingo() -> AdaptConfig:
    """Teach words of an invented language that the base has never seen translated.

    What is to be learnt here are facts: LoRA is on every linear layer, and the ratio is low.
    """
    every_layer = LORA.model_copy(
        update={"target_modules": (*LORA.target_modules, "gate_proj", "up_proj", "down_proj")}
    )
    train = TrainConfig(lora=every_layer, stages=(_joint_stage(400, learning_rate=5e-3),))
    return AdaptConfig(
        name="starter_lingo",
        model=STARTER,
        task=TaskConfig(path="package://delia.starter/tasks/lingo"),
        pool=PoolConfig(
            synthesize=SynthesizeConfig(sources=(_magpie(800),), sampling=SamplingConfig(max_tokens=96)),
            curate=CURATE,
        ),
        arm=ArmConfig(mix=SELF_SAMPLED.model_copy(update={"diverse_ratio": 3.0}), train=train),
        baselines={"plain": ArmConfig(mix=MixConfig(diverse_ratio=0.0), train=train)},
        engine=ENGINE,
        split="test",
        max_concurrent_arms=2,
    )


def sep_hallucination() -> AdaptConfig:
    """Adapt to the 100 real rows of the DELIA authors; give a chat model: `--set model.path=...`.

    The starter as base is far too small for them: with it the job shows that nothing breaks.
    """
    starter = starter_sep()
    return starter.model_copy(
        update={
            "name": "sep_hallucination",
            "task": TaskConfig(
                path="tests/data/sep-hallucination/train.jsonl",
                tokens=("<sep>",),
                metrics=("exact_match", "chrf"),
                licence="MIT",
                dev_fraction=0.1,
                test_fraction=0.1,
            ),
            "engine": ENGINE.model_copy(update={"max_model_len": 2048}),
            "arm": _with_length(starter.arm, 2048),
            "baselines": {},
        }
    )


def _with_length(arm: ArmConfig, max_length: int) -> ArmConfig:
    train = arm.train.model_copy(update={"max_length": max_length})
    return arm.model_copy(update={"train": train})


def reproduce_sep() -> ReproduceConfig:
    """Measure `starter_sep` under three seeds with all controls (`jobs/reproduce.py`)."""
    recipe = starter_sep()
    plain = recipe.baselines["plain"]
    # at ratio 10 a batch of 32 holds 2.9 task rows: so many steps of plain tuning see as many of them
    equal_exposures = round(plain.train.max_steps / 11)
    variants = {
        f"rate {rate:g}, {steps} steps": _plain_arm(steps, rate)
        for rate in (5e-4, 2e-3, 5e-3)
        for steps in (30, 100)
    }
    attention_only = TrainConfig(lora=LORA, stages=(_joint_stage(300, learning_rate=2e-3),))
    other_task = ArmConfig(mix=MixConfig(diverse_ratio=0.0), train=attention_only)
    starts: dict[str, TokenInit] = {"reserved row": "reserved_row", "stand-in": "stand_in"}
    return ReproduceConfig(
        recipe=recipe,
        extra_arms={
            "plain, equal exposures": _plain_arm(equal_exposures, 5e-3),
            "delia, explicit KL": _hold_to_base(recipe.baselines["delia"], weight=1.0),
            **{
                f"{name}, from the {words}": _start_at(recipe.baselines[name], start)
                for words, start in starts.items()
                for name in ("plain", "delia")
            },
        },
        tuned=variants,
        foreign=starter_lingo().model_copy(update={"baselines": {"plain": other_task}}),
        narrow_word="capital",
        num_few=15,
        one_wording=True,
    )


def _hold_to_base(arm: ArmConfig, *, weight: float) -> ArmConfig:
    """Return an arm whose diverse rows are held to the base's distribution in the place of their answers."""
    return arm.model_copy(update={"train": arm.train.model_copy(update={"kl_weight": weight})})


def _start_at(arm: ArmConfig, start: TokenInit) -> ArmConfig:
    return arm.model_copy(update={"train": arm.train.model_copy(update={"token_init": start})})


def reproduce_lingo() -> ReproduceConfig:
    """Measure `starter_lingo` under three seeds (`jobs/reproduce.py`)."""
    return ReproduceConfig(recipe=starter_lingo())


def search_starter_sep() -> SearchConfig:
    """Search the ratio for `starter_sep` on one pool, scored on dev (`jobs/search.py`)."""
    return SearchConfig(recipe=starter_sep())


def promote_starter_sep() -> PromoteConfig:
    """Make the candidate of `starter_sep` champion if the gate lets it (`jobs/promote.py`)."""
    return PromoteConfig(recipe=starter_sep())
