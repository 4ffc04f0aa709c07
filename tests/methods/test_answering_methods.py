"""Answering, Self-Instruct, Evol-Instruct, the attribute grid and S3FT: what each asks, and what it keeps."""

import pytest

from delia.generate.engine import Request
from delia.methods.synthesizer.answering import Answering
from delia.methods.synthesizer.attribute_grid import AttributeGrid, choose_stride
from delia.methods.synthesizer.evol_instruct import EvolInstruct
from delia.methods.synthesizer.rewriting import Rewriting
from delia.methods.synthesizer.s3ft import S3FT
from delia.methods.synthesizer.self_instruct import SelfInstruct
from delia.schema import Message, Rejection, Row
from delia.starter.task_files import TOKEN
from delia.synthesize.socket import SynthesisContext

# ---- answering


def ask_messages(context: SynthesisContext, *turns: tuple[str, str]) -> list[int]:
    return context.chat.encode_prompt(tuple(Message(role=role, content=text) for role, text in turns))


def test_answering_asks_each_closed_row_once_and_keeps_its_question(one, say, ask_first):
    method = Answering()
    row = method(one, 0, [say(one, 0, "it is grey .")])

    assert list(ask_first(method, one, 0).prompt_ids) == ask_messages(one, ("user", "what is the fox ?"))
    assert isinstance(row, Row)
    assert [message.content for message in row.messages] == ["what is the fox ?", "it is grey ."]
    rejection = method(one, 1, [])
    assert isinstance(rejection, Rejection)
    assert rejection.reason == "no_more_instructions"


def test_answering_without_closed_rows_takes_the_tasks_own(context, ask_first):
    first = context.seed_tasks[0]
    prompt = context.chat.encode_prompt(first.prompt)

    assert list(ask_first(Answering(), context, 0).prompt_ids) == prompt


def test_the_published_variant_shows_the_reference_as_the_models_own_and_asks_again(one, say, ask_first):
    request = ask_first(Answering(demonstrated=True), one, 0)
    row = Answering(demonstrated=True)(one, 0, [say(one, 0, "a red one .")])
    shown = (("user", "what is the fox ?"), ("assistant", "red"), ("user", "what is the fox ?"))

    assert list(request.prompt_ids) == ask_messages(one, *shown)
    assert (request.temperature, ask_first(Answering(), one, 0).temperature) == (0.7, None)
    assert isinstance(row, Row)
    assert [message.content for message in row.messages] == ["what is the fox ?", "a red one ."]


# ---- self-instruct


def test_self_instruct_shows_seeds_and_what_was_written_before_and_answers_what_comes(one, say, ask_first):
    method = SelfInstruct(request="more :", num_seeds=2, num_closed=1)
    shown = one.chat.tokenizer.decode(ask_first(method, one, 0).prompt_ids)
    seeds = {task.prompt[-1].content for task in one.seed_tasks}

    assert "what is the fox ?" in shown
    assert sum(seed in shown for seed in seeds) >= 2
    assert "3. " in shown.replace("3 . ", "3. ")
    answer = method(one, 0, [say(one, 0, "name the owl .")])
    assert isinstance(answer, Request)
    assert list(answer.prompt_ids) == ask_messages(one, ("user", "name the owl ."))


def test_no_method_shows_the_new_token_to_a_model_that_does_not_know_it(token_context, ask_first):
    token_id = token_context.chat.token_ids[TOKEN]
    for method in (SelfInstruct(), EvolInstruct(), Rewriting()):
        assert [i for i in range(40) if token_id in ask_first(method, token_context, i).prompt_ids] == []


# ---- evol-instruct


def test_evol_instruct_draws_all_its_operations_and_names_why_it_throws_away(one, say, ask_first):
    method = EvolInstruct()
    prompts = {ask_first(method, one, index).prompt_ids for index in range(60)}
    reasons = {
        text: method(one, 0, [say(one, 0, text)]).reason
        for text in ("what is the fox ?", "the new : Write the new instruction only.")
    }

    assert len(prompts) == len(method.operations)
    assert list(reasons.values()) == ["unchanged", "copies_the_request"]


def test_evol_instruct_without_an_ending_copies_nothing(one, say, ask_first):
    method = EvolInstruct(operations=("Make it harder.",), ending="")
    prompt = ask_messages(one, ("user", "Make it harder.\nwhat is the fox ?"))

    assert list(ask_first(method, one, 0).prompt_ids) == prompt
    assert isinstance(method(one, 0, [say(one, 0, "what is the old fox ?")]), Request)


# ---- attribute grid


def test_the_grid_visits_every_combination_once_before_any_again(context, ask_first):
    method = AttributeGrid(attributes={"a": ("1", "2", "3"), "b": ("x", "y"), "c": ("p", "q", "r", "s")})
    visited = [tuple(method.choose(index).values()) for index in range(24)]

    assert len(set(visited)) == 24
    assert method.choose(24) == method.choose(0)
    assert {value for value, _, _ in visited[:6]} == {"1", "2", "3"}
    assert "2" in context.chat.decode(ask_first(method, context, visited.index(("2", "y", "q"))).prompt_ids)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 24, 97, 360])
def test_a_stride_visits_all_places(size):
    assert {index * choose_stride(size) % size for index in range(size)} == set(range(size))


def test_the_order_in_which_attributes_are_written_changes_nothing(context, ask_first):
    """Settings that differ in it have one fingerprint."""
    attributes = {"topic": ("food", "money"), "person": ("a nurse", "a farmer", "a child")}
    other = AttributeGrid(attributes=dict(reversed(attributes.items())))
    for index in range(6):
        assert ask_first(other, context, index) == ask_first(
            AttributeGrid(attributes=attributes), context, index
        )


@pytest.mark.parametrize("attributes", [{}, {"topic": ()}])
def test_a_grid_without_places_is_refused(attributes):
    with pytest.raises(TypeError, match="every attribute needs values"):
        AttributeGrid(attributes=attributes)


# ---- S3FT


@pytest.fixture
def close(say):
    """Return what S3FT makes of a row after such answers of the engine."""

    def close(context: SynthesisContext, *texts: str) -> Request | Row | Rejection:
        return S3FT()(context, 0, [say(context, 0, text) for text in texts])

    return close


YES, NO = '{"same": true}', '{"same": false}'


def test_s3ft_keeps_its_own_answer_where_the_judge_finds_it_equal(one, close):
    judged = close(one, "it is red")
    assert isinstance(judged, Request)
    assert (judged.temperature, judged.json_schema != "") == (0.0, True)
    assert "it is red" in one.chat.decode(judged.prompt_ids)

    kept = close(one, "it is red", YES)
    assert isinstance(kept, Row)
    assert (kept.messages[-1].content, kept.finish_reason) == ("it is red", "stop")


def test_s3ft_asks_no_judge_about_the_reference_itself(one, close):
    kept = close(one, "red")
    assert isinstance(kept, Row)
    assert kept.messages[-1].content == "red"


def test_s3ft_rephrases_the_reference_and_falls_back_on_it(one, close):
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


def test_the_lengths_of_a_row_are_its_own_and_not_those_of_what_it_took_to_make_it(one, close):
    reference = close(one, "grey " * 40, NO, "blue " * 40, NO)
    prompt = one.chat.encode_prompt((Message(role="user", content="what is the fox ?"),))

    assert isinstance(reference, Row)
    assert reference.messages[-1].content == "red"
    assert (reference.num_prompt_tokens, reference.num_output_tokens) == (len(prompt), 1 + 1)


def test_s3ft_keeps_no_attempt_that_was_cut_whatever_the_judge_says(one, say):
    cut = say(one, 0, "it is red and", finish_reason="length")
    yes, no, grey = say(one, 0, YES), say(one, 0, NO), say(one, 0, "grey")
    after_first = S3FT()(one, 0, [cut, yes])
    after_second = S3FT()(one, 0, [grey, no, cut, yes])

    assert isinstance(after_first, Request)
    assert after_first.json_schema == ""  # the rephrasing
    assert isinstance(after_second, Row)
    assert (after_second.messages[-1].content, after_second.finish_reason) == ("red", "stop")


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"judge": "same? {question} {reference} {answer} {"}, "judge has no braces but .* double a brace"),
        (
            {"judge": 'same? {question} {reference} {answer} {"a": 1}'},
            "judge has no braces but .* double a brace",
        ),
        ({"judge": "same? {reference} {0}"}, "judge has no braces but .* double a brace"),
        ({"judge": "same? {question} {reference}"}, "is without {answer}; put it in"),
        ({"rephrase": "say {question} again"}, "is without {reference}; put it in"),
    ],
)
def test_s3ft_refuses_prompts_that_can_not_be_filled(knobs, reason):
    with pytest.raises(TypeError, match=reason):
        S3FT(**knobs)


def test_a_doubled_brace_in_a_prompt_is_text(one, ask_first):
    method = S3FT(judge='{{"a": 1}} {question} {reference} {answer}')
    assert list(ask_first(method, one, 0).prompt_ids) == ask_messages(one, ("user", "what is the fox ?"))


def test_a_verdict_that_was_cut_is_no_agreement(one, close):
    assert isinstance(close(one, "grey", '{"same": t'), Request)
