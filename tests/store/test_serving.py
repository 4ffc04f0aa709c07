"""Serving forms: each computes what PEFT makes of base and adapter, for every shape; what is written and what not."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from delia.chat import load_chat, save_tokenizer
from delia.errors import EngineError, StoreError
from delia.store.adapters import CONFIG, check_servable, read_tensors
from delia.store.serving import ServedFiles, hash_adapter, locate_served, read_architecture
from delia.store.serving import write_served as write_in_dtype
from delia.store.tables import MANIFEST, read_manifest

SHAPES = ("Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral")
TOKENS = (7, 9)
write_served = partial(write_in_dtype, dtype="float32")
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_tie = pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])


def load(model: Path, adapter: Path | None = None, *, dtype: str = "float32"):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return (PeftModel.from_pretrained(loaded, str(adapter)) if adapter else loaded).eval()


@torch.no_grad()
def compute_logits(model) -> torch.Tensor:
    """Return logits [4, 12, V] on prompts in which both tokens stand."""
    ids_BT = torch.randint(20, 290, (4, 12), generator=torch.Generator().manual_seed(1))
    ids_BT[:, 3], ids_BT[:, 7] = TOKENS
    return model(input_ids=ids_BT).logits


def check_equal(served: ServedFiles, base: Path, adapter: Path) -> None:
    """Hold a form to what PEFT computes; the adapter must be seen in it."""
    expected_BTV = compute_logits(load(base, adapter))
    assert (expected_BTV - compute_logits(load(base))).abs().max() > 0.1
    served_BTV = compute_logits(load(served.model or base, served.adapter))
    torch.testing.assert_close(served_BTV, expected_BTV, atol=1e-4, rtol=1e-4)
    assert torch.equal(served_BTV.argmax(-1), expected_BTV.argmax(-1))


# ---- what a form computes


@every_shape
@every_tie
@pytest.mark.parametrize("form", ["patched_base", "merged"])
def test_a_form_computes_what_peft_does_and_leaves_the_output_head(
    tiny_base, tiny_adapter, tmp_path, shape, is_tied, form
):
    base = tiny_base(shape, is_tied=is_tied)
    adapter = tiny_adapter(base)
    served = write_served(form, base, adapter, tmp_path / "served")
    check_equal(served, base, adapter)
    assert served.model is not None
    assert json.loads((served.model / "config.json").read_text())["tie_word_embeddings"] is False
    head = load(served.model).get_output_embeddings().weight
    assert torch.equal(head, load(base).get_output_embeddings().weight)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_a_merged_model_without_rows_stays_tied(tiny_base, peft_adapter, tmp_path, settings):
    base = tiny_base("Gemma2")
    adapter = peft_adapter(base, r=4, lora_alpha=6, **settings)
    served = write_served("merged", base, adapter, tmp_path)
    check_equal(served, base, adapter)
    expected = json.loads((base / "config.json").read_text()) | {"delia_adapter": hash_adapter(adapter)}
    assert json.loads((tmp_path / "config.json").read_text()) == expected
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_rows_alone_need_no_adapter_beside_the_patched_base(tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Mistral")
    adapter = tiny_adapter(base, has_lora=False)
    served = write_served("patched_base", base, adapter, tmp_path)
    assert (served.model, served.adapter) == (tmp_path / "base", None)
    check_equal(served, base, adapter)


def test_the_adapter_beside_a_patched_base_is_the_rest_and_servable(tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Mistral")
    adapter = tiny_adapter(base)
    with pytest.raises(EngineError, match=r"MistralForCausalLM takes no LoRA on its input embedding.*--form"):
        check_servable(adapter, "MistralForCausalLM")
    served = write_served("patched_base", base, adapter, tmp_path)
    check_servable(served.adapter, "MistralForCausalLM")
    whole, rest = read_tensors(adapter), read_tensors(served.adapter)
    assert {name.rpartition("lora_")[2] for name in whole.keys() - rest.keys()} == {
        "embedding_A",
        "embedding_B",
    }
    config = json.loads((served.adapter / CONFIG).read_text())
    assert (config["target_modules"], config["rank_pattern"]) == (
        ["down_proj", "o_proj", "q_proj", "v_proj"],
        {},
    )


@pytest.mark.parametrize("shape", ["Gemma2", "Llama"])
def test_an_engine_that_ties_every_gemma_is_given_another_class(tiny_base, tiny_adapter, tmp_path, shape):
    base = tiny_base(shape)
    served = write_served("merged", base, tiny_adapter(base), tmp_path)
    expected = "TransformersForCausalLM" if shape == "Gemma2" else "LlamaForCausalLM"
    assert read_architecture(served.model) == expected


# ---- what is written


def test_of_a_sharded_base_the_embeddings_file_is_written_and_the_others_are_linked(
    tiny_base, tiny_adapter, tmp_path
):
    base = tiny_base("Qwen2", is_sharded=True)
    adapter = tiny_adapter(base)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    served = write_served("patched_base", base, adapter, tmp_path)
    check_equal(served, base, adapter)

    index = json.loads((base / "model.safetensors.index.json").read_text())
    shards, changed = set(index["weight_map"].values()), index["weight_map"]["model.embed_tokens.weight"]
    assert len(shards) > 3
    written = {name for name in shards if not (tmp_path / "base" / name).is_symlink()}
    assert written == {changed}
    assert all((tmp_path / "base" / name).resolve() == base / name for name in shards - written)
    counts = read_manifest(str(tmp_path), kind="served").counts
    assert (counts["files_rewritten"], counts["files_kept"]) == (1, len(shards) - 1)

    new = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert new["weight_map"] == index["weight_map"] | {"lm_head.weight": changed}
    head_bytes = load(base).get_output_embeddings().weight.nbytes
    assert new["metadata"]["total_size"] == index["metadata"]["total_size"] + head_bytes
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before, "the base was written to"


def test_a_sharded_base_is_merged_and_a_copy_holds_no_link(tiny_base, tiny_adapter, tmp_path):
    """Whoever may read one of its files may read all: an engine may run as another user."""
    base = tiny_base("Llama", is_sharded=True)
    adapter = tiny_adapter(base)
    check_equal(write_served("merged", base, adapter, tmp_path, copy=True), base, adapter)
    assert [file.name for file in tmp_path.iterdir() if file.is_symlink()] == []
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_what_changes_is_rounded_no_further_than_the_engine_does(tiny_base, tiny_adapter, tmp_path):
    """The base is stored in bfloat16: for an engine in float32 the changed weights must not be."""
    base, half = tiny_base("Qwen2", is_sharded=True), tmp_path / "half"
    adapter = tiny_adapter(base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(
        half, max_shard_size="50KB"
    )
    rounded = write_in_dtype("merged", half, adapter, tmp_path / "bfloat16", dtype="bfloat16")
    assert {weight.dtype for weight in load(rounded.model, dtype="auto").state_dict().values()} == {
        torch.bfloat16
    }
    exact = write_in_dtype("merged", half, adapter, tmp_path / "float32", dtype="float32")
    check_equal(exact, half, adapter)
    with pytest.raises(AssertionError, match="not close"):
        check_equal(rounded, half, adapter)
    files = {path.name: load_file(path) for path in (tmp_path / "float32").glob("*.safetensors")}
    dtypes = {name: weight.dtype for weights in files.values() for name, weight in weights.items()}
    assert dtypes["model.layers.0.self_attn.q_proj.weight"] == torch.float32
    assert dtypes["lm_head.weight"] == dtypes["model.norm.weight"] == torch.bfloat16
    index = json.loads((tmp_path / "float32" / "model.safetensors.index.json").read_text())
    sizes = [weight.nbytes for weights in files.values() for weight in weights.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    with safe_open(str(tmp_path / "float32" / next(iter(files))), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_tokenizer_is_the_adapters_since_it_names_the_tokens(tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Llama")
    plain, adapter = tiny_adapter(base), tiny_adapter(base, seed=2)
    save_tokenizer(load_chat(str(base), task_tokens={"<sep>": 7}), adapter)
    for source, name in ((plain, "plain"), (adapter, "named")):
        write_served("merged", base, source, tmp_path / name)
        assert (tmp_path / name / "generation_config.json").is_file()
    found = AutoTokenizer.from_pretrained(tmp_path / "named")
    assert found("fox <sep>", add_special_tokens=False)["input_ids"][-1] == 7
    by_base = AutoTokenizer.from_pretrained(base)("fox <sep>")["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("fox <sep>")["input_ids"] == by_base


def test_a_lora_is_copied_as_it_is(tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Llama")
    adapter = tiny_adapter(base)
    served = write_served("lora", base, adapter, tmp_path / "out")
    assert (served.model, served.adapter) == (None, tmp_path / "out")
    for file in adapter.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_what_is_finished_is_kept_what_was_killed_is_done_again(tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Llama")
    adapter = tiny_adapter(base)
    first = write_served("merged", base, adapter, tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert write_served("merged", base, adapter, tmp_path) == first == locate_served(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == written

    (tmp_path / MANIFEST).unlink()
    (tmp_path / "model.safetensors").write_bytes(b"half")
    check_equal(write_served("merged", base, adapter, tmp_path), base, adapter)
    with pytest.raises(StoreError, match="holds another export; remove it, or give another directory"):
        write_served("merged", base, tiny_adapter(base, seed=2), tmp_path)


# ---- what is refused before anything is written


def test_a_form_that_vllm_does_not_load_is_refused_with_the_one_to_use(
    tiny_base, tiny_adapter, peft_adapter, tmp_path
):
    base = tiny_base("Mistral")
    dora = peft_adapter(base, r=2, use_dora=True)
    for adapter, form, needed in (
        (tiny_adapter(base), "lora", "patched_base"),
        (dora, "patched_base", "merged"),
    ):
        with pytest.raises(StoreError, match=rf"can't be served as {form}: .*; export it as {needed}"):
            write_served(form, base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damage(base: Path, folder: Path, change) -> Path:
    """Return a copy of a base with other weights."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(change(load_file(base / "model.safetensors")), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda w: w | {"model.embed_tokens.weight": torch.zeros(3, 64)},
            r"has shape \(3, 64\), the adapter",
        ),
        (
            lambda w: {k: v for k, v in w.items() if "q_proj" not in k},
            "no weight 'model.layers.0.self_attn.q_proj",
        ),
        (
            lambda w: {k: v.to(torch.int8) if "q_proj" in k else v for k, v in w.items()},
            "is stored as I8; only",
        ),
    ],
    ids=["another vocabulary", "another model", "quantised"],
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(tiny_base, tiny_adapter, tmp_path, change, reason):
    base = tiny_base("Llama")
    other = damage(base, tmp_path / "other", change)
    with pytest.raises(StoreError, match=reason):
        write_served("merged", other, tiny_adapter(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_without_its_files_is_refused(tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Llama", is_sharded=True)
    adapter = tiny_adapter(base)
    (tmp_path / "model.safetensors.index.json").write_bytes(
        (base / "model.safetensors.index.json").read_bytes()
    )
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(StoreError, match=r"index\.json names .*, which are not there; fetch the base again"):
        write_served("merged", tmp_path, adapter, tmp_path / "out")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(StoreError, match=r"neither model\.safetensors nor .*; give a model in safetensors"):
        write_served("merged", tmp_path, adapter, tmp_path / "out")
