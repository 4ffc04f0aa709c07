"""`delia export`: every form answers as the adapter does, and an export that does not is not let out."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from delia.cli import FORMS as CLI_FORMS
from delia.cli import main
from delia.errors import ExportError, StoreError
from delia.flow.ask import ask
from delia.flow.export import compare, export_adapter
from delia.recipes.starter import STARTER
from delia.store.models import resolve_model
from delia.store.serving import FORMS, locate_served

QUESTION = "count the words : fox cat owl . use the <sep> format ."


@pytest.fixture
def adapter(small_space, make_adapter) -> str:
    """LoRA and the row of <sep> on the starter, which vLLM serves as they are."""
    return make_adapter(small_space, shift=0.3)


def test_the_lightest_form_is_the_default_and_says_how_it_is_served(adapter, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["export", adapter, "--output", str(output)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["form"].startswith("lora: vLLM's LlamaForCausalLM takes all of it")
    assert lines["model"] == "the base as it is"
    assert lines["adapter"] == str(output)
    assert lines["checked"].endswith(" nats from HF + PEFT")
    command = lines["serve"].split()
    assert command[:2] == ["vllm", "serve"]
    assert (Path(command[2]) / "config.json").is_file()
    assert command[command.index("--lora-modules") + 1] == f"adapter={output}"
    assert command[command.index("--max-lora-rank") + 1] == "8"
    assert command[command.index("--tokenizer") + 1] == str(output), "the base's does not know the token"


def test_a_merged_model_answers_as_the_adapter_without_anything_of_delia(adapter, tmp_path):
    export = export_adapter(adapter, str(tmp_path / "out"), form="merged", copy=True)
    assert export.command == f"vllm serve {tmp_path / 'out'} --dtype float32"
    assert export.gap_nats < 1e-4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**ids, max_new_tokens=256, do_sample=False)[0, ids["input_ids"].shape[1] :]
    by_adapter, by_base = ask(adapter, QUESTION).split("\n")
    answer = tokenizer.decode(output, skip_special_tokens=True)
    assert f"adapter: {answer}".split() == by_adapter.split()
    assert answer.split() != by_base.removeprefix("base: ").split()


def test_a_patched_base_is_served_with_the_rest_as_lora(adapter, tmp_path, capsys):
    assert main(["export", adapter, "--form", "patched_base", "--output", str(tmp_path / "out")]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["model"], lines["adapter"]) == (f"{tmp_path}/out/base", f"{tmp_path}/out/adapter")
    assert lines["serve"].startswith(f"vllm serve {tmp_path}/out/base --dtype float32 --enable-lora")
    assert "--tokenizer" not in lines["serve"]


def test_what_is_not_checked_says_so(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("delia.flow.export.compare", None)
    assert main(["export", adapter, "--no-check", "--output", str(tmp_path / "out")]) == 0
    assert "checked  no\n" in capsys.readouterr().out


@pytest.mark.parametrize("damaged", ["the row", "the rest", "the head", "everything"])
def test_an_export_that_lost_something_does_not_pass(adapter, small_space, tmp_path, damaged):
    files = export_adapter(adapter, str(tmp_path / "out"), form="merged", copy=True, is_checked=False).files
    weights = load_file(files.model / "model.safetensors")
    of_base = load_file(resolve_model(STARTER) / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    lost = {
        "the row": [embedding],
        "the rest": [name for name in of_base if name != embedding],
        "the head": [],
        "everything": list(of_base),
    }[damaged]
    weights.update({name: of_base[name] for name in lost})
    if damaged == "the head":
        weights["lm_head.weight"] = weights["lm_head.weight"] + 0.01
    save_file(weights, files.model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"nats a token from those of HF \+ PEFT .*: don't serve it"):
        compare(STARTER, Path(adapter), files, tuple(small_space.chat.token_ids.values()))


def test_a_directory_that_holds_something_else_is_left_alone(adapter, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="is not empty and holds no export; remove it, or give another"):
        export_adapter(adapter, str(tmp_path), form="merged")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["notes.txt"]


def test_an_export_is_made_once(adapter, tmp_path):
    first = export_adapter(adapter, str(tmp_path / "out"), form="merged", is_checked=False)
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert export_adapter(adapter, str(tmp_path / "out"), form="merged", is_checked=False) == first
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    assert locate_served(tmp_path / "out") == first.files


def test_the_command_names_the_forms_that_there_are():
    assert CLI_FORMS == FORMS
