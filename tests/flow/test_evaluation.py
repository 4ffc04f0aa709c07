"""Scores are kept by what was scored: another adapter, row or setting is another address."""

import dataclasses
import shutil

import pytest

from delia.evaluate.harness import EvaluateConfig, evaluate
from delia.flow.evaluation import eval_address, evaluate_adapters
from delia.generate.engine import EngineConfig

CONFIG = EvaluateConfig(max_tokens=8)
SCRIPTED = EngineConfig(kind="scripted")


def test_two_adapters_in_folders_of_one_name_do_not_share_their_scores(small_space, make_adapter, tmp_path):
    """A registry gives every version a folder `adapter`."""
    rows = small_space.task.rows_by_split["dev"]
    copies = []
    for version, shift in (("1", 0.0), ("2", 1.0)):
        made = make_adapter(small_space, shift=shift, seed=int(version))
        shutil.copytree(made, tmp_path / version / "adapter")
        copies.append(str(tmp_path / version / "adapter"))
        assert eval_address(CONFIG, small_space, copies[-1], rows) == eval_address(
            CONFIG, small_space, made, rows
        )
    assert len({eval_address(CONFIG, small_space, address, rows) for address in (*copies, "")}) == 3


@pytest.mark.parametrize("change", ["rows", "config", "task"])
def test_other_rows_settings_or_tasks_are_scored_anew(small_space, change):
    rows = small_space.task.rows_by_split["dev"]
    before = eval_address(CONFIG, small_space, "", rows)
    space = dataclasses.replace(small_space, task=dataclasses.replace(small_space.task, digest="other"))
    after = {
        "rows": lambda: eval_address(CONFIG, small_space, "", rows[1:]),
        "config": lambda: eval_address(EvaluateConfig(max_tokens=9), small_space, "", rows),
        "task": lambda: eval_address(CONFIG, space, "", rows),
    }[change]()
    assert after != before


def test_what_is_scored_is_not_generated_again(cluster, small_space, make_adapter, monkeypatch):
    rows = small_space.task.rows_by_split["dev"]
    address = make_adapter(small_space, shift=1.0)
    first = evaluate_adapters(CONFIG, small_space, {"a": address, "base": ""}, rows, engine=SCRIPTED)
    assert first["a"].completions != first["base"].completions
    monkeypatch.setattr("delia.flow.evaluation.evaluate", None)
    again = evaluate_adapters(CONFIG, small_space, {"a": address, "base": ""}, rows, engine=SCRIPTED)
    assert again == first


def test_a_report_is_kept_before_the_next_model_is_answered(cluster, small_space, make_adapter, monkeypatch):
    """What a killed job had scored is there when it is started again."""
    rows = small_space.task.rows_by_split["dev"]
    addresses = {"base": "", "a": make_adapter(small_space, shift=1.0)}
    whole = dict(
        evaluate(
            addresses,
            rows,
            CONFIG,
            model=small_space.model,
            engine=SCRIPTED,
            chat=small_space.chat,
            metrics=("exact_match",),
        )
    )

    def die_after_one(*args, **settings):
        yield "base", whole["base"]
        raise KeyboardInterrupt

    monkeypatch.setattr("delia.flow.evaluation.evaluate", die_after_one)
    with pytest.raises(KeyboardInterrupt):
        evaluate_adapters(CONFIG, small_space, addresses, rows, engine=SCRIPTED)
    kept = evaluate_adapters(CONFIG, small_space, {"base": ""}, rows, engine=SCRIPTED)
    assert kept["base"].completions == whole["base"].completions
