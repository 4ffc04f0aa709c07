"""Scores of rows on their way from a table to the worker, and methods that are refused before any work."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from delia.config import MethodConfig
from delia.errors import ConfigError, StoreError, TrainError
from delia.flow.preflight import check_train_methods
from delia.flow.trial import ArmConfig, build_input, plan_arm
from delia.flow.workspace import Workspace, open_workspace
from delia.mix.mixture import MixConfig
from delia.model.lora import LoraConfig
from delia.recipes.starter import STARTER
from delia.schema import Message, SeedTask, Task
from delia.store.scores import read_score_column, write_scores
from delia.store.tables import join, write_table
from delia.train.settings import RowScoresConfig, StageConfig, TrainConfig

MFT_OF_2 = MethodConfig(method="delia.methods.input_corruption.mft.MFT", knobs={"share": 2})
UAL = MethodConfig(method="delia.methods.token_weighter.ual.UAL")


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    rows = tuple(
        SeedTask(
            task_id=f"t{i}",
            messages=(Message(role="user", content=f"say {i}"), Message(role="assistant", content="yes")),
        )
        for i in range(3)
    )
    splits = {"train": rows, "dev": (), "test": ()}
    return open_workspace(str(tmp_path / "runs"), STARTER, Task(name="t", digest="d", rows_by_split=splits))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., RowScoresConfig]:
    def write(scores: dict[str, float], **changes: float | str) -> RowScoresConfig:
        write_scores(str(tmp_path), list(scores), {"doubt": list(scores.values())})
        return RowScoresConfig(**{"path": join(str(tmp_path), "scores.parquet"), "column": "doubt"} | changes)

    return write


def make_arm(*, ratio: float = 0.0, **settings) -> ArmConfig:
    train = TrainConfig(stages=(StageConfig(max_steps=1, parts=("lora",)),), **settings)
    return ArmConfig(mix=MixConfig(diverse_ratio=ratio), train=train)


def test_scores_arrive_by_row_id_whatever_the_order_of_the_table(space, write):
    scores = write({"t2": 0.25, "other": 9.0, "t0": 0.5, "t1": 1.0})
    arm = plan_arm(make_arm(token_weighter=UAL, row_scores=scores), space, None)
    assert arm.mixture.row_ids == ("t0", "t1", "t2")
    assert build_input(arm, space, None)[0].rows.score_R.tolist() == [0.5, 1.0, 0.25]


def test_without_the_setting_there_are_none(space):
    assert build_input(plan_arm(make_arm(), space, None), space, None)[0].rows.score_R is None


def test_rows_without_a_score_are_refused_or_have_the_one_that_is_set(space, write):
    arm = plan_arm(make_arm(token_weighter=UAL, row_scores=write({"t1": 0.5})), space, None)
    with pytest.raises(TrainError, match=r"2 of 3 rows have no 'doubt' .* the first is 't0'"):
        build_input(arm, space, None)
    filled = make_arm(token_weighter=UAL, row_scores=write({"t1": 0.5}, missing=0.125))
    rows = build_input(plan_arm(filled, space, None), space, None)[0].rows
    assert np.array_equal(rows.score_R, np.array([0.125, 0.5, 0.125], np.float32))


def test_changed_scores_under_one_address_are_another_adapter(space, write):
    names = {
        plan_arm(make_arm(token_weighter=UAL, row_scores=write(scores)), space, None).fingerprint
        for scores in ({"t0": 0.5}, {"t0": 0.75}, {"t0": 0.75, "t1": 0.0})
    }
    assert len(names) == 3


def test_a_table_without_the_column_or_with_a_row_twice_is_refused(tmp_path: Path, write):
    with pytest.raises(StoreError, match=r"no column \['mood'\], it has \['row_id', 'doubt'\]"):
        read_score_column(write({"t0": 0.5}).path, "mood")
    with pytest.raises(StoreError, match="no table of scores at"):
        read_score_column(str(tmp_path / "nowhere.parquet"), "doubt")
    twice = str(tmp_path / "twice.parquet")
    write_table(twice, pa.table({"row_id": ["a", "a", "b"], "doubt": [1.0, 2.0, 3.0]}))
    with pytest.raises(StoreError, match="got 3 values of 2 rows"):
        read_score_column(twice, "doubt")
    empty = str(tmp_path / "empty.parquet")
    write_table(empty, pa.table({"row_id": ["a", "b"], "doubt": [1.0, None]}))
    with pytest.raises(StoreError, match="a finite number for each row"):
        read_score_column(empty, "doubt")


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        (make_arm(kl_weight=1.0), r"main: train\.kl_weight=1 holds diverse rows .* mix\.diverse_ratio is 0"),
        (
            make_arm(ratio=1.0, kl_weight=1.0, lora=LoraConfig(init="pissa")),
            r"train\.lora\.init=pissa starts over another weight",
        ),
        (make_arm(row_scores=RowScoresConfig(path="x", column="y")), r"set train\.token_weighter"),
        (make_arm(token_weighter=MethodConfig(method="delia.methods.token_weighter.dft.Dft")), "no method"),
        (make_arm(input_corruption=MFT_OF_2), "shares of 0 to 1"),
    ],
)
def test_methods_that_could_not_train_are_refused_before_any_work(arm, reason):
    with pytest.raises(ConfigError, match=reason):
        check_train_methods({"main": arm})
    check_train_methods({"main": make_arm(ratio=1.0, kl_weight=1.0, token_weighter=UAL)})
