"""LoRA's variants and starts in the loop: through shards and checkpoints, to an adapter over the unchanged base."""

import dataclasses

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from delia.model.logprobs import load_adapted
from delia.model.lora import LoraConfig
from delia.train.building import build_model, build_optimizer
from delia.train.settings import StageConfig

LORA = LoraConfig(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
STARTS = {
    "pissa": LORA.model_copy(update={"init": "pissa", "use_rslora": True}),
    "corda": LORA.model_copy(update={"init": "corda", "use_dora": True}),
    "eva": LORA.model_copy(update={"init": "eva"}),
}


def make_stages(make_input, **settings):
    """Return a task of whole batches whose last step moves almost nothing: its loss is the adapter's."""
    stages = (
        StageConfig(max_steps=11, learning_rate=1e-2, token_learning_rate=3e-2, warmup_steps=0),
        StageConfig(max_steps=1, learning_rate=1e-9, token_learning_rate=1e-9, warmup_steps=0),
    )
    return make_input(stages=stages, global_batch_size=24, **settings)


@pytest.mark.parametrize("offload", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("start", STARTS)
def test_the_adapter_over_the_unchanged_base_has_the_last_steps_loss(
    measure_loss, train_here, make_input, start, offload
):
    task = make_stages(make_input, lora=STARTS[start], offload=offload)
    run = train_here(task)
    assert run.losses[12] < run.losses[1] - 0.1
    assert measure_loss(load_adapted(task.model, run.adapter), task) == pytest.approx(
        run.losses[12], rel=1e-5
    )


def test_shards_in_bfloat16_keep_the_start_and_the_magnitudes(measure_loss, train_here, make_input):
    """One worker shards, too, to keep what is trained in float32."""
    task = make_stages(make_input, lora=STARTS["corda"])
    half = dataclasses.replace(task, model=task.model.model_copy(update={"dtype": "bfloat16"}))
    assert isinstance(build_model(half), FSDPModule)
    run = train_here(half)
    assert run.losses[12] < run.losses[1] - 0.1
    assert measure_loss(load_adapted(task.model, run.adapter), task) == pytest.approx(
        run.losses[12], rel=1e-2
    )


@pytest.mark.parametrize("group", [1, 2], ids=["copies", "shards"])
def test_workers_that_find_other_stand_ins_start_from_the_first_ones(work_together, make_input, group):
    """As an arg-max over a GPU's sums may differ between machines; copies are averaged, and never compared."""
    stages = (StageConfig(max_steps=1, learning_rate=1e-3, token_learning_rate=1e-3),)
    task = make_input(
        stages=stages,
        token_ids=(7,),
        token_init="stand_in",
        num_workers=2,
        shard_group=group,
        checkpoint_every=1,
    )
    _, folder = work_together(task, does="stray")
    first, second = (torch.load(folder / f"rows-{rank}.pt", weights_only=True) for rank in range(2))
    assert first.any()
    assert torch.equal(first, second)


@pytest.mark.parametrize("start", STARTS)
def test_a_resumed_run_has_the_same_start_again(train_here, make_input, start):
    task = make_input(lora=STARTS[start], checkpoint_every=3)
    whole = train_here(task)
    rest = train_here(task, whole.checkpoints[3])
    assert rest.losses == {step: loss for step, loss in whole.losses.items() if step > 3}
    assert [name for name, value in whole.tensors.items() if not torch.equal(value, rest.tensors[name])] == []


def test_two_workers_start_and_end_as_one_does(measure_loss, train_together, train_here, make_input):
    lora = STARTS["pissa"].model_copy(update={"use_dora": True})
    task = make_stages(make_input, lora=lora, num_workers=2)
    two, one = train_together(task), train_here(make_stages(make_input, lora=lora))
    assert list(two.losses.values()) == pytest.approx(list(one.losses.values()), rel=1e-4)
    assert measure_loss(load_adapted(task.model, two.adapter), task) == pytest.approx(
        two.losses[12], rel=1e-5
    )


def test_magnitudes_have_loras_rate_and_no_decay(make_input, world_of_one):
    model = build_model(make_input(lora=STARTS["corda"]))
    stage = StageConfig(max_steps=1, learning_rate=0.1, token_learning_rate=0.3, weight_decay=0.5)
    groups = build_optimizer(model, stage).param_groups
    assert [(len(g["params"]), g["peak"], g["weight_decay"]) for g in groups] == [
        (2 * 7 * 2, 0.1, 0.5),
        (2 * 7, 0.1, 0.0),
        (1, 0.3, 0.0),
    ]
