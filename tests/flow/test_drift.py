"""Drift off the task: on which rows of a pool it is measured, and that nothing is said where it is not."""

import pytest

from delia.flow import evaluation
from delia.flow.workspace import Workspace
from delia.schema import Message, Row
from delia.store.pools import Pool, index_rows
from delia.store.tables import Manifest
from delia.train.settings import StageConfig, TrainConfig


def test_no_drift_is_told_where_no_row_is_short_enough(opened: Workspace, monkeypatch: pytest.MonkeyPatch):
    """It was not measured: it is not 0. Rows of the pool need not be short enough to train on."""
    monkeypatch.setattr(
        evaluation, "measure_drift", lambda addresses, sequences, model: {"a": len(sequences)}
    )
    texts = ("name a fox", "name a fox " * 30)
    rows = tuple(
        Row(
            row_id=f"d{index}",
            index=index,
            source="magpie",
            messages=(Message(role="user", content=text), Message(role="assistant", content="so")),
        )
        for index, text in enumerate(texts)
    )
    manifest = Manifest(kind="pool", fingerprint="p", root="r", counts={})

    def measure(*rows: Row, on_long: str) -> dict[str, float]:
        train = TrainConfig(stages=(StageConfig(max_steps=1),), max_length=32, on_long=on_long)
        pool = Pool(manifest=manifest, load=lambda: index_rows(rows))
        return evaluation.measure_pool_drift({"a": "x"}, opened, pool, train=train, num_rows=8)

    for on_long in ("error", "drop", "truncate_prompt_left"):
        assert measure(*rows, on_long=on_long) == {"a": 1}
        assert measure(rows[1], on_long=on_long) == {}
