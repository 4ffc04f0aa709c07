"""Contexts of synthesis on the starter's two tasks, and what tests say to a method."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from delia.chat import ChatEncoder, load_chat
from delia.generate.engine import Completion, Request
from delia.recipes.starter import STARTER
from delia.schema import Message, Row
from delia.starter.task_files import TOKEN, build_lingo, build_sep
from delia.store.models import resolve_model
from delia.synthesize.socket import SynthesisContext, Synthesizer

Say = Callable[..., Completion]
AskFirst = Callable[[Synthesizer, SynthesisContext, int], Request]


@pytest.fixture(scope="session")
def plain_chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)))


@pytest.fixture(scope="session")
def token_chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)), task_tokens=[TOKEN])


@pytest.fixture(scope="session")
def context(plain_chat: ChatEncoder) -> SynthesisContext:
    """The task `lingo`, which has no token."""
    seeds = build_lingo().rows_by_split["train"]
    return SynthesisContext(
        source="s", recipe="r", chat=plain_chat, seed_tasks=seeds, token="", long_instruction=""
    )


@pytest.fixture(scope="session")
def token_context(token_chat: ChatEncoder) -> SynthesisContext:
    """The task `sep`, whose instructions hold a token."""
    task = build_sep()
    return SynthesisContext(
        source="s",
        recipe="r",
        chat=token_chat,
        seed_tasks=task.rows_by_split["train"],
        token=TOKEN,
        long_instruction=task.long_instruction,
    )


@pytest.fixture(scope="session")
def one(context: SynthesisContext) -> SynthesisContext:
    """One row to feed on."""
    messages = (Message(role="user", content="what is the fox ?"), Message(role="assistant", content="red"))
    row = Row(row_id="x", index=0, source="before", messages=messages)
    return replace(context, closed=(row,))


@pytest.fixture(scope="session")
def say() -> Say:
    """Return what makes an engine's answer of a text."""

    def say(context: SynthesisContext, index: int, text: str, *, finish_reason: str = "stop") -> Completion:
        ids = tuple(context.chat.tokenizer.encode(f" {text}", add_special_tokens=False)) if text else ()
        return Completion(
            request_id=f"s:{index}", token_ids=ids, finish_reason=finish_reason, num_prompt_tokens=5
        )

    return say


@pytest.fixture(scope="session")
def ask_first() -> AskFirst:
    """Return what gets a method's first request."""

    def ask(method: Synthesizer, context: SynthesisContext, index: int) -> Request:
        request = method(context, index, [])
        assert isinstance(request, Request)
        return request

    return ask
