"""`delia export`: an adapter as the directory that an engine is started on, checked against HF + PEFT.

ADAPTER (a directory or models:/NAME@champion) --write_served--> DIR --compare in HF--> how to serve it
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from delia.errors import ExportError, StoreError
from delia.flow.ask import locate_adapter
from delia.flow.serving import choose_serving
from delia.flow.trial import read_adapter
from delia.flow.verify import MAX_GAP_NATS
from delia.model.loading import load_base
from delia.model.logprobs import load_adapted, score_sequences
from delia.rng import make_random
from delia.store.adapters import read_traits
from delia.store.forms import Form, fit_rank
from delia.store.models import ModelConfig, place_model, resolve_model
from delia.store.serving import ServedFiles, write_served
from delia.store.tables import is_finished, read_manifest

NUM_PROBES = 4
PROBE_LENGTH = 48
MAX_GAP_FLOAT32 = 1e-4
"""Mean absolute difference of log-probability between an export and HF + PEFT in float32."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What was written, why in this form, how far from HF + PEFT it lies, and the command that serves it."""

    files: ServedFiles
    reason: str
    gap_nats: float | None
    command: str


def export_adapter(
    adapter: str, output: str, *, form: Form | None = None, copy: bool = False, is_checked: bool = True
) -> Export:
    """Write an adapter in a form that vLLM serves.

    Args:
        adapter: An adapter's directory or a registry address.
        output: The directory to write: new, empty, or the same export.
        form: None for the lightest that vLLM serves over this base.
        copy: Copy the base's untouched files instead of linking to them.
        is_checked: Compare with HF + PEFT; it needs the memory of the base.

    Raises:
        StoreError: The form can't be served, the base has changed, or the directory holds something else.
        ExportError: The export does not compute what HF + PEFT does.
    """
    directory = locate_adapter(adapter)
    found = read_adapter(str(directory.resolve()))
    model = ModelConfig.model_validate(read_manifest(found.path, kind="adapter").details["model"])
    needed = choose_serving(found.path, model)
    target = Path(output).absolute()
    if target.exists() and not is_finished(str(target)) and any(target.iterdir()):
        raise StoreError(f"{output} is not empty and holds no export; remove it, or give another directory")
    files = write_served(
        form or needed.form, resolve_model(model), directory, target, dtype=model.dtype, copy=copy
    )
    gap = compare(model, directory, files, tuple(found.tokens.values())) if is_checked else None
    return Export(files=files, reason=needed.reason, gap_nats=gap, command=format_command(files, model))


def compare(model: ModelConfig, adapter: Path, files: ServedFiles, token_ids: tuple[int, ...]) -> float:
    """Return how far an export lies from HF + PEFT on fixed ids, in nats a token; transformers computes both.

    Raises:
        ExportError: It is more than the dtype explains, or not clearly nearer than the base lies.
    """
    adapted = load_adapted(model, adapter)
    probes = _draw_probes(adapted.config.vocab_size, token_ids)
    expected = torch.cat(score_sequences(adapted, probes))
    with cast(Any, adapted).disable_adapter():
        of_base = torch.cat(score_sequences(adapted, probes))
    del adapted  # both at once would need twice the memory
    served = place_model(model, str(files.model)) if files.model else model
    exported = load_adapted(served, files.adapter) if files.adapter else load_base(served)
    found = torch.cat(score_sequences(exported, probes))
    gap, base_gap = (float((found - other).abs().mean()) for other in (expected, of_base))
    limit = MAX_GAP_NATS.get(model.dtype, MAX_GAP_FLOAT32)
    if not gap <= min(limit, base_gap / 2):
        raise ExportError(
            f"{files.model or files.adapter}: log-probabilities lie {gap:.3g} nats a token from those of HF + PEFT"
            f" and {base_gap:.3g} from the base's; {model.dtype} explains {limit:g}, and it must be clearly nearer"
            " to the adapter: don't serve it"
        )
    return gap


def format_command(files: ServedFiles, model: ModelConfig) -> str:
    """Return the command that serves an export with vLLM."""
    words = ["vllm", "serve"]
    if files.model:
        words.append(str(files.model))
    elif model.revision:
        words += [model.path, "--revision", model.revision]
    else:
        words.append(str(resolve_model(model)))
    words += ["--dtype", model.dtype]
    if files.adapter:
        rank = fit_rank(read_traits(files.adapter).rank)
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"adapter={files.adapter}"]
        if not files.model:
            words += ["--tokenizer", str(files.adapter)]  # it names the task's tokens
    return shlex.join(words)


def _draw_probes(vocab_size: int, token_ids: tuple[int, ...]) -> list[tuple[list[int], list[bool]]]:
    """Return fixed sequences of any ids, in each of which every token stands."""
    rng = make_random("export probes")
    probes = []
    for _ in range(NUM_PROBES):
        ids = [rng.randrange(vocab_size) for _ in range(PROBE_LENGTH - len(token_ids))]
        for token in token_ids:
            ids.insert(rng.randrange(1, PROBE_LENGTH // 2), token)
        probes.append((ids, [False] + [True] * (len(ids) - 1)))
    return probes
