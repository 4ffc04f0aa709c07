"""Layouts: columns of users' files become one form of chat, or a reason."""

import pytest

from delia.errors import TaskFileError
from delia.schema import Message
from delia.store.task_columns import ColumnMapping, parse_row, render_row, resolve_layout

USER = {"role": "user", "content": "Add 1 and 2."}
ANSWER = {"role": "assistant", "content": "3"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = (Message(role="user", content="Add 1 and 2."), Message(role="assistant", content="3"))
WITH_SYSTEM = (Message(role="system", content="Be brief."), *CHAT)


def parse(fields, *, is_train=True, **columns):
    return parse_row(fields, resolve_layout(ColumnMapping(**columns), fields), is_train=is_train)


@pytest.mark.parametrize(
    ("layout", "fields", "chat"),
    [
        ("messages", {"messages": [USER, ANSWER]}, CHAT),
        ("messages", {"messages": [SYSTEM, USER, ANSWER]}, WITH_SYSTEM),
        ("messages", {"system": "Be brief.", "messages": [USER, ANSWER]}, WITH_SYSTEM),
        ("prompt_completion", {"prompt": "Add 1 and 2.", "completion": "3"}, CHAT),
        ("alpaca", {"instruction": "Add 1 and 2.", "input": "", "output": "3"}, CHAT),
        ("alpaca", {"instruction": "Add 1 and 2.", "input": None, "output": "3", "system": " "}, CHAT),
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief."},
            (
                Message(role="system", content="Be brief."),
                Message(role="user", content="Add.\n1 and 2"),
                Message(role="assistant", content="3"),
            ),
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Add 1 and 2."},
                    {"from": "gpt", "value": "3"},
                ]
            },
            WITH_SYSTEM,
        ),
    ],
)
def test_every_layout_is_read_when_it_is_named_and_when_it_is_found(layout, fields, chat):
    assert parse(fields, layout=layout).messages == chat
    assert parse(fields, layout="auto").messages == chat


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        ({"prompt": "question", "completion": "answer"}, {"question": "Add 1 and 2.", "answer": "3"}),
        (
            {"messages": "chat", "role": "who", "content": "text"},
            {"chat": [{"who": "user", "text": "Add 1 and 2."}, {"who": "assistant", "text": "3"}]},
        ),
        (
            {"conversations": "talk", "sender": "by", "value": "said"},
            {"talk": [{"by": "human", "said": "Add 1 and 2."}, {"by": "gpt", "said": "3"}]},
        ),
        (
            {"layout": "alpaca", "instruction": "q", "input": "context", "output": "a"},
            {"q": "Add 1 and 2.", "context": "", "a": "3", "prompt": "x", "completion": "y"},
        ),
    ],
)
def test_columns_of_other_names_are_mapped(columns, fields):
    assert parse(fields, **columns).messages == CHAT


def test_fields_besides_the_chat_are_kept_and_may_have_other_names():
    fields = {
        "messages": [USER, ANSWER],
        "uid": 17,
        "suite": "negated",
        "phrasing": "p3",
        "licence": "MIT",
        "base_messages": [SYSTEM, USER],
        "source": "left alone",
    }

    row = parse(fields, id="uid")

    assert (row.task_id, row.suite, row.phrasing, row.licence) == ("17", "negated", "p3", "MIT")
    assert row.base_messages == WITH_SYSTEM[:2]


def test_null_fields_are_the_same_as_absent_ones():
    fields = {
        "messages": [USER, ANSWER],
        **dict.fromkeys(("id", "suite", "phrasing", "licence", "base_messages", "system")),
    }

    assert parse(fields) == parse({"messages": [USER, ANSWER]})
    assert parse(fields).suite == "task"


def turn(role, content="text"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([USER], "no assistant turn at the end; add one, train rows need it"),
        ([USER, ANSWER, USER], "no assistant turn at the end"),
        ([], "no user turn in the chat"),
        ([SYSTEM], "no user turn in the chat"),
        ([ANSWER], "wrong turn order in the chat: turn 1 is 'assistant' where 'user' must stand"),
        ([SYSTEM, ANSWER], "wrong turn order in the chat: turn 2 is 'assistant' where 'user'"),
        ([USER, USER, ANSWER], "turn 2 is 'user' where 'assistant' must stand"),
        ([USER, ANSWER, ANSWER], "turn 3 is 'assistant' where 'user' must stand"),
        ([USER, SYSTEM, ANSWER], "turn 2 is 'system' where 'assistant' must stand"),
        ([SYSTEM, SYSTEM, USER, ANSWER], "turn 2 is 'system' where 'user' must stand"),
        ([turn("tool"), ANSWER], "turn 1 of messages has the unknown role 'tool'; the roles are .*'user'"),
        ([turn("human"), ANSWER], "unknown role 'human'"),
        ([turn(["user"]), ANSWER], "the role of turn 1 of messages must be text, not list"),
        ([turn("user", ""), ANSWER], "the content of turn 1 of messages is empty or only whitespace"),
        ([USER, turn("assistant", " \n\t\u3000")], "the content of turn 2 of messages is empty or only"),
        ([turn("user", 7), ANSWER], "the content of turn 1 of messages must be text, not int"),
        ([turn("user", None), ANSWER], "must be text, not NoneType"),
        ([turn("user", [{"type": "text", "text": "x"}]), ANSWER], "must be text, not list"),
        ([turn("user", "a\0b"), ANSWER], "holds a NUL character"),
        ([turn("user", "a\ud83d"), ANSWER], r"holds a lone surrogate \(\\ud83d at character 1\)"),
        (["Add", ANSWER], "turn 1 of messages must be an object, not str"),
        ([{"role": "user"}, ANSWER], r"turn 1 .* has no 'content', found \['role'\]; .*columns.content"),
        ([{"content": "x"}, ANSWER], r"turn 1 of messages has no 'role'.*columns.role"),
        ("Add 1 and 2.", "messages must be a list of turns, not str"),
        (None, "messages must be a list of turns, not NoneType"),
    ],
)
def test_a_chat_that_is_wrong_is_refused_with_the_turn_and_the_reason(turns, reason):
    with pytest.raises(TaskFileError, match=f"^{reason}" if reason.startswith("the ") else reason):
        parse({"messages": turns})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": " ", "completion": "3"}, "prompt is empty or only whitespace"),
        ({"prompt": "x", "completion": ""}, "completion is empty or only whitespace"),
        ({"prompt": "x", "completion": None}, "no assistant turn"),
        ({"prompt": [USER], "completion": "3"}, "prompt must be text, not list"),
        ({"instruction": "x", "input": 3, "output": "3"}, "input must be text, not int"),
        ({"conversations": [{"from": "user", "value": "x"}]}, r"unknown role 'user'.*'human', 'gpt'"),
        ({"messages": [USER, ANSWER], "system": 1}, "system must be text, not int"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "Too."}, "turn 2 is 'system'"),
        ({"messages": [USER, ANSWER], "id": " "}, "id is empty"),
        ({"messages": [USER, ANSWER], "id": True}, "id must be text, not bool"),
        ({"messages": [USER, ANSWER], "suite": 1}, "suite must be text, not int"),
        ({"messages": [USER, ANSWER], "phrasing": "\udc00"}, "phrasing holds a lone surrogate"),
        ({"messages": [USER, ANSWER], "base_messages": "x"}, "base_messages must be a list"),
        ({"messages": [USER, ANSWER], "base_messages": []}, "no user turn in base_messages"),
        ({"messages": [USER, ANSWER], "base_messages": [USER, ANSWER]}, "must end in a user"),
    ],
)
def test_a_field_that_is_wrong_is_refused_by_its_name(fields, reason):
    with pytest.raises(TaskFileError, match=reason):
        parse(fields)


def test_a_dev_row_may_lack_its_answer_only_where_the_base_gives_one():
    fields = {"messages": [USER], "base_messages": [SYSTEM, USER]}

    assert parse(fields, is_train=False).reference is None
    with pytest.raises(TaskFileError, match="no assistant turn at the end; add one, train rows need it"):
        parse(fields, is_train=True)
    with pytest.raises(TaskFileError, match="no assistant turn at the end; add one, or base_messages"):
        parse({"messages": [USER]}, is_train=False)


def test_a_dev_row_without_an_answer_may_leave_its_column_out():
    fields = {"prompt": "Add 1 and 2.", "base_messages": [USER]}

    assert parse(fields, is_train=False, layout="prompt_completion").messages == CHAT[:1]
    with pytest.raises(TaskFileError, match=r"no column \['completion'\]"):
        parse(fields, is_train=True, layout="prompt_completion")


def test_missing_columns_are_refused_with_found_and_needed_names_and_the_setting():
    with pytest.raises(TaskFileError) as caught:
        parse({"question": "x", "output": "y"}, layout="alpaca")

    message = str(caught.value)
    assert "no column ['instruction']" in message
    assert "needs ['instruction', 'output']" in message
    assert "found ['question', 'output']" in message
    assert "map it with columns.instruction, or set columns.layout" in message


def test_columns_that_fit_no_layout_are_refused_with_what_each_needs():
    with pytest.raises(TaskFileError) as caught:
        parse({"question": "x", "answer": "y"})

    message = str(caught.value)
    assert "the columns ['question', 'answer'] fit no layout" in message
    assert "['prompt', 'completion'] for prompt_completion" in message
    assert "columns.prompt=question" in message


def test_columns_that_fit_two_layouts_are_not_guessed_at():
    with pytest.raises(TaskFileError, match=r"the layouts \['messages', 'prompt_completion'\]; set"):
        parse({"messages": [USER, ANSWER], "prompt": "x", "completion": "y"})


def test_text_of_control_tokens_stays_text():
    text = "<|end|></s><|im_start|>system <sep>"

    row = parse({"messages": [turn("user", text), turn("assistant", text)]})

    assert [message.content for message in row.messages] == [text, text]


def test_a_rendered_row_says_no_more_than_it_must_and_is_read_back():
    plain = parse({"id": "a", "messages": [USER, ANSWER]})
    full = parse(
        {"id": "b", "messages": [USER, ANSWER], "suite": "", "phrasing": "p", "base_messages": [USER]}
    )

    assert render_row(plain) == {"id": "a", "messages": [USER, ANSWER]}
    assert parse(render_row(full)) == full
    assert full.suite == ""


@pytest.mark.parametrize(("input_first", "content"), [(False, "Add.\n1 and 2"), (True, "1 and 2\nAdd.")])
def test_an_instruction_stands_before_its_input_or_after_it_by_setting(input_first, content):
    row = parse({"instruction": "Add.", "input": "1 and 2", "output": "3"}, input_first=input_first)
    assert row.messages == (Message(role="user", content=content), Message(role="assistant", content="3"))
    alone = parse({"instruction": "Add 1 and 2.", "input": " ", "output": "3"}, input_first=input_first)
    assert alone.messages == CHAT


@pytest.mark.parametrize("layout", ["auto", "messages"])
def test_an_order_of_parts_that_the_layout_does_not_know_is_refused(layout):
    with pytest.raises(
        TaskFileError, match=r"the layout 'messages' does not tell apart; give the file columns"
    ):
        parse({"messages": [USER, ANSWER]}, layout=layout, input_first=True)
