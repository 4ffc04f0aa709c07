"""The nouns on the arrows: SeedTask, Task, Row, Rejection, Mixture, Adapter.

    SeedTask --synthesize--> Row --curate--> Pool --mix--> Mixture --train--> Adapter --evaluate--> EvalReport

All are frozen values without behaviour beyond what follows from their fields.
"""

from dataclasses import dataclass, field
from typing import Literal

from delia.rng import hash_text

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "dev", "test"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a chat; `content` is text and never becomes a control token."""

    role: Role
    content: str


Messages = tuple[Message, ...]


def hash_messages(messages: Messages) -> str:
    """Return the content hash of a chat: roles and texts, in order."""
    return hash_text(*(part for message in messages for part in (message.role, message.content)))


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedTask:
    """One row of a task file.

    `suite` groups rows of dev and test for evaluation (`follow`, `negated`, ...); `phrasing` names
    the wording of the instruction, the cluster of the paired bootstrap. A row whose last message is
    not the assistant's has no reference: the base model's answer to `base_messages` is its target.
    """

    task_id: str
    messages: Messages
    suite: str = "task"
    phrasing: str = ""
    licence: str = ""
    base_messages: Messages = ()

    @property
    def prompt(self) -> Messages:
        """Return the messages before the reference answer."""
        return self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages

    @property
    def reference(self) -> str | None:
        """Return the reference answer, or None where the base model's own answer is the target."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task: its rows by split, and the token that stands for a long instruction, if any.

    `digest` covers every row of every split. `tokens` are the declared task tokens, such as
    `<sep>`: the only text that is ever parsed as a control token.
    """

    name: str
    digest: str
    rows_by_split: dict[Split, tuple[SeedTask, ...]]
    tokens: tuple[str, ...] = ()
    long_instruction: str = ""
    metrics: tuple[str, ...] = ("exact_match",)
    licence: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One synthesised or imported chat that ends in an assistant turn.

    `index` is the candidate's position in its recipe, which decides between near-duplicates. Lengths are those of
    the chat as it is trained on: ids before its last answer, and of that answer with its end.
    """

    row_id: str
    index: int
    source: str
    messages: Messages
    finish_reason: str = "stop"
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    licence: str = ""
    """That of an imported row; what is generated states none."""

    @property
    def instruction(self) -> str:
        """Return every turn before the answer: what exact duplicates and overlaps are found in."""
        return "\n".join(message.content for message in self.messages[:-1])

    @property
    def user_text(self) -> str:
        """Return every user turn: what near and semantic duplicates, openings and embeddings are of.

        System turns are no part of it: one that all rows of a source share would make them all alike.
        """
        return "\n".join(message.content for message in self.messages if message.role == "user")

    @property
    def leaf(self) -> str:
        """Return the Merkle leaf: changed text is seen even where the id is the same."""
        return hash_text(self.row_id, hash_messages(self.messages), self.finish_reason)


MAX_REJECTED_TEXT = 2000
"""Characters that are kept of what was rejected."""
TASK_SOURCE = "task"
"""What the source of a task's own rows is called among those of a training."""
TEMPLATE_LEAK = "template_leak"
"""Why a candidate is rejected that holds a control or task token, or spells one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A candidate that did not become a row of the pool, and why; kept and counted.

    `num_output_tokens` is the row's where there was one, else what was generated for the candidate.
    """

    row_id: str
    index: int
    source: str
    reason: str
    text: str
    num_output_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """An index view of a task and a pool: ordered row ids, no text.

    `row_ids` are in training order within one epoch and repeat nothing; `is_task` runs parallel.
    """

    root: str
    row_ids: tuple[str, ...]
    is_task: tuple[bool, ...]
    diverse_ratio: float
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A directory that PEFT and vLLM load, with where it came from."""

    path: str
    fingerprint: str
    base_model: str
    template_hash: str
    mixture_root: str
    tokens: dict[str, int] = field(default_factory=dict)
