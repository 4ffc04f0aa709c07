"""The starter's tokenizer: a token a word, bytes for the rest, and nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from delia.chat import reserve_tokens
from delia.starter.tokenizer import CONTROL_TOKENS, RESERVED_TOKENS, build_tokenizer, collect_words
from delia.starter.world import draw_chats, draw_held_out

TOKENIZER = build_tokenizer()
VOCABULARY = TOKENIZER.get_vocab()
BYTE_IDS = {VOCABULARY[piece] for piece in pre_tokenizers.ByteLevel.alphabet()}


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back_as_it_was(text):
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two  spaces\t\n\r\n",
        "the fox",
        " the fox",
        "foxes",
        "größer 42nd",
        "日本語 🦊",
        "a\u2028b\x00",
    ],
    ids=ascii,
)
def test_hard_texts_come_back_as_they_were(text):
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


def test_a_word_of_the_world_is_one_token_behind_a_space():
    words = collect_words()

    assert len(words) == len(set(words)) > 400
    assert {word: encode(f" {word}") for word in words if len(encode(f" {word}")) != 1} == {}


def test_a_word_that_the_world_does_not_know_falls_apart_into_its_bytes():
    assert encode(" fox") == [VOCABULARY["Ġfox"]]
    assert len(encode(" foxes")) == len(" foxes")
    assert set(encode(" foxes")) <= BYTE_IDS


def test_chats_of_the_world_are_a_token_a_word_and_never_bytes():
    """bos, then for each turn its role, its words and the end."""
    chats = [
        *draw_chats("tokenizer", num_chats=2000),
        *(i.messages() for i in draw_held_out("t", num_items=200)),
    ]
    encoded = TOKENIZER.apply_chat_template(chats, tokenize=True, return_dict=True)["input_ids"]
    lengths = [1 + sum(2 + len(turn["content"].split()) for turn in chat) for chat in chats]

    assert [len(ids) for ids in encoded] == lengths
    assert BYTE_IDS & {token for ids in encoded for token in ids} == set()


def test_the_answer_mask_covers_the_answer_and_its_end_and_nothing_else():
    chat = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "red"}] * 2
    encoded = TOKENIZER.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]

    assert (
        TOKENIZER.convert_ids_to_tokens(
            [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]
        )
        == [
            "Ġred",
            "<|end|>",
        ]
        * 2
    )


def test_at_least_8_rows_are_reserved_for_task_tokens():
    tokens = [f"<task{place}>" for place in range(8)]
    rows = reserve_tokens(TOKENIZER, tokens)

    assert len(RESERVED_TOKENS) >= 8
    assert sorted(rows.values()) == [VOCABULARY[name] for name in RESERVED_TOKENS[:8]]
    assert set(rows.values()).isdisjoint(VOCABULARY[name] for name in CONTROL_TOKENS)


def test_the_vocabulary_has_no_gap_and_its_size_is_a_multiple_of_64():
    assert sorted(VOCABULARY.values()) == list(range(len(TOKENIZER)))
    assert len(TOKENIZER) % 64 == 0


def test_pad_is_not_the_end_of_a_turn():
    names = (TOKENIZER.pad_token, TOKENIZER.bos_token, TOKENIZER.eos_token)

    assert names == ("<|pad|>", "<|bos|>", "<|end|>")
    assert len({VOCABULARY[name] for name in names}) == 3
