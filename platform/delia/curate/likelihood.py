"""How likely the base model finds each answer: Row -> mean log-probability, nats per token.

    row --chat--> (ids, mask of the answer and its end of turn) --base model--> mean over the mask

Of answers that the model sampled itself at T=1 the mean over a pool estimates minus its entropy per token;
answers from elsewhere lie below. Nothing is rejected on it: it is a column that selection and analysis read.
"""

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from delia.chat import ChatEncoder
from delia.model.logprobs import score_sequences
from delia.schema import Row

LIKELIHOOD = "answer_logprob_per_token"

_MAX_LOGITS = 1 << 28
"""B x T x V of one pass; in float32 a gibibyte."""


def score_answers(model: PreTrainedModel, chat: ChatEncoder, rows: Sequence[Row]) -> list[float]:
    """Return the mean log-probability of each row's last answer given what comes before, in nats per token.

    The end-of-turn token counts, as in training. Batches are small enough that the logits of one pass stay
    within a gibibyte, if those of one row do.

    Raises:
        ChatError: A row doesn't end in an answer, or the template can't write it.
    """
    if not rows:
        return []
    encoded = [chat.encode_chat(row.messages) for row in rows]
    sequences = [(list(item.input_ids), list(item.loss_mask)) for item in encoded]
    longest = max(len(ids) for ids, _ in sequences)
    vocabulary = int(model.config.get_text_config().vocab_size)
    batch_size = min(32, max(1, _MAX_LOGITS // (longest * vocabulary)))
    scores = score_sequences(model, sequences, batch_size=batch_size)
    return [float(score.double().mean()) if len(score) else math.nan for score in scores]
