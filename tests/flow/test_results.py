"""A reproduction as text: every arm and seed is in it, sections are replaced, pairs are the right ones."""

import pytest

from delia.evaluate.harness import EvalReport
from delia.flow.reproduction import Reproduction
from delia.flow.results import default_pairs, draw_plot, format_arms, format_differences, write_section

SUITES = ("follow", "general")


def make_report(follow: float, general: float, num_rows: int = 20) -> EvalReport:
    shares = {"follow": follow, "general": general}
    size = num_rows * len(shares)
    return EvalReport(
        task_ids=tuple(str(i) for i in range(size)),
        suites=tuple(suite for suite in shares for _ in range(num_rows)),
        phrasings=tuple(str(i // 2) for i in range(size)),
        completions=("",) * size,
        token_ids=((),) * size,
        logprobs=((),) * size,
        scores={
            "exact_match": tuple(
                float(i < share * num_rows) for share in shares.values() for i in range(num_rows)
            )
        },
    )


def make_result(**arms: list[tuple[float, float]]) -> Reproduction:
    named = {name.replace("__", ", ").replace("_", " "): scores for name, scores in arms.items()}
    return Reproduction(
        reports={name: tuple(make_report(*score) for score in scores) for name, scores in named.items()},
        drift={name: (0.25, 0.75) for name in named if name != "base"},
        tuned={},
        metric="exact_match",
    )


@pytest.fixture
def result() -> Reproduction:
    return make_result(
        base=[(0.0, 1.0)],
        plain=[(1.0, 0.5), (0.9, 0.3)],
        delia=[(0.9, 1.0), (0.8, 0.9)],
        recipe=[(1.0, 1.0), (1.0, 1.0)],
        plain__from_the_row=[(0.5, 0.0), (0.5, 0.0)],
        delia__from_the_row=[(0.4, 0.9), (0.4, 0.9)],
        plain__best_on_dev=[(0.9, 0.9), (0.9, 0.9)],
        delia__few_prompts=[(0.9, 0.8), (0.8, 0.8)],
    )


def test_an_arm_shows_its_mean_and_each_seed_and_its_drift(result):
    lines = format_arms(result, SUITES).splitlines()
    assert lines[0] == "| arm | follow | general | off-task KL |"
    assert lines[2] == "| base | 0.000 | 1.000 | - |"
    assert lines[3] == "| plain | 0.950 (1.000, 0.900) | 0.400 (0.500, 0.300) | 0.5000 |"
    assert len(lines) == 2 + len(result.reports)


def test_each_plain_arm_is_compared_with_its_own_twin_and_with_the_recipe(result):
    assert default_pairs(result) == [
        ("delia", "plain"),
        ("delia, from the row", "plain, from the row"),
        ("delia", "plain, best on dev"),
        ("recipe", "plain"),
        ("recipe", "plain, from the row"),
        ("recipe", "plain, best on dev"),
        ("delia", "delia, few prompts"),
    ]
    assert default_pairs(make_result(base=[(0, 1)], plain=[(1, 1)], recipe=[(1, 1)])) == [("recipe", "plain")]


def test_a_difference_is_ours_minus_theirs_over_all_seeds(result):
    lines = format_differences(result, [("delia", "plain")], SUITES).splitlines()
    assert lines[2].startswith("| delia - plain | -0.100 [")
    assert "| 0.550 [." in lines[2]
    assert result.difference("plain", "plain", "general").estimate == 0.0


def test_a_section_is_replaced_and_its_neighbours_stay(tmp_path):
    path = tmp_path / "deep" / "RESULTS.md"
    write_section(path, "one", "first")
    write_section(path, "two", "second")
    write_section(path, "one", "first, again\n\n### with a part\n")
    assert path.read_text() == "# Results\n\n## one\n\nfirst, again\n\n### with a part\n\n## two\n\nsecond\n"
    write_section(path, "two", r"back\1slash")
    assert path.read_text().endswith("## two\n\nback\\1slash\n")


def test_the_plot_names_every_arm_and_is_the_same_each_time(result, tmp_path):
    draw_plot(result, SUITES, tmp_path / "a.svg")
    draw_plot(result, SUITES, tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert all(f">{name}</text>" in text for name in (*result.reports, *SUITES, "exact match"))
    num_seeds = sum(len(reports) for reports in result.reports.values())
    assert text.count("fill-opacity: 0.7") == num_seeds * len(SUITES)
