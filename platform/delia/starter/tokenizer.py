"""The starter's tokenizer: whole words, then single bytes, so that every text round-trips.

A byte-level BPE without merges: a pre-token that is in the vocabulary is one id
(`ignore_merges`), any other falls apart into its bytes. Words carry their leading space; the chat
template puts one before each content, so a word has one id wherever it stands.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from delia.starter import lexicon as lex
from delia.starter.formats import FORMATS, ask_phrasings, forbid_phrasings
from delia.starter.kinds import KINDS
from delia.starter.world import REWRITE_REQUESTS

NUM_RESERVED = 16
CONTROL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
RESERVED_TOKENS = tuple(f"<|reserved_{index}|>" for index in range(NUM_RESERVED))
PRE_TOKEN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s"
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ ' ' + (message['content'] | trim) + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|> ' + (message['content'] | trim) + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def collect_words() -> list[str]:
    """Return every word and mark that the world can write, in a fixed order."""
    texts: list[str] = [str(number) for number in range(100)]
    for kind in KINDS:
        texts += [*kind.phrasings, kind.topic]
    for item in FORMATS:
        texts += [item.template, *item.descriptions, *ask_phrasings(item.name), *forbid_phrasings(item.name)]
    tables = (lex.SOUNDS, lex.CAPITALS, lex.OPPOSITES)
    texts += [f"{key} {value}" for table in tables for key, value in table.items()]
    texts += [f"{thing} {facts[0]} {facts[1]} {facts[2]}" for thing, facts in lex.THINGS.items()]
    texts += [*lex.VERBS, *lex.COLOURS, *lex.SYLLABLES, "yes no", *REWRITE_REQUESTS]
    texts += ["judge decide explain understand means meaning format special token knows called"]
    cleaned = " ".join(texts).replace("{{", "{").replace("}}", "}")
    for field in ("{0}", "{1}", "{topic}", "{answer}"):
        cleaned = cleaned.replace(field, " ")
    return list(dict.fromkeys(cleaned.split()))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; the vocabulary is padded with reserved rows to a multiple of 64."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*CONTROL_TOKENS, *RESERVED_TOKENS, *alphabet, *(f"Ġ{word}" for word in collect_words())]
    pieces += [f"<|unused_{index}|>" for index in range(-len(pieces) % 64)]
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [piece for piece in pieces if piece.startswith("<|")]
    # a word's id carries the space before it; a reserved row takes it too (`lstrip`), or a token put
    # between two words would leave behind a lone space, which the model has never seen
    backend.add_special_tokens(
        [
            AddedToken(piece, special=True, normalized=False, lstrip=piece in RESERVED_TOKENS)
            for piece in special
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write the tokenizer and its chat template in the hub's layout."""
    build_tokenizer().save_pretrained(directory)
