from collections.abc import Callable

import pytest

from delia.chat import ChatEncoder, load_chat
from delia.errors import ChatError
from delia.schema import Message, Messages

EncoderOf = Callable[[str], ChatEncoder]
BaseOf = Callable[[str], str]
TemplateFile = Callable[[str], str]
TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
HEAD, CONTENT, END = "{{ '<|im_start|>assistant\n' }}", "{{ message['content'] }}", "{{ '<|im_end|>\n' }}"
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"
TWO_ROUNDS: Messages = (
    Message(role="user", content="the"),
    Message(role="assistant", content="<|im_end|> word"),
    Message(role="user", content="what <|im_end|>"),
    Message(role="assistant", content="the <|im_end|> list"),
)


def with_answer(encoder_of: EncoderOf, answer: str) -> str:
    """Return ChatML's template with another way to write an assistant's turn."""
    template = encoder_of("chatml").template.text
    assert TURN in template
    return template.replace(
        TURN, f"{{% if message['role'] == 'assistant' %}}{answer}{{% else %}}{TURN}{{% endif %}}"
    )


@pytest.mark.parametrize("train_on", ["last", "all"])
@pytest.mark.parametrize("answer", [HEAD + OPEN + CONTENT + CLOSE + END, HEAD + OPEN + CONTENT + END + CLOSE])
def test_generation_markers_give_the_mask_of_prefixes_also_without_the_end_of_turn_token(
    encoder_of: EncoderOf, base_of: BaseOf, template_file: TemplateFile, answer: str, train_on: str
) -> None:
    encoder = load_chat(base_of("chatml"), chat_template=template_file(with_answer(encoder_of, answer)))
    assert encoder.template.has_markers
    assert not encoder_of("chatml").template.has_markers
    expected = encoder_of("chatml").encode_chat(TWO_ROUNDS, train_on=train_on)  # type: ignore[arg-type]
    assert encoder.encode_chat(TWO_ROUNDS, train_on=train_on) == expected  # type: ignore[arg-type]


def test_a_template_that_rewrites_earlier_answers_can_train_the_last_only(
    encoder_of: EncoderOf, base_of: BaseOf, template_file: TemplateFile
) -> None:
    shorter = HEAD + "{{ message['content'] if loop.last else message['content'][:2] }}" + END
    encoder = load_chat(base_of("chatml"), chat_template=template_file(with_answer(encoder_of, shorter)))
    chat = encoder.encode_chat(TWO_ROUNDS)
    ids = [i for i, is_trained in zip(chat.input_ids, chat.loss_mask, strict=True) if is_trained]
    assert encoder.decode(ids) == "the <|im_end|> list"
    with pytest.raises(ChatError, match=r"up to turn 1, so that turn can't be told apart; .*`chat_template`"):
        encoder.encode_chat(TWO_ROUNDS, train_on="all")


def test_of_two_special_tokens_after_an_answer_the_first_ends_it(
    encoder_of: EncoderOf, base_of: BaseOf, template_file: TemplateFile
) -> None:
    template = with_answer(encoder_of, HEAD + CONTENT + "{{ '<|endoftext|>' }}" + END)
    encoder = load_chat(base_of("chatml"), chat_template=template_file(template))
    ends = encoder.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert list(encoder.end_ids) == ends
    chat = encoder.encode_chat(TWO_ROUNDS)
    assert [
        i for i, is_trained in zip(chat.input_ids, chat.loss_mask, strict=True) if is_trained and i in ends
    ] == [ends[0]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (HEAD + CONTENT + "{{ '\n' }}", r"writes '\\n' after an answer, which holds no special token"),
        ("{{ '<|im_start|>model\n' }}" + CONTENT + END, "turn can't be told apart"),
        (HEAD + OPEN + CONTENT + CLOSE + "{{ ' over' }}" + END, r"does not end in '<\|im_end\|>'"),
        (OPEN + HEAD + CONTENT + CLOSE + END, "prompts for an answer with"),
        (HEAD + CONTENT + END + "{% if false %}" + OPEN + CLOSE + "{% endif %}", "marks 0 answers of 1"),
        (HEAD + CONTENT + END + "{{ strftime_now(message['role']) }}", "reads the clock"),
    ],
)
def test_a_template_that_hides_where_an_answer_is_is_refused(
    encoder_of: EncoderOf, base_of: BaseOf, template_file: TemplateFile, answer: str, message: str
) -> None:
    with pytest.raises(ChatError, match=f"{message}.*set `chat_template` to a template file"):
        load_chat(base_of("chatml"), chat_template=template_file(with_answer(encoder_of, answer)))


def test_a_generation_prompt_whose_space_belongs_to_the_answers_token_is_refused(
    encoder_of: EncoderOf, base_of: BaseOf, template_file: TemplateFile
) -> None:
    template = encoder_of("llama2").template.text + "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
    with pytest.raises(
        ChatError, match=r"prompts for an answer with \[1, .*whose generation prompt begins every"
    ):
        load_chat(base_of("llama2"), chat_template=template_file(template))


def test_a_template_without_a_system_role_says_so(encoder_of: EncoderOf) -> None:
    messages = (Message(role="system", content="write"), *TWO_ROUNDS)
    with pytest.raises(
        ChatError, match=r"\['system', 'user', .*\]: System role not supported; .*`chat_template`"
    ):
        encoder_of("gemma").encode_chat(messages)


@pytest.mark.parametrize("change", ["message['content'] | upper", "message['content'][:1]"])
def test_a_template_that_does_not_write_what_the_user_says_is_refused(
    encoder_of: EncoderOf, base_of: BaseOf, template_file: TemplateFile, change: str
) -> None:
    template = encoder_of("chatml").template.text.replace("message['content']", change)
    with pytest.raises(ChatError, match="leaves out or alters the user's 'the'; set `chat_template`"):
        load_chat(base_of("chatml"), chat_template=template_file(template))


def test_a_missing_template_is_asked_for_by_the_settings_name(encoder_of: EncoderOf, base_of: BaseOf) -> None:
    base = base_of("without")
    with pytest.raises(ChatError, match="no chat template; set `chat_template` to a template file"):
        load_chat(base)
    with pytest.raises(ChatError, match=r"none at 'gone\.jinja'"):
        load_chat(base, chat_template="gone.jinja")


def test_a_base_model_that_is_no_directory_is_refused() -> None:
    with pytest.raises(ChatError, match="local directory, 'org/model' is none"):
        load_chat("org/model")


def test_dates_in_templates_are_fixed(encoder_of: EncoderOf) -> None:
    prompt = encoder_of("llama3").encode_prompt(TWO_ROUNDS[:1])
    assert "Today: 26 Jul 2024" in encoder_of("llama3").decode(prompt)
