"""The contract of every engine: the scripted one, and vLLM on the starter."""

import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from delia.chat import ChatEncoder, load_chat
from delia.errors import EngineError
from delia.generate.engine import (
    ENGINE_FAULT,
    PROMPT_TOO_LONG,
    Completion,
    Engine,
    EngineConfig,
    Request,
    SamplingConfig,
    build_engine,
)
from delia.generate.vllm_engine import VllmEngine
from delia.rng import derive_seed
from delia.schema import Message
from delia.starter.world import draw_held_out
from delia.store.adapters import AdapterTensors, write_adapter
from delia.store.forms import SERVED_RANKS
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")
SAMPLED = SamplingConfig(max_tokens=24)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=24)
QUESTIONS = tuple(item.prompt()[-1]["content"] for item in draw_held_out("engines", num_items=24))


@pytest.fixture(scope="session")
def chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)))


class HostedEngine:
    """An engine in an actor: vLLM wants a process of its own, this one has imported all there is."""

    def __init__(self, host) -> None:
        self._host = host

    def generate(self, requests, sampling, *, end_ids):
        return ray.get(self._host.generate.remote(list(requests), sampling, tuple(end_ids)))


@pytest.fixture(scope="module")
def vllm_engine(cluster) -> Iterator[Engine]:
    @ray.remote(num_cpus=1)
    class Host:
        def __init__(self, model, config):
            self._engine = build_engine(model, config)

        def generate(self, requests, sampling, end_ids):
            return self._engine.generate(requests, sampling, end_ids=end_ids)

    config = EngineConfig(kind="vllm", max_model_len=256, max_num_seqs=64, lora_rank=8)
    host = Host.options(max_concurrency=4).remote(STARTER, config)
    yield HostedEngine(host)
    ray.kill(host)


@pytest.fixture(params=["scripted", "vllm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "vllm":
        return request.getfixturevalue("vllm_engine")
    return build_engine(STARTER, EngineConfig(kind="scripted", max_model_len=256))


@pytest.fixture(scope="session")
def requests(chat: ChatEncoder) -> list[Request]:
    return [
        Request(
            request_id=f"r{place}",
            prompt_ids=tuple(chat.encode_prompt((Message(role="user", content=text),))),
            seed=derive_seed("engines", place),
        )
        for place, text in enumerate(QUESTIONS)
    ]


def reseed(requests: list[Request], seed: int) -> list[Request]:
    return [
        Request(request_id=item.request_id, prompt_ids=item.prompt_ids, seed=derive_seed(seed, place))
        for place, item in enumerate(requests)
    ]


def count_changed(some: list[Completion], other: list[Completion]) -> int:
    return sum(a.token_ids != b.token_ids for a, b in zip(some, other, strict=True))


# ---- both engines


def test_completions_come_in_the_order_of_their_requests_with_their_ids_and_prompt_lengths(
    engine, requests, chat
):
    completions = engine.generate(requests, SAMPLED, end_ids=chat.end_ids)

    assert [item.request_id for item in completions] == [item.request_id for item in requests]
    assert [item.num_prompt_tokens for item in completions] == [len(item.prompt_ids) for item in requests]


def test_no_requests_give_no_completions(engine, chat):
    assert engine.generate([], SAMPLED, end_ids=chat.end_ids) == []


def test_an_answer_that_is_cut_has_max_tokens_and_says_length_and_a_whole_one_says_stop(
    engine, requests, chat
):
    cut = engine.generate(requests, SamplingConfig(max_tokens=6), end_ids=chat.end_ids)
    whole = engine.generate(requests, SamplingConfig(max_tokens=100), end_ids=chat.end_ids)

    assert {item.finish_reason for item in cut} == {"length", "stop"}
    assert {len(item.token_ids) for item in cut if item.finish_reason == "length"} == {6}
    assert all(len(item.token_ids) <= 6 for item in cut)
    assert {item.finish_reason for item in whole} == {"stop"}
    assert max(len(item.token_ids) for item in whole) > 6


def test_the_end_token_is_not_part_of_an_answer(engine, requests, chat):
    completions = engine.generate(requests, SAMPLED, end_ids=chat.end_ids)

    assert [item for item in completions if set(item.token_ids) & set(chat.end_ids)] == []


def test_greedy_answers_come_with_the_log_probability_of_each_id_and_sampled_ones_with_none(
    engine, requests, chat
):
    greedy = engine.generate(requests, GREEDY, end_ids=chat.end_ids)
    sampled = engine.generate(requests, SAMPLED, end_ids=chat.end_ids)

    assert [len(item.logprobs) for item in greedy] == [len(item.token_ids) for item in greedy]
    assert all(value <= 0 for item in greedy for value in item.logprobs)
    assert {item.logprobs for item in sampled} == {()}


def test_equal_seeds_give_equal_tokens_and_other_seeds_others(engine, requests, chat):
    first, again = (engine.generate(requests, SAMPLED, end_ids=chat.end_ids) for _ in range(2))
    others = [engine.generate(reseed(requests, seed), SAMPLED, end_ids=chat.end_ids) for seed in (7, 8, 9)]

    assert first == again
    assert min(count_changed(first, other) for other in others) > 0


def test_requests_of_one_prompt_and_distinct_seeds_do_not_repeat_each_other(engine, chat):
    prompt = tuple(chat.encode_user_prefix(QUESTIONS[0]))
    requests = [Request(request_id=str(seed), prompt_ids=prompt, seed=seed) for seed in range(16)]
    completions = engine.generate(requests, SAMPLED, end_ids=chat.end_ids)

    assert len({item.token_ids for item in completions}) > 12


def test_greedy_answers_ignore_the_seed(engine, requests, chat):
    first, other = (
        engine.generate(reseed(requests, seed), GREEDY, end_ids=chat.end_ids) for seed in (0, 12345)
    )

    assert first == other


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_neither_the_order_of_requests_nor_their_company_changes_an_answer(engine, requests, chat, sampling):
    together = engine.generate(requests, sampling, end_ids=chat.end_ids)
    backwards = engine.generate(requests[::-1], sampling, end_ids=chat.end_ids)
    alone = [engine.generate([item], sampling, end_ids=chat.end_ids)[0] for item in requests[:4]]

    assert backwards[::-1] == together
    assert alone == together[:4]


def test_a_prompt_without_room_for_an_answer_is_handed_back_and_the_others_are_answered(
    engine, requests, chat
):
    long = Request(request_id="long", prompt_ids=(9,) * 256)
    before, refused, after = engine.generate([requests[0], long, requests[1]], GREEDY, end_ids=chat.end_ids)

    assert [before, after] == engine.generate(requests[:2], GREEDY, end_ids=chat.end_ids)
    assert (refused.request_id, refused.finish_reason, refused.token_ids) == ("long", PROMPT_TOO_LONG, ())
    assert refused.error == "the prompt has 256 ids, engine.max_model_len=256 leaves no room"


def test_an_answer_ends_where_the_context_does(engine, chat):
    full = Request(request_id="r", prompt_ids=tuple(chat.encode_user_prefix("the " * 250)[:253]))
    long = SamplingConfig(max_tokens=100)
    (answer,) = engine.generate([full], long, end_ids=())

    assert (len(answer.token_ids), answer.finish_reason) == (256 - 253, "length")


def test_a_request_may_set_its_own_temperature_and_length(engine, requests, chat):
    own = [dataclasses.replace(item, temperature=0.0, max_tokens=3) for item in requests]
    short = engine.generate(requests, SamplingConfig(temperature=0.0, max_tokens=3), end_ids=chat.end_ids)

    assert engine.generate(own, SAMPLED, end_ids=chat.end_ids) == short
    assert {len(item.token_ids) for item in short} <= {1, 2, 3}


def test_callers_at_the_same_time_get_what_each_would_get_alone(engine, requests, chat):
    parts = [requests[place::4] for place in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: engine.generate(part, SAMPLED, end_ids=chat.end_ids), parts))

    assert together == [engine.generate(part, SAMPLED, end_ids=chat.end_ids) for part in parts]


# ---- vLLM


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
    vllm_engine, requests, chat, tmp_path
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
    vllm_engine, requests, chat, tmp_path
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


@pytest.mark.parametrize("settings", [{"kind": "sglang"}, {"replicas": 2}])
def test_settings_of_no_engine_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        EngineConfig(**settings)
