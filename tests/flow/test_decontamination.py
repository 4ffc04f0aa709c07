"""Sets beside the task's own that a pool is kept clear of: rejected rows, the pool's name, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from delia.curate.settings import CurateConfig
from delia.errors import TaskFileError
from delia.flow.adapt import open_job
from delia.flow.pool import PoolConfig, pool_fingerprint
from delia.recipes.starter import starter_sep
from delia.store.tables import exists
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

LONG = "one two three four five six seven eight nine"


@pytest.fixture(autouse=True)
def accept_here(local_acceptance: None) -> None:
    """No test here is about where pools are accepted."""


def write_rows(path: Path, *questions: str, answer: str = "yes") -> TaskConfig:
    path.parent.mkdir(exist_ok=True)
    rows = [json.dumps({"prompt": text, "completion": answer}) for text in questions]
    path.write_text("\n".join(rows))
    return TaskConfig(path=str(path))


def import_rows(rows: TaskConfig, sets: Sequence[TaskConfig], *, num_rows: int = 2) -> PoolConfig:
    source = SourceConfig(name="file", rows=rows, num_rows=num_rows)
    curate = CurateConfig(near_duplicate_threshold=None, max_repeated_share=None, decontaminate=tuple(sets))
    return PoolConfig(synthesize=SynthesizeConfig(sources=(source,)), curate=curate)


def test_a_row_that_overlaps_any_of_the_sets_is_rejected_and_others_are_kept(
    space, tmp_path, build, read_back
):
    rows = write_rows(tmp_path / "rows.jsonl", f"say {LONG} .", "name a cat", "the fox", "the owl")
    sets = [write_rows(tmp_path / "first.jsonl", LONG), write_rows(tmp_path / "second.jsonl", "name a cat")]
    config = import_rows(rows, sets)
    pool = build(space, config, num_replicas=None)

    assert [row.instruction for row in pool.rows] == ["the fox", "the owl"]
    assert [(item.reason, item.index) for item in read_back(space, config)] == [
        ("overlaps_eval", 0),
        ("overlaps_eval", 1),
    ]
    assert pool.manifest.counts == {"accepted": 2, "rejected_overlaps_eval": 2}


def test_what_the_sets_hold_decides_the_name_of_a_pool_and_where_they_lie_does_not(space, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", "the fox")
    names = [pool_fingerprint(import_rows(rows, []), space)]
    for questions in (("a",), ("a", "b"), ("a", "c")):
        sets = [write_rows(tmp_path / "set.jsonl", *questions)]
        names.append(pool_fingerprint(import_rows(rows, sets), space))
    assert len(set(names)) == len(names)

    moved = [write_rows(tmp_path / "moved" / f"{text}.jsonl", text, answer="no") for text in ("c", "a")]
    assert pool_fingerprint(import_rows(rows, moved), space) == names[-1]


def test_a_pool_is_made_anew_once_a_set_has_changed(space, tmp_path, build):
    rows = write_rows(tmp_path / "rows.jsonl", "the fox", "the owl", "the cat")
    kept = []
    for question in ("the fox", "the owl"):
        sets = [write_rows(tmp_path / "set.jsonl", question)]
        pool = build(space, import_rows(rows, sets), num_replicas=None)
        kept.append([row.instruction for row in pool.rows])

    assert kept == [["the owl", "the cat"], ["the fox", "the cat"]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": 1, "completion": "b"}', "line 2: prompt must be"),
    ],
)
def test_a_set_that_is_missing_or_malformed_is_refused_before_anything_is_generated(
    space, tmp_path, build, make_config, local_stage, text, reason
):
    if text is not None:
        (tmp_path / "set.jsonl").write_text(text)
    sets = (TaskConfig(path=str(tmp_path / "set.jsonl")),)
    stage, recipe = local_stage(), starter_sep()
    curate = recipe.pool.curate.model_copy(update={"decontaminate": sets})

    with pytest.raises(TaskFileError, match=rf"^curate\.decontaminate\.0: .*{reason}"):
        build(space, make_config(curate=curate))
    with pytest.raises(TaskFileError, match=rf"^curate\.decontaminate\.0: .*{reason}"):
        open_job(recipe.model_copy(update={"pool": recipe.pool.model_copy(update={"curate": curate})}))
    assert stage.answered == []
    assert not exists(space.address("candidates", ""))
