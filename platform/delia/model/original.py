"""The base inside an adapted model: what it says while LoRA layers and token rows are left out.

Nothing is copied, and no parameter changes its `requires_grad`: sharded models keep their state.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from delia.errors import TrainError
from delia.model.adapted import TokenRows, part_of


def find_changes(model: PreTrainedModel) -> list[str]:
    """Return the names that tell that a base is not what it was: its own are trained, or LoRA's start left it."""
    own = [name for name, p in model.named_parameters() if p.requires_grad and part_of(name) == "base"]
    return own + [name for name, _ in model.named_buffers() if name.endswith((".start_A", ".start_B"))]


def check_base_is_there(model: PreTrainedModel) -> None:
    """Refuse a model whose base is no longer what it was before training.

    Raises:
        TrainError: With the first parameter that tells so.
    """
    if changes := find_changes(model):
        raise TrainError(
            f"train.kl_weight needs the base as it was, which {changes[0]!r} says it is not; leave it out, or"
            " train LoRA (train.lora.init=default) and not the base"
        )


@contextmanager
def base_alone(model: PreTrainedModel) -> Iterator[None]:
    """Let a model answer as its base does, without a base's own dropout, until the context is left."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]  # `enable_adapters` would touch requires_grad
    rows, was_training = model.get_input_embeddings(), model.training
    try:
        model.eval()
        for layer in layers:
            layer._disable_adapters = True
        if isinstance(rows, TokenRows):
            model.set_input_embeddings(rows.embedding)
        yield
    finally:
        for layer, was_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = was_disabled
        model.set_input_embeddings(rows)
        model.train(was_training)
