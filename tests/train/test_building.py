"""Ways to hold a model in memory: each trains what the plain way trains."""

from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from torch import _dynamo as dynamo
from torch.distributed.fsdp import FSDPModule

from delia.errors import ConfigError, TrainError
from delia.model.adapted import LoraConfig
from delia.store.models import ModelConfig
from delia.train.building import TrainInput, build_model
from delia.train.rows import TASK, join_rows
from delia.train.settings import MetersConfig, StageConfig, TrainConfig

STAGES = (StageConfig(max_steps=4, learning_rate=1e-2, token_learning_rate=1e-2, warmup_steps=1),)


def assert_alike(run, other, *, loss: float, tensor: float) -> None:
    assert list(run.losses.values()) == pytest.approx(list(other.losses.values()), rel=loss)
    for name, value in run.tensors.items():
        torch.testing.assert_close(value, other.tensors[name], rtol=0, atol=tensor)


def test_layers_computed_again_give_the_same_gradients(train_here, make_input):
    plain = train_here(make_input(stages=STAGES, dropout=0.1))
    again = train_here(make_input(stages=STAGES, dropout=0.1, gradient_checkpointing=True))
    assert_alike(again, plain, loss=1e-6, tensor=1e-6)


def test_shards_in_the_host_s_memory_train_the_same(train_here, make_input):
    plain = train_here(make_input(stages=STAGES))
    assert_alike(train_here(make_input(stages=STAGES, offload=True)), plain, loss=1e-6, tensor=1e-6)


def test_bfloat16_trains_on_a_cpu_and_keeps_what_is_trained_in_float32(train_here, make_input, tiny_llama):
    """Rounding of the base moves each loss by a hundredth or so; a step of 1e-5 would be lost in bfloat16."""
    small = (StageConfig(max_steps=4, learning_rate=1e-6, token_learning_rate=1e-6, warmup_steps=0),)
    whole = train_here(make_input(stages=STAGES))
    half = train_here(make_input(stages=STAGES, dtype="bfloat16"))
    assert list(half.losses.values()) == pytest.approx(list(whole.losses.values()), rel=2e-2)
    assert list(half.losses.values()) != pytest.approx(list(whole.losses.values()), rel=1e-6)

    moved = train_here(make_input(stages=small, dtype="bfloat16")).tensors
    b_values = moved["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert b_values.dtype == torch.float32
    a_values = moved["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert 0 < float(b_values.abs().max()) < 1e-5
    assert not torch.equal(a_values, a_values.bfloat16().float())


def test_a_bfloat16_run_goes_on_bit_for_bit(train_here, make_input):
    task = make_input(stages=STAGES, dtype="bfloat16", checkpoint_every=2, dropout=0.1)
    whole = train_here(task)
    rest = train_here(task, whole.checkpoints[2])
    assert rest.losses == {step: whole.losses[step] for step in (3, 4)}
    assert all(torch.equal(value, whole.tensors[name]) for name, value in rest.tensors.items())


def test_copies_of_the_model_train_what_one_sharded_model_does(
    train_together, run_of_two, make_input, find_far
):
    """HSDP with a group of one: two whole copies, whose gradients are averaged."""
    copies = train_together(make_input(num_workers=2, shard_group=1))
    assert list(copies.losses.values()) == pytest.approx(list(run_of_two.losses.values()), rel=1e-5)
    assert find_far(copies.tensors, run_of_two.tensors) == {}


def test_a_group_that_does_not_divide_the_workers_is_refused(world_of_one, make_input):
    with pytest.raises(TrainError, match=r"train\.shard_group=2 must divide the 1 workers"):
        build_model(make_input(shard_group=2, offload=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_is_sharded_by_its_layers(make_shape, shape, dtype, world_of_one, tmp_path: Path):
    make_shape(shape).save_pretrained(tmp_path)
    rows = join_rows([((1, 2, 3), (False, True, True))], sources=[TASK], has_token=[True])
    config = TrainConfig(lora=LoraConfig(rank=2), stages=STAGES, offload=True)
    model = build_model(
        TrainInput(model=ModelConfig(path=str(tmp_path), dtype=dtype), config=config, rows=rows)
    )
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    assert sharded == [model, *model.get_decoder().layers]


def test_a_model_whose_layers_are_not_found_is_not_sharded_as_one(world_of_one, make_input, monkeypatch):
    monkeypatch.setattr("delia.train.building.find_layers", lambda model: [])
    with pytest.raises(TrainError, match="LlamaForCausalLM keeps its decoder layers in no one list"):
        build_model(make_input(offload=True))


def test_float16_is_refused_for_training(world_of_one, make_input):
    task = make_input()
    with pytest.raises(ConfigError, match=r"model\.dtype=float16 loses small gradients; take bfloat16"):
        build_model(replace(task, model=task.model.model_copy(update={"dtype": "float16"})))


@pytest.mark.soak  # a minute of compiling, by g++
def test_compiled_layers_give_the_same_gradients(train_here, make_input):
    plain = train_here(make_input(stages=STAGES))
    assert_alike(train_here(make_input(stages=STAGES, compile=True)), plain, loss=1e-5, tensor=1e-5)


@pytest.mark.parametrize("shape", ["llama", "gemma2"])
def test_all_variants_of_a_layer_are_compiled(train_here, make_input, save_shape, shape, monkeypatch):
    """Past a limit Dynamo runs a layer as it is. Which variants there are is seen without a compiler of C."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    task = make_input(
        stages=STAGES,
        compile=True,
        gradient_checkpointing=True,
        dropout=0.1,
        kl_weight=0.1,
        meters=MetersConfig(every=1, num_rows=5, num_words=40),
    )
    object.__setattr__(task, "instruction_ids", (40, 41, 42))
    with dynamo.config.patch(fail_on_recompile_limit_hit=True):
        run = train_here(replace(task, model=ModelConfig(path=str(save_shape(shape)), dtype="float32")))
    assert len(run.losses) == 4
