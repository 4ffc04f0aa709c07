"""What a job's engines are given for an adapter, by the base's architecture, locally and with a bucket."""

import json
from pathlib import Path

import pytest

from delia.errors import EngineError
from delia.evaluate.harness import EvaluateConfig
from delia.flow.evaluation import evaluate_adapters
from delia.flow.serving import Served, choose_serving, materialise, serve
from delia.flow.workspace import Workspace, open_workspace
from delia.generate.engine import EngineConfig
from delia.schema import Message, SeedTask, Task
from delia.store.adapters import CONFIG, fetch_adapter
from delia.store.models import ModelConfig, resolve_model

ROWS = tuple(
    SeedTask(
        task_id=text,
        messages=(Message(role="user", content=f"<sep> {text}"), Message(role="assistant", content="no")),
    )
    for text in ("name a cat .", "who is king ?")
)


def open_space(output_dir: Path, base: Path) -> Workspace:
    task = Task(name="t", digest="d", rows_by_split={"train": (), "dev": ROWS, "test": ()}, tokens=("<sep>",))
    return open_workspace(str(output_dir), ModelConfig(path=str(base), revision="r"), task)


def test_what_an_engine_loads_as_it_is_is_not_written(tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Llama")
    space, address = open_space(tmp_path / "runs", base), str(tiny_adapter(base))
    assert serve(address, space) == Served(model=space.model, adapter=address, rank=4)
    assert serve("", space) == Served(model=space.model, rank=1)
    assert not (tmp_path / "runs").exists()


def test_the_rank_is_the_largest_of_all_parts(tiny_base, tiny_adapter):
    base = tiny_base("Llama")
    address = tiny_adapter(base, token_ids=tuple(range(7, 16)))
    assert serve(str(address), open_space(Path("runs"), base)).rank == 9


def test_a_patched_base_is_made_once_and_scored_over(cluster, tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Mistral")
    space, address = open_space(tmp_path / "runs", base), str(tiny_adapter(base))
    assert choose_serving(address, space.model).form == "patched_base"
    served = serve(address, space)
    (place,) = (tmp_path / "runs" / "served").iterdir()
    assert served.model == space.model.model_copy(update={"path": f"{place}/base", "revision": None})
    assert (served.adapter, served.rank) == (f"{place}/adapter", 4)
    written = (place / "base" / "model.safetensors").stat().st_mtime_ns

    scripted = EngineConfig(kind="scripted")
    report = evaluate_adapters(EvaluateConfig(max_tokens=8), space, {"a": address}, ROWS, engine=scripted)[
        "a"
    ]
    assert len(report.token_ids) == len(ROWS)
    assert (place / "base" / "model.safetensors").stat().st_mtime_ns == written
    other = serve(str(tiny_adapter(base, seed=2)), space)
    assert other.model.path != served.model.path


def test_a_merged_model_is_served_alone(cluster, tiny_base, peft_adapter, tmp_path):
    base = tiny_base("Llama")
    space = open_space(tmp_path / "runs", base)
    served = serve(str(peft_adapter(base, r=2, use_dora=True)), space)
    assert served.adapter == ""
    assert (resolve_model(served.model) / "model.safetensors").is_file()


def test_an_adapter_that_nothing_serves_is_refused_before_an_engine_starts(tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Llama")
    address = tiny_adapter(base)
    config = json.loads((address / CONFIG).read_text()) | {"modules_to_save": ["lm_head"]}
    (address / CONFIG).write_text(json.dumps(config))
    with pytest.raises(EngineError, match="can't load an adapter with modules_to_save"):
        serve(str(address), open_space(tmp_path, base))


def test_in_a_bucket_a_served_base_is_whole_and_fetched_by_those_who_load_it(
    tiny_base, tiny_adapter, object_store
):
    base = tiny_base("Qwen2", is_sharded=True)
    address = tiny_adapter(base)
    object_store.create_bucket(Bucket="served")
    materialise("patched_base", ModelConfig(path=str(base)), str(address), "s3://served/runs/one")
    model = resolve_model(ModelConfig(path="s3://served/runs/one/base"))
    adapter = fetch_adapter("s3://served/runs/one/adapter")
    assert not any(file.is_symlink() for file in model.iterdir())
    shards = set(json.loads((model / "model.safetensors.index.json").read_text())["weight_map"].values())
    changed = [file for file in shards if (model / file).read_bytes() != (base / file).read_bytes()]
    assert len(changed) == 1
    assert (adapter / "adapter_model.safetensors").is_file()
