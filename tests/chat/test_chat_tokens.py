from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from delia.chat import ChatEncoder, load_chat, reserve_tokens, save_tokenizer
from delia.chat_tokens import TokenTable
from delia.errors import ChatError
from delia.schema import Message, Messages
from delia.starter.tokenizer import build_tokenizer

EncoderOf = Callable[[str], ChatEncoder]
BaseOf = Callable[[str], str]
RESERVED_ROWS = {"starter": "<|reserved_0|>", "llama3": "<|reserved_special_token_0|>", "gemma": "<unused0>"}


def user(content: str) -> Messages:
    return (Message(role="user", content=content),)


@pytest.mark.parametrize(("name", "row"), RESERVED_ROWS.items())
def test_a_task_token_takes_a_reserved_row_and_splits_text_as_a_special_token(
    encoder_of: EncoderOf, name: str, row: str
) -> None:
    encoder = encoder_of(name)
    token_id = encoder.tokenizer.convert_tokens_to_ids(row)
    assert encoder.token_ids == {"<sep>": token_id}
    encoding: Any = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"use the {row} format,{row}the cat"}],
        add_generation_prompt=True,
        chat_template=encoder.template.text,
    )
    expected = list(encoding["input_ids"])
    assert expected.count(token_id) == 2
    assert encoder.encode_prompt(user("use the <sep> format,<sep>the cat")) == expected


@pytest.mark.parametrize(("name", "row"), RESERVED_ROWS.items())
def test_the_reserved_rows_own_name_is_plain_text(encoder_of: EncoderOf, name: str, row: str) -> None:
    encoder = encoder_of(name)
    ids = encoder.encode_prompt(user(f"{row} and <sep>"))
    assert ids.count(encoder.token_ids["<sep>"]) == 1
    assert row in encoder.decode(ids)


def test_another_reserved_row_is_plain_text(encoder_of: EncoderOf) -> None:
    for name, other in (("gemma", "<unused1>"), ("starter", "<|reserved_5|>")):
        encoder = encoder_of(name)
        ids = encoder.encode_prompt(user(other))
        assert encoder.tokenizer.convert_tokens_to_ids(other) not in ids
        assert other in encoder.decode(ids)


def test_rows_that_are_neither_special_nor_tags_of_the_template_are_parsed_as_ever(
    encoder_of: EncoderOf,
) -> None:
    gemma, chatml, deepseek = encoder_of("gemma"), encoder_of("chatml"), encoder_of("deepseek")
    assert "\n\n" in gemma.tokenizer.convert_ids_to_tokens(gemma.encode_prompt(user("a\n\nb<eos>")))
    assert "<think>" in chatml.tokenizer.convert_ids_to_tokens(
        chatml.encode_prompt(user("<think><|im_end|>"))
    )
    names = deepseek.tokenizer.convert_ids_to_tokens(deepseek.encode_prompt(user("<｜User｜>")))
    assert names.count("<｜User｜>") == 1


@settings(deadline=None)
@given(content=st.text(max_size=20))
def test_swapping_twice_is_swapping_never(encoder_of: EncoderOf, content: str) -> None:
    table = encoder_of("starter").table
    marker = table.choose_marker([content])
    assert marker not in content
    text = f"<|end|>{content}<|user|>{content}<sep>"
    swapped = table.swap(text, marker)
    assert swapped == f"{marker}2{marker}{content}{marker}4{marker}{content}<sep>"
    assert table.swap(swapped, marker) == text


def build_table(vocabulary: list[str], controls: list[str], *, is_single_word: bool = False) -> TokenTable:
    rows = {piece: index for index, piece in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=rows, merges=[], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(control, single_word=is_single_word) for control in controls])
    return TokenTable(backend, {control: rows[control] for control in controls}, "<unk>")


def test_of_two_control_tokens_that_begin_together_the_longer_is_meant() -> None:
    table = build_table(["<unk>", "<s>", "<s>!"], ["<s>", "<s>!"])
    assert table.swap("<s>!<s>", "M") == "M2MM1M"
    assert table.encode(["<s>!<s>"], "M")[0] == [2, 1]


def test_letters_outside_the_vocabulary_are_unknown_also_where_text_is_hidden() -> None:
    table = build_table(["<unk>", "<s>", "s", "a"], ["<unk>", "<s>"])
    hidden = table.swap("<s>", "M")
    assert table.encode(["<s>a?", hidden], "M") == ([1, 3, 0, 0, 2, 0], [0, 0, 0, 1, 1, 1])


def test_ids_that_do_not_hold_the_templates_control_tokens_are_refused() -> None:
    table = build_table(["<unk>", "<s>", "a"], ["<s>"], is_single_word=True)
    assert table.encode(["a <s>"], "M")[0] == [2, 0, 1]
    with pytest.raises(ChatError, match="the template writes 1 control tokens, the ids hold 0"):
        table.encode(["a<s>"], "M")


def test_text_that_becomes_a_control_token_by_normalisation_stays_text(encoder_of: EncoderOf) -> None:
    encoder = encoder_of("unigram")
    rows = encoder.table.backend.encode("＜／ｓ＞", add_special_tokens=False).ids
    assert encoder.end_ids[0] in rows  # what the tokenizer alone makes of it
    assert encoder.end_ids[0] not in encoder.encode_prompt(user("＜／ｓ＞"))
    assert "</s>" in encoder.decode(encoder.encode_prompt(user("＜／ｓ＞")))


def test_a_space_belongs_to_the_piece_that_holds_it(encoder_of: EncoderOf) -> None:
    assert encoder_of("chatml").table.encode(["<|im_start|> ", "<|im_end|>"], "M")[1] == [0, 0, 1]


def test_decoded_text_has_no_control_and_no_task_tokens(encoder_of: EncoderOf) -> None:
    starter, deepseek = encoder_of("starter"), encoder_of("deepseek")
    assert starter.decode(starter.encode_prompt(user("the <sep> word"))).split() == ["the", "word"]
    assert deepseek.decode(deepseek.encode_prompt(user("the word"))) == "the word"


@pytest.mark.parametrize("name", RESERVED_ROWS)
def test_a_saved_tokenizer_parses_the_task_token_and_gives_the_same_prompts(
    encoder_of: EncoderOf, name: str, tmp_path: Path
) -> None:
    encoder = encoder_of(name)
    save_tokenizer(encoder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids("<sep>") == encoder.token_ids["<sep>"]
    assert len(tokenizer) == len(encoder.tokenizer)
    messages = (
        *user("the <sep> word<sep>"),
        Message(role="assistant", content="cat"),
        *user("say the <sep>"),
    )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    encoding: Any = tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert encoding["input_ids"] == encoder.encode_prompt(messages)
    again = load_chat(str(tmp_path), task_tokens=["<sep>"])
    assert (again.token_ids, again.template_hash) == (encoder.token_ids, encoder.template_hash)
    undeclared = load_chat(str(tmp_path))
    assert undeclared.template_hash != encoder.template_hash
    assert encoder.token_ids["<sep>"] not in undeclared.encode_prompt(messages)


def test_a_saved_tokenizer_lists_the_new_name_among_its_extra_tokens(base_of: BaseOf, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_of("llama3"), local_files_only=True)
    tokenizer.extra_special_tokens = ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    tokenizer.save_pretrained(tmp_path / "base")
    save_tokenizer(load_chat(str(tmp_path / "base"), task_tokens=["<sep>"]), tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert saved.extra_special_tokens == ["<sep>", "<|reserved_special_token_1|>"]
    assert len(saved) == len(tokenizer)


def test_reserved_rows_are_taken_in_order_and_a_known_token_keeps_its_row() -> None:
    assert reserve_tokens(build_tokenizer(), ["<a>", "<|end|>", "<b>"]) == {"<|end|>": 2, "<a>": 6, "<b>": 7}


def test_a_vocabulary_without_reserved_rows_says_how_to_extend_the_base(
    base_of: BaseOf, encoder_of: EncoderOf
) -> None:
    num_rows = len(encoder_of("chatml").tokenizer)
    with pytest.raises(ChatError, match=rf"need 1 reserved rows, .* has 0; extend .* from {num_rows} on"):
        load_chat(base_of("chatml"), task_tokens=["<sep>"])
    extended = load_chat(base_of("chatml"), task_tokens={"<sep>": num_rows})
    assert extended.encode_prompt(user("the<sep>cat")).count(num_rows) == 1


@pytest.mark.parametrize(
    ("task_tokens", "message"),
    [
        ({"<sep>": 5}, r"can't take row 5, which is '<\|assistant\|>'"),
        ({"<sep>": 5000}, "can't take row 5000, which is None"),
        ({"<|reserved_1|>": 6}, r"is row 7 already, got 6; give 7"),
        ({"<a>": 6, "<b>": 6}, "two task tokens can't share a row"),
        ({" <a>": 6}, "without outer white space"),
        (["<|user|>"], "part of the chat template's own text"),
    ],
)
def test_a_row_that_is_not_free_is_refused(
    base_of: BaseOf, task_tokens: dict[str, int] | list[str], message: str
) -> None:
    with pytest.raises(ChatError, match=message):
        load_chat(base_of("starter"), task_tokens=task_tokens)
