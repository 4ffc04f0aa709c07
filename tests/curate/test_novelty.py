"""How new instructions are: rates over windows, Good-Turing and Chao1."""

import math
import random

import pytest

from delia.curate.novelty import Novelty, estimate_distinct
from delia.curate.pipeline import Curator
from delia.curate.screening import Screener
from delia.curate.settings import CurateConfig
from delia.curate.stopping import StopConfig, StopRule
from delia.schema import Message, Rejection, Row


def count(texts: list[str], *, window: int = 1000) -> Novelty:
    novelty = Novelty(window=window)
    for text in texts:
        novelty.add(text)
    return novelty


def test_rates_are_shares_of_new_texts_in_windows():
    """New are a, b, c, then d: of the last four one, of all eight four; case and white space don't count."""
    report = count(["a", "b", "A ", "c", "a", "b", "d", " d"], window=4).report()

    assert (report.num_candidates, report.num_distinct) == (8, 4)
    assert report.new_unique_rate == 1 / 4
    assert report.new_unique_rates == (3 / 4, 1 / 4)


def test_before_the_first_window_is_full_the_rate_is_of_what_there_is():
    assert count([]).rate == 1
    assert count(["a", "a", "b"]).rate == 2 / 3


def test_a_long_course_is_told_in_twenty_stretches():
    report = count([str(i % 700) for i in range(1000)], window=10).report()

    assert len(report.new_unique_rates) == 20
    assert report.new_unique_rates == (1.0,) * 14 + (0.0,) * 6


def test_chao1_and_its_interval_worked_by_hand():
    """10 species, 4 seen once, 2 twice: 10 + 4*3 / (2*3) = 12; EstimateS, equation 6, for the variance."""
    estimate, low, high = estimate_distinct(10, 4, 2)
    variance = 12 / 6 + 4 * 7**2 / (4 * 3**2) + 16 * 2 * 3**2 / (4 * 3**4)
    spread = math.exp(1.96 * math.sqrt(math.log(1 + variance / 4)))

    assert (estimate, low, high) == pytest.approx((12, 10 + 2 / spread, 10 + 2 * spread))


def test_chao1_with_no_species_seen_twice():
    """5 species, 3 seen once: 5 + 3*2 / 2 = 8; equation 7: 3 + 3*5^2/4 - 3^4/(4*8)."""
    estimate, low, high = estimate_distinct(5, 3, 0)
    spread = math.exp(1.96 * math.sqrt(math.log(1 + (3 + 75 / 4 - 81 / 32) / 9)))

    assert (estimate, low, high) == pytest.approx((8, 5 + 3 / spread, 5 + 3 * spread))


def test_where_everything_was_seen_twice_nothing_is_left():
    report = count(["a", "b", "a", "b"]).report()

    assert (report.estimated_distinct, report.interval, report.estimated_left) == (2, (2, 2), 0)
    assert report.unseen_mass == 0


def test_all_estimates_of_no_candidate_are_empty():
    report = count([]).report()

    assert (report.num_distinct, report.estimated_distinct, report.unseen_mass) == (0, 0, 1)
    assert report.new_unique_rates == ()


def test_of_candidates_that_are_no_draws_there_are_rates_and_no_estimates():
    drawn, walked = count(["a", "b", "a", "c"]).report(), count(["a", "b", "a", "c"]).report(is_drawn=False)

    assert (drawn.unseen_mass, drawn.estimated_left) == (2 / 4, 2 * 1 / 4)
    assert (walked.unseen_mass, walked.estimated_distinct, walked.interval, walked.estimated_left) == (
        (None,) * 4
    )
    assert (walked.num_distinct, walked.new_unique_rates) == (drawn.num_distinct, drawn.new_unique_rates)


@pytest.mark.parametrize("num_kinds", [300, 2000])
def test_of_uniform_draws_the_interval_holds_the_truth_and_the_mass_is_what_is_unseen(num_kinds: int):
    rng = random.Random(5)
    report = count([str(rng.randrange(num_kinds)) for _ in range(1000)]).report()
    truly_unseen = 1 - report.num_distinct / num_kinds

    assert report.interval[0] < num_kinds < report.interval[1]
    assert report.interval[0] < report.estimated_distinct < report.interval[1]
    assert report.unseen_mass == pytest.approx(truly_unseen, abs=0.03)
    assert report.estimated_left == report.estimated_distinct - report.num_distinct


def test_a_curator_counts_every_candidate_with_an_instruction_up_to_its_target():
    def make_row(index: int, instruction: str, answer: str = "yes") -> Row:
        messages = (Message(role="user", content=instruction), Message(role="assistant", content=answer))
        return Row(row_id=f"r{index}", index=index, source="s", messages=messages)

    rejection = Rejection(row_id="r9", index=9, source="s", reason="x", text="d")
    rows = [make_row(0, "a"), make_row(1, "a"), make_row(2, "b", ""), rejection, make_row(10, "c")]
    curator = Curator(Screener(CurateConfig()))
    curator.feed([*rows, make_row(11, "e")], rule=StopRule(StopConfig(), num_rows=2))
    report = curator.novelty.report()

    assert (report.num_candidates, report.num_distinct) == (4, 3)
