"""Named, platform-independent seeds: one root seed -> a seed for each use.

    derive_seed(42, "pretrain", step)  ->  an integer below 2**63

A seed depends only on its names, never on the order or number of draws made elsewhere, so a value
is equal on any number of workers and after any restart. `random.Random` is used rather than
NumPy's generators because its stream is fixed across versions by Python's documentation.
"""

import random

import xxhash


def derive_seed(*names: int | str) -> int:
    """Return the seed that belongs to a sequence of names.

    Args:
        *names: Integers and strings; `1` and `"1"` are different names.

    Returns:
        An integer in `[0, 2**63)`, equal on every machine.
    """
    text = "\x1f".join(f"{type(name).__name__}:{name}" for name in names)
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def make_random(*names: int | str) -> random.Random:
    """Return a `random.Random` seeded by a sequence of names."""
    return random.Random(derive_seed(*names))


def hash_text(*parts: str) -> str:
    """Return a 128-bit hash as 32 hex digits; parts are length-prefixed, so they can't run together."""
    digest = xxhash.xxh3_128()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
