"""One contract for every token weighter, and what is special to each."""

import importlib
import math
import pickle
import pkgutil
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from delia.config import MethodConfig, build_method
from delia.errors import ConfigError
from delia.methods import token_weighter
from delia.methods.token_weighter.dft import DFT
from delia.methods.token_weighter.label_smoothing import LabelSmoothing
from delia.methods.token_weighter.ual import UAL
from delia.train.weighting import ScoredWeigher, TokenWeighter, TrainedTokens

METHODS: dict[str, TokenWeighter] = {"dft": DFT(), "label_smoothing": LabelSmoothing(), "ual": UAL()}
UAL_PATH = "delia.methods.token_weighter.ual.UAL"


def make_tokens(**changes) -> TrainedTokens:
    probs_n = torch.tensor([0.5, 0.01, 0.9, 1.0])
    values = {
        "row_n": torch.tensor([0, 0, 1, 1]),
        "rows": (7, 3),
        "score_n": torch.tensor([0.0, 0.0, 0.5, 2.0]),
    }
    return TrainedTokens(logprobs_n=probs_n.log(), **(values | changes))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> TokenWeighter:
    return METHODS[request.param]


# ---- the contract


def test_no_method_is_left_out_of_this_file():
    assert {module.name for module in pkgutil.iter_modules(token_weighter.__path__)} == set(METHODS)


def test_a_weigher_is_a_frozen_value_in_the_module_of_its_name_which_names_its_paper(method):
    module = importlib.import_module(type(method).__module__)
    assert METHODS[module.__name__.rpartition(".")[2]] is method
    assert "https://arxiv.org/abs/" in (module.__doc__ or "")
    assert pickle.loads(pickle.dumps(method)) == method == type(method)()
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(method)[0].name, 0.5)


def test_weights_and_smoothing_are_finite_numbers_of_each_token_and_change_nothing_given(method):
    tokens = make_tokens()
    before = tokens.logprobs_n.clone()
    given = [values for values in method(tokens) if values is not None]
    assert given
    for values in given:
        assert (values.shape, values.requires_grad) == ((4,), False)
        assert bool(((values >= 0) & (values <= 1)).all())
    assert torch.equal(tokens.logprobs_n, before)


def test_no_tokens_have_no_weights(method):
    nothing = torch.zeros(0)
    tokens = make_tokens(row_n=torch.zeros(0, dtype=torch.long), rows=(), score_n=nothing)
    values = method(TrainedTokens(logprobs_n=nothing, row_n=tokens.row_n, rows=(), score_n=nothing))
    assert all(part is None or part.shape == (0,) for part in values)


# ---- each


def test_dft_weighs_a_token_by_its_probability():
    weights_n, smoothing_n = DFT()(make_tokens())
    assert smoothing_n is None
    torch.testing.assert_close(weights_n, torch.tensor([0.5, 0.01, 0.9, 1.0]))
    torch.testing.assert_close(DFT(floor=1.0)(make_tokens())[0], torch.ones(4))
    torch.testing.assert_close(DFT(floor=0.5)(make_tokens())[0], torch.tensor([0.75, 0.505, 0.95, 1.0]))


def test_dfts_gradient_is_that_of_minus_the_probability():
    """The paper's identity: a reward of one, not of one over the probability."""
    logits_V = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    logprobs_n = logits_V.log_softmax(0)[:1]
    weights_n, _ = DFT()(
        make_tokens().__class__(logprobs_n=logprobs_n.detach(), row_n=torch.zeros(1), rows=(0,))
    )
    (weighted,) = torch.autograd.grad((-logprobs_n * weights_n).sum(), logits_V, retain_graph=True)
    (expected,) = torch.autograd.grad(-logprobs_n.exp().sum(), logits_V)
    torch.testing.assert_close(weighted, expected)


def test_ual_smooths_between_its_two_scores_and_not_beyond():
    _, smoothing_n = UAL(most=0.4)(make_tokens())
    torch.testing.assert_close(smoothing_n, torch.tensor([0.0, 0.0, 0.2, 0.4]))
    likelihoods = make_tokens(score_n=torch.tensor([-0.5, -1.0, -3.0, -9.0]))
    _, smoothing_n = UAL(most=0.2, certain=-1.0, doubtful=-3.0)(likelihoods)
    torch.testing.assert_close(smoothing_n, torch.tensor([0.0, 0.0, 0.2, 0.2]))


def train_by(weigher: TokenWeighter, *, num_steps: int = 400) -> list[float]:
    """Fit one distribution a row to its label by gradient descent; return the confidence in each label."""
    logits_RV = torch.zeros((4, 5), requires_grad=True)
    for _ in range(num_steps):
        logprobs_RV = logits_RV.log_softmax(-1)
        tokens = TrainedTokens(
            logprobs_n=logprobs_RV[:, 0].detach(), row_n=torch.arange(4), rows=(0, 1, 2, 3)
        )
        _, smoothing_n = weigher(tokens)
        losses_n = -(1 - smoothing_n) * logprobs_RV[:, 0] - smoothing_n * logprobs_RV.mean(-1)
        (gradient,) = torch.autograd.grad(losses_n.sum(), logits_RV)
        logits_RV = (logits_RV - 2.0 * gradient).detach().requires_grad_()
    return logits_RV.softmax(-1)[:, 0].tolist()


def test_confidence_orders_by_the_rows_doubt_and_under_constant_smoothing_does_not():
    """The paper's check: after training each row is believed to 1 - e + e / V, V = 5."""
    scores_R = torch.tensor([0.2, 0.8, 0.4, 1.0])
    confidences = train_by(ScoredWeigher(UAL(most=0.5), scores_R))
    assert confidences == pytest.approx([1 - 0.8 * 0.5 * score for score in scores_R.tolist()], abs=1e-3)

    constant = train_by(LabelSmoothing(amount=0.3))
    assert max(constant) - min(constant) < 1e-6
    assert constant[0] == pytest.approx(1 - 0.8 * 0.3, abs=1e-3)


def test_scores_are_looked_up_by_the_tokens_row():
    seen = []

    def weigh(tokens: TrainedTokens):
        seen.append(tokens.score_n)
        return None, None

    ScoredWeigher(weigh, torch.arange(10) * 10.0)(make_tokens(score_n=None))
    assert seen[0].tolist() == [70.0, 70.0, 30.0, 30.0]


def test_ual_without_scores_is_refused():
    with pytest.raises(ConfigError, match=r"set train\.row_scores"):
        UAL()(make_tokens(score_n=None))


@pytest.mark.parametrize("knobs", [{"most": 1.0}, {"most": -0.1}, {"certain": 2.0, "doubtful": 2.0}])
def test_knobs_that_make_no_smoothing_are_refused(knobs):
    with pytest.raises(ConfigError, match="two scores that differ"):
        build_method(MethodConfig(method=UAL_PATH, knobs=knobs))
    with pytest.raises(ConfigError, match=r"at least 0 and below 1, got amount=1\.5"):
        LabelSmoothing(amount=1.5)
    assert math.isclose(LabelSmoothing(amount=0.5).amount, 0.5)
