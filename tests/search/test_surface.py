"""The trade-off and the choice, on reports made by hand."""

import pytest

from delia.errors import ConfigError
from delia.evaluate.harness import EvalReport
from delia.recipes.starter import search_starter_sep
from delia.search.surface import choose, format_tradeoffs, summarise

CONFIG = search_starter_sep().model_copy(update={"task_suites": ("follow",), "kept_suites": ("general",)})


def make_report(follow: float, general: float, num_rows: int = 200) -> EvalReport:
    """Return a report whose suites have these shares of right answers, ten rows a wording."""
    scores = [float(i < follow * num_rows) for i in range(num_rows)]
    scores += [float(i < general * num_rows) for i in range(num_rows)]
    size = len(scores)
    return EvalReport(
        task_ids=tuple(str(i) for i in range(size)),
        suites=("follow",) * num_rows + ("general",) * num_rows,
        phrasings=tuple(str(i // 10) for i in range(size)),
        completions=("",) * size,
        token_ids=((),) * size,
        logprobs=((),) * size,
        scores={"exact_match": tuple(scores)},
    )


def test_a_trial_is_summarised_by_its_task_and_kept_suites() -> None:
    tradeoff = summarise({"a": make_report(0.9, 0.5)}, CONFIG)["a"]
    assert tradeoff.task.estimate == pytest.approx(0.9)
    assert tradeoff.kept.estimate == pytest.approx(0.5)
    assert tradeoff.task.low < 0.9 < tradeoff.task.high


def test_among_trials_inside_the_noise_the_least_forgetful_is_chosen() -> None:
    reports = {
        "best": make_report(0.97, 0.90),
        "same": make_report(0.97, 0.93),
        "worse": make_report(0.5, 0.99),
    }
    assert choose(reports, CONFIG) == "same"


def test_a_trial_that_is_worse_beyond_the_noise_is_not_chosen() -> None:
    reports = {"good": make_report(0.95, 0.90), "forgets_nothing": make_report(0.6, 1.0)}
    assert choose(reports, CONFIG) == "good"


def test_an_unknown_suite_is_refused_with_those_that_are_there() -> None:
    config = CONFIG.model_copy(update={"task_suites": ("folow",)})
    with pytest.raises(ConfigError, match=r"no suite \['folow'\].*\['follow', 'general'\]"):
        summarise({"a": make_report(1.0, 1.0)}, config)


def test_the_table_marks_the_chosen_trial_and_starts_with_the_least_forgetful() -> None:
    reports = {"a": make_report(0.9, 0.5), "b": make_report(0.8, 0.9)}
    lines = format_tradeoffs(summarise(reports, CONFIG), "a").splitlines()
    assert lines[1].split()[0] == "b"
    assert lines[2].startswith("* a")
