"""One contract for every synthesis method; what is special to each stands in files beside this one."""

import importlib
import pickle
import pkgutil
from dataclasses import FrozenInstanceError, fields

import pytest

from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig
from delia.generate.scripted import ScriptedEngine
from delia.methods import synthesizer
from delia.methods.synthesizer.answering import Answering
from delia.methods.synthesizer.attribute_grid import AttributeGrid
from delia.methods.synthesizer.evol_instruct import EvolInstruct
from delia.methods.synthesizer.magpie import Magpie
from delia.methods.synthesizer.rewriting import Rewriting
from delia.methods.synthesizer.s3ft import S3FT
from delia.methods.synthesizer.self_instruct import SelfInstruct
from delia.recipes.starter import STARTER
from delia.schema import Rejection, Row
from delia.synthesize.socket import SynthesisContext, Synthesizer

SYSTEM = "name the colour of the red fox , the grey wolf and the black cat ."
METHODS: dict[str, Synthesizer] = {
    "answering": Answering(),
    "attribute_grid": AttributeGrid(),
    "evol_instruct": EvolInstruct(),
    "magpie": Magpie(system=SYSTEM),
    "rewriting": Rewriting(),
    "s3ft": S3FT(in_json=False),  # the scripted engine knows no grammar
    "self_instruct": SelfInstruct(),
}
GIVEN = {"answering", "s3ft"}
"""Those that answer instructions which are there already."""
SAMPLING = SamplingConfig(max_tokens=16)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Synthesizer:
    return METHODS[request.param]


@pytest.fixture(params=sorted(set(METHODS) - GIVEN))
def writer(request: pytest.FixtureRequest) -> Synthesizer:
    """The methods that have instructions written."""
    return METHODS[request.param]


def make_candidate(method: Synthesizer, context: SynthesisContext, index: int) -> Row | Rejection:
    engine, ends = ScriptedEngine(STARTER, EngineConfig()), context.chat.end_ids
    completions: list[Completion] = []
    while isinstance(step := method(context, index, completions), Request):
        completions += engine.generate([step], SAMPLING, end_ids=ends)
    return step


# ---- the contract


def test_no_method_is_left_out_of_this_file():
    assert {module.name for module in pkgutil.iter_modules(synthesizer.__path__)} == set(METHODS)


def test_a_method_lies_in_the_module_of_its_name_which_names_its_paper(method):
    module = importlib.import_module(type(method).__module__)

    assert METHODS[module.__name__.rpartition(".")[2]] is method
    assert "https://arxiv.org/abs/" in (module.__doc__ or "")


def test_a_method_is_a_frozen_value_that_can_be_sent_to_an_actor(method):
    assert pickle.loads(pickle.dumps(method)) == method
    assert type(method)() == type(method)()  # every knob has a default
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(method)[0].name, "x")


def test_a_request_depends_on_its_index_alone(method, context, ask_first):
    forwards = [ask_first(method, context, index) for index in range(12)]
    backwards = [ask_first(method, context, index) for index in range(11, -1, -1)]

    assert backwards[::-1] == forwards
    assert [item.request_id for item in forwards] == [f"s:{index}" for index in range(12)]
    assert len({item.seed for item in forwards}) == 12


def test_a_prompt_begins_a_chat_and_is_made_of_ids_of_the_vocabulary(method, context, ask_first):
    for index in range(12):
        prompt_ids = ask_first(method, context, index).prompt_ids
        assert prompt_ids[0] == context.chat.bos_id
        assert max(prompt_ids) < len(context.chat.tokenizer)


def test_a_reply_keeps_the_request_id_and_takes_a_seed_of_its_own(method, context, say, ask_first):
    first = ask_first(method, context, 3)
    reply = method(context, 3, [say(context, 3, "what is the fox ?")])

    assert reply == method(context, 3, [say(context, 3, "what is the fox ?")])
    assert not isinstance(reply, Request) or (reply.request_id == "s:3" and reply.seed != first.seed)


def test_a_candidate_is_the_same_alone_and_among_others(method, context):
    together = [make_candidate(method, context, index) for index in range(40)]

    assert [make_candidate(method, context, index) for index in (17, 5)] == [together[17], together[5]]
    assert sum(isinstance(item, Row) for item in together) >= 10


def test_a_candidate_has_its_index_its_source_and_its_id(method, context):
    for index in range(40):
        candidate = make_candidate(method, context, index)
        assert (candidate.index, candidate.source) == (index, "s")
        assert candidate.row_id == context.row_id(index)


def test_a_row_ends_in_the_assistants_turn_after_an_instruction(method, context):
    rows = [item for index in range(40) if isinstance(item := make_candidate(method, context, index), Row)]

    for row in rows:
        assert row.messages[-1].role == "assistant"
        assert row.messages[-2].role == "user"
        assert row.messages[-2].content.strip()


def test_a_method_that_wrote_nothing_gives_a_named_rejection_and_no_second_turn(writer, context, say):
    method = writer
    silence = say(context, 4, "")

    rejection = method(context, 4, [silence])
    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.text, rejection.index) == ("no_instruction", "", 4)


def test_an_instruction_that_was_cut_never_becomes_a_row_that_looks_whole(writer, context, say):
    method = writer
    cut = say(context, 2, "say this in", finish_reason="length")

    candidate = method(context, 2, [cut])
    assert isinstance(candidate, Rejection) or candidate.finish_reason == "length"
