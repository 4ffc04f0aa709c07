"""The contract of every engine: the scripted one, and vLLM on the starter."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError

from delia.config import validate
from delia.errors import ConfigError
from delia.generate.engine import PROMPT_TOO_LONG, Engine, EngineConfig, Request, SamplingConfig, build_engine
from delia.rng import derive_seed
from delia.store.models import ModelConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
SAMPLED = SamplingConfig(max_tokens=24)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=24)


@pytest.fixture(params=["scripted", "vllm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "vllm":
        return request.getfixturevalue("vllm_engine")
    return build_engine(STARTER, EngineConfig(kind="scripted", max_model_len=256))


def reseed(requests: list[Request], seed: int) -> list[Request]:
    return [
        Request(request_id=item.request_id, prompt_ids=item.prompt_ids, seed=derive_seed(seed, place))
        for place, item in enumerate(requests)
    ]


def test_completions_come_in_the_order_of_their_requests_with_their_ids_and_prompt_lengths(
    engine, requests, chat
):
    completions = engine.generate(requests, SAMPLED, end_ids=chat.end_ids)

    assert [item.request_id for item in completions] == [item.request_id for item in requests]
    assert [item.num_prompt_tokens for item in completions] == [len(item.prompt_ids) for item in requests]


@pytest.mark.parametrize("fields", [{"top_p": 0}, {"top_p": 2}, {"temperature": -1}, {"max_tokens": 0}])
def test_sampling_that_no_engine_can_do_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        SamplingConfig(**fields)


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


def test_ids_that_a_request_names_end_its_answer_too(engine, requests, chat):
    plain = engine.generate(requests, GREEDY, end_ids=chat.end_ids)
    ended = [
        dataclasses.replace(request, end_ids=answer.token_ids[1:2])
        for request, answer in zip(requests, plain, strict=True)
    ]
    answers = engine.generate(ended, GREEDY, end_ids=chat.end_ids)

    assert [a for a, b in zip(answers, ended, strict=True) if set(a.token_ids) & set(b.end_ids)] == []
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}


def test_greedy_answers_come_with_the_log_probability_of_each_id_and_sampled_ones_with_none(
    engine, requests, chat
):
    greedy = engine.generate(requests, GREEDY, end_ids=chat.end_ids)
    sampled = engine.generate(requests, SAMPLED, end_ids=chat.end_ids)

    assert [len(item.logprobs) for item in greedy] == [len(item.token_ids) for item in greedy]
    assert all(value <= 0 for item in greedy for value in item.logprobs)
    assert {item.logprobs for item in sampled} == {()}


def test_equal_seeds_give_equal_tokens_and_other_seeds_others(engine, requests, chat, count_changed):
    first, again = (engine.generate(requests, SAMPLED, end_ids=chat.end_ids) for _ in range(2))
    others = [engine.generate(reseed(requests, seed), SAMPLED, end_ids=chat.end_ids) for seed in (7, 8, 9)]

    assert first == again
    assert min(count_changed(first, other) for other in others) > 0


def test_requests_of_one_prompt_and_distinct_seeds_do_not_repeat_each_other(engine, chat, questions):
    prompt = tuple(chat.encode_user_prefix(questions[0]))
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


@pytest.mark.parametrize("settings", [{"kind": "sglang"}, {"replicas": 2}])
def test_settings_of_no_engine_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        EngineConfig(**settings)


def make_engine_config(size: int, num_gpus: float, num_cpus: float) -> EngineConfig:
    settings = {
        "tensor_parallel_size": size,
        "num_gpus_per_replica": num_gpus,
        "num_cpus_per_replica": num_cpus,
    }
    return validate(EngineConfig, settings)


@pytest.mark.parametrize(("size", "num_gpus"), [(1, 2.0), (2, 1.0), (4, 2.0), (2, 0.5), (1, 1.5)])
def test_a_model_that_does_not_lie_on_all_gpus_of_its_replica_is_refused(size, num_gpus):
    with pytest.raises(
        ConfigError,
        match="tensor_parallel_size is the number of a replica's GPUs.*"
        f" it is {size} with num_gpus_per_replica={num_gpus:g}; change one of the two",
    ):
        make_engine_config(size, num_gpus, 8.0)


def test_shards_that_would_share_a_cpu_are_refused_with_the_ways_out():
    with pytest.raises(
        ConfigError, match=r"it is 2 with num_cpus_per_replica=1; .* set num_gpus_per_replica=2, or take"
    ):
        make_engine_config(2, 0.0, 1.0)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size'.* greater than 0, got 0"):
        make_engine_config(0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("size", "num_gpus", "num_cpus"),
    [(1, 0.0, 1.0), (1, 0.0, 0.5), (2, 0.0, 2.0), (1, 0.5, 1.0), (1, 1.0, 1.0), (2, 2.0, 1.0)],
)
def test_a_shard_has_a_device_of_its_own(size, num_gpus, num_cpus):
    assert make_engine_config(size, num_gpus, num_cpus).tensor_parallel_size == size


def test_custom_resources_that_are_none_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"names GPU, which Ray counts itself; set .* num_gpus_per_replica"):
        validate(EngineConfig, {"resources_per_replica": {"GPU": 1.0}})
    for amount in (0.0, -1.0, 1.5):
        with pytest.raises(
            ConfigError, match=rf"\[a100\] is a part of one or a whole number, got {amount:g}; take"
        ):
            validate(EngineConfig, {"resources_per_replica": {"a100": amount}})


def test_custom_resources_are_taken_as_they_are():
    wanted = {"accelerator_type:A100": 0.001, "a100": 2.0}

    assert validate(EngineConfig, {"resources_per_replica": wanted}).resources_per_replica == wanted
