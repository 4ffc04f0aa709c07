"""What a model makes of fixed ids before it speaks: the mean of its hidden states half-way up.

    text --as a user's turn--> (ids, mask) --first half of the decoder layers--> [T, D] --mean over the mask--> [D]

Half-way, not at the end: on 32 tasks of embedding, for several families of models, middle layers serve better than the
last one, whose states are about the next token (Skean et al. 2025, "Layer by Layer", https://arxiv.org/abs/2502.02013).
So it is with the starter: of its questions, three in five have their own paraphrase nearest among all paraphrases by
the middle states, and one in five by the last ones. It is half of the work, too.

Sequences are padded on the right, so that in a causal model no counted position sees padding: a vector
depends on its own sequence alone, up to what a batch's shape changes in the last bits of a float.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from delia.chat import FIRST_WORDS, ChatEncoder
from delia.model.loading import find_layers
from delia.model.logprobs import batch_sequences
from delia.schema import Message


class _Reached(Exception):
    """Carries the states out of a pass that need not go on."""

    def __init__(self, states_BTD: Tensor) -> None:
        super().__init__()
        self.states_BTD = states_BTD


@torch.no_grad()
def mean_hidden_states(
    model: PreTrainedModel, sequences: Sequence[tuple[list[int], list[bool]]], *, batch_size: int = 32
) -> NDArray[np.float32]:
    """Return the mean of the middle hidden states over the counted tokens of each (ids, mask).

    The middle states of L decoder layers are the output of layer ceil(L / 2), each scaled to a root mean square of 1,
    as a final normalisation would: some tokens' states are hundreds of times as large as others' (Sun et al. 2024,
    "Massive Activations in Large Language Models", https://arxiv.org/abs/2402.17762), and would be the mean. Of a model
    whose layers are not found, or put out other shapes than [B, T, D], the last states are taken.

    Returns:
        float32 [N, D]; zeros where no token counts.
    """
    vectors_ND = np.zeros((len(sequences), model.config.get_text_config().hidden_size), dtype=np.float32)
    for chosen, ids_BT, mask_BT in batch_sequences(sequences, size=batch_size):
        states_BTD = _read_middle_states(model, ids_BT.to(model.device)).float().cpu()
        hidden_BTD = nn.functional.rms_norm(states_BTD, states_BTD.shape[-1:], eps=1e-12)
        counts_B = mask_BT.sum(1).clamp(min=1)
        vectors_ND[chosen] = ((hidden_BTD * mask_BT[:, :, None]).sum(1) / counts_B[:, None]).numpy()
    return vectors_ND


def _read_middle_states(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.shape == (*ids_BT.shape, model.config.get_text_config().hidden_size):
            raise _Reached(states)

    layers = find_layers(model)
    handles = [layer.register_forward_hook(leave) for layer in layers[(len(layers) - 1) // 2 :][:1]]
    try:
        # without the head, whose B x T x V logits would be the largest tensor of all
        last_BTD: Tensor = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    except _Reached as reached:
        return reached.states_BTD
    finally:
        for handle in handles:
            handle.remove()
    return last_BTD


def embed_with_base(
    model: PreTrainedModel, chat: ChatEncoder, texts: Sequence[str], *, batch_size: int = 32
) -> NDArray[np.float32]:
    """Return the mean middle hidden state of each text, read as a user's turn.

    Only the text's own tokens count, not the template's: a first token draws much of the attention and has
    a state of another size (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).

    Not centred. States of a language model share a part whatever they say, which lifts all cosines
    (Ethayarajh 2019, https://arxiv.org/abs/1909.00512), so a threshold is a model's own. To take off the
    mean of the rows at hand would make a vector depend on the other rows and a narrow pool look wide.

    Args:
        model: The base model.
        chat: Its chat format.
        texts: Any; a blank one has the vector of zeros.
        batch_size: Texts in one pass.

    Returns:
        float32 [N, D], not of unit length.
    """
    words = [chat.encode_prompt((Message(role="user", content=word),))[::-1] for word in FIRST_WORDS]
    num_after = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*words, strict=False)))
    num_before = len(chat.encode_user_prefix())
    sequences = []
    for text in texts:
        ids = chat.encode_prompt((Message(role="user", content=text),))
        last = len(ids) - num_after if text.strip() else 0
        kept = ids[: max(last, 1)]  # no state of a causal model sees what comes after it
        sequences.append((kept, [num_before <= place < last for place in range(len(kept))]))
    return mean_hidden_states(model, sequences, batch_size=batch_size)
