"""Intervals against textbook values, exact properties and simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from delia.evaluate.intervals import Interval, mean_interval, paired_difference, wilson_interval


@pytest.mark.parametrize(
    ("num_correct", "num_total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_numbers_of_newcombe_1998(num_correct: int, num_total: int, low: float, high: float):
    interval = wilson_interval(num_correct, num_total)

    assert interval.estimate == num_correct / num_total
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_agrees_with_scipy_at_another_confidence():
    reference = stats.binomtest(37, 50).proportion_ci(confidence_level=0.9, method="wilson")

    interval = wilson_interval(37, 50, confidence=0.9)
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-12)


@pytest.mark.parametrize("num_total", [1, 3, 7, 400, 10_007])
def test_wilson_reaches_the_edge_exactly_where_all_or_none_is_correct(num_total: int):
    """At 0 of n the upper bound is z^2 / (n + z^2)."""
    z2 = 1.959964**2
    none, every = wilson_interval(0, num_total), wilson_interval(num_total, num_total)

    assert (none.low, every.high) == (0.0, 1.0)
    assert none.high == pytest.approx(z2 / (num_total + z2), rel=1e-5)
    assert every.low == pytest.approx(1 - none.high, abs=1e-12)


@pytest.mark.parametrize(("num_correct", "num_total"), [(0, 0), (3, 2), (-1, 5), (0, -1)])
def test_wilson_refuses_impossible_counts(num_correct: int, num_total: int):
    with pytest.raises(ValueError, match=f"got {num_correct} of {num_total}"):
        wilson_interval(num_correct, num_total)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_a_confidence_outside_0_and_1_is_refused(confidence: float):
    with pytest.raises(ValueError, match=f"got {confidence}"):
        wilson_interval(1, 2, confidence=confidence)
    with pytest.raises(ValueError, match=f"got {confidence}"):
        mean_interval([0.0, 1.0], ["a", "b"], seed=0, confidence=confidence)


def test_two_clusters_of_unlike_size_span_their_own_means():
    """Resamples are AA, AB or BB: means 0, 3/4 and 1; Student's t of two clusters takes in both ends."""
    interval = mean_interval([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"], seed=0)

    assert interval == Interval(estimate=0.75, low=0.0, high=1.0)


def test_three_clusters_have_the_quantiles_of_all_27_resamples():
    """Scores 0, 0, 9: a mean of 0, 3, 6, 9 has probability 8, 12, 6, 1 of 27; the median is 3.

    The widened tail of 3 clusters at confidence 0.5 is Phi(-0.8165 sqrt(3/2)) = 0.1587, so the bounds are
    the quantiles 0.16 and 0.84: 0 (up to 0.296) and 6 (from 0.741 to 0.963).
    """
    interval = mean_interval([0.0, 0.0, 9.0], ["a", "b", "c"], seed=0, confidence=0.5)

    assert interval == Interval(estimate=3.0, low=0.0, high=6.0)


def test_many_clusters_of_one_row_agree_with_students_t():
    scores = np.random.default_rng(3).normal(0.4, 0.2, size=400)
    half = stats.t.ppf(0.975, 399) * scores.std(ddof=1) / 20

    interval = mean_interval(scores, [str(i) for i in range(400)], seed=0, num_resamples=20_000)
    assert interval.estimate == pytest.approx(scores.mean())
    assert (interval.low, interval.high) == pytest.approx(
        (scores.mean() - half, scores.mean() + half), abs=0.03 * half
    )


def _simulate_scores(rng: np.random.Generator, *, num_clusters: int) -> tuple[np.ndarray, list[str]]:
    """Return scores of true mean 0: the clusters' spread is as large as that of their 10 rows."""
    levels = rng.normal(size=num_clusters)
    scores = np.repeat(levels, 10) + rng.normal(size=10 * num_clusters)
    return scores, [str(i // 10) for i in range(len(scores))]


@pytest.mark.parametrize(("num_clusters", "least"), [(5, 0.89), (8, 0.92), (30, 0.92)])
def test_the_clustered_interval_covers_the_truth_as_often_as_it_says(num_clusters: int, least: float):
    rng = np.random.default_rng(11)
    num_covered = num_covered_by_rows = 0
    for trial in range(400):
        scores, clusters = _simulate_scores(rng, num_clusters=num_clusters)
        interval = mean_interval(scores, clusters, seed=trial, num_resamples=400)
        num_covered += interval.low <= 0 <= interval.high
        rows = mean_interval(scores, [str(i) for i in range(len(scores))], seed=trial, num_resamples=200)
        num_covered_by_rows += rows.low <= 0 <= rows.high

    assert least <= num_covered / 400 <= 0.98
    assert num_covered_by_rows / 400 < 0.75


def test_one_seed_gives_one_interval_and_another_seed_another():
    scores, clusters = _simulate_scores(np.random.default_rng(0), num_clusters=6)

    first = mean_interval(scores, clusters, seed=2**63)
    assert mean_interval(scores, clusters, seed=2**63) == first
    assert mean_interval(scores, clusters, seed=1) != first


def test_an_interval_is_the_same_number_on_every_machine():
    scores = [0.1, 0.5, 0.2, 0.9, 0.4, 0.7, 0.3]
    interval = mean_interval(scores, list("aabbcde"), seed=5, num_resamples=50)

    assert (interval.low, interval.high) == pytest.approx((0.3125834837982897, 0.6122821031267613), abs=1e-12)


def test_resamples_drawn_in_blocks_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch):
    scores, clusters = _simulate_scores(np.random.default_rng(0), num_clusters=6)
    at_once = mean_interval(scores, clusters, seed=2, num_resamples=1000)

    monkeypatch.setattr("delia.evaluate.intervals._MAX_DRAWS_AT_ONCE", 6 * 7)
    assert mean_interval(scores, clusters, seed=2, num_resamples=1000) == at_once


def test_the_order_of_rows_changes_nothing_but_names_of_clusters_may_be_anything():
    scores, clusters = _simulate_scores(np.random.default_rng(0), num_clusters=6)
    renamed = [f"phrasing {name}" for name in clusters]

    assert mean_interval(scores, renamed, seed=2) == mean_interval(scores, clusters, seed=2)


def test_seeds_that_share_clusters_are_drawn_together():
    """Two seeds concatenated give the interval of the rows' means over both seeds."""
    rng = np.random.default_rng(1)
    first, clusters = _simulate_scores(rng, num_clusters=7)
    second = first + rng.normal(size=len(first))

    both = mean_interval(np.concatenate([first, second]), [*clusters, *clusters], seed=4)
    mean = mean_interval((first + second) / 2, clusters, seed=4)
    assert (both.estimate, both.low, both.high) == pytest.approx((mean.estimate, mean.low, mean.high))


def test_a_paired_difference_leaves_out_what_is_hard_for_both():
    rng = np.random.default_rng(5)
    b, clusters = _simulate_scores(rng, num_clusters=10)
    a = b + 0.1 + rng.normal(scale=0.05, size=len(b))

    difference = paired_difference(a, b, clusters, seed=0)
    assert difference.estimate == pytest.approx((a - b).mean())
    assert 0.08 < difference.low < 0.1 < difference.high < 0.12
    assert mean_interval(a, clusters, seed=0).low < mean_interval(b, clusters, seed=0).high


def test_a_paired_difference_turns_its_sign_when_the_sides_are_swapped():
    a, clusters = _simulate_scores(np.random.default_rng(6), num_clusters=9)
    b = np.random.default_rng(7).normal(size=len(a))

    there, back = paired_difference(a, b, clusters, seed=3), paired_difference(b, a, clusters, seed=3)
    assert (-back.estimate, -back.high, -back.low) == pytest.approx((there.estimate, there.low, there.high))


def test_equal_scores_differ_by_exactly_nothing():
    scores, clusters = _simulate_scores(np.random.default_rng(6), num_clusters=9)

    assert paired_difference(scores, scores, clusters, seed=3) == Interval(estimate=0.0, low=0.0, high=0.0)


def test_less_confidence_and_settings_pass_through_to_a_narrower_interval():
    a, clusters = _simulate_scores(np.random.default_rng(6), num_clusters=9)
    b = np.zeros(len(a))

    narrow = paired_difference(a, b, clusters, seed=3, num_resamples=500, confidence=0.5)
    assert narrow == mean_interval(a, clusters, seed=3, num_resamples=500, confidence=0.5)
    wide = paired_difference(a, b, clusters, seed=3, num_resamples=500)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize(
    ("scores", "clusters", "reason"),
    [
        ([], [], "at least 2 clusters, got 0"),
        ([0.5, 1.0], ["a", "a"], r"at least 2 clusters, got 1 \(\['a'\]\)"),
        ([0.5, 1.0], ["a"], r"shape \(2,\) and 1 clusters"),
        ([[0.5, 1.0]], ["a"], r"shape \(1, 2\)"),
        ([0.5, math.nan], ["a", "b"], "got nan in row 1"),
        ([math.inf, 0.5], ["a", "b"], "got inf in row 0"),
    ],
)
def test_scores_that_have_no_clustered_mean_are_refused(
    scores: list[float], clusters: list[str], reason: str
):
    with pytest.raises(ValueError, match=reason):
        mean_interval(scores, clusters, seed=0)


def test_a_bootstrap_without_resamples_is_refused():
    with pytest.raises(ValueError, match="num_resamples=0"):
        mean_interval([0.0, 1.0], ["a", "b"], seed=0, num_resamples=0)


def test_scores_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        paired_difference([0.0, 1.0], [0.0, 1.0, 1.0], ["a", "b"], seed=0)
