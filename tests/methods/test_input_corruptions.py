"""One contract for every input corruption, and what is special to each."""

import importlib
import pickle
import pkgutil
import random
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from delia.errors import ConfigError, TrainError
from delia.methods import input_corruption
from delia.methods.input_corruption.mft import MFT
from delia.train.corruption import InputCorruption, corrupt_stream
from delia.train.packing import join_stream
from delia.train.rows import TASK, join_rows

METHODS: dict[str, InputCorruption] = {"mft": MFT()}
VOCABULARY = 500


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> InputCorruption:
    return METHODS[request.param]


def make_rows(num_rows: int = 40):
    rng = random.Random(1)
    rows = []
    for _ in range(num_rows):
        length = rng.randint(20, 60)
        start = rng.randint(1, 10)
        ids = [rng.randrange(10, VOCABULARY) for _ in range(length)]
        rows.append((ids, [False] * start + [True] * (length - start)))
    return join_rows(rows, sources=[TASK] * num_rows)


def corrupt(method, rows, chosen, *, step: int = 3, progress: float = 0.9):
    stream = join_stream(rows, chosen)
    changed = corrupt_stream(
        stream, rows, method, names=(0, "corruption", step), progress=progress, vocab_size=VOCABULARY
    )
    return stream, changed


# ---- the contract


def test_no_method_is_left_out_of_this_file():
    assert {module.name for module in pkgutil.iter_modules(input_corruption.__path__)} == set(METHODS)


def test_a_corruption_is_a_frozen_value_in_the_module_of_its_name_which_names_its_paper(method):
    module = importlib.import_module(type(method).__module__)
    assert METHODS[module.__name__.rpartition(".")[2]] is method
    assert "https://arxiv.org/abs/" in (module.__doc__ or "")
    assert pickle.loads(pickle.dumps(method)) == method == type(method)()
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(method)[0].name, 0.1)


def test_labels_and_prompts_stay_and_answers_change(method):
    rows = make_rows()
    stream, changed = corrupt(method, rows, range(40))
    assert torch.equal(changed.labels_N, stream.labels_N)
    assert torch.equal(changed.places_N, stream.places_N)
    is_answer_T = torch.cat([torch.tensor(rows[row][1].tolist()) for row in range(40)])
    assert torch.equal(changed.ids_T[~is_answer_T], stream.ids_T[~is_answer_T])
    assert not torch.equal(changed.ids_T, stream.ids_T)
    assert torch.equal(join_stream(rows, range(40)).ids_T, stream.ids_T), "the rows themselves were changed"


def test_a_row_is_corrupted_alike_wherever_it_is_packed_and_otherwise_at_another_step(method):
    rows = make_rows()
    _, together = corrupt(method, rows, [5, 9, 2])
    _, alone = corrupt(method, rows, [9])
    start, length = together.lengths[0], together.lengths[1]
    assert torch.equal(together.ids_T[start : start + length], alone.ids_T)
    _, later = corrupt(method, rows, [9], step=4)
    assert not torch.equal(later.ids_T, alone.ids_T)


def test_a_stream_without_rows_stays(method):
    stream, changed = corrupt(method, make_rows(), [])
    assert torch.equal(changed.ids_T, stream.ids_T)


# ---- mft


@pytest.mark.parametrize(
    ("progress", "share"), [(0.0, 0.0), (1 / 6, 0.1), (1 / 3, 0.2), (2 / 3, 0.4), (0.9, 0.4)]
)
def test_the_realised_share_is_within_binomial_bounds(progress, share):
    """Five standard errors of a binomial; a mask token is seen where a random one might be the token's own."""
    rows = make_rows(200)
    stream, changed = corrupt(MFT(mask_id=0), rows, range(200), progress=progress)
    num_answer = int(rows.shards[0].mask_T.sum())
    num_masked = int((changed.ids_T != stream.ids_T).sum())
    assert num_answer > 5000
    assert bool((changed.ids_T[changed.ids_T != stream.ids_T] == 0).all())
    assert abs(num_masked - share * num_answer) <= 5 * (num_answer * share * (1 - share)) ** 0.5


def test_without_a_mask_token_random_ids_of_the_whole_vocabulary_stand_there():
    rows = make_rows(200)
    stream, changed = corrupt(MFT(share=1.0), rows, range(200))
    drawn = changed.ids_T[changed.ids_T != stream.ids_T]
    assert len(drawn.unique()) == VOCABULARY
    assert abs(float(drawn.float().mean()) - (VOCABULARY - 1) / 2) < 10


def test_a_constant_share_begins_at_once():
    answer = list(range(100, 1100))
    changed = MFT(share=0.5, rising=0.0, mask_id=0)(
        answer, progress=0.0, vocab_size=2000, rng=random.Random(0)
    )
    assert 400 < changed.count(0) < 600


@pytest.mark.parametrize("knobs", [{"share": 1.2}, {"rising": -0.1}])
def test_shares_that_are_none_are_refused(knobs):
    with pytest.raises(ConfigError, match="shares of 0 to 1"):
        MFT(**knobs)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(TrainError, match=r"ids below 500 .* up to 500"):
        corrupt(MFT(share=1.0, mask_id=VOCABULARY), make_rows(), [0])
    with pytest.raises(TrainError, match=r"as many, got 0"):
        corrupt(lambda answer_ids, **_: [], make_rows(), [0])
