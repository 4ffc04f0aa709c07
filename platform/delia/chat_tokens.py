"""A tokenizer whose control tokens no content can write: task tokens named, other names hidden.

    tokenizer + {"<sep>": 6}  ->  row 6 renamed to <sep>  ->  pieces of text -> ids, ids -> text

A control token is a row that stands for structure, not for text: one that the tokenizer calls special,
a reserved one, or one that the chat template writes into a prompt. Text in a content that spells one is
swapped with the name `M12M` (row 12; M is a private-use character that no content holds) before the
template sees it. Afterwards names and texts are swapped back, and a second tokenizer, whose row 12 is
*called* `M12M`, encodes the whole: the template's tokens are rows, the content's text is text, and all
else (added spaces, normalisation, multi-digit rules) is as in the first tokenizer.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from delia.errors import ChatError

RESERVED = re.compile(r"[<\[]\|?(reserved|reserved_special_token|unused|special)_?\d+\|?[>\]]", re.IGNORECASE)
PRIVATE_USE = tuple(chain(range(0x10FFFD, 0xFFFFF, -1), range(0xF8FF, 0xDFFF, -1)))


def rename_rows(tree: dict[str, Any], name_by_id: Mapping[int, str]) -> dict[str, Any]:
    """Give rows of a `tokenizer.json` tree other names; text in the old names becomes plain text.

    Renamed rows are special tokens, also those that were ordinary vocabulary or did not exist.
    """
    model = dict(tree["model"])
    old_names = {name: i for name, i in list_vocabulary(model) if i in name_by_id}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = {token["id"]: token for token in tree["added_tokens"]}
    for token_id, name in name_by_id.items():
        token = added.get(token_id, {"id": token_id, **flags})
        added[token_id] = {**token, "content": name, "special": True}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {name_by_id.get(i, name): i for name, i in model["vocab"].items()}
    else:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[name_by_id.get(i, pair[0]), pair[1]] for i, pair in enumerate(model["vocab"])]
    if model.get("merges"):
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if old_names.keys().isdisjoint((left, right, left + right))
        ]
    if model.get("unk_token") in old_names:
        model["unk_token"] = name_by_id[old_names[model["unk_token"]]]
    return {**tree, "model": model, "added_tokens": [added[i] for i in sorted(added)]}


def list_vocabulary(model: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    """Return the (piece, id) pairs of a `tokenizer.json` model of any kind."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary.items()
    return ((pair[0], index) for index, pair in enumerate(vocabulary))


def find_unknown(tree: Mapping[str, Any]) -> str | None:
    """Return what the tokenizer writes for text that it doesn't know, None where it knows all."""
    model = tree["model"]
    if model.get("unk_id") is not None:  # Unigram
        return str(model["vocab"][model["unk_id"]][0])
    return str(model["unk_token"]) if model.get("unk_token") is not None else None


def build_backend(tree: Mapping[str, Any]) -> Tokenizer:
    """Build a tokenizer that adds, cuts and pads nothing, and whose offsets are untrimmed."""
    plain = {**tree, "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(plain))


def name_task_tokens(tokenizer: PreTrainedTokenizerFast, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the tokenizer's JSON tree with rows renamed to the task tokens.

    Raises:
        ChatError: A token is no name or has another row already, or the row is in use.
    """
    backend = tokenizer.backend_tokenizer
    if len(set(token_ids.values())) < len(token_ids):
        raise ChatError(f"two task tokens can't share a row, got {dict(token_ids)}; give each its own")
    for token, token_id in token_ids.items():
        if not token or token != token.strip():
            raise ChatError(f"a task token is a text without outer white space, got {token!r}; rename it")
        row, name = backend.token_to_id(token), backend.id_to_token(token_id)
        if row is not None and row != token_id:
            raise ChatError(f"task token {token!r} is row {row} already, got {token_id}; give {row}")
        is_free = RESERVED.fullmatch(name) if name else token_id == backend.get_vocab_size()
        if row is None and not is_free:
            raise ChatError(
                f"task token {token!r} can't take row {token_id}, which is {name!r}; give a reserved row, or"
                f" extend the base model by a row and give its id, {backend.get_vocab_size()}"
            )
    return rename_rows(json.loads(backend.to_str()), {i: token for token, i in token_ids.items()})


@dataclass(frozen=True, eq=False)
class TokenTable:
    """A tokenizer with named task tokens and guarded control tokens.

    `control_ids` maps the text of each control token to its row, task tokens left out. `unknown` is what
    the tokenizer writes for text that it doesn't know: no sign of a forged control token.
    """

    backend: Tokenizer
    control_ids: Mapping[str, int]
    unknown: str | None
    _pattern: re.Pattern[str] = field(init=False)
    _counted_ids: frozenset[int] = field(init=False)
    _guarded: dict[str, Tokenizer] = field(init=False, default_factory=dict)
    _swaps: dict[str, tuple[re.Pattern[str], dict[str, str]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Compile what finds control tokens: of several that begin together, the longest."""
        longest_first = sorted(self.control_ids, key=len, reverse=True)
        counted = frozenset(i for name, i in self.control_ids.items() if name != self.unknown)
        object.__setattr__(self, "_pattern", re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"))
        object.__setattr__(self, "_counted_ids", counted)

    def choose_marker(self, texts: Iterable[str]) -> str:
        """Return a private-use character that none of the texts holds."""
        given = tuple(texts)
        return next(chr(code) for code in PRIVATE_USE if not any(chr(code) in text for text in given))

    def swap(self, text: str, marker: str) -> str:
        """Replace control tokens' texts by their names `M12M`, and names by texts; its own inverse."""
        if marker not in self._swaps:
            names = {name: f"{marker}{i}{marker}" for name, i in self.control_ids.items()}
            either = re.compile(rf"{marker}\d+{marker}|{self._pattern.pattern}")
            self._swaps[marker] = either, names | {name: text for text, name in names.items()}
        either, swaps = self._swaps[marker]
        return either.sub(lambda found: swaps[found[0]], text)

    def encode(
        self, pieces: Sequence[str], marker: str, *, is_guarded: bool = False
    ) -> tuple[list[int], list[int]]:
        """Encode the concatenation of pieces in one go.

        Control tokens in clear become rows; those that `swap` hid become plain text. Where nothing is
        hidden the tokenizer itself encodes the text, unless `is_guarded`; the result must be the same.

        Returns:
            Ids, and for each id the index of the piece that it begins in.

        Raises:
            ChatError: The ids hold other control tokens than the text.
        """
        text = "".join(pieces)
        num_controls = self._count(self.control_ids[name] for name in self._pattern.findall(text))
        if not is_guarded and marker not in text:
            ids, owners = _encode_pieces(self.backend, pieces)
            if self._count(ids) == num_controls:
                return ids, owners
        ids, owners = _encode_pieces(self._guard(marker), [self.swap(piece, marker) for piece in pieces])
        if self._count(ids) != num_controls:
            raise ChatError(
                f"the template writes {num_controls} control tokens, the ids hold {self._count(ids)}: the"
                f" tokenizer forms control tokens from plain text; take it out of {text[:200]!r}"
            )
        return ids, owners

    def holds_control(self, ids: Sequence[int], task_ids: Iterable[int]) -> bool:
        """Tell whether ids hold a control or task token; that for text which the tokenizer doesn't know is none."""
        return not (self._counted_ids.isdisjoint(ids) and set(task_ids).isdisjoint(ids))

    def spell(self, ids: Sequence[int]) -> str:
        """Return the text of ids with control and task tokens in clear."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids without control and task tokens."""
        hidden = set(self.control_ids.values())
        text = self.backend.decode([i for i in ids if i not in hidden], skip_special_tokens=True)
        return str(text)

    def _count(self, ids: Iterable[int]) -> int:
        return sum(map(self._counted_ids.__contains__, ids))

    def _guard(self, marker: str) -> Tokenizer:
        """Return the tokenizer whose control tokens are called `M12M`, built once for a marker."""
        if marker not in self._guarded:
            names = {i: f"{marker}{i}{marker}" for i in self.control_ids.values()}
            self._guarded[marker] = build_backend(rename_rows(json.loads(self.backend.to_str()), names))
        return self._guarded[marker]


def _encode_pieces(backend: Tokenizer, pieces: Sequence[str]) -> tuple[list[int], list[int]]:
    encoding = backend.encode("".join(pieces), add_special_tokens=False)
    if len(pieces) == 1:
        return encoding.ids, [0] * len(encoding.ids)
    ends = list(accumulate(map(len, pieces)))
    return encoding.ids, [bisect_right(ends, start) for start, _ in encoding.offsets]
