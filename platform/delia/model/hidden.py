"""What a model makes of fixed ids before it speaks: the mean of its last hidden states.

    text --as a user's turn--> (ids, mask) --base model without its head--> [T, D] --mean over the mask--> [D]

Sequences are padded on the right, so that in a causal model no counted position sees padding: a vector
depends on its own sequence alone, up to what a batch's shape changes in the last bits of a float.
"""

from collections.abc import Sequence
from itertools import takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from delia.chat import FIRST_WORDS, ChatEncoder
from delia.model.logprobs import batch_sequences
from delia.schema import Message


@torch.no_grad()
def mean_hidden_states(
    model: PreTrainedModel, sequences: Sequence[tuple[list[int], list[bool]]], *, batch_size: int = 32
) -> NDArray[np.float32]:
    """Return the mean of the last hidden states over the counted tokens of each (ids, mask).

    The last hidden states are those that the output head reads, after the final normalisation.

    Returns:
        float32 [N, D]; zeros where no token counts.
    """
    vectors_ND = np.zeros((len(sequences), model.config.get_text_config().hidden_size), dtype=np.float32)
    for chosen, ids_BT, mask_BT in batch_sequences(sequences, size=batch_size):
        # without the head, whose B x T x V logits would be the largest tensor of all
        hidden_BTD = model.base_model(input_ids=ids_BT.to(model.device)).last_hidden_state.float().cpu()
        counts_B = mask_BT.sum(1).clamp(min=1)
        vectors_ND[chosen] = ((hidden_BTD * mask_BT[:, :, None]).sum(1) / counts_B[:, None]).numpy()
    return vectors_ND


def embed_with_base(
    model: PreTrainedModel, chat: ChatEncoder, texts: Sequence[str], *, batch_size: int = 32
) -> NDArray[np.float32]:
    """Return the mean last hidden state of each text, read as a user's turn.

    Only the text's own tokens count, not the template's: a first token draws much of the attention and has
    a state of another size (Xiao et al. 2023, https://arxiv.org/abs/2309.17453).

    Not centred. States of a language model share a part whatever they say, which lifts all cosines
    (Ethayarajh 2019, https://arxiv.org/abs/1909.00512), so a threshold is a model's own. To take off the
    mean of the rows at hand would make a vector depend on the other rows and a narrow pool look wide; a
    fixed centre, the mean over random tokens, told the starter's kinds of question apart less well.

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
