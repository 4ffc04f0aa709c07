"""Full tuning: what is trained, stepped, kept, resumed and written is a model of its own that HF loads as any."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from delia.errors import EngineError, TrainError
from delia.model.adapted import TokenRows, attach
from delia.model.loading import load_base
from delia.model.logprobs import load_adapted
from delia.model.lora import LoraConfig
from delia.store.adapters import check_servable, read_traits
from delia.store.forms import choose_form
from delia.store.models import ModelConfig
from delia.store.weights import INDEX, WHOLE
from delia.train.building import build_model, build_optimizer
from delia.train.settings import MetersConfig, StageConfig, TrainConfig

TOKEN = 7
ROWS_THEN_ALL = (
    StageConfig(max_steps=2, parts=("token_rows",), rows="token", warmup_steps=0),
    StageConfig(max_steps=9, parts=("base", "token_rows"), learning_rate=3e-3, warmup_steps=0),
    StageConfig(max_steps=1, parts=("base",), learning_rate=1e-9, warmup_steps=0),
)
"""Its last step moves almost nothing: that step's loss is the model's."""


@pytest.fixture
def make_full(make_input):
    """Return a function of settings: a full tuning on whole batches, over the tiny Llama or another base."""

    def make(base: ModelConfig | None = None, **settings):
        task = make_input(stages=ROWS_THEN_ALL, global_batch_size=24, **({"lora": None} | settings))
        return task if base is None else type(task)(**(vars(task) | {"model": base}))

    return make


@pytest.fixture
def start(tiny_llama):
    """The tiny Llama's weights by name; its head is its embedding."""
    weights = load_file(Path(tiny_llama.path) / WHOLE)
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("shape", ["Llama", "Qwen2", "Gemma2"])
def test_what_is_written_is_a_model_with_the_last_step_s_loss(
    measure_loss, train_here, make_full, tiny_base, shape, is_tied
):
    directory = tiny_base(shape, is_tied=is_tied, is_sharded=True)
    task = make_full(ModelConfig(path=str(directory)))
    run = train_here(task)
    assert run.losses[12] < run.losses[1] - 0.1

    tuned = load_adapted(task.model, run.adapter)
    assert measure_loss(tuned, task) == pytest.approx(run.losses[12], rel=1e-5)
    base = dict(load_base(task.model).named_parameters())
    assert [
        name for name, value in tuned.named_parameters() if torch.equal(value, base.get(name, value[:0]))
    ] == []
    head, rows = tuned.get_output_embeddings().weight, tuned.get_input_embeddings().weight
    assert tuned.config.tie_word_embeddings is False
    if is_tied:  # the head is the embedding, but for what the token's row has learnt
        others = [row for row in range(len(rows)) if row not in task.token_ids]
        assert torch.equal(head[others], rows[others])
        assert not torch.equal(head[list(task.token_ids)], rows[list(task.token_ids)])
    index = json.loads((run.adapter / INDEX).read_text())
    files = {name: load_file(run.adapter / name) for name in set(index["weight_map"].values())}
    assert index["weight_map"] == {name: file for file, values in files.items() for name in values}
    num_bytes = sum(value.nbytes for values in files.values() for value in values.values())
    assert index["metadata"]["total_size"] == num_bytes


def test_a_head_that_lies_in_the_files_of_a_tied_base_is_untied_too(
    train_here, make_full, tiny_llama, tmp_path
):
    shutil.copytree(tiny_llama.path, tmp_path / "base")
    weights = load_file(tmp_path / "base" / WHOLE)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "base" / WHOLE, metadata={"format": "pt"})
    expected, found = (
        train_here(make_full(base)) for base in (None, ModelConfig(path=str(tmp_path / "base")))
    )
    assert found.losses == expected.losses
    assert not AutoModelForCausalLM.from_pretrained(found.adapter).config.tie_word_embeddings
    ours, theirs = (load_file(run.adapter / WHOLE) for run in (found, expected))
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def test_without_a_token_a_tied_model_stays_tied(train_here, make_full):
    stages = (StageConfig(max_steps=3, parts=("base",), learning_rate=3e-3, warmup_steps=0),)
    task = make_full(token_ids=())
    run = train_here(
        type(task)(**(vars(task) | {"config": task.config.model_copy(update={"stages": stages})}))
    )
    tuned = AutoModelForCausalLM.from_pretrained(run.adapter)
    assert tuned.config.tie_word_embeddings
    assert tuned.lm_head.weight is tuned.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(run.adapter / WHOLE)


@pytest.mark.parametrize(
    "settings", [{"num_workers": 2}, {"num_workers": 2, "shard_group": 1}, {"offload": True}],
    ids=["two workers", "copies", "offload"],
)  # fmt: skip
def test_shards_train_the_same_model(train_here, train_together, make_full, start, find_far, settings):
    one = train_here(make_full())
    other = (train_together if "num_workers" in settings else train_here)(make_full(**settings))
    assert list(other.losses.values()) == pytest.approx(list(one.losses.values()), rel=1e-5)
    expected, found = (load_file(run.adapter / WHOLE) for run in (one, other))
    assert find_far(found, expected, start) == {}


def test_a_resumed_run_goes_on_bit_for_bit(train_here, make_full):
    task = make_full(checkpoint_every=3)
    whole = train_here(task)
    rest = train_here(task, whole.checkpoints[3])
    assert rest.losses == {step: loss for step, loss in whole.losses.items() if step > 3}
    expected, found = (load_file(run.adapter / WHOLE) for run in (whole, rest))
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_a_checkpoint_of_two_workers_goes_on_with_one(train_here, train_together, make_full, start, find_far):
    """Held to 1e-5: each loss, and the distance of each tensor as a share of what it has moved by."""
    two = train_together(make_full(num_workers=2, checkpoint_every=3))
    rest = train_here(make_full(checkpoint_every=3), two.checkpoints[3])
    assert list(rest.losses.values()) == pytest.approx([two.losses[step] for step in rest.losses], rel=1e-5)
    expected, found = (load_file(run.adapter / WHOLE) for run in (two, rest))
    assert find_far(found, expected, start) == {}


def test_the_token_s_own_row_learns_nothing_from_the_input(make_shape):
    """Of a tied model it is the output row: what the token comes to mean would be what makes it be said."""
    model = attach(make_shape("qwen2"), lora=None, token_ids=(TOKEN,), trains_base=True)
    ids_BT = torch.tensor([[3, TOKEN, 5]])
    model.get_decoder()(input_ids=ids_BT).last_hidden_state.square().sum().backward()
    gradient_VD = model.get_output_embeddings().weight.grad
    assert gradient_VD[[3, 5]].norm(dim=1).min() > 0
    assert not gradient_VD[TOKEN].any()
    assert model.get_input_embeddings().deltas_KD.grad.norm() > 0


def test_over_bfloat16_steps_are_in_float32_and_the_model_is_stored_as_its_base(
    measure_loss, train_here, make_full
):
    task = make_full(dtype="bfloat16")
    run = train_here(task)
    assert run.losses[12] < run.losses[1] - 0.1
    weights = load_file(run.adapter / WHOLE)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((run.adapter / "config.json").read_text())["dtype"] == "bfloat16"
    state = build_model(task).state_dict()
    assert {value.dtype for name, value in state.items() if "rotary" not in name} == {torch.float32}
    tuned = load_adapted(task.model, run.adapter).float()
    assert measure_loss(tuned, task) == pytest.approx(run.losses[12], rel=1e-2)


def test_the_directory_is_known_for_a_model_and_never_asked_for_as_a_lora(train_here, make_full):
    run = train_here(make_full())
    traits = read_traits(run.adapter)
    assert traits.is_whole
    assert choose_form("MistralForCausalLM", traits).form == "whole"
    with pytest.raises(EngineError, match=r"model of its own.*; name its directory as the model"):
        check_servable(run.adapter)


def test_matrices_decay_norms_and_biases_do_not(make_shape):
    model = attach(make_shape("qwen2"), lora=None, token_ids=(7,), trains_base=True)
    stage = StageConfig(
        max_steps=1,
        parts=("base", "token_rows"),
        learning_rate=0.1,
        token_learning_rate=0.3,
        weight_decay=0.5,
    )
    groups = build_optimizer(model, stage).param_groups
    num_matrices, num_others = 2 * 7 + 1, 2 * (2 + 3) + 1
    assert [(len(g["params"]), g["peak"], g["weight_decay"]) for g in groups] == [
        (num_matrices, 0.1, 0.5),
        (num_others, 0.1, 0.0),
        (1, 0.3, 0.0),
    ]
    assert all(parameter.ndim == 2 for parameter in groups[0]["params"])


def test_meters_read_what_a_full_tuning_moves_and_no_divergence_from_a_base_that_is_gone(
    train_here, make_full
):
    run = train_here(make_full(meters=MetersConfig(every=6, num_rows=4)))
    assert run.losses == train_here(make_full()).losses
    assert "train/gradient_cosine" in run.readings[6]
    assert "train/off_task_kl" not in run.readings[6]


# ---- what is refused


def test_lora_over_a_base_that_moves_is_refused():
    stages = (StageConfig(max_steps=1, parts=("base",)),)
    with pytest.raises(ValueError, match=r"set train\.lora=null"):
        TrainConfig(lora=LoraConfig(), stages=stages)
    assert TrainConfig(lora=None, stages=stages).trains_base


def test_a_penalty_on_leaving_the_base_needs_it(make_full):
    with pytest.raises(ValueError, match=r"kl_weight=1 needs the base as it was"):
        make_full(kl_weight=1.0)


def test_a_base_whose_files_use_other_names_is_refused_before_it_is_trained(
    world_of_one, make_full, tiny_llama, tmp_path
):
    base = load_base(tiny_llama)
    base.save_pretrained(tmp_path)
    weights = load_file(tmp_path / WHOLE)
    weights["model.extra.weight"] = torch.zeros(2)
    save_file(weights, tmp_path / WHOLE, metadata={"format": "pt"})
    with pytest.raises(TrainError, match=r"other names \(files alone: \['model\.extra\.weight'\]"):
        build_model(make_full(ModelConfig(path=str(tmp_path))))


def test_only_token_rows_leave_the_base_frozen(make_shape):
    model = attach(make_shape("llama"), lora=None, token_ids=(7,))
    assert isinstance(model.get_input_embeddings(), TokenRows)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.embed_tokens.deltas_KD"
    ]
