"""Packed rows -> hidden states, through a model that may be sharded.

FSDP gathers a layer's parameters around calls that it knows as a forward pass, frees them in the backward
pass that follows, and adds workers' gradients up in the pass that it is told to. What it must be told is here.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedModel

from delia.model.attention import Segments


def add_pass(model: PreTrainedModel, run: Callable[..., Any]) -> None:
    """Give a model a function as its method, by the function's name, which FSDP treats as `forward`."""
    setattr(model, run.__name__, MethodType(run, model))
    register_fsdp_forward_method(cast(nn.Module, model), run.__name__)


def run_decoder(
    model: PreTrainedModel, ids_T: Tensor, positions_T: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Return the last hidden states of a stream of rows, [T, D]; each row attends to itself alone."""
    device = cast(nn.Linear, model.get_output_embeddings()).weight.device
    states = model.get_decoder()(
        input_ids=ids_T[None].to(device),
        position_ids=positions_T[None].to(device),
        use_cache=False,
        segments=Segments(*lengths),
    )
    return cast(Tensor, states.last_hidden_state[0])


def sync_gradients(model: nn.Module, *, is_last: bool) -> None:
    """Say before a pass whether its backward is the last of several, which adds workers' gradients up.

    Until then each worker keeps them whole: little for an adapter, four bytes a parameter for a base that is
    trained, whose gradients are therefore added up and sharded in every pass.
    """
    if isinstance(model, FSDPModule):
        head = cast(nn.Linear, cast(PreTrainedModel, model).get_output_embeddings())
        model.set_requires_gradient_sync(is_last or head.weight.requires_grad)


def reshard(model: nn.Module) -> None:
    """Free what a pass without a backward leaves gathered: a later pass would take it for the parameters."""
    if isinstance(model, FSDPModule):
        model.reshard()
