"""Tokenizers and templates in the style of eight model families, small and built here."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from delia.chat import ChatEncoder, load_chat
from delia.starter.tokenizer import build_tokenizer

CORPUS = [
    "the cat says what the user wants",
    "write a word in the list, system and assistant",
    "123 456 [INST]",
]
LLAMA3 = (
    "{{- bos_token }}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if loop.first %}{{ 'Today: ' + date_string + '\n' }}{% endif %}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'] + '<｜end｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def special(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in texts]


def plain(*texts: str) -> list[AddedToken]:
    return [AddedToken(text, special=False, normalized=False) for text in texts]


def wrap(backend: Tokenizer, template: str | None, **names: str) -> PreTrainedTokenizerFast:
    build: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(added: list[AddedToken]) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen, with the trimmed offsets that some of them have."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.add_tokens(added)
    return backend


def sentence_piece(first: list[str], *, is_legacy: bool) -> Tokenizer:
    """As Llama 2: bytes for unknown letters, "▁" for spaces, and merges that spell its own `<s>`."""
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("▁", "the"),
        ("s", ">"),
        ("<", "s>"),
        ("/", "s>"),
        ("<", "/s>"),
        ("▁", "1"),
    ]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyzINSTWY0123456789[]<>/?.,:|\n"))
    pieces = [
        *first,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        *("".join(pair) for pair in merges),
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if is_legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_tokens(special(*first))
    return backend


def make_llama3() -> PreTrainedTokenizerFast:
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(2)]
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *reserved,
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return wrap(byte_level(special(*names)), LLAMA3, **tokens)


def make_chatml() -> PreTrainedTokenizerFast:
    added = special("<|endoftext|>", "<|im_start|>", "<|im_end|>") + plain("<think>", "</think>")
    return wrap(byte_level(added), CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")


def make_deepseek() -> PreTrainedTokenizerFast:
    added = special("<｜begin｜>", "<｜end｜>") + plain("<｜User｜>", "<｜Assistant｜>", "<think>")
    return wrap(byte_level(added), DEEPSEEK, bos_token="<｜begin｜>", eos_token="<｜end｜>")


def make_llama2(*, is_legacy: bool = True) -> PreTrainedTokenizerFast:
    backend = sentence_piece(["<unk>", "<s>", "</s>"], is_legacy=is_legacy)
    return wrap(backend, LLAMA2, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_gemma() -> PreTrainedTokenizerFast:
    first = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    backend = sentence_piece(first, is_legacy=False)
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_tokens(plain("\n", "\n\n", "▁▁", "<unused0>", "<unused1>"))
    return wrap(backend, GEMMA, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def make_unigram() -> PreTrainedTokenizerFast:
    """A Unigram model finds `</s>` in plain text by itself; NFKC makes one from full-width letters."""
    letters = "▁abcdefghijklmnopqrstuvwxyzINST[]<>/|_\n"
    pieces = [
        ("<unk>", 0.0),
        ("<s>", -1.0),
        ("</s>", -1.0),
        *((letter, -5.0) for letter in letters),
        ("▁the", -2.0),
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_tokens(special("<unk>", "<s>", "</s>"))
    return wrap(backend, LLAMA2, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "starter": build_tokenizer,
    "llama3": make_llama3,
    "chatml": make_chatml,
    "deepseek": make_deepseek,
    "llama2": make_llama2,
    "mistral": lambda: make_llama2(is_legacy=False),
    "gemma": make_gemma,
    "unigram": make_unigram,
}
FAMILIES = tuple(MAKERS)
MAKERS["without"] = lambda: wrap(byte_level(special("<|end|>")), None, eos_token="<|end|>")
WITH_RESERVED_ROWS = ("starter", "llama3", "gemma")


@cache
def build_encoder(name: str) -> ChatEncoder:
    with TemporaryDirectory() as folder:
        MAKERS[name]().save_pretrained(folder)
        return load_chat(folder, task_tokens=["<sep>"] if name in WITH_RESERVED_ROWS else ())


@pytest.fixture(scope="session", params=FAMILIES)
def encoder(request: pytest.FixtureRequest) -> ChatEncoder:
    """Each family's encoder in turn, `<sep>` declared where the vocabulary has reserved rows."""
    return build_encoder(request.param)


@pytest.fixture(scope="session")
def encoder_of() -> Callable[[str], ChatEncoder]:
    return build_encoder


@pytest.fixture
def base_of(tmp_path: Path) -> Callable[[str], str]:
    """Save a family's tokenizer where a base model would lie, and return the directory."""

    def save(name: str) -> str:
        MAKERS[name]().save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def template_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "template.jinja").write_text(text, encoding="utf-8")
        return str(tmp_path / "template.jinja")

    return write
