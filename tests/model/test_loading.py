"""Loading a base, quantised or not, and what is refused before it is tried."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model, replace_lora_weights_loftq
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from delia.errors import ConfigError
from delia.model.adapted import attach, collect
from delia.model.loading import check_quantisation, find_layers, load_base
from delia.model.logprobs import load_adapted
from delia.model.lora import LoraConfig
from delia.store.adapters import write_adapter
from delia.store.models import ModelConfig

QUANTISED = ("nf4", "int8")
every_form = pytest.mark.parametrize("quantisation", QUANTISED)


def make_settings(quantisation: str = "nf4") -> ModelConfig:
    return ModelConfig(path="org/name", revision="main", quantisation=quantisation)


def check(settings: ModelConfig, **changes) -> None:
    standard = {"num_workers": 1, "use_gpu": True, "offload": False, "lora": LoraConfig()}
    changed = standard | changes
    check_quantisation(settings, changed.pop("lora"), **changed)


# ---- from the settings alone


@every_form
def test_one_worker_with_a_gpu_may_train_over_a_quantised_base(quantisation):
    check(make_settings(quantisation))
    check(make_settings(quantisation), lora=None)
    check(make_settings(quantisation), lora=LoraConfig(init="eva"))


@every_form
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_gpu": False}, r"needs a GPU; set train\.use_gpu=true"),
        ({"num_workers": 2}, r"can't be sharded, got train\.num_workers=2 .*set num_workers=1"),
        ({"trains_base": True}, r"a stage of train\.stages moves the base; train LoRA"),
        ({"offload": True}, r"can't be sharded, .*train\.offload=true"),
        ({"lora": LoraConfig(init="pissa")}, r"train\.lora\.init=pissa takes its start out of that weight"),
        ({"lora": LoraConfig(init="olora")}, r"take init=default, eva or loftq, or quantisation=none"),
    ],
)
def test_what_no_quantised_base_bears_is_refused(quantisation, changes, reason):
    with pytest.raises(ConfigError, match=rf"model\.quantisation={quantisation} .*{reason}"):
        check(make_settings(quantisation), **changes)
    check(make_settings("none"), **changes)


def test_magnitudes_over_eight_bits_are_refused():
    dora = LoraConfig(use_dora=True)
    check(make_settings("nf4"), lora=dora)
    with pytest.raises(ConfigError, match=r"int8 .*train\.lora\.use_dora=true.*nf4"):
        check(make_settings("int8"), lora=dora)


@pytest.mark.parametrize(
    ("quantisation", "use_dora"),
    [("none", False), ("int8", False), ("nf4", True)],
    ids=["none", "int8", "dora"],
)
def test_loftq_is_over_four_bits_and_without_magnitudes(quantisation, use_dora):
    check(make_settings("nf4"), lora=LoraConfig(init="loftq"))
    with pytest.raises(
        ConfigError, match=rf"init=loftq .*quantisation={quantisation} .*set quantisation=nf4"
    ):
        check(make_settings(quantisation), lora=LoraConfig(init="loftq", use_dora=use_dora))


# ---- in the process that loads


@every_form
def test_without_a_gpu_nothing_is_loaded(monkeypatch, save_model, quantisation):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded")
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = save_model().model_copy(update={"quantisation": quantisation})
    with pytest.raises(
        ConfigError, match=rf"model\.quantisation={quantisation} needs a GPU, and this process"
    ):
        load_base(settings, for_training=True)


def test_without_bitsandbytes_the_way_to_it_is_named(monkeypatch, save_model):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("delia.model.loading.find_spec", lambda name: None)
    settings = save_model().model_copy(update={"quantisation": "nf4"})
    with pytest.raises(ConfigError, match="needs bitsandbytes, which the GPU environment has"):
        load_base(settings, for_training=True)


@pytest.mark.parametrize(
    ("quantisation", "expected"),
    [
        (
            "nf4",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
            },
        ),
        ("int8", {"load_in_8bit": True, "load_in_4bit": False}),
    ],
)
def test_the_form_is_handed_to_transformers_for_training_alone(
    monkeypatch, save_model, quantisation, expected
):
    """The GPU and the load are played; the settings of bitsandbytes are the real ones."""
    asked: list[dict] = []
    model = load_base(save_model())
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **options: asked.append(options) or model
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr("delia.model.loading.find_spec", lambda name: SimpleNamespace())
    settings = save_model().model_copy(update={"quantisation": quantisation, "dtype": "bfloat16"})
    load_base(settings, for_training=True)
    load_base(settings)

    form = asked[0]["quantization_config"].to_dict()
    assert {name: form[name] for name in expected} == expected
    assert asked[0]["device_map"] == {"": 3}
    assert asked[1].keys() == {"dtype", "attn_implementation", "use_safetensors", "local_files_only"}


class Packed(nn.Linear):
    """Saves a scale that is no attribute of its own, as bitsandbytes' eight-bit layer does."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}SCB"] = torch.ones(1)


def test_what_is_trained_over_packed_weights_has_a_state_of_its_own(monkeypatch, save_model):
    """DCP looks up every name of a state as an attribute, of what is frozen too."""
    model = load_base(save_model())
    for layer in model.model.layers:
        layer.self_attn.q_proj = Packed(32, 32, bias=False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    adapted = attach(load_base(save_model()), lora=LoraConfig(target_modules=("q_proj",)))

    state = get_model_state_dict(adapted, options=StateDictOptions(ignore_frozen_params=True))
    assert set(state) == {name for name, value in adapted.named_parameters() if value.requires_grad}


def test_a_base_lies_on_the_cpu_frozen_and_in_its_dtype(save_model):
    settings = save_model().model_copy(update={"dtype": "bfloat16"})
    model = load_base(settings)
    assert (model.device.type, model.dtype, model.training) == ("cpu", torch.bfloat16, False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(
        ConfigError, match=r"model\.dtype must be float32, bfloat16 or float16, got 'float99'"
    ):
        load_base(settings.model_copy(update={"dtype": "float99"}))


# ---- on a GPU


@pytest.mark.gpu
@every_form
def test_lora_and_rows_learn_over_a_quantised_base_and_are_exported_over_the_plain_one(
    save_model, tmp_path, quantisation
):
    """The export is as far from what was trained as the base is from its quantised form, and no further."""
    settings = save_model("llama").model_copy(update={"quantisation": quantisation})
    ids_BT = torch.randint(20, 290, (4, 12), generator=torch.Generator().manual_seed(1))
    ids_BT[:, 3] = 7
    model, base = load_base(settings, for_training=True), load_base(settings)
    ids_on_gpu = ids_BT.to(model.device)
    with torch.no_grad():
        lost = (model(input_ids=ids_on_gpu).logits.cpu() - base(input_ids=ids_BT).logits).abs().mean()
    lora = LoraConfig(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    attach(model, lora=lora, token_ids=(7,))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids_on_gpu, labels=ids_on_gpu).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3

    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    assert set(state) == set(trained)
    tensors = collect(model, trained, scaling=lora.scaling)
    write_adapter(tmp_path, tensors, vocab_size=model.config.vocab_size, base_model=settings.path)
    with torch.no_grad():
        gap = load_adapted(settings, tmp_path)(input_ids=ids_BT).logits
        gap = (gap - model(input_ids=ids_on_gpu).logits.cpu()).abs().mean()
    assert gap < 2 * lost


@pytest.mark.gpu
def test_loftq_starts_where_pefts_own_does_and_nearer_to_the_base_than_rounding_left_it(save_model):
    """PEFT's leaves LoRA's scaling out, so the comparison is at 1."""
    settings = save_model("llama").model_copy(update={"quantisation": "nf4"})
    lora = LoraConfig(rank=4, alpha=4, dropout=0.0, target_modules="all-linear", init="loftq")
    whole, ids_BT = load_base(settings), torch.arange(20, 60).reshape(4, 10)
    model = attach(load_base(settings, for_training=True), lora=lora, whole=whole)
    plain = PeftLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peer = get_peft_model(load_base(settings, for_training=True), plain)
    replace_lora_weights_loftq(peer, settings.path)
    ours, theirs = dict(model.named_parameters()), dict(peer.get_base_model().named_parameters())
    names = [name for name in ours if ".lora_A." in name]
    assert len(names) == 2 * 7
    for name in names:
        other = name.replace(".lora_A.", ".lora_B.")
        torch.testing.assert_close(
            (ours[other] @ ours[name]).float(), (theirs[other] @ theirs[name]).float(), atol=1e-4, rtol=1e-3
        )
    with torch.no_grad():
        expected = whole(input_ids=ids_BT).logits
        rounded = load_base(settings, for_training=True)(input_ids=ids_BT.cuda()).logits.cpu()
        started = model(input_ids=ids_BT.cuda()).logits.cpu()
    assert (started - expected).abs().mean() < 0.9 * (rounded - expected).abs().mean()


TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", TEXT),
        ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96}),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 96, "state_size": 4}),
        ("gemma3", {"text_config": TEXT, "vision_config": SIGHT, "mm_tokens_per_image": 4}),
    ],
)
def test_the_decoder_layers_are_those_of_the_text_in_their_order(name: str, settings: dict[str, Any]):
    """Though a class names its mixers beside its layers, as Mamba, or has layers for images, as Gemma 3."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    decoder = model.get_decoder()
    expected = list(decoder.h if name == "gpt2" else decoder.layers)

    assert find_layers(model) == expected
    assert len(expected) == (4 if name == "mamba" else 3)
