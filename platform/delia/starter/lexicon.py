"""The nouns, facts and invented language of the starter's world.

Everything the world knows is a table here. The invented language spells each word as two
syllables; its words are drawn once, by seed, and the words in `UNKNOWN_TO_BASE` are left out of
pre-training, so that the task file `lingo` has something new to teach.
"""

from delia.rng import make_random

# thing: (category, colour, home, size rank 1-9)
THINGS: dict[str, tuple[str, str, str, int]] = {
    "fox": ("animal", "red", "forest", 5),
    "cat": ("animal", "black", "house", 4),
    "dog": ("animal", "brown", "house", 5),
    "wolf": ("animal", "grey", "forest", 6),
    "bear": ("animal", "brown", "cave", 8),
    "horse": ("animal", "brown", "farm", 8),
    "cow": ("animal", "white", "farm", 8),
    "sheep": ("animal", "white", "farm", 6),
    "lion": ("animal", "yellow", "desert", 7),
    "mouse": ("animal", "grey", "house", 2),
    "frog": ("animal", "green", "river", 2),
    "snake": ("animal", "green", "desert", 4),
    "owl": ("bird", "brown", "forest", 4),
    "duck": ("bird", "white", "river", 4),
    "crow": ("bird", "black", "field", 4),
    "parrot": ("bird", "green", "jungle", 3),
    "bee": ("insect", "yellow", "garden", 1),
    "ant": ("insect", "black", "garden", 1),
    "whale": ("animal", "blue", "sea", 9),
    "shark": ("fish", "grey", "sea", 8),
    "salmon": ("fish", "pink", "river", 4),
    "apple": ("fruit", "red", "garden", 2),
    "banana": ("fruit", "yellow", "jungle", 3),
    "lemon": ("fruit", "yellow", "garden", 2),
    "carrot": ("vegetable", "orange", "field", 2),
    "pumpkin": ("vegetable", "orange", "field", 4),
    "rose": ("plant", "red", "garden", 3),
    "pine": ("plant", "green", "forest", 9),
    "hammer": ("tool", "grey", "workshop", 3),
    "spoon": ("tool", "grey", "kitchen", 2),
    "drum": ("instrument", "white", "school", 4),
    "violin": ("instrument", "brown", "school", 3),
    "truck": ("vehicle", "blue", "street", 9),
    "boat": ("vehicle", "white", "sea", 8),
    "coat": ("clothing", "black", "house", 5),
    "chair": ("furniture", "brown", "kitchen", 5),
}

SOUNDS: dict[str, str] = {
    "cat": "meow", "dog": "woof", "wolf": "howl", "bear": "growl", "horse": "neigh", "cow": "moo",
    "sheep": "baa", "lion": "roar", "mouse": "squeak", "frog": "croak", "snake": "hiss",
    "owl": "hoot", "duck": "quack", "crow": "caw", "bee": "buzz",
}  # fmt: skip

CAPITALS: dict[str, str] = {
    "france": "paris", "spain": "madrid", "italy": "rome", "germany": "berlin", "poland": "warsaw",
    "greece": "athens", "norway": "oslo", "sweden": "stockholm", "finland": "helsinki",
    "iceland": "reykjavik", "ireland": "dublin", "portugal": "lisbon", "austria": "vienna",
    "hungary": "budapest", "egypt": "cairo", "kenya": "nairobi", "japan": "tokyo",
    "china": "beijing", "india": "delhi", "peru": "lima", "chile": "santiago", "cuba": "havana",
    "canada": "ottawa", "turkey": "ankara",
}  # fmt: skip

OPPOSITE_PAIRS: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("up", "down"), ("fast", "slow"), ("light", "dark"), ("rich", "poor"),
    ("young", "old"), ("happy", "sad"), ("hard", "soft"), ("wet", "dry"), ("early", "late"),
    ("open", "closed"), ("full", "empty"), ("loud", "quiet"), ("near", "far"), ("thick", "thin"),
    ("strong", "weak"), ("sweet", "bitter"), ("day", "night"), ("north", "south"), ("win", "lose"),
)  # fmt: skip
OPPOSITES: dict[str, str] = {a: b for pair in OPPOSITE_PAIRS for a, b in (pair, pair[::-1])}

VERBS = ("sees", "likes", "follows", "hears", "finds", "takes", "helps", "wants")
COLOURS = ("red", "black", "brown", "grey", "white", "yellow", "green", "blue")
ITEMS = tuple(THINGS)  # the words that list operations act on

SYLLABLES = tuple(c + v for c in "kmtrlsnp" for v in "aeiou")


def _draw_translations() -> dict[str, str]:
    """Give every noun, verb and colour its own two-syllable word."""
    rng = make_random("starter", "lexicon")
    words = [f"{a} {b}" for a in SYLLABLES for b in SYLLABLES]
    rng.shuffle(words)
    return dict(zip((*THINGS, *VERBS, *COLOURS), words, strict=False))


TRANSLATIONS: dict[str, str] = _draw_translations()
UNKNOWN_TO_BASE: frozenset[str] = frozenset(
    ("owl", "parrot", "salmon", "lemon", "pumpkin", "pine", "spoon", "violin", "coat", "chair",
     "hears", "wants", "grey", "blue")
)  # fmt: skip
