"""Scores are kept by what was scored: another adapter, row or setting is another address."""

import dataclasses
import shutil

import pytest

from delia.evaluate.harness import EvaluateConfig, evaluate
from delia.flow.evaluation import eval_address, evaluate_adapters
from delia.generate.engine import EngineConfig

CONFIG = EvaluateConfig(max_tokens=8)
SCRIPTED = EngineConfig(kind="scripted")


def locate(space, adapter, rows, *, config=CONFIG, engine=SCRIPTED) -> str:
    return eval_address(config, space, adapter, rows, engine=engine)


def test_two_adapters_in_folders_of_one_name_do_not_share_their_scores(small_space, make_adapter, tmp_path):
    """A registry gives every version a folder `adapter`."""
    rows = small_space.task.rows_by_split["dev"]
    copies = []
    for version, shift in (("1", 0.0), ("2", 1.0)):
        made = make_adapter(small_space, shift=shift, seed=int(version))
        shutil.copytree(made, tmp_path / version / "adapter")
        copies.append(str(tmp_path / version / "adapter"))
        assert locate(small_space, copies[-1], rows) == locate(small_space, made, rows)
    assert len({locate(small_space, address, rows) for address in (*copies, "")}) == 3


@pytest.mark.parametrize("change", ["rows", "settings", "task", "metrics", "dtype", "engine"])
def test_another_question_is_answered_anew(small_space, change):
    rows = small_space.task.rows_by_split["dev"]
    task, model = small_space.task, small_space.model

    def with_task(**changes) -> str:
        return locate(dataclasses.replace(small_space, task=dataclasses.replace(task, **changes)), "", rows)

    after = {
        "rows": lambda: locate(small_space, "", rows[1:]),
        "settings": lambda: locate(small_space, "", rows, config=EvaluateConfig(max_tokens=9)),
        "task": lambda: with_task(digest="other"),
        "metrics": lambda: with_task(metrics=("chrf",)),
        "dtype": lambda: locate(
            dataclasses.replace(small_space, model=model.model_copy(update={"dtype": "bfloat16"})), "", rows
        ),
        "engine": lambda: locate(small_space, "", rows, engine=EngineConfig(kind="vllm")),
    }[change]()
    assert after != locate(small_space, "", rows)


def test_the_number_of_replicas_does_not_matter(small_space):
    rows = small_space.task.rows_by_split["dev"]
    more = SCRIPTED.model_copy(update={"num_replicas": 3, "batch_size": 7})
    assert locate(small_space, "", rows, engine=more) == locate(small_space, "", rows)


def test_scores_keep_the_tasks_order_of_metrics(cluster, small_space):
    """The first is the one that the gate and the search go by."""
    space = dataclasses.replace(
        small_space, task=dataclasses.replace(small_space.task, metrics=("chrf", "exact_match"))
    )
    rows = space.task.rows_by_split["dev"]
    report = evaluate_adapters(CONFIG, space, {"base": ""}, rows, engine=SCRIPTED)["base"]
    assert list(report.scores) == ["chrf", "exact_match"]


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
