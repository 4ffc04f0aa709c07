"""Answers that a JSON schema holds vLLM to, at T=1: always of the schema, and the same for the same seed."""

import json
from dataclasses import replace

import jsonschema
import pytest

from delia.generate.engine import Completion, Request, SamplingConfig
from delia.methods.synthesizer.s3ft import S3FT, VERDICT_SCHEMA
from delia.rng import derive_seed

SAMPLED = SamplingConfig(max_tokens=64)
RATING_SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["question", "list"]},
            "marks": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        },
        "required": ["kind", "marks"],
        "additionalProperties": False,
    }
)
SCHEMAS = (VERDICT_SCHEMA, RATING_SCHEMA)


def is_of_schema(text: str, schema: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), json.loads(schema))
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


@pytest.fixture(scope="module")
def free(requests) -> list[Request]:
    """48 requests: each question under two seeds."""
    return [
        replace(item, request_id=f"{item.request_id}/{copy}", seed=derive_seed("schemas", place, copy))
        for place, item in enumerate(requests)
        for copy in range(2)
    ]


@pytest.fixture(scope="module")
def held(free) -> list[Request]:
    """The same requests, each held to one of two schemas."""
    return [replace(item, json_schema=SCHEMAS[place % 2]) for place, item in enumerate(free)]


@pytest.fixture(scope="module")
def answered(vllm_engine, held, chat) -> list[Completion]:
    return vllm_engine.generate(held, SAMPLED, end_ids=chat.end_ids)


def test_every_sampled_answer_is_whole_and_of_its_schema_and_none_is_without_it(
    vllm_engine, free, held, answered, chat
):
    texts = [chat.decode(item.token_ids) for item in answered]
    unheld = [
        chat.decode(item.token_ids) for item in vllm_engine.generate(free, SAMPLED, end_ids=chat.end_ids)
    ]

    for request, completion, text, other in zip(held, answered, texts, unheld, strict=True):
        assert completion.finish_reason == "stop"
        assert is_of_schema(text, request.json_schema), text
        assert not is_of_schema(other, request.json_schema), other
    assert len(set(texts)) > len(SCHEMAS)  # sampled: a schema leaves a choice


def test_a_batch_of_both_answers_each_as_it_does_alone(vllm_engine, free, held, answered, chat):
    """Free and held requests take turns; one after the other is from the end."""
    alone = vllm_engine.generate(free, SAMPLED, end_ids=chat.end_ids)
    mixed = [request for pair in zip(free, held, strict=True) for request in pair]
    together = vllm_engine.generate(mixed[::-1], SAMPLED, end_ids=chat.end_ids)[::-1]

    assert together[::2] == alone
    assert together[1::2] == answered


def test_a_seed_has_one_answer_under_a_schema_and_another_seed_another(vllm_engine, held, answered, chat):
    again = vllm_engine.generate(held, SAMPLED, end_ids=chat.end_ids)
    reseeded = [replace(item, seed=item.seed + 1) for item in held]
    others = vllm_engine.generate(reseeded, SAMPLED, end_ids=chat.end_ids)

    assert again == answered
    assert others != answered


def test_no_verdict_is_cut_at_the_judges_limit(vllm_engine, free, chat):
    """The grammar admits no white space, which a model could fill its limit with."""
    asked = [replace(item, json_schema=VERDICT_SCHEMA, max_tokens=S3FT().max_verdict_tokens) for item in free]
    texts = [
        chat.decode(item.token_ids) for item in vllm_engine.generate(asked, SAMPLED, end_ids=chat.end_ids)
    ]

    assert {text.replace(" ", "") for text in texts} <= {'{"same":true}', '{"same":false}'}
