"""What vLLM alone does: schemas, adapters, and requests that are refused before it would die of them."""

import dataclasses
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from delia.errors import EngineError
from delia.generate.engine import ENGINE_FAULT, EngineConfig, Request, SamplingConfig, build_engine
from delia.generate.pipeline import answer_requests, run_script, to_blocks, to_completions
from delia.generate.vllm_engine import VllmEngine, _to_completion
from delia.store.adapters import AdapterTensors, write_adapter
from delia.store.forms import SERVED_RANKS
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")
SAMPLED = SamplingConfig(max_tokens=24)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=24)

NUMBER_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"equal": {"type": "boolean"}},
        "required": ["equal"],
        "additionalProperties": False,
    }
)


def test_a_schema_admits_no_other_answer_and_leaves_its_neighbours_alone(vllm_engine, requests, chat):
    asked = [
        dataclasses.replace(item, json_schema=NUMBER_SCHEMA if place % 2 else "", max_tokens=40)
        for place, item in enumerate(requests[:8])
    ]
    plain = [dataclasses.replace(item, max_tokens=40) for item in requests[:8]]
    answers = vllm_engine.generate(asked, SAMPLED, end_ids=chat.end_ids)
    free = vllm_engine.generate(plain, SAMPLED, end_ids=chat.end_ids)

    for item in answers[1::2]:
        assert item.finish_reason == "stop"
        assert isinstance(json.loads(chat.decode(item.token_ids))["equal"], bool)
    assert answers[::2] == free[::2]


@pytest.mark.parametrize("schema", ["{", '{"type": "nothing"}'])
def test_a_schema_that_makes_no_grammar_is_refused_and_the_engine_lives_on(
    vllm_engine, requests, chat, schema
):
    bad = dataclasses.replace(requests[0], json_schema=schema)
    with pytest.raises(EngineError, match="makes no grammar"):
        vllm_engine.generate([bad, requests[1]], GREEDY, end_ids=chat.end_ids)
    assert vllm_engine.generate(requests[1:2], GREEDY, end_ids=chat.end_ids)[0].token_ids


def test_what_vllm_refuses_is_one_requests_fault(vllm_engine, requests, chat):
    bad = dataclasses.replace(requests[0], max_tokens=0)
    refused, answered = vllm_engine.generate([bad, requests[1]], GREEDY, end_ids=chat.end_ids)

    assert (refused.finish_reason, refused.token_ids) == (ENGINE_FAULT, ())
    assert "max_tokens" in refused.error
    assert [answered] == vllm_engine.generate(requests[1:2], GREEDY, end_ids=chat.end_ids)


@pytest.mark.parametrize(("finish_reason", "ids"), [("stop", (40, 41)), ("length", (40, 41, 7))])
def test_an_end_that_only_the_models_own_files_name_is_no_part_of_an_answer(requests, finish_reason, ids):
    """vLLM takes ends from generation_config.json too; 7 is none of the chat format's."""
    output = SimpleNamespace(token_ids=[40, 41, 7], finish_reason=finish_reason, logprobs=None)

    assert _to_completion(requests[0], output).token_ids == ids


def test_the_scripted_engine_refuses_a_schema(requests, chat):
    asked = dataclasses.replace(requests[0], json_schema=NUMBER_SCHEMA)
    with pytest.raises(EngineError, match=r"no grammar; set engine\.kind=vllm"):
        build_engine(STARTER, EngineConfig(kind="scripted")).generate([asked], GREEDY, end_ids=chat.end_ids)


def test_vllm_answers_with_the_tokens_of_the_model_itself(vllm_engine, requests, chat):
    """Greedy ids of transformers, with no engine between."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(resolve_model(STARTER), dtype=torch.float32)
    expected = []
    for item in requests[:8]:
        ids = model.generate(torch.tensor([item.prompt_ids]), max_new_tokens=24, do_sample=False)[0]
        answer = ids[len(item.prompt_ids) :].tolist()
        expected.append(tuple(answer[: answer.index(chat.end_ids[0])]))

    completions = vllm_engine.generate(requests[:8], GREEDY, end_ids=chat.end_ids)
    assert [item.token_ids for item in completions] == expected


def write_plain_adapter(directory, *, scale: float) -> str:
    """A LoRA adapter of rank 4 on the first attention's values."""
    generator = torch.Generator().manual_seed(0)
    config = json.loads((resolve_model(STARTER) / "config.json").read_text())
    width = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    matrices = (
        torch.randn(4, config["hidden_size"], generator=generator),
        scale * torch.randn(width, 4, generator=generator),
    )
    tensors = AdapterTensors(lora_by_module={"model.layers.0.self_attn.v_proj": matrices})
    write_adapter(directory, tensors, vocab_size=config["vocab_size"], base_model=STARTER.path)
    return str(directory)


def test_requests_with_and_without_an_adapter_are_answered_in_one_batch(
    vllm_engine, requests, chat, tmp_path, count_changed
):
    strong = write_plain_adapter(tmp_path / "strong", scale=1.0)
    nothing = write_plain_adapter(tmp_path / "nothing", scale=0.0)
    base = vllm_engine.generate(requests, GREEDY, end_ids=chat.end_ids)
    mixed = [
        Request(
            request_id=item.request_id, prompt_ids=item.prompt_ids, adapter=(strong, nothing, "")[place % 3]
        )
        for place, item in enumerate(requests)
    ]
    answers = vllm_engine.generate(mixed, GREEDY, end_ids=chat.end_ids)

    assert answers[1::3] == base[1::3]
    assert answers[2::3] == base[2::3]
    assert count_changed(answers[::3], base[::3]) > 0


def test_callers_with_different_adapters_at_the_same_time_get_each_its_own(
    vllm_engine, requests, chat, tmp_path, count_changed
):
    addresses = [write_plain_adapter(tmp_path / str(scale), scale=float(scale)) for scale in range(4)]
    parts = [[dataclasses.replace(item, adapter=address) for item in requests[:4]] for address in addresses]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(lambda part: vllm_engine.generate(part, GREEDY, end_ids=chat.end_ids), parts)
        )

    assert together == [vllm_engine.generate(part, GREEDY, end_ids=chat.end_ids) for part in parts]
    assert count_changed(together[0], together[3]) > 0


def spoil_config(directory, **entries) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_an_adapter_that_vllm_would_die_of_is_refused_and_the_engine_lives_on(
    vllm_engine, requests, chat, tmp_path
):
    before = vllm_engine.generate(requests[:2], GREEDY, end_ids=chat.end_ids)
    for name, entries, reason in (
        ("saved", {"modules_to_save": ["embed_tokens"]}, r"adapter with modules_to_save=\['embed_tokens'\]"),
        ("rows", {"trainable_token_indices": [9]}, r"trainable_token_indices=\[9\].*embedding LoRA"),
        ("dora", {"use_dora": True}, "vLLM has no DoRA.*--form merged"),
    ):
        bad = Request(
            request_id="bad",
            prompt_ids=requests[0].prompt_ids,
            adapter=write_plain_adapter(tmp_path / name, scale=1.0),
        )
        spoil_config(tmp_path / name, **entries)
        with pytest.raises(EngineError, match=reason):
            vllm_engine.generate([requests[0], bad], GREEDY, end_ids=chat.end_ids)

    assert vllm_engine.generate(requests[:2], GREEDY, end_ids=chat.end_ids) == before


def test_an_adapter_with_tensors_of_another_kind_is_refused_by_their_names(
    vllm_engine, requests, chat, tmp_path
):
    address = write_plain_adapter(tmp_path / "a", scale=1.0)
    save_file(
        {"base_model.model.model.embed_tokens.weight": torch.zeros(2)},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    bad = Request(request_id="bad", prompt_ids=requests[0].prompt_ids, adapter=address)

    with pytest.raises(EngineError, match=r"can't load the tensors \['base_model.*embed_tokens.weight'\]"):
        vllm_engine.generate([bad], GREEDY, end_ids=chat.end_ids)
    assert vllm_engine.generate(requests[:1], GREEDY, end_ids=chat.end_ids)[0].token_ids


def test_a_rank_over_vllms_largest_is_refused_before_the_engine_starts():
    config = EngineConfig(lora_rank=SERVED_RANKS[-1] + 1)

    with pytest.raises(EngineError, match="LoRA rank 513 is over vLLM's largest, 512; merge"):
        VllmEngine(STARTER, config)


# ---- what vLLM is started with


@pytest.fixture
def start(monkeypatch):
    """Return a function of settings: what vLLM is given, options and environment, with none started."""

    def start(**settings: Any) -> tuple[dict[str, Any], dict[str, str]]:
        given: dict[str, Any] = {}

        def take(**options: Any) -> SimpleNamespace:
            given.update(options)
            return SimpleNamespace(llm_engine=None)

        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=take))
            others = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
            patch.setattr("os.environ", others)
            VllmEngine(STARTER, EngineConfig(**settings))
            return given, dict(os.environ)

    return start


def test_a_model_is_spread_over_the_gpus_of_its_replica_inside_its_node(start):
    options, environment = start(num_gpus_per_replica=2, tensor_parallel_size=2, gpu_memory_utilization=0.7)

    assert options["tensor_parallel_size"] == 2
    assert options["distributed_executor_backend"] == "mp"
    assert (options["gpu_memory_utilization"], options["enforce_eager"]) == (0.7, False)
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


def test_a_model_on_one_device_stays_in_the_process_of_its_replica(start):
    for num_gpus in (0.0, 0.5, 1.0):
        options, environment = start(num_gpus_per_replica=num_gpus)
        assert options["tensor_parallel_size"] == 1
        assert "distributed_executor_backend" not in options
        assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


@pytest.mark.system
def test_a_model_in_two_shards_answers_as_it_does_in_one(cluster, tiny_base, requests, chat):
    model = ModelConfig(path=str(tiny_base("Llama")))
    answers = []
    for size in (1, 2):
        engine = EngineConfig(tensor_parallel_size=size, num_cpus_per_replica=size, max_model_len=96)
        tables = run_script(
            answer_requests,
            to_blocks(requests[:8], engine.batch_size),
            model=model,
            engine=engine,
            sampling=GREEDY,
            end_ids=chat.end_ids,
        )
        answers.append([item.token_ids for table in tables for item in to_completions(table)])

    assert any(len(ids) > 1 for ids in answers[0])
    assert answers[0] == answers[1]
