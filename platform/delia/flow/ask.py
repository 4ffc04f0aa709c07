"""Ask an adapter one thing, in this process, as any PEFT user would: no Ray, no vLLM."""

from pathlib import Path

from delia.chat import load_chat
from delia.errors import StoreError
from delia.flow.trial import read_adapter
from delia.model.loading import load_base
from delia.model.logprobs import continue_greedily, load_adapted
from delia.schema import Message
from delia.store.models import ModelConfig, resolve_model

MAX_TOKENS = 256


def ask(adapter: str, text: str) -> str:
    """Return the greedy answers of the adapter and of its base to one user message, as two lines.

    Raises:
        StoreError: The directory is no finished adapter of this platform.
    """
    directory = Path(adapter)
    if not directory.is_dir():
        raise StoreError(f"no adapter directory {adapter!r}; give the path that `jobs/adapt.py` printed")
    found = read_adapter(str(directory.resolve()))
    model = ModelConfig(path=found.base_model)
    chat = load_chat(str(resolve_model(model)), task_tokens=found.tokens)
    prompt = [chat.encode_prompt((Message(role="user", content=text),))]
    lines = []
    for label, loaded in (("adapter", load_adapted(model, directory)), ("base", load_base(model))):
        ids = continue_greedily(loaded, prompt, max_tokens=MAX_TOKENS, end_ids=chat.end_ids)[0]
        lines.append(f"{label}: {chat.decode(ids)}")
    return "\n".join(lines)
