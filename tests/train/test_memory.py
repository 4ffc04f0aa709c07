"""The memory estimate: by hand, against what autograd keeps, and what is refused before a model is loaded."""

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from delia.model.adapted import attach
from delia.model.attention import use_packed_attention
from delia.model.loading import load_base
from delia.model.lora import LoraConfig
from delia.store.models import ModelConfig, resolve_model
from delia.train.head import read_head
from delia.train.memory import (
    GIB,
    OVERHEAD_BYTES,
    describe_shortage,
    estimate_memory,
    read_device_bytes,
)
from delia.train.objective import prepare_loss
from delia.train.packing import join_stream
from delia.train.rows import TASK, join_rows
from delia.train.settings import StageConfig, TrainConfig
from delia.train.weighting import weigh_equally

STARTER = ModelConfig(path="package://delia.starter/weights")
LORA = LoraConfig(rank=16, alpha=16, dropout=0.0)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def make_config(**settings) -> TrainConfig:
    standard = {"stages": (StageConfig(max_steps=1),), "lora": LoraConfig(rank=16, alpha=16, dropout=0.05)}
    return TrainConfig(**(standard | settings))


def test_an_estimate_worked_by_hand():
    """8.03 billion parameters; rank 16 on 2 x (4096 + 4096) + 2 x (4096 + 1024) = 26624 widths a layer."""
    estimate = estimate_memory(LLAMA_8B, make_config(), dtype="bfloat16")
    assert estimate.parameters == estimate.loading == 2 * 8_030_261_248
    assert estimate.trained == 16 * 16 * 26624 * 32
    layer = 2 * 4096 * 4 + (2 * 4096 + 2 * 1024) * 2 + 3 * 14336 * 2 + 4 * 4096 * 4
    assert estimate.kept == 8192 * 32 * layer
    assert estimate.passing == 8192 * 3 * layer
    assert 60 * GIB < estimate.peak < 80 * GIB


def test_each_way_out_needs_less():
    full = estimate_memory(LLAMA_8B, make_config(use_gpu=True), dtype="bfloat16")
    assert estimate_memory(LLAMA_8B, make_config(use_gpu=True), dtype="float32").peak > full.peak
    again = estimate_memory(
        LLAMA_8B, make_config(use_gpu=True, gradient_checkpointing=True), dtype="bfloat16"
    )
    assert again.kept == 8192 * 32 * 4096 * 2
    shorter = estimate_memory(
        LLAMA_8B, make_config(max_tokens_per_micro_batch=1024, use_gpu=True), dtype="bfloat16"
    )
    assert shorter.kept == full.kept // 8
    eight = estimate_memory(LLAMA_8B, make_config(num_workers=8, use_gpu=True), dtype="bfloat16")
    assert eight.trained == full.trained // 8
    assert full.parameters // 8 < eight.parameters < full.parameters // 4
    away = estimate_memory(LLAMA_8B, make_config(num_workers=8, use_gpu=True, offload=True), dtype="bfloat16")
    quarter = estimate_memory(LLAMA_8B, make_config(use_gpu=True), dtype="bfloat16", quantisation="nf4")
    assert 0.3 < quarter.parameters / full.parameters < 0.4  # the vocabulary's rows stay as they are
    assert (away.trained, away.parameters < eight.parameters) == (0, True)


def test_all_parameters_need_sixteen_bytes_each_and_nothing_frozen_beside_them():
    stages = (StageConfig(max_steps=1, parts=("base",)),)
    config = make_config(lora=None, stages=stages, num_workers=8, use_gpu=True)
    estimate = estimate_memory(LLAMA_8B, config, dtype="bfloat16")
    num_parameters = (
        2 * 128256 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096) + 4096
    )
    assert estimate.trained == 16 * num_parameters // 8
    assert estimate.loading == 2 * num_parameters
    twice = config.model_copy(update={"stages": stages * 2})
    assert estimate_memory(LLAMA_8B, twice, dtype="bfloat16").trained == 24 * num_parameters // 8
    lora = estimate_memory(LLAMA_8B, make_config(num_workers=8, use_gpu=True), dtype="bfloat16")
    assert lora.parameters - estimate.parameters == 2 * num_parameters // 8


def test_a_micro_batch_is_never_thought_larger_than_a_batch_nor_smaller_than_a_row():
    small = estimate_memory(LLAMA_8B, make_config(global_batch_size=2, max_length=256), dtype="bfloat16")
    long = make_config(max_tokens_per_micro_batch=64, max_length=256)
    assert small.kept == 2 * estimate_memory(LLAMA_8B, long, dtype="bfloat16").kept


FORMS = {
    "no dropout": LoraConfig(rank=16, alpha=16, dropout=0.0),
    "dropout": LoraConfig(rank=16, alpha=16, dropout=0.05),
    "DoRA": LoraConfig(rank=16, alpha=16, dropout=0.0, use_dora=True),
    "DoRA, dropout": LoraConfig(rank=16, alpha=16, dropout=0.05, use_dora=True),
    "DoRA, all-linear": LoraConfig(
        rank=16, alpha=16, dropout=0.05, use_dora=True, target_modules="all-linear"
    ),
    "all parameters": None,
}


@pytest.mark.parametrize("lora", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_what_autograd_keeps_on_the_starter(dtype, lora):
    base = STARTER.model_copy(update={"dtype": dtype})
    model = attach(load_base(base), lora=lora, trains_base=lora is None)
    use_packed_attention(model)
    for parameter in model.parameters():  # as FSDP casts them
        parameter.data = parameter.data.to(model.dtype)
    prepare_loss(model, read_head(model))
    model.train()
    measured = measure_kept(model, length=128)

    parts = ("base",) if lora is None else ("lora",)
    stages = (StageConfig(max_steps=1, parts=parts),)
    config = make_config(lora=lora, stages=stages, max_length=128, global_batch_size=4)
    form = AutoConfig.from_pretrained(resolve_model(base))
    ratio = estimate_memory(form, config, dtype=dtype).kept / measured
    assert 0.9 < ratio < 1.15, ratio


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_that_are_capped_are_kept_and_counted(make_shape, dtype):
    """They grow with the square of a row's length, and are most of what is kept of long rows."""
    model = make_shape("gemma2", max_position_embeddings=1024).to(getattr(torch, dtype))
    form = model.config
    model = attach(model, lora=LORA, trains_base=False)
    use_packed_attention(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(model.dtype)
    prepare_loss(model, read_head(model))
    model.train()
    config = make_config(lora=LORA, max_length=512, global_batch_size=4)
    ratio = estimate_memory(form, config, dtype=dtype).kept / measure_kept(model, length=512)
    assert 0.9 < ratio < 1.15, ratio


def measure_kept(model, *, length: int) -> int:
    """Return the bytes that autograd keeps of a pass over four rows, parameters aside."""
    half = length // 2
    row = (tuple(10 + place % 80 for place in range(length)), (False,) * half + (True,) * half)
    rows = join_rows([row] * 4, sources=[TASK] * 4)

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.compute_loss(join_stream(rows, range(4)), weigh_equally)
    return sum(storage.nbytes() for storage in kept.values())


def test_what_a_device_can_not_hold_is_refused_with_the_numbers_and_the_ways_out():
    config = make_config(use_gpu=True)
    message = describe_shortage(STARTER, config, available=GIB)
    assert message.startswith("training needs about ")
    assert "GiB a worker (loading 0.0, parameters 0.0, trained 0.0, kept 0." in message
    assert "its device has 1.0" in message
    for way_out in (
        "train.num_workers=1",
        "train.gradient_checkpointing=true",
        "under 8192",
        "model.dtype=bfloat16",
        "train.offload=true",
    ):
        assert way_out in message


def test_what_it_can_hold_and_what_nobody_knows_is_not_refused():
    assert describe_shortage(STARTER, make_config(), available=OVERHEAD_BYTES + 8 * GIB) == ""
    assert describe_shortage(STARTER, make_config(), available=None) == ""


def test_a_worker_says_so_before_it_loads_a_model(train_here, make_input, monkeypatch):
    monkeypatch.setattr(
        "delia.train.memory.read_device_bytes", lambda config, num_sharing: GIB // num_sharing
    )
    monkeypatch.setattr("delia.train.loop.build_model", lambda task: pytest.fail("a model was loaded"))
    outcome = train_here(make_input()).outcome
    assert outcome.step == 0
    assert "its device has 1.0; set" in outcome.problem


def test_the_hosts_memory_is_shared_by_its_workers(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("delia.train.memory.CGROUP_LIMIT", limit)
    whole = read_device_bytes(make_config(), num_sharing=1)
    assert read_device_bytes(make_config(), num_sharing=4) == whole // 4
    limit.write_text("max\n")
    assert read_device_bytes(make_config(), num_sharing=1) == whole
    limit.write_text(f"{GIB}\n")
    assert read_device_bytes(make_config(), num_sharing=2) == GIB // 2
    if not torch.cuda.is_available():
        assert read_device_bytes(make_config(use_gpu=True), num_sharing=1) is None
