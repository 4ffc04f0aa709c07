"""The answer formats of the starter's world, and the words that ask for one or forbid it.

A format renders (topic, answer) into a text. Instructions name a format ("use the record format"),
describe it at length, or forbid it; a forbidden format means the plain answer. Phrasings are
composed as lead + core + tail, so that one name meets hundreds of surroundings.
"""

import random
from dataclasses import dataclass

PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """A named layout of an answer: `template` takes `topic` and `answer`."""

    name: str
    template: str
    descriptions: tuple[str, ...]

    def render(self, *, topic: str, answer: str) -> str:
        """Return the answer text in this format."""
        return self.template.format(topic=topic, answer=answer)


FORMATS: tuple[AnswerFormat, ...] = (
    AnswerFormat(name="sentence", template="the answer is {answer} .", descriptions=(
        "begin with the words the answer is , then write the answer and a full stop .",
        "write a whole sentence : the words the answer is , the answer , a full stop .")),
    AnswerFormat(name="record", template="{{ thought : {topic} , answer : {answer} }}", descriptions=(
        "first an open brace , then the word thought and what is asked , then the word answer and the answer , then a closing brace .",
        "write an open brace , the word thought with what is asked , a comma , the word answer with the answer , and close the brace .")),
    AnswerFormat(name="quote", template='" {answer} "', descriptions=(
        "put a quotation mark before the answer and a quotation mark after the answer .",
        "write a quotation mark , then the answer , then a quotation mark .")),
    AnswerFormat(name="bullet", template="- {answer}", descriptions=(
        "put one dash before the answer .",
        "begin with a dash , then write the answer .")),
    AnswerFormat(name="arrow", template="{topic} => {answer}", descriptions=(
        "first write what is asked , then an arrow , then the answer .",
        "begin with what is asked , put an arrow after it , and end with the answer .")),
    AnswerFormat(name="tag", template="< answer > {answer} < / answer >", descriptions=(
        "put the word answer in angle brackets before the answer , and the closing tag after it .",
        "open an answer tag , write the answer , close the answer tag .")),
    AnswerFormat(name="twice", template="{answer} and again {answer}", descriptions=(
        "write the answer , then the words and again , then the answer once more .",
        "say the answer two times with the words and again between .")),
    AnswerFormat(name="report", template="topic : {topic} ; result : {answer}", descriptions=(
        "first the word topic and what is asked , then a semicolon , then the word result and the answer .",
        "write the word topic with what is asked , a semicolon , and the word result with the answer .")),
)  # fmt: skip
FORMAT_BY_NAME: dict[str, AnswerFormat] = {item.name: item for item in FORMATS}

LEADS = ("", "please", "you must", "make sure to", "remember to", "for this one ,", "now you should")
ASK_CORES = (
    "use the {f} format", "answer in the {f} format", "follow the {f} format", "write in the {f} format",
    "reply in the {f} format", "keep to the {f} format", "give the answer in the {f} format",
    "respect the {f} format", "put the answer in the {f} format", "apply the {f} format",
    "choose the {f} format", "stick to the {f} format",
)  # fmt: skip
FORBID_CORES = (
    "not use the {f} format", "avoid the {f} format", "answer without the {f} format",
    "never follow the {f} format", "not write in the {f} format", "leave out the {f} format",
    "skip the {f} format", "not reply in the {f} format", "stay away from the {f} format",
    "not apply the {f} format", "drop the {f} format", "ignore the {f} format",
)  # fmt: skip
TAILS = ("", "this time", "when you answer", "in your reply", "here")


def _compose(lead: str, core: str, tail: str) -> str:
    if core.startswith("not ") and lead in ("", "please", "for this one ,"):
        core = f"do {core}"
    return " ".join(part for part in (lead, core, tail, ".") if part)


def ask_phrasings(name: str) -> tuple[str, ...]:
    """Return every way to ask for a format by name; `name` may be a token such as `<sep>`."""
    return tuple(_compose(a, core.format(f=name), b) for a in LEADS for core in ASK_CORES for b in TAILS)


def forbid_phrasings(name: str) -> tuple[str, ...]:
    """Return every way to forbid a format by name."""
    return tuple(_compose(a, core.format(f=name), b) for a in LEADS for core in FORBID_CORES for b in TAILS)


@dataclass(frozen=True, kw_only=True)
class FormatRequest:
    """What an instruction says of the format: `applies` names the one the answer must have."""

    applies: str
    mentions: str | None
    text: str

    @property
    def cell(self) -> str:
        """Return how tables name it: a format, `plain`, or `no-` and the forbidden one."""
        if self.applies == PLAIN and self.mentions:
            return f"no-{self.mentions}"
        return self.applies


NO_REQUEST = FormatRequest(applies=PLAIN, mentions=None, text="")
_ASKS = {item.name: ask_phrasings(item.name) for item in FORMATS}
_FORBIDS = {item.name: forbid_phrasings(item.name) for item in FORMATS}


def draw_request(rng: random.Random) -> FormatRequest:
    """Draw none (3 of 12), a named format (4), a described one (2) or a forbidden one (3)."""
    choice = rng.randrange(12)
    if choice < 3:
        return NO_REQUEST
    item = rng.choice(FORMATS)
    if choice < 7:
        return FormatRequest(applies=item.name, mentions=item.name, text=rng.choice(_ASKS[item.name]))
    if choice < 9:
        return FormatRequest(applies=item.name, mentions=item.name, text=rng.choice(item.descriptions))
    return FormatRequest(applies=PLAIN, mentions=item.name, text=rng.choice(_FORBIDS[item.name]))
