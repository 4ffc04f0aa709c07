"""Ask an adapter one thing, in this process, as any PEFT user would: no Ray, no vLLM.

An adapter is a directory, or `models:/NAME@champion` of the registry that jobs write to by default.
"""

from pathlib import Path

from delia.chat import load_chat
from delia.errors import StoreError
from delia.flow.trial import read_adapter
from delia.model.loading import load_base
from delia.model.logprobs import continue_greedily, load_adapted
from delia.schema import Message
from delia.store.adapters import fetch_adapter as fetch_directory
from delia.store.models import ModelConfig, resolve_model
from delia.store.tables import exists, read_manifest
from delia.track.registry import fetch_adapter
from delia.track.runs import TrackConfig, Tracker

MAX_TOKENS = 256
REGISTRY_SCHEME = "models:/"
OUTPUT_DIR = "runs"
"""Where jobs keep their store unless told otherwise; `MLFLOW_TRACKING_URI` names another."""


def ask(adapter: str, text: str) -> str:
    """Return the greedy answers of the adapter and of its base to one user message, as two lines.

    Raises:
        ConfigError: A registry address that is none.
        StoreError: No finished adapter of this platform is there, or its base has another chat format now.
    """
    directory = locate_adapter(adapter)
    found = read_adapter(str(directory.resolve()))
    model = ModelConfig.model_validate(read_manifest(found.path, kind="adapter").details["model"])
    path = str(resolve_model(model))
    chat = load_chat(path, chat_template=model.chat_template, task_tokens=found.tokens)
    if chat.template_hash != found.template_hash:
        raise StoreError(
            f"{adapter!r} was trained with chat format {found.template_hash}, {path} now has"
            f" {chat.template_hash}; bring back the template or the tokenizer that it was trained with"
        )
    prompt = [chat.encode_prompt((Message(role="user", content=text),))]
    lines = []
    for label, loaded in (("adapter", load_adapted(model, directory)), ("base", load_base(model))):
        ids = continue_greedily(loaded, prompt, max_tokens=MAX_TOKENS, end_ids=chat.end_ids)[0]
        lines.append(f"{label}: {chat.decode(ids)}")
    return "\n".join(lines)


def locate_adapter(adapter: str) -> Path:
    """Return the directory of an adapter, fetched where it lies elsewhere.

    Raises:
        ConfigError: A registry address that is none.
        StoreError: Nothing is there.
    """
    if adapter.startswith(REGISTRY_SCHEME):
        tracker = Tracker(TrackConfig(), default_store=str(Path(OUTPUT_DIR, "mlflow.db").resolve()))
        return fetch_adapter(tracker, adapter, Path(OUTPUT_DIR, "registry"))
    if not exists(adapter):
        raise StoreError(
            f"no adapter directory {adapter!r}; give the path that `jobs/adapt.py` printed, or models:/NAME@ALIAS"
        )
    return fetch_directory(adapter)
