"""Adapter directories: what is written, what is refused before an engine sees it, and where they lie."""

import dataclasses
import json

import pyarrow.fs as pafs
import pytest
import torch
from safetensors.torch import save_file

from delia.errors import EngineError, StoreError
from delia.store.adapters import (
    CONFIG,
    WEIGHTS,
    AdapterTensors,
    check_servable,
    fetch_adapter,
    read_tensors,
    to_peft,
    write_adapter,
)

A_RI = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
B_OR = torch.tensor([[7.0, 8.0]])
DELTAS_KD = torch.tensor([[0.5, -0.5, 0.25]])
QUERY = "model.layers.0.self_attn.q_proj"
LORA = AdapterTensors(lora_by_module={QUERY: (A_RI, B_OR)})
ROWS = AdapterTensors(token_ids=(4,), row_deltas_KD=DELTAS_KD)
BOTH = AdapterTensors(lora_by_module={QUERY: (A_RI, B_OR)}, token_ids=(4,), row_deltas_KD=DELTAS_KD)


def test_a_low_rank_pair_is_stored_as_it_is_with_alpha_equal_to_the_rank():
    named, config = to_peft(LORA, vocab_size=6, base_model="base")

    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {name: value.tolist() for name, value in named.items()} == {
        f"{prefix}.lora_A.weight": A_RI.tolist(),
        f"{prefix}.lora_B.weight": B_OR.tolist(),
    }
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, ["q_proj"])
    assert (config["rank_pattern"], config["base_model_name_or_path"]) == ({}, "base")
    assert (config["inference_mode"], config["lora_dropout"]) == (True, 0.0)


def test_a_trained_row_is_an_embedding_pair_whose_product_is_the_delta_at_the_token():
    named, config = to_peft(ROWS, vocab_size=6, base_model="base")

    a_KV = named["base_model.model.model.embed_tokens.lora_embedding_A"]
    b_DK = named["base_model.model.model.embed_tokens.lora_embedding_B"]
    change_DV = b_DK @ a_KV
    assert change_DV[:, 4].tolist() == DELTAS_KD[0].tolist()
    assert change_DV[:, [0, 1, 2, 3, 5]].abs().max() == 0
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (1, 1, ["embed_tokens"])
    assert config["rank_pattern"] == {}, "a pattern is only needed beside LoRA of another rank"


def test_rows_beside_lora_have_a_rank_of_their_own():
    _, config = to_peft(BOTH, vocab_size=6, base_model="base")
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"embed_tokens": 1}
    assert config["target_modules"] == ["q_proj", "embed_tokens"]


def test_a_dora_adapter_holds_a_magnitude_for_every_target_the_embedding_too():
    magnitudes = {QUERY: torch.tensor([9.0]), "model.embed_tokens": torch.tensor([3.0, 4.0, 5.0])}
    named, config = to_peft(
        dataclasses.replace(BOTH, magnitude_by_module=magnitudes), vocab_size=6, base_model="base"
    )
    plain, plain_config = to_peft(BOTH, vocab_size=6, base_model="base")
    assert {name: value.tolist() for name, value in named.items() if name not in plain} == {
        f"base_model.model.{QUERY}.lora_magnitude_vector": [9.0],
        "base_model.model.model.embed_tokens.lora_magnitude_vector": [3.0, 4.0, 5.0],
    }
    assert config == plain_config | {"use_dora": True}


@pytest.mark.parametrize("module", [QUERY, "model.embed_tokens"])
def test_a_target_without_its_magnitude_is_refused(module):
    """PEFT would make up the missing one from the base, without a word."""
    others = {name: torch.ones(1) for name in {QUERY, "model.embed_tokens"} - {module}}
    with pytest.raises(StoreError, match=rf"a magnitude for every target; \['{module}'\] have none"):
        to_peft(dataclasses.replace(BOTH, magnitude_by_module=others), vocab_size=6, base_model="base")


def test_what_is_written_is_read_back_in_float32(tmp_path):
    half = AdapterTensors(lora_by_module={QUERY: (A_RI.bfloat16(), B_OR.bfloat16())})
    write_adapter(tmp_path / "deep" / "adapter", half, vocab_size=6, base_model="base")

    tensors = read_tensors(tmp_path / "deep" / "adapter")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert tensors[f"base_model.model.{QUERY}.lora_A.weight"].tolist() == A_RI.tolist()
    check_servable(tmp_path / "deep" / "adapter")


def test_nothing_is_no_adapter():
    with pytest.raises(StoreError, match="nothing was trained"):
        to_peft(AdapterTensors(), vocab_size=6, base_model="base")


def test_a_pickled_adapter_is_not_read(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(StoreError, match=r"no adapter_model\.safetensors; a pickled adapter is not read"):
        read_tensors(tmp_path)


# ---- what would kill an engine


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_save", ["embed_tokens"]),
        ("trainable_token_indices", {"embed_tokens": [4]}),
        ("layer_replication", [[0, 4]]),
    ],
)
def test_an_adapter_of_a_kind_that_kills_the_engine_is_refused_with_the_form_to_use(tmp_path, name, value):
    write_adapter(tmp_path, BOTH, vocab_size=6, base_model="base")
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {name: value}))

    with pytest.raises(
        EngineError, match=rf"can't load an adapter with {name}=.*export it with delia"
    ) as caught:
        check_servable(tmp_path)
    assert str(value) in str(caught.value)


def test_what_is_set_to_nothing_is_no_reason_to_refuse(tmp_path):
    write_adapter(tmp_path, BOTH, vocab_size=6, base_model="base")
    config = json.loads((tmp_path / CONFIG).read_text())
    off = {
        "modules_to_save": None,
        "trainable_token_indices": None,
        "use_dora": False,
        "layer_replication": None,
    }
    (tmp_path / CONFIG).write_text(json.dumps(config | off))
    check_servable(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        f"base_model.model.{QUERY}.lora_magnitude_vector",
    ],
)
def test_a_tensor_that_is_no_low_rank_matrix_is_refused_by_name(tmp_path, name):
    write_adapter(tmp_path, LORA, vocab_size=6, base_model="base")
    save_file(read_tensors(tmp_path) | {name: torch.zeros(2)}, tmp_path / WEIGHTS)

    with pytest.raises(EngineError, match="only LoRA matrices are served") as caught:
        check_servable(tmp_path)
    assert f"['{name}']" in str(caught.value)


def test_a_directory_without_a_config_is_no_adapter_to_serve(tmp_path):
    with pytest.raises(EngineError, match=r"has no adapter_config\.json; give a PEFT adapter directory"):
        check_servable(tmp_path)


# ---- where it lies


def test_a_local_adapter_is_used_in_place(tmp_path):
    assert fetch_adapter(str(tmp_path)) == tmp_path
    assert fetch_adapter(f"file://{tmp_path}") == tmp_path


def test_an_adapter_on_an_object_store_is_copied_once_a_process(tmp_path, monkeypatch):
    """A filesystem that is not the local one, though its files are here."""
    write_adapter(tmp_path / "adapter", LORA, vocab_size=6, base_model="base")
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr("delia.store.directories.open_filesystem", lambda address: (remote, "adapter"))

    first = fetch_adapter("s3://bucket/adapter")
    assert not first.is_relative_to(tmp_path)
    assert {file.name for file in first.iterdir()} == {WEIGHTS, CONFIG}
    check_servable(first)
    assert fetch_adapter("s3://bucket/adapter") == first


def test_an_adapter_that_is_not_on_this_node_is_an_error_with_the_way_out(tmp_path):
    with pytest.raises(
        StoreError, match=r"no adapter directory at .* on this node; use storage that every node"
    ):
        fetch_adapter(str(tmp_path / "gone"))
