"""The new token's neighbours: how near it lies, layer by layer, to the words that it is to stand for.

    one prefix of the task + each word in the token's place --> states at that place --> cosines, ranks, p-values

States of a language model share a part whatever they say, and single channels of them are huge for some tokens
(`model.hidden`), so that raw distances tell nothing: states are centred on the mean over words of the
vocabulary. Frequent words lie apart from rare ones whatever they mean, and training moves most what it sees
often, so that each word of the task's long instruction is compared with control words of its own, which occur
as often in the rows that are trained on, or nearly. If the token took on no meaning, which word of such a set
is the instruction's could be permuted: the p-value is the share of permutations within all sets with as large
a difference of mean cosines (a stratified permutation test, sampled).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from delia.chat import TAG
from delia.chat_tokens import RESERVED
from delia.metrics import labelled
from delia.model.adapted import TokenRows
from delia.model.loading import find_layers
from delia.rng import derive_seed, make_random
from delia.store.models import ModelConfig, resolve_model
from delia.train.building import TrainInput
from delia.train.passes import add_pass, reshard, run_decoder
from delia.train.rows import TrainRows
from delia.train.settings import MetersConfig

MAX_PREFIX = 64
"""Tokens before the word that are read at most."""
PASS_TOKENS = 2048
MAX_CONTROLS = 4
"""Control words of each word of the instruction; more add little power, and lie further off in frequency."""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """What the token is measured against: M meant words, K controls of each, and others.

    Attributes:
        token_id: The token.
        prefix: Ids before it in a row of the task.
        word_ids: The meant words [M], then the first one's controls [K] and so on to the last one's, then others.
        num_meant: M.
        num_controls: K.
        num_permutations: Permutations a p-value is made from.
        seed: Draws them.
    """

    token_id: int
    prefix: tuple[int, ...]
    word_ids: tuple[int, ...]
    num_meant: int
    num_controls: int
    num_permutations: int
    seed: int

    @classmethod
    def choose(cls, model: PreTrainedModel, task: TrainInput, config: MetersConfig) -> "Neighbours | None":
        """Choose prefix and words; None without a token, a row that holds it, or words that it stands for.

        All words but the meant are `config.num_words` together: controls are at most half of them, where that
        leaves one for each, and others are drawn from the rest of the vocabulary.
        """
        rows = model.get_input_embeddings()
        if not task.token_ids or not task.instruction_ids or not isinstance(rows, TokenRows):
            return None
        token_id = task.token_ids[0]
        prefixes = [
            ids[: list(ids).index(token_id)].tolist()
            for ids, _ in (task.rows[row] for row in np.flatnonzero(task.rows.has_token_R).tolist())
            if token_id in ids[1:] and ids[0] != token_id
        ]
        meant = sorted(set(task.instruction_ids) - set(task.token_ids))
        if not prefixes or not meant:
            return None
        size = model.config.vocab_size
        candidates = [
            word
            for word in sorted(list_text_ids(task.model).difference(meant, task.token_ids))
            if word < size  # a tokenizer may know more than the model has rows
        ]
        num_words = min(config.num_words, len(candidates))
        num_controls = max(1, min(MAX_CONTROLS, num_words // 2 // len(meant)))
        if num_words < num_controls * len(meant):
            return None
        counts_V = count_ids(task.rows, size)
        controls_MK = match_frequencies(counts_V, meant, candidates, num_controls=num_controls)
        controls = controls_MK.flatten().tolist()
        left = sorted(set(candidates).difference(controls))
        others = make_random(config.seed, "words").sample(left, num_words - len(controls))
        prepare_states(model)
        return cls(
            token_id=token_id,
            prefix=tuple(min(prefixes, key=len)[-MAX_PREFIX:]),
            word_ids=(*meant, *controls, *others),
            num_meant=len(meant),
            num_controls=num_controls,
            num_permutations=config.num_permutations,
            seed=config.seed,
        )

    def read(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the difference of mean cosines, the median rank and the p-value of each layer.

        Layer 0 is the input embedding. A rank is the share of the other words that are read which lie nearer: 0 is
        the nearest of all. It is not among the whole vocabulary, whose states would take a pass over the prefix
        with each word of it, unless `num_words` of the settings is as large.
        """
        states_LWD = self._read_states(model)
        readings = {}
        for layer, states_WD in enumerate(states_LWD):
            cosines_W = compare_centred(states_WD[0], states_WD[1:])
            meant, rest = np.split(cosines_W, [self.num_meant])
            controls_MK = rest[: self.num_meant * self.num_controls].reshape(self.num_meant, -1)
            difference, p_value = permute_within(
                np.column_stack((meant, controls_MK)),
                num_permutations=self.num_permutations,
                seed=derive_seed(self.seed, layer),
            )
            nearer = [(cosines_W > cosine).sum() / (len(cosines_W) - 1) for cosine in meant]
            readings[labelled("train/token_cosine", layer)] = difference
            readings[labelled("train/token_rank", layer)] = float(np.median(nearer))
            readings[labelled("train/token_p_value", layer)] = p_value
        return readings

    @torch.no_grad()
    def _read_states(self, model: PreTrainedModel) -> NDArray[np.float64]:
        """Return states at the place of the token and of each word, [layers + 1, 1 + words, D]."""
        words = [self.token_id, *self.word_ids]
        length = len(self.prefix) + 1
        size = max(1, PASS_TOKENS // length)
        parts = []
        for start in range(0, len(words), size):
            chosen = words[start : start + size]
            ids_T = torch.tensor([token for word in chosen for token in (*self.prefix, word)])
            positions_T = torch.arange(length).repeat(len(chosen))
            parts.append(cast(Any, model).read_states(ids_T, positions_T, (length,) * len(chosen)))
            reshard(model)
        return torch.cat(parts, 1).double().cpu().numpy()


def prepare_states(model: PreTrainedModel) -> None:
    """Give a model, sharded or not, `read_states(ids, positions, lengths)`, which FSDP treats as `forward`."""

    def read_states(
        self: PreTrainedModel, ids_T: Tensor, positions_T: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """Return the states at the end of each row, after the embedding and after each layer, [L + 1, W, D]."""
        device = self.get_output_embeddings().weight.device
        ends_W = torch.tensor(lengths).cumsum(0).sub(1).to(device)
        found: list[Tensor] = []

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # it differs from layer to layer
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            states_1TD = output[0] if isinstance(output, tuple) else output
            found.append(states_1TD[0].index_select(0, ends_W).float())

        handles = [
            module.register_forward_hook(keep) for module in (self.get_input_embeddings(), *find_layers(self))
        ]
        try:
            run_decoder(self, ids_T, positions_T, lengths)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(found)

    add_pass(model, read_states)


def list_text_ids(model: ModelConfig) -> set[int]:
    """Return the ids of a base's vocabulary that stand for text: no special, reserved or control token.

    Rows of the embedding that no id of the tokenizer names (padding of its size) are not among them either.
    Tags that some tokenizers add without calling them special (turn markers, HTML) are taken for control.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        resolve_model(model), local_files_only=True, trust_remote_code=False
    )
    control = set(tokenizer.all_special_ids)
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special or TAG.fullmatch(token.content):
            control.add(i)
    return {
        i for text, i in tokenizer.get_vocab().items() if i not in control and not RESERVED.fullmatch(text)
    }


def count_ids(rows: TrainRows, vocab_size: int) -> NDArray[np.int64]:
    """Return how often each id of the vocabulary occurs, [V]; every shard is read, one at a time."""
    counts_V = np.zeros(vocab_size, np.int64)
    for ids_T, times_T in rows.stream_ids():
        counts_V += np.bincount(ids_T, times_T, vocab_size).astype(np.int64)  # float64, exact below 2**53
    return counts_V


def match_frequencies(
    counts_V: NDArray[np.int64], meant: Sequence[int], candidates: Sequence[int], *, num_controls: int
) -> NDArray[np.int64]:
    """Return each meant word's controls: the candidates nearest in log(1 + count), none of them twice, [M, K].

    Words take turns, each one candidate a turn, and frequent ones go first, as there are fewest like them.
    Of candidates equally near the one nearest by id is taken, then the lower: vocabularies number their words
    about in order of frequency where they were made, which is all that tells words apart that the rows lack.

    Args:
        counts_V: How often each id occurs in the rows.
        meant: M words.
        candidates: At least M * K other ids, ascending.
        num_controls: K.
    """
    ids_C = np.array(candidates, np.int64)
    logs_C = np.log1p(counts_V[ids_C])
    controls_MK = np.empty((len(meant), num_controls), np.int64)
    frequent_first = sorted(range(len(meant)), key=lambda place: (-counts_V[meant[place]], meant[place]))
    for turn in range(num_controls):
        for place in frequent_first:
            word = meant[place]
            gaps_C = np.abs(logs_C - np.log1p(counts_V[word]))
            nearest = np.flatnonzero(gaps_C == gaps_C.min())
            chosen = nearest[np.abs(ids_C[nearest] - word).argmin()]
            controls_MK[place, turn] = ids_C[chosen]
            logs_C[chosen] = np.inf  # taken
    return controls_MK


def compare_centred(state_D: NDArray[np.float64], states_WD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine of a state to each of others, all centred on the others' mean; 0 for no length."""
    centre_D = states_WD.mean(0)
    one_D, others_WD = state_D - centre_D, states_WD - centre_D
    norms_W = np.linalg.norm(one_D) * np.linalg.norm(others_WD, axis=1)
    return cast(
        NDArray[np.float64],
        np.divide(others_WD @ one_D, norms_W, out=np.zeros(len(norms_W)), where=norms_W > 0),
    )


def permute_within(
    cosines_MK1: NDArray[np.float64], *, num_permutations: int, seed: int
) -> tuple[float, float]:
    """Return the difference of means and its one-sided p-value, at least 1 / (permutations + 1).

    Each row is a set of words of like frequency: a meant word, then its controls. What is permuted is which
    word of a set is the meant one, each with the same chance and in each set for itself: words of different
    sets differ in frequency and could not be exchanged. All sets have one size, so that the mean over sets of
    (meant word less its controls' mean) is the difference of both means.
    """
    num_meant, num_words = cosines_MK1.shape
    others_MK1 = (cosines_MK1.sum(1, keepdims=True) - cosines_MK1) / (num_words - 1)
    contrasts_MK1 = cosines_MK1 - others_MK1  # of each word, were it the meant one
    difference = float(contrasts_MK1[:, 0].mean())
    picks_PM = np.random.default_rng(seed).integers(num_words, size=(num_permutations, num_meant))
    drawn_P = contrasts_MK1[np.arange(num_meant), picks_PM].mean(1)
    # the last bits of a sum depend on its order
    count = int((drawn_P >= difference - 1e-12).sum())
    return difference, (1 + count) / (1 + num_permutations)
