"""The new token's neighbours: how near it lies, layer by layer, to the words that it is to stand for.

    one prefix of the task + each word in the token's place --> states at that place --> cosines, ranks, p-values

States of a language model share a part whatever they say, and single channels of them are huge for some tokens
(`model.hidden`), so that raw distances tell nothing: states are centred on the mean over words of the
vocabulary, and the words of the task's long instruction are compared with control words whose input rows have
the nearest norms. If the token took on no meaning, which of both sets a word is in could be permuted: the
p-value is the share of permutations with as large a difference of mean cosines (Fisher's exact test, sampled).
How often a word occurs is not known here; norms follow it loosely.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from delia.metrics import labelled
from delia.model.adapted import TokenRows
from delia.rng import derive_seed, make_random
from delia.train.building import TrainInput, find_layers
from delia.train.passes import add_pass, reshard, run_decoder
from delia.train.settings import MetersConfig

MAX_PREFIX = 64
"""Tokens before the word that are read at most."""
PASS_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """What the token is measured against; `word_ids` begins with the meant words, then controls, then others."""

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

        All workers must choose together: norms of a sharded embedding are gathered.
        """
        rows = model.get_input_embeddings()
        if not task.token_ids or not task.instruction_ids or not isinstance(rows, TokenRows):
            return None
        token_id = task.token_ids[0]
        prefixes = [
            ids[: list(ids).index(token_id)].tolist()
            for ids, _ in (task.rows[row] for row in range(len(task.rows)))
            if token_id in ids[1:] and ids[0] != token_id
        ]
        meant = sorted(set(task.instruction_ids) - set(task.token_ids))
        rng = make_random(config.seed, "words")
        others = sorted(set(range(model.config.vocab_size)) - set(meant) - set(task.token_ids))
        sampled = rng.sample(others, min(config.num_words, len(others)))
        if not prefixes or not meant or len(sampled) < len(meant):
            return None
        prepare_states(model)
        norms = _measure_norms(model, [*meant, *sampled])
        controls: list[int] = []
        for place in range(len(meant)):  # the nearest norm that no other word has taken
            left = [word for word in sampled if word not in controls]
            controls.append(min(left, key=lambda word: abs(norms[word] - norms[meant[place]])))
        chosen = set(controls)
        return cls(
            token_id=token_id,
            prefix=tuple(min(prefixes, key=len)[-MAX_PREFIX:]),
            word_ids=(*meant, *controls, *(word for word in sampled if word not in chosen)),
            num_meant=len(meant),
            num_controls=len(controls),
            num_permutations=config.num_permutations,
            seed=config.seed,
        )

    def read(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the difference of mean cosines, the median rank and the p-value of each layer.

        Layer 0 is the input embedding. A rank is a share of the other words: 0 is the nearest of all.
        """
        states_LWD = self._read_states(model)
        readings = {}
        for layer, states_WD in enumerate(states_LWD):
            cosines_W = compare_centred(states_WD[0], states_WD[1:])
            meant, controls = np.split(cosines_W[: self.num_meant + self.num_controls], [self.num_meant])
            difference, p_value = permute(
                meant, controls, num_permutations=self.num_permutations, seed=derive_seed(self.seed, layer)
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


def _measure_norms(model: PreTrainedModel, words: list[int]) -> dict[int, float]:
    """Return the norm of each word's input row, through the model, which may be sharded."""
    with torch.no_grad():
        lengths = (1,) * len(words)
        states_LWD = cast(Any, model).read_states(
            torch.tensor(words), torch.zeros(len(words), dtype=torch.long), lengths
        )
    reshard(model)
    return dict(zip(words, states_LWD[0].norm(dim=-1).tolist(), strict=True))


def compare_centred(state_D: NDArray[np.float64], states_WD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine of a state to each of others, all centred on the others' mean; 0 for no length."""
    centre_D = states_WD.mean(0)
    one_D, others_WD = state_D - centre_D, states_WD - centre_D
    norms_W = np.linalg.norm(one_D) * np.linalg.norm(others_WD, axis=1)
    return cast(
        NDArray[np.float64],
        np.divide(others_WD @ one_D, norms_W, out=np.zeros(len(norms_W)), where=norms_W > 0),
    )


def permute(
    meant: NDArray[np.float64], controls: NDArray[np.float64], *, num_permutations: int, seed: int
) -> tuple[float, float]:
    """Return the difference of means and its one-sided p-value, at least 1 / (permutations + 1)."""
    together = np.concatenate((meant, controls))
    difference = float(meant.mean() - controls.mean())
    rng = np.random.default_rng(seed)
    count = 0
    for _ in range(num_permutations):
        drawn = rng.permutation(together)
        # the last bits of a sum depend on its order
        count += drawn[: len(meant)].mean() - drawn[len(meant) :].mean() >= difference - 1e-12
    return difference, (1 + count) / (1 + num_permutations)
