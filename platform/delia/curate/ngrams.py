"""Text -> the words and word n-grams that all rules of curation compare.

Words are what white space separates: a script written without spaces is one long word, and only
exact rules act on it.
"""


def normalise(text: str) -> str:
    """Return the text in case-folded words, one space apart."""
    return " ".join(text.casefold().split())


def list_ngrams(words: list[str], size: int) -> list[str]:
    """Return every run of `size` words, in order and with repeats; none if there are fewer words."""
    return [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]
