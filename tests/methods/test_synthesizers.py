"""One contract for every synthesis method, and what is special to each."""

import importlib
import pickle
import pkgutil
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from delia.chat import ChatEncoder, load_chat
from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig
from delia.generate.scripted import ScriptedEngine
from delia.methods import synthesizer
from delia.methods.synthesizer.answering import Answering
from delia.methods.synthesizer.attribute_grid import AttributeGrid, choose_stride
from delia.methods.synthesizer.evol_instruct import EvolInstruct
from delia.methods.synthesizer.magpie import Magpie
from delia.methods.synthesizer.rewriting import Rewriting
from delia.methods.synthesizer.s3ft import S3FT
from delia.methods.synthesizer.self_instruct import SelfInstruct
from delia.schema import Message, Rejection, Row, SeedTask
from delia.starter.task_files import TOKEN, build_lingo, build_sep
from delia.store.models import ModelConfig, resolve_model
from delia.synthesize.socket import SynthesisContext, Synthesizer

STARTER = ModelConfig(path="package://delia.starter/weights")
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


@pytest.fixture(scope="module")
def plain_chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)))


@pytest.fixture(scope="module")
def token_chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)), task_tokens=[TOKEN])


@pytest.fixture(scope="module")
def context(plain_chat: ChatEncoder) -> SynthesisContext:
    """The task `lingo`, which has no token."""
    seeds = build_lingo().rows_by_split["train"]
    return SynthesisContext(
        source="s", recipe="r", chat=plain_chat, seed_tasks=seeds, token="", long_instruction=""
    )


@pytest.fixture(scope="module")
def token_context(token_chat: ChatEncoder) -> SynthesisContext:
    """The task `sep`, whose instructions hold a token."""
    task = build_sep()
    return SynthesisContext(
        source="s",
        recipe="r",
        chat=token_chat,
        seed_tasks=task.rows_by_split["train"],
        token=TOKEN,
        long_instruction=task.long_instruction,
    )


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Synthesizer:
    return METHODS[request.param]


@pytest.fixture(params=sorted(set(METHODS) - GIVEN))
def writer(request: pytest.FixtureRequest) -> Synthesizer:
    """The methods that have instructions written."""
    return METHODS[request.param]


def say(context: SynthesisContext, index: int, text: str, *, finish_reason: str = "stop") -> Completion:
    ids = tuple(context.chat.tokenizer.encode(f" {text}", add_special_tokens=False)) if text else ()
    return Completion(
        request_id=f"s:{index}", token_ids=ids, finish_reason=finish_reason, num_prompt_tokens=5
    )


def make_candidate(method: Synthesizer, context: SynthesisContext, index: int) -> Row | Rejection:
    engine, ends = ScriptedEngine(STARTER, EngineConfig()), context.chat.end_ids
    completions: list[Completion] = []
    while isinstance(step := method(context, index, completions), Request):
        completions += engine.generate([step], SAMPLING, end_ids=ends)
    return step


def ask_first(method: Synthesizer, context: SynthesisContext, index: int) -> Request:
    request = method(context, index, [])
    assert isinstance(request, Request)
    return request


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


def test_a_request_depends_on_its_index_alone(method, context):
    forwards = [ask_first(method, context, index) for index in range(12)]
    backwards = [ask_first(method, context, index) for index in range(11, -1, -1)]

    assert backwards[::-1] == forwards
    assert [item.request_id for item in forwards] == [f"s:{index}" for index in range(12)]
    assert len({item.seed for item in forwards}) == 12


def test_a_prompt_begins_a_chat_and_is_made_of_ids_of_the_vocabulary(method, context):
    for index in range(12):
        prompt_ids = ask_first(method, context, index).prompt_ids
        assert prompt_ids[0] == context.chat.bos_id
        assert max(prompt_ids) < len(context.chat.tokenizer)


def test_a_reply_keeps_the_request_id_and_takes_a_seed_of_its_own(method, context):
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


def test_a_method_that_wrote_nothing_gives_a_named_rejection_and_no_second_turn(writer, context):
    method = writer
    silence = say(context, 4, "")

    rejection = method(context, 4, [silence])
    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.text, rejection.index) == ("no_instruction", "", 4)


def test_an_instruction_that_was_cut_never_becomes_a_row_that_looks_whole(writer, context):
    method = writer
    cut = say(context, 2, "say this in", finish_reason="length")

    candidate = method(context, 2, [cut])
    assert isinstance(candidate, Rejection) or candidate.finish_reason == "length"


# ---- magpie


def test_magpie_prompts_with_the_user_prefix_and_answers_what_it_wrote(context):
    method, chat = Magpie(), context.chat
    reply = method(context, 0, [say(context, 0, "what is the fox ?")])

    assert list(ask_first(method, context, 0).prompt_ids) == chat.encode_user_prefix()
    assert isinstance(reply, Request)
    assert list(reply.prompt_ids) == chat.encode_prompt((Message(role="user", content="what is the fox ?"),))


def test_magpie_puts_its_system_turn_before_both_turns_and_into_the_row(context):
    method, chat = Magpie(system="be short ."), context.chat
    first, second = say(context, 0, "what is the fox ?"), say(context, 0, "red", finish_reason="length")
    reply, row = method(context, 0, [first]), method(context, 0, [first, second])
    turns = (Message(role="system", content="be short ."), Message(role="user", content="what is the fox ?"))

    assert list(ask_first(method, context, 0).prompt_ids) == chat.encode_user_prefix("be short .")
    assert isinstance(reply, Request)
    assert list(reply.prompt_ids) == chat.encode_prompt(turns)
    assert row == Row(
        row_id=context.row_id(0),
        index=0,
        source="s",
        messages=(*turns, Message(role="assistant", content="red")),
        finish_reason="length",
        num_prompt_tokens=5,
        num_output_tokens=5 + 1,
    )


def test_magpies_instruction_that_is_cut_is_kept_as_a_rejection_with_its_text(context):
    cut = say(context, 1, "what is the", finish_reason="length")
    rejection = Magpie()(context, 1, [cut])

    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.text, rejection.num_output_tokens) == ("unfinished", "what is the", 3)


def test_magpies_foreign_answers_come_from_the_adapter_and_its_instructions_do_not(context):
    method = Magpie(answered_by="s3://bucket/adapter")
    reply = method(context, 0, [say(context, 0, "what is the fox ?")])

    assert ask_first(method, context, 0).adapter == ""
    assert isinstance(reply, Request)
    assert reply.adapter == "s3://bucket/adapter"


# ---- rewriting


def make_context(
    base: SynthesisContext, question: str, *, phrasing: str, token: str = ""
) -> SynthesisContext:
    messages = (Message(role="user", content=question), Message(role="assistant", content="red"))
    seeds = (SeedTask(task_id="t", messages=messages, phrasing=phrasing),)
    return SynthesisContext(
        source="s", recipe="r", chat=base.chat, seed_tasks=seeds, token=token, long_instruction=""
    )


def test_rewriting_asks_about_the_instruction_alone_with_a_stand_in_for_the_token(token_context):
    one = make_context(
        token_context,
        f"the fox ? use the {TOKEN} format .",
        phrasing=f"use the {TOKEN} format .",
        token=TOKEN,
    )
    prompt = one.chat.encode_prompt((Message(role="user", content="put otherwise : use the JSON format ."),))
    method = Rewriting(request="put otherwise : {instruction}")

    assert list(ask_first(method, one, 0).prompt_ids) == prompt


def test_rewriting_puts_the_token_back_and_keeps_the_question_and_the_answer(token_context):
    one = make_context(
        token_context,
        f"the fox ? use the {TOKEN} format .",
        phrasing=f"use the {TOKEN} format .",
        token=TOKEN,
    )
    row = Rewriting()(one, 0, [say(one, 0, "answer in JSON please .")])

    assert isinstance(row, Row)
    assert [m.content for m in row.messages] == [f"the fox ? answer in {TOKEN} please .", "red"]
    assert one.chat.token_ids[TOKEN] in one.chat.encode_chat(row.messages).input_ids


@pytest.mark.parametrize("text", ["answer here .", "JSON or JSON ."])
def test_rewriting_that_lost_or_doubled_the_token_is_rejected(token_context, text):
    one = make_context(token_context, f"the fox ? use {TOKEN} .", phrasing=f"use {TOKEN} .", token=TOKEN)
    rejection = Rewriting()(one, 0, [say(one, 0, text)])

    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.text) == ("lost_token", text)


def test_rewriting_that_changed_nothing_is_rejected(context):
    one = make_context(context, "the fox ? be short .", phrasing="be short .")
    rejection = Rewriting()(one, 0, [say(one, 0, "be short .")])

    assert isinstance(rejection, Rejection)
    assert rejection.reason == "unchanged"


@pytest.mark.parametrize("phrasing", ["", "wording 7"])
def test_a_phrasing_that_is_only_a_label_leaves_the_whole_question_to_be_rewritten(context, phrasing):
    one = make_context(context, "what is the fox ?", phrasing=phrasing)
    prompt = one.chat.encode_prompt(
        (Message(role="user", content="Say this in other words: what is the fox ?"),)
    )
    row = Rewriting()(one, 0, [say(one, 0, "tell me the fox .")])

    assert list(ask_first(Rewriting(), one, 0).prompt_ids) == prompt
    assert isinstance(row, Row)
    assert [message.content for message in row.messages] == ["tell me the fox .", "red"]


def test_rewriting_goes_round_the_train_rows(context):
    size = len(context.seed_tasks)
    method = Rewriting()

    assert ask_first(method, context, size).prompt_ids == ask_first(method, context, 0).prompt_ids
    assert ask_first(method, context, size).seed != ask_first(method, context, 0).seed
    assert len({ask_first(method, context, index).prompt_ids for index in range(size)}) > 1


def test_rewriting_never_asks_with_the_token_that_the_model_does_not_know(token_context):
    token_id = token_context.chat.token_ids[TOKEN]
    size = len(token_context.seed_tasks)

    assert [i for i in range(size) if token_id in ask_first(Rewriting(), token_context, i).prompt_ids] == []


# ---- answering


def ask_messages(context: SynthesisContext, *turns: tuple[str, str]) -> list[int]:
    return context.chat.encode_prompt(tuple(Message(role=role, content=text) for role, text in turns))


@pytest.fixture
def one(context: SynthesisContext) -> SynthesisContext:
    """One row to feed on."""
    messages = (Message(role="user", content="what is the fox ?"), Message(role="assistant", content="red"))
    row = Row(row_id="x", index=0, source="before", messages=messages)
    return replace(context, closed=(row,))


def test_answering_asks_each_closed_row_once_and_keeps_its_question(one):
    method = Answering()
    row = method(one, 0, [say(one, 0, "it is grey .")])

    assert list(ask_first(method, one, 0).prompt_ids) == ask_messages(one, ("user", "what is the fox ?"))
    assert isinstance(row, Row)
    assert [message.content for message in row.messages] == ["what is the fox ?", "it is grey ."]
    rejection = method(one, 1, [])
    assert isinstance(rejection, Rejection)
    assert rejection.reason == "no_more_instructions"


def test_answering_without_closed_rows_takes_the_tasks_own(context):
    first = context.seed_tasks[0]
    prompt = context.chat.encode_prompt(first.prompt)

    assert list(ask_first(Answering(), context, 0).prompt_ids) == prompt


def test_the_published_variant_shows_the_reference_as_the_models_own_and_asks_again(one):
    request = ask_first(Answering(demonstrated=True), one, 0)
    row = Answering(demonstrated=True)(one, 0, [say(one, 0, "a red one .")])
    shown = (("user", "what is the fox ?"), ("assistant", "red"), ("user", "what is the fox ?"))

    assert list(request.prompt_ids) == ask_messages(one, *shown)
    assert (request.temperature, ask_first(Answering(), one, 0).temperature) == (0.7, None)
    assert isinstance(row, Row)
    assert [message.content for message in row.messages] == ["what is the fox ?", "a red one ."]


# ---- self-instruct


def test_self_instruct_shows_seeds_and_what_was_written_before_and_answers_what_comes(one):
    method = SelfInstruct(request="more :", num_seeds=2, num_closed=1)
    shown = one.chat.tokenizer.decode(ask_first(method, one, 0).prompt_ids)
    seeds = {task.prompt[-1].content for task in one.seed_tasks}

    assert "what is the fox ?" in shown
    assert sum(seed in shown for seed in seeds) >= 2
    assert "3. " in shown.replace("3 . ", "3. ")
    answer = method(one, 0, [say(one, 0, "name the owl .")])
    assert isinstance(answer, Request)
    assert list(answer.prompt_ids) == ask_messages(one, ("user", "name the owl ."))


def test_no_method_shows_the_new_token_to_a_model_that_does_not_know_it(token_context):
    token_id = token_context.chat.token_ids[TOKEN]
    for method in (SelfInstruct(), EvolInstruct(), Rewriting()):
        assert [i for i in range(40) if token_id in ask_first(method, token_context, i).prompt_ids] == []


# ---- evol-instruct


def test_evol_instruct_draws_all_its_operations_and_names_why_it_throws_away(one):
    method = EvolInstruct()
    prompts = {ask_first(method, one, index).prompt_ids for index in range(60)}
    reasons = {
        text: method(one, 0, [say(one, 0, text)]).reason
        for text in ("what is the fox ?", "the new : Write the new instruction only.")
    }

    assert len(prompts) == len(method.operations)
    assert list(reasons.values()) == ["unchanged", "copies_the_request"]


# ---- attribute grid


def test_the_grid_visits_every_combination_once_before_any_again(context):
    method = AttributeGrid(attributes={"a": ("1", "2", "3"), "b": ("x", "y"), "c": ("p", "q", "r", "s")})
    visited = [tuple(method.choose(index).values()) for index in range(24)]

    assert len(set(visited)) == 24
    assert method.choose(24) == method.choose(0)
    assert {value for value, _, _ in visited[:6]} == {"1", "2", "3"}
    assert "2" in context.chat.decode(ask_first(method, context, visited.index(("2", "y", "q"))).prompt_ids)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 24, 97, 360])
def test_a_stride_visits_all_places(size):
    assert {index * choose_stride(size) % size for index in range(size)} == set(range(size))


@pytest.mark.parametrize("attributes", [{}, {"topic": ()}])
def test_a_grid_without_places_is_refused(attributes):
    with pytest.raises(TypeError, match="every attribute needs values"):
        AttributeGrid(attributes=attributes)


# ---- S3FT


def close(context: SynthesisContext, *texts: str) -> Request | Row | Rejection:
    return S3FT()(context, 0, [say(context, 0, text) for text in texts])


YES, NO = '{"same": true}', '{"same": false}'


def test_s3ft_keeps_its_own_answer_where_the_judge_finds_it_equal(one):
    judged = close(one, "it is red")
    assert isinstance(judged, Request)
    assert (judged.temperature, judged.json_schema != "") == (0.0, True)
    assert "it is red" in one.chat.decode(judged.prompt_ids)

    kept = close(one, "it is red", YES)
    assert isinstance(kept, Row)
    assert (kept.messages[-1].content, kept.finish_reason) == ("it is red", "stop")


def test_s3ft_asks_no_judge_about_the_reference_itself(one):
    kept = close(one, "red")
    assert isinstance(kept, Row)
    assert kept.messages[-1].content == "red"


def test_s3ft_rephrases_the_reference_and_falls_back_on_it(one):
    rephrasing = close(one, "grey", NO)
    assert isinstance(rephrasing, Request)
    assert rephrasing.json_schema == ""
    assert isinstance(close(one, "grey", NO, "the colour red"), Request)
    rephrased = close(one, "grey", NO, "the colour red", YES)
    reference = close(one, "grey", NO, "the colour blue", NO)

    assert isinstance(rephrased, Row)
    assert rephrased.messages[-1].content == "the colour red"
    assert isinstance(reference, Row)
    assert reference.messages[-1].content == "red"


def test_a_verdict_that_was_cut_is_no_agreement(one):
    assert isinstance(close(one, "grey", '{"same": t'), Request)
