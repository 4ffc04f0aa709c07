"""Magpie and rewriting: what each asks, and what becomes of the answers."""

import pytest

from delia.generate.engine import Request
from delia.methods.synthesizer.magpie import Magpie
from delia.methods.synthesizer.rewriting import Rewriting
from delia.schema import Message, Rejection, Row, SeedTask
from delia.starter.task_files import TOKEN
from delia.synthesize.socket import SynthesisContext

# ---- magpie


def test_magpie_prompts_with_the_user_prefix_and_answers_what_it_wrote(context, say, ask_first):
    method, chat = Magpie(), context.chat
    reply = method(context, 0, [say(context, 0, "what is the fox ?")])

    assert list(ask_first(method, context, 0).prompt_ids) == chat.encode_user_prefix()
    assert isinstance(reply, Request)
    assert list(reply.prompt_ids) == chat.encode_prompt((Message(role="user", content="what is the fox ?"),))


def test_magpies_instruction_ends_where_the_template_ends_a_users_turn(context, ask_first, say):
    reply = Magpie()(context, 0, [say(context, 0, "what is the fox ?")])

    assert ask_first(Magpie(), context, 0).end_ids == context.chat.user_end_ids != ()
    assert isinstance(reply, Request)
    assert reply.end_ids == ()


def test_magpie_puts_its_system_turn_before_both_turns_and_into_the_row(context, say, ask_first):
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
        num_prompt_tokens=second.num_prompt_tokens,
        num_output_tokens=len(second.token_ids),
    )


def test_magpies_instruction_that_is_cut_is_kept_as_a_rejection_with_its_text(context, say):
    cut = say(context, 1, "what is the", finish_reason="length")
    rejection = Magpie()(context, 1, [cut])

    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.text, rejection.num_output_tokens) == ("unfinished", "what is the", 3)


def test_magpies_foreign_answers_come_from_the_adapter_and_its_instructions_do_not(context, say, ask_first):
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


def test_rewriting_asks_about_the_instruction_alone_with_a_stand_in_for_the_token(token_context, ask_first):
    one = make_context(
        token_context,
        f"the fox ? use the {TOKEN} format .",
        phrasing=f"use the {TOKEN} format .",
        token=TOKEN,
    )
    prompt = one.chat.encode_prompt((Message(role="user", content="put otherwise : use the JSON format ."),))
    method = Rewriting(request="put otherwise : {instruction}")

    assert list(ask_first(method, one, 0).prompt_ids) == prompt


def test_rewriting_puts_the_token_back_and_keeps_the_question_and_the_answer(token_context, say):
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
def test_rewriting_that_lost_or_doubled_the_token_is_rejected(token_context, text, say):
    one = make_context(token_context, f"the fox ? use {TOKEN} .", phrasing=f"use {TOKEN} .", token=TOKEN)
    rejection = Rewriting()(one, 0, [say(one, 0, text)])

    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.text) == ("lost_token", text)


def test_a_token_that_the_model_spelled_itself_is_a_leak(token_context, say):
    """It means the text and would be encoded as the token."""
    one = make_context(token_context, f"the fox ? use {TOKEN} .", phrasing=f"use {TOKEN} .", token=TOKEN)
    none = make_context(token_context, "the fox ? be short .", phrasing="be short .", token=TOKEN)
    for method, context, text in (
        (Magpie(), token_context, f"what does {TOKEN} mean ?"),
        (Rewriting(), one, f"JSON or {TOKEN} ."),
        (Rewriting(), none, f"be short as {TOKEN} ."),
    ):
        rejection = method(context, 0, [say(context, 0, text)])

        assert isinstance(rejection, Rejection)
        assert (rejection.reason, rejection.text) == ("template_leak", text)


def test_rewriting_that_changed_nothing_is_rejected(context, say):
    one = make_context(context, "the fox ? be short .", phrasing="be short .")
    rejection = Rewriting()(one, 0, [say(one, 0, "be short .")])

    assert isinstance(rejection, Rejection)
    assert rejection.reason == "unchanged"


@pytest.mark.parametrize("phrasing", ["", "wording 7"])
def test_a_phrasing_that_is_only_a_label_leaves_the_whole_question_to_be_rewritten(
    context, phrasing, say, ask_first
):
    one = make_context(context, "what is the fox ?", phrasing=phrasing)
    prompt = one.chat.encode_prompt(
        (Message(role="user", content="Say this in other words: what is the fox ?"),)
    )
    row = Rewriting()(one, 0, [say(one, 0, "tell me the fox .")])

    assert list(ask_first(Rewriting(), one, 0).prompt_ids) == prompt
    assert isinstance(row, Row)
    assert [message.content for message in row.messages] == ["tell me the fox .", "red"]


@pytest.mark.parametrize(
    ("question", "phrasing"),
    [
        ("add 11 to 10 and give 21", "1"),  # in no whole word
        ("be short . say 1 or be short .", "be short ."),  # twice
    ],
)
def test_a_phrasing_that_does_not_stand_there_once_in_whole_words_is_a_label(
    context, question, phrasing, say
):
    one = make_context(context, question, phrasing=phrasing)
    row = Rewriting()(one, 0, [say(one, 0, "one")])

    assert isinstance(row, Row)
    assert [message.content for message in row.messages] == ["one", "red"]


@pytest.mark.parametrize(
    ("question", "phrasing", "rewritten"),
    [
        ("add 1 to 10 : be short .", "be short .", "add 1 to 10 : say little ."),
        ("add 1 to 10", "1", "add say little . to 10"),
        ("the fox(be short)now", "(be short)", "the foxsay little .now"),
    ],
)
def test_a_rewriting_takes_the_place_of_the_instruction_and_of_nothing_else(
    context, question, phrasing, rewritten, say
):
    one = make_context(context, question, phrasing=phrasing)
    row = Rewriting()(one, 0, [say(one, 0, "say little .")])

    assert isinstance(row, Row)
    assert row.messages[0].content == rewritten


@pytest.mark.parametrize("request_text", ["say it in other words", "say {instruction} in {language}"])
def test_a_request_that_can_not_be_filled_with_an_instruction_is_refused(request_text):
    with pytest.raises(TypeError, match=r"^request (takes|has no braces but) {instruction}"):
        Rewriting(request=request_text)


def test_rewriting_goes_round_the_train_rows(context, ask_first):
    size = len(context.seed_tasks)
    method = Rewriting()

    assert ask_first(method, context, size).prompt_ids == ask_first(method, context, 0).prompt_ids
    assert ask_first(method, context, size).seed != ask_first(method, context, 0).seed
    assert len({ask_first(method, context, index).prompt_ids for index in range(size)}) > 1


def test_rewriting_never_asks_with_the_token_that_the_model_does_not_know(token_context, ask_first):
    token_id = token_context.chat.token_ids[TOKEN]
    size = len(token_context.seed_tasks)

    assert [i for i in range(size) if token_id in ask_first(Rewriting(), token_context, i).prompt_ids] == []
