"""What may be written about a setting: credentials are masked, long texts cut to MLflow's limit.

    ("hub.api_key", "abc")  ->  "(masked)"        ("train.max_tokens", 512)  ->  "512"

A name is judged word by word, since this platform is full of tokens that are no secret.
"""

import re
from itertools import pairwise

from delia.rng import hash_text

MASK = "(masked)"
MAX_VALUE_LENGTH = 6000  # MLflow's limit for a parameter; a tag may have 8000

_SECRET_WORDS = frozenset(
    ("password", "passwd", "passphrase", "secret", "secrets", "credential", "credentials", "apikey")
)
_KEY_OWNERS = frozenset(("api", "access", "private", "secret"))
_TOKEN_OWNERS = frozenset(
    ("access", "api", "auth", "bearer", "hf", "hub", "huggingface", "login", "refresh", "session")
)
_VOCABULARY_TOKEN = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_USER_IN_URI = re.compile(r"(?<=://)[^/\s]+(?=@)")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def is_secret_name(name: str) -> bool:
    """Tell whether a setting's path names a credential: `hub.api_key` does, `max_tokens` does not.

    `token` alone or after its issuer (`hf_token`) does; `tokens`, `eos_token` and `token_row` do not.
    """
    path = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = re.split(r"[._\-/\s]+", path)
    leaf = re.split(r"[_\-\s]+", re.split(r"[./]", path)[-1])
    is_key = any(word in _KEY_OWNERS and after in ("key", "keys") for word, after in pairwise(words))
    is_token = leaf[-1] == "token" and (len(leaf) == 1 or leaf[-2] in _TOKEN_OWNERS)
    return is_key or is_token or not _SECRET_WORDS.isdisjoint(words)


def hide_secrets(text: str) -> str:
    """Mask the user and password inside URIs, and hub tokens, wherever they stand."""
    return _HUB_TOKEN.sub(MASK, _USER_IN_URI.sub(MASK, text))


def render_value(name: str, value: object) -> str:
    """Return a parameter or a tag as text; one that is too long ends in its length and hash.

    A `token` whose value looks like `<sep>` belongs to the vocabulary and is no secret.
    """
    text = str(value)
    if value is not None and is_secret_name(name) and not _VOCABULARY_TOKEN.fullmatch(text):
        return MASK
    text = hide_secrets(text)
    if len(text) <= MAX_VALUE_LENGTH:
        return text
    suffix = f"... ({len(text)} characters, hash {hash_text(text)})"
    return text[: MAX_VALUE_LENGTH - len(suffix)] + suffix
