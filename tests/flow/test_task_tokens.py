"""A task token in a pool: in rows of the task it is the token, in anybody else's text it is a leak."""

import json

import pytest

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.flow.pool import PoolConfig
from delia.generate.engine import SamplingConfig
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

pytestmark = pytest.mark.usefixtures("local_acceptance")

LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)
FOREIGN = "what does <sep> mean in a tokenizer ?"


def make_pool(source: SourceConfig, **curate: object) -> PoolConfig:
    synthesize = SynthesizeConfig(sources=(source,), sampling=SamplingConfig(max_tokens=16), chunk_size=8)
    return PoolConfig(synthesize=synthesize, curate=LOOSE.model_copy(update=curate))


def test_a_row_of_a_file_that_spells_a_task_token_is_a_leak_unless_the_rule_is_off(
    small_space, tmp_path, build, read_back
):
    """It means the text, and would be encoded as the token."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": text, "completion": "so"} for text in ("the fox", FOREIGN, "the cat")]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    file = SourceConfig(name="file", rows=TaskConfig(path=str(path), licence="MIT"), num_rows=2)
    config = make_pool(file)
    pool = build(small_space, config, num_replicas=None)
    all_three = make_pool(file.model_copy(update={"num_rows": 3}), reject_template_leaks=False)
    unruled = build(small_space, all_three, num_replicas=None)

    assert [row.instruction for row in pool.rows] == ["the fox", "the cat"]
    assert [(item.reason, item.text) for item in read_back(small_space, config)] == [
        ("template_leak", FOREIGN)
    ]
    assert [row.instruction for row in unruled.rows] == ["the fox", FOREIGN, "the cat"]


def test_answers_to_the_tasks_own_rows_keep_its_token(small_space, local_stage, build):
    local_stage()
    method = MethodConfig(method="delia.methods.synthesizer.answering.Answering")
    pool = build(small_space, make_pool(SourceConfig(name="answers", synthesizer=method, num_rows=2)))
    tasks = small_space.task.rows_by_split["train"]

    assert [row.messages[:-1] for row in pool.rows] == [tasks[row.index].prompt for row in pool.rows]
    assert all("<sep>" in row.instruction for row in pool.rows)
