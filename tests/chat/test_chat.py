import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delia.chat import ChatEncoder, EncodedChat, load_chat
from delia.errors import ChatError
from delia.schema import Message, Messages

EncoderOf = Callable[[str], ChatEncoder]
SPELLINGS = (
    "<sep>", "<|end|>", "<|user|>", "<|reserved_0|>", "<|reserved_3|>", "<|eot_id|>", "<|start_header_id|>",
    "<|reserved_special_token_0|>", "<|im_start|>", "<|im_end|>\n", "<think>", "<s>", "</s>", "＜／ｓ＞",
    "<unk>", "<bos>", "<end_of_turn>", "<unused0>", "<｜User｜>", "<｜end｜>", "\U0010fffd2\U0010fffd",
    "\U0010fffd", "\ue000", "\n", " ", "the", "[/INST]", "<|", "{{ bos_token }}",
)  # fmt: skip
texts = st.lists(st.sampled_from(SPELLINGS) | st.text(max_size=4), max_size=8).map("".join)


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def system(content: str) -> Message:
    return Message(role="system", content=content)


def apply_template(encoder: ChatEncoder, messages: Messages, *, is_prompt: bool) -> list[int]:
    """What transformers makes of a chat, with the dates fixed."""
    encoding: Any = encoder.tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=is_prompt,
        chat_template=encoder.template.text,
    )
    return list(encoding["input_ids"])


def trained_ids(chat: EncodedChat) -> list[int]:
    return [i for i, is_trained in zip(chat.input_ids, chat.loss_mask, strict=True) if is_trained]


def control_ids(encoder: ChatEncoder, ids: Sequence[int]) -> list[int]:
    """The controls among ids, but for what stands for text that the tokenizer doesn't know."""
    controls = {i for name, i in encoder.table.control_ids.items() if name != "<unk>"}
    return [i for i in ids if i in controls]


@pytest.mark.parametrize(
    "messages",
    [
        (user("what does the cat say"), assistant("the word")),
        (
            user("write 123,\n\n  a list"),
            assistant("1. the\n2. a"),
            user("ünïcode 漢字 🙂?"),
            assistant("the {cat}"),
        ),
    ],
)
def test_clean_chats_get_the_ids_of_apply_chat_template(encoder: ChatEncoder, messages: Messages) -> None:
    whole = encoder.encode_chat(messages).input_ids
    assert list(whole) == apply_template(encoder, messages, is_prompt=False)
    assert encoder.encode_prompt(messages[:-1]) == apply_template(encoder, messages[:-1], is_prompt=True)


@settings(max_examples=40, deadline=None)
@given(content=texts)
def test_the_guarded_tokenizer_gives_clean_chats_the_same_ids(encoder: ChatEncoder, content: str) -> None:
    table, marker = encoder.table, "\ue000"
    clean = table.swap(content, marker).replace(marker, "").replace("＜／ｓ＞", "")
    turns = [{"role": "user", "content": clean}, {"role": "assistant", "content": f"the cat {clean}"}]
    text, [(start, _)] = encoder.template.find_answers(turns, "last", encoder.end_of_turn)
    pieces = [text[:start], text[start:]]
    assert table.encode(pieces, marker, is_guarded=True) == table.encode(pieces, marker)


@settings(max_examples=60, deadline=None)
@given(asked=texts, answered=texts)
def test_no_content_forms_a_control_token(encoder: ChatEncoder, asked: str, answered: str) -> None:
    harmless = (user("the"), assistant("the"), user("the"))
    forged = (user(asked), assistant(answered), user(asked))
    expected = control_ids(encoder, apply_template(encoder, harmless, is_prompt=True))
    assert control_ids(encoder, encoder.encode_prompt(forged)) == expected
    expected = control_ids(encoder, apply_template(encoder, harmless[:2], is_prompt=False))
    assert control_ids(encoder, encoder.encode_chat(forged[:2]).input_ids) == expected


@settings(max_examples=200, deadline=None)
@given(asked=texts, answered=texts)
def test_every_text_survives_and_the_mask_covers_the_answer_and_its_end(
    encoder_of: EncoderOf, asked: str, answered: str
) -> None:
    encoder = encoder_of("starter")
    asked, answered = asked.replace("<sep>", ""), answered.replace("<sep>", "")
    prompt = encoder.encode_prompt((user(asked),))
    chat = encoder.encode_chat((user(asked), assistant(answered)))
    assert encoder.decode(prompt) == asked.strip()
    assert chat.input_ids[: len(prompt)] == tuple(prompt)
    assert chat.loss_mask == (False,) * len(prompt) + (True,) * (len(chat.input_ids) - len(prompt))
    assert encoder.decode(trained_ids(chat)) == answered.strip()
    assert [i for i in trained_ids(chat) if i in encoder.end_ids] == [chat.input_ids[-1]]


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_the_mask_holds_answers_each_with_its_end_of_turn_token(encoder: ChatEncoder, train_on: str) -> None:
    messages = (
        user("the word"),
        assistant("cat"),
        user("what </s><|eot_id|>"),
        assistant("the list <|im_end|>"),
    )
    chat = encoder.encode_chat(messages, train_on=train_on)  # type: ignore[arg-type]
    ids, end = trained_ids(chat), encoder.end_ids[0]
    answers = [item.content for item in messages if item.role == "assistant"][
        -1 if train_on == "last" else 0 :
    ]
    assert ids[-1] == end
    assert control_ids(encoder, ids) == [end] * len(answers)
    decoded = []
    while end in ids:
        decoded.append(encoder.decode(ids[: ids.index(end)]))
        ids = ids[ids.index(end) + 1 :]
    assert decoded == answers


def test_white_space_after_the_end_of_turn_token_is_not_trained(encoder_of: EncoderOf) -> None:
    encoder = encoder_of("chatml")
    chat = encoder.encode_chat((user("the"), assistant("cat")))
    assert encoder.tokenizer.convert_ids_to_tokens(list(chat.input_ids[-2:])) == ["<|im_end|>", "Ċ"]
    assert chat.loss_mask[-2:] == (True, False)


def test_a_token_that_begins_in_the_prompt_is_not_trained(encoder_of: EncoderOf) -> None:
    encoder = encoder_of("gemma")
    before, after = "<start_of_turn>model\n", "\nthe<end_of_turn>"
    ids, owners = encoder.table.encode([before, after], "\ue000")
    assert encoder.tokenizer.convert_ids_to_tokens(ids)[-3:] == ["\n\n", "the", "<end_of_turn>"]
    assert owners[-3:] == [0, 1, 1]


@pytest.mark.parametrize("name", ["starter", "llama3", "chatml", "deepseek", "llama2", "mistral"])
def test_a_system_turn_is_encoded(encoder_of: EncoderOf, name: str) -> None:
    encoder, messages = encoder_of(name), (system("write the list"), user("the"), assistant("cat"))
    assert "write the list" in encoder.decode(encoder.encode_chat(messages).input_ids)
    assert "write the list" in encoder.decode(encoder.encode_user_prefix("write the list"))
    assert trained_ids(encoder.encode_chat(messages)) == trained_ids(encoder.encode_chat(messages[1:]))


@pytest.mark.parametrize("content", ["the cat", "Zebra", "123", "漢字", "[x]"])
def test_the_user_prefix_begins_every_prompt(encoder: ChatEncoder, content: str) -> None:
    prefix = encoder.encode_user_prefix()
    assert encoder.encode_prompt((user(content),))[: len(prefix)] == prefix


def test_the_user_prefix_leaves_the_first_words_space_to_its_token(encoder_of: EncoderOf) -> None:
    starter, llama3, mistral = encoder_of("starter"), encoder_of("llama3"), encoder_of("mistral")
    assert starter.tokenizer.convert_ids_to_tokens(starter.encode_user_prefix()) == ["<|bos|>", "<|user|>"]
    assert llama3.decode(llama3.encode_user_prefix()) == "user\n\nToday: 26 Jul 2024"
    assert mistral.tokenizer.convert_ids_to_tokens(mistral.encode_user_prefix()) == ["<s>", *"[INST]"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((user("a"),), "ends in the assistant's turn"),
        ((), "ends in the assistant's turn"),
        ((Message(role="tool", content="a"), assistant("b")), "got 'tool'"),  # type: ignore[arg-type]
        ((user("a \ud83d"), assistant("b")), "half a character"),
    ],
)
def test_a_chat_that_can_not_be_trained_on_is_refused(
    encoder_of: EncoderOf, messages: Messages, message: str
) -> None:
    with pytest.raises(ChatError, match=message):
        encoder_of("starter").encode_chat(messages)


def test_a_prompt_that_holds_the_answer_is_refused(encoder_of: EncoderOf) -> None:
    with pytest.raises(ChatError, match="leave the answer out"):
        encoder_of("starter").encode_prompt((user("a"), assistant("b")))


def test_the_padding_is_never_an_end(encoder: ChatEncoder, encoder_of: EncoderOf) -> None:
    assert encoder.pad_id not in encoder.end_ids
    assert encoder_of("chatml").tokenizer.pad_token_id in encoder_of("chatml").end_ids  # so it is not taken
    assert encoder_of("starter").pad_id == encoder_of("starter").tokenizer.pad_token_id
    assert encoder_of("llama2").pad_id == encoder_of("llama2").tokenizer.unk_token_id


def test_a_generation_stops_at_the_end_of_turn_and_of_the_sequence(encoder_of: EncoderOf) -> None:
    ends = encoder_of("llama3").end_ids
    assert encoder_of("llama3").tokenizer.convert_ids_to_tokens(list(ends)) == [
        "<|eot_id|>",
        "<|end_of_text|>",
    ]
    assert encoder_of("starter").end_ids == (2,)


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("starter", ["<|end|>", "<|assistant|>"]),
        ("chatml", ["<|im_end|>", "<|im_start|>"]),
        ("deepseek", ["<｜Assistant｜>"]),
        ("llama2", []),  # [/INST] is text there
    ],
)
def test_a_users_turn_ends_at_each_control_token_that_the_template_writes_after_it(
    encoder_of: EncoderOf, family: str, ends: list[str]
) -> None:
    encoder = encoder_of(family)
    assert encoder.tokenizer.convert_ids_to_tokens(list(encoder.user_end_ids)) == ends


def test_control_and_task_tokens_among_ids_are_spelled_out_and_plain_text_is_no_leak(
    base_of: Callable[[str], str],
) -> None:
    encoder = load_chat(base_of("starter"), task_tokens={"<sep>": 6})
    words = encoder.encode_prompt((user("it is 4"),))[2:5]

    assert encoder.find_leak(words) == ""
    assert encoder.find_leak([*words, 4, *words]) == " it is 4<|user|> it is 4"
    assert encoder.find_leak([*words, 6]) == " it is 4<sep>"
    assert encoder.find_leak([]) == ""


def test_the_hash_follows_template_vocabulary_and_task_tokens(
    base_of: Callable[[str], str], template_file: Callable[[str], str]
) -> None:
    base = base_of("starter")
    file = template_file(load_chat(base).template.text + "{# other #}")
    encoders = [
        load_chat(base),
        load_chat(base, chat_template=file),
        *(load_chat(base, task_tokens={"<sep>": row}) for row in (6, 7)),
        load_chat(base_of("llama2")),
        load_chat(base_of("mistral")),
    ]
    assert encoders[-1].template == encoders[-2].template
    assert len({encoder.template_hash for encoder in encoders}) == len(encoders)
    assert load_chat(base).template_hash == encoders[0].template_hash


def test_an_encoder_travels_to_workers(encoder_of: EncoderOf) -> None:
    prompt = (user("<sep> <|end|>"),)
    copy: ChatEncoder = pickle.loads(pickle.dumps(encoder_of("starter")))
    assert copy.encode_prompt(prompt) == encoder_of("starter").encode_prompt(prompt)


def chat_of(first: int, num_prompt: int, num_answer: int) -> EncodedChat:
    ids = (first, *range(100, 100 + num_prompt - 1), *range(200, 200 + num_answer))
    return EncodedChat(input_ids=ids, loss_mask=(False,) * num_prompt + (True,) * num_answer)


@pytest.mark.parametrize(
    ("first", "max_length", "input_ids"),
    [
        (1, 6, (1, 100, 101, 102, 200, 201)),
        (1, 4, (1, 102, 200, 201)),
        (1, 3, (1, 200, 201)),
        (9, 4, (101, 102, 200, 201)),
        (9, 3, (102, 200, 201)),
    ],
)
def test_a_long_chat_loses_the_start_of_its_prompt_after_bos(
    encoder_of: EncoderOf, first: int, max_length: int, input_ids: tuple[int, ...]
) -> None:
    cut = encoder_of("starter").fit(chat_of(first, 4, 2), max_length, "truncate_prompt_left")
    mask = tuple(i >= 200 for i in input_ids)
    assert cut == EncodedChat(input_ids=input_ids, loss_mask=mask)


def test_an_answer_is_never_cut(encoder_of: EncoderOf) -> None:
    with pytest.raises(ChatError, match="the 2 ids of an answer are never cut; max_length=2"):
        encoder_of("starter").fit(chat_of(1, 4, 2), 2, "truncate_prompt_left")


def test_a_long_chat_is_refused_or_dropped_as_set(encoder_of: EncoderOf) -> None:
    chat, starter = chat_of(1, 4, 2), encoder_of("starter")
    assert starter.fit(chat, 6, "error") is chat
    assert starter.fit(chat, 6, "drop") is chat
    assert starter.fit(chat, 5, "drop") is None
    with pytest.raises(ChatError, match="a chat has 6 ids, max_length is 5"):
        starter.fit(chat, 5, "error")
