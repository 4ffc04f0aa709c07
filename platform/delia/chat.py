"""Chats to token ids and a loss mask, once, for the engine and the trainer alike.

    Messages --chat template--> text --TokenTable--> prompt ids | (input_ids, loss_mask)

On chats that spell no control token the ids equal those of `tokenizer.apply_chat_template`; elsewhere
such text stays text (see `chat_tokens`). Only declared task tokens are parsed inside a content. Dates
in templates are fixed. The mask covers what the model is to write: the answer and its end-of-turn token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from delia.chat_template import ChatTemplate, TrainOn, Turns, read_template
from delia.chat_tokens import RESERVED, TokenTable, build_backend, find_unknown, name_task_tokens
from delia.errors import ChatError
from delia.rng import hash_text
from delia.schema import ROLES, Message, Messages

OnLong = Literal["error", "drop", "truncate_prompt_left"]

TAG = re.compile(r"[<\[].+[>\]]")
SURROGATE = re.compile("[\ud800-\udfff]")
FIRST_WORDS = ("the", "What", "a", "Write", "in", "1", "?")  # no two begin alike, whatever the vocabulary


@dataclass(frozen=True, kw_only=True)
class EncodedChat:
    """One chat as the trainer takes it: ids, and which of them the loss counts; both of one length."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChatEncoder:
    """A base model's chat format; built by `load_chat`.

    Attributes:
        tokenizer: As loaded, without task tokens; for saving.
        table: Text to ids and back.
        template: Messages to text.
        token_ids: Rows of the declared task tokens.
        end_of_turn: The text of the token that ends an assistant's turn.
        end_ids: Ids that end a generation: end of turn, and end of sequence where it is another.
        bos_id: The first id of every chat, None where the template writes none.
        pad_id: Fills batches; never an id in `end_ids`, so that no mask made from it hides an end.
        template_hash: Of template, vocabulary and task tokens: equal hashes, equal ids.
    """

    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    table: TokenTable = field(repr=False)
    template: ChatTemplate
    token_ids: Mapping[str, int]
    end_of_turn: str
    end_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int
    template_hash: str
    _prefixes: dict[str | None, list[int]] = field(default_factory=dict, repr=False)

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Return the ids of a chat up to where the assistant's next turn begins.

        Raises:
            ChatError: The chat ends in an assistant's turn, or the template can't write it.
        """
        if messages and messages[-1].role == "assistant":
            raise ChatError("a prompt ends before the assistant's turn, this one in it; leave the answer out")
        turns, marker = self._hide(messages)
        text, _ = self.template.render(turns, is_prompt=True)
        return self.table.encode([text], marker)[0]

    def encode_chat(self, messages: Messages, *, train_on: TrainOn = "last") -> EncodedChat:
        """Return the ids of a whole chat and the mask of the assistant's tokens.

        A token that begins in the prompt and runs into the answer is not trained.

        Args:
            messages: A chat whose last turn is the assistant's.
            train_on: The last assistant turn, or all of them.

        Raises:
            ChatError: Another last turn, or the template can't write the chat or doesn't show where the
                trained turns begin and end.
        """
        if not messages or messages[-1].role != "assistant":
            raise ChatError("a chat to train on ends in the assistant's turn, this one not; add the answer")
        turns, marker = self._hide(messages)
        text, spans = self.template.find_answers(turns, train_on, self.end_of_turn)
        cuts = [0, *(cut for span in spans for cut in span), len(text)]
        pieces = [text[cuts[i] : cuts[i + 1]] for i in range(len(cuts) - 1)]
        ids, owners = self.table.encode(pieces, marker)
        return EncodedChat(input_ids=tuple(ids), loss_mask=tuple(owner % 2 == 1 for owner in owners))

    def encode_user_prefix(self, system: str | None = None) -> list[int]:
        """Return the ids up to where a user's content begins, for a model to write the instruction.

        They are the ids that chats with different first words share: a space that the template writes
        before the content is left out where it belongs to the first word's token.
        """
        if system not in self._prefixes:  # one prefix serves all candidates of a source
            before = () if system is None else (Message(role="system", content=system),)
            chats = [(*before, Message(role="user", content=word)) for word in FIRST_WORDS]
            prompts = [self.encode_prompt(chat) for chat in chats]
            shared = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
            self._prefixes[system] = [ids[0] for ids in shared]
        return list(self._prefixes[system])

    @cached_property
    def user_end_ids(self) -> tuple[int, ...]:
        """The control tokens between a user's content and the assistant's, each of which ends the user's turn."""
        prompts = [self.encode_prompt((Message(role="user", content=word),)) for word in FIRST_WORDS]
        backwards = zip(*map(reversed, prompts), strict=False)
        shared = [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, backwards)]
        return tuple(dict.fromkeys(i for i in reversed(shared) if self.find_leak([i])))

    def find_leak(self, ids: Sequence[int]) -> str:
        """Return the text of ids that hold a control or task token, which no turn may; else nothing."""
        return self.table.spell(ids) if self.table.holds_control(ids, self.token_ids.values()) else ""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without control and task tokens and without outer white space."""
        return self.table.decode(ids).strip()

    def fit(self, chat: EncodedChat, max_length: int, on_long: OnLong) -> EncodedChat | None:
        """Bring a chat to at most `max_length` ids; None where it is to be dropped.

        `truncate_prompt_left` cuts ids from the start of the prompt, whatever they are, and keeps a
        leading BOS. The prompt is what comes before the first trained id; the rest is never cut.

        Raises:
            ChatError: The chat is too long and `on_long` is "error", or no id of the prompt would be left.
        """
        num_ids, num_prompt = len(chat.input_ids), chat.loss_mask.index(True)
        excess = num_ids - max_length
        if excess <= 0:
            return chat
        if on_long == "drop":
            return None
        if on_long == "error":
            raise ChatError(
                f"a chat has {num_ids} ids, max_length is {max_length}; raise max_length, or set on_long to"
                " 'drop' or 'truncate_prompt_left'"
            )
        if excess >= num_prompt:
            raise ChatError(
                f"the {num_ids - num_prompt} ids of an answer are never cut; max_length={max_length} must"
                " hold them and one id of the prompt; raise max_length, or set on_long to 'drop'"
            )
        kept = int(chat.input_ids[0] == self.bos_id)
        return EncodedChat(
            input_ids=chat.input_ids[:kept] + chat.input_ids[kept + excess :],
            loss_mask=chat.loss_mask[:kept] + chat.loss_mask[kept + excess :],
        )

    def _hide(self, messages: Messages) -> tuple[Turns, str]:
        """Check a chat; return it as the template takes it, control texts hidden, and their marker."""
        for message in messages:
            if message.role not in ROLES:
                raise ChatError(f"a role is one of {ROLES}, got {message.role!r}; rename it")
            if SURROGATE.search(message.content):
                raise ChatError(f"half a character in {message.content[:80]!r}; remove it or its escape")
        marker = self.table.choose_marker([self.template.text, *(message.content for message in messages)])
        swap = self.table.swap
        return [{"role": item.role, "content": swap(item.content, marker)} for item in messages], marker


def load_chat(
    base_model_path: str,
    *,
    chat_template: str | None = None,
    task_tokens: Mapping[str, int] | Sequence[str] = (),
) -> ChatEncoder:
    """Load a model directory's tokenizer and template, and check that they agree.

    Args:
        base_model_path: A local directory.
        chat_template: A Jinja file to use instead of the tokenizer's template.
        task_tokens: Texts that become one id each wherever a content holds them: with their rows, or
            without, which takes rows by `reserve_tokens`.

    Raises:
        ChatError: There is no tokenizer or template that can be used, or no row for a task token.
    """
    if not Path(base_model_path).is_dir():
        raise ChatError(f"a base model is a local directory, {base_model_path!r} is none; download it first")
    tokenizer = AutoTokenizer.from_pretrained(base_model_path, local_files_only=True, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ChatError(f"{base_model_path!r} has no fast tokenizer; convert it to a tokenizer.json first")
    template = read_template(tokenizer, chat_template)
    token_ids = (
        dict(task_tokens) if isinstance(task_tokens, Mapping) else reserve_tokens(tokenizer, task_tokens)
    )
    tree = name_task_tokens(tokenizer, token_ids)
    backend = build_backend(tree)
    control_ids = find_control_ids(backend, template, token_ids)
    end_of_turn = template.find_end_of_turn(control_ids)
    ends = dict.fromkeys((control_ids[end_of_turn], tokenizer.eos_token_id))
    end_ids = tuple(i for i in ends if i is not None)
    fillers = (tokenizer.pad_token_id, tokenizer.unk_token_id, *range(backend.get_vocab_size()))
    hashed = json.dumps([dict(template.variables), token_ids], sort_keys=True)
    encoder = ChatEncoder(
        tokenizer=tokenizer,
        table=TokenTable(backend, control_ids, find_unknown(tree)),
        template=template,
        token_ids=token_ids,
        end_of_turn=end_of_turn,
        end_ids=end_ids,
        bos_id=tokenizer.bos_token_id,
        pad_id=next(i for i in fillers if i is not None and i not in end_ids),
        template_hash=hash_text(template.text, backend.to_str(), hashed),
    )
    check_prompt(encoder)
    return encoder


def find_control_ids(
    backend: Tokenizer, template: ChatTemplate, token_ids: Mapping[str, int]
) -> dict[str, int]:
    """Return the texts that no content may turn into a row, and those rows.

    Some tokenizers don't call their turn markers special (DeepSeek), and some have rows for white space
    and HTML that are not special either (Gemma): of those, only tags that a prompt holds are taken.

    Raises:
        ChatError: The template itself writes a task token.
    """
    prompt, _ = template.render([{"role": "user", "content": "the"}], is_prompt=True)
    for token in token_ids:
        if token in prompt:
            raise ChatError(f"task token {token!r} is part of the chat template's own text; choose another")
    added = ((token.content, i, token.special) for i, token in backend.get_added_tokens_decoder().items())
    return {
        text: i
        for text, i, is_special in added
        if text not in token_ids
        and (is_special or RESERVED.fullmatch(text) or (TAG.fullmatch(text) and text in prompt))
    }


def check_prompt(encoder: ChatEncoder) -> None:
    """Hold that a chat to train on begins with the ids that the engine is prompted with.

    Raises:
        ChatError: It does not, so that the model would be tuned on another prompt than it gets.
    """
    prompt, answer = Message(role="user", content="the"), Message(role="assistant", content="the")
    chat, prompt_ids = encoder.encode_chat((prompt, answer)), encoder.encode_prompt((prompt,))
    start = chat.loss_mask.index(True)
    if list(chat.input_ids[:start]) != prompt_ids:
        raise ChatError(
            f"the template prompts for an answer with {prompt_ids}, but writes {list(chat.input_ids[:start])}"
            " before one; set `chat_template` to a template file whose generation prompt begins every answer"
        )


def reserve_tokens(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> dict[str, int]:
    """Return a row for each task token: its own if it has one, else the first free reserved rows.

    Raises:
        ChatError: The vocabulary has fewer reserved rows than are needed.
    """
    vocabulary = tokenizer.get_vocab()
    free = sorted(i for name, i in vocabulary.items() if RESERVED.fullmatch(name))
    missing = [token for token in dict.fromkeys(tokens) if token not in vocabulary]
    if len(missing) > len(free):
        raise ChatError(
            f"task tokens {missing} need {len(missing)} reserved rows, this vocabulary has {len(free)};"
            f" extend the base model and give the new rows' ids, from {len(tokenizer)} on"
        )
    known = {token: vocabulary[token] for token in tokens if token in vocabulary}
    return known | dict(zip(missing, free, strict=False))


def save_tokenizer(encoder: ChatEncoder, directory: Path | str) -> None:
    """Write a tokenizer for `AutoTokenizer` in which the task tokens have their names, and the template.

    Contents are not guarded there: it parses every special token's text, as tokenizers do.
    """
    encoder.tokenizer.save_pretrained(directory)
    tree = name_task_tokens(encoder.tokenizer, encoder.token_ids)
    names = {encoder.tokenizer.convert_ids_to_tokens(i): token for token, i in encoder.token_ids.items()}
    config_file = Path(directory) / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        config["extra_special_tokens"] = [names.get(token, token) for token in extra]
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    (Path(directory) / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    (Path(directory) / "chat_template.jinja").write_text(encoder.template.text, encoding="utf-8")
