"""Whose data a pool is made of: licences on the way from a file's rows to the registered version."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.flow import adapt
from delia.flow.pool import PoolConfig
from delia.generate.engine import SamplingConfig
from delia.schema import Task
from delia.store.pools import Pool, join_licences
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

pytestmark = pytest.mark.usefixtures("local_acceptance")

WORDS = ("fox", "owl", "cat", "dog")
LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)


@pytest.fixture
def make_source(tmp_path: Path):
    """Return a function that writes a file of a row a licence, and returns a source of its first rows."""

    def make(name: str, *stated: str, num_rows: int, licence: str = "") -> SourceConfig:
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"prompt": f"what of the {word} ?", "completion": word} | ({"licence": text} if text else {})
            for word, text in zip(WORDS, stated, strict=False)
        ]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        rows_config = TaskConfig(path=str(path), licence=licence)
        return SourceConfig(name=name, rows=rows_config, num_rows=num_rows)

    return make


def make_config(*sources: SourceConfig) -> PoolConfig:
    synthesize = SynthesizeConfig(sources=sources, sampling=SamplingConfig(max_tokens=64), chunk_size=4)
    return PoolConfig(synthesize=synthesize, curate=LOOSE)


def answer(source: SourceConfig) -> SourceConfig:
    method = MethodConfig(method="delia.methods.synthesizer.answering.Answering")
    return SourceConfig(name="answers", synthesizer=method, feeds_on=(source.name,), num_rows=2)


@pytest.fixture
def licensed(space, local_stage, build, make_source) -> Pool:
    """Rows of one file under two licences and a third that no row of the pool has, and answers to them."""
    local_stage()
    file = make_source("file", "CC0", "", "", "GPL", num_rows=3, licence="cc-by-4.0")
    return build(space, make_config(file, answer(file)))


def test_rows_have_the_licence_that_they_state_else_that_of_their_source(licensed):
    assert [row.licence for row in licensed.rows if row.source == "file"] == ["CC0", "cc-by-4.0", "cc-by-4.0"]
    assert {row.licence for row in licensed.rows if row.source == "answers"} == {""}


def test_the_manifest_lists_the_licences_of_the_pools_rows_by_source(licensed):
    assert licensed.manifest.details["licences"] == {"answers": [], "file": ["CC0", "cc-by-4.0"]}


def test_a_licence_in_the_settings_names_another_pool_of_the_same_rows(opened, tmp_path, build, make_source):
    """Its rows keep their ids, and so do the mixtures that are drawn from them."""
    pools = []
    for licence in ("", "MIT"):
        space = dataclasses.replace(opened, output_dir=str(tmp_path / "runs"))
        source = make_source("file", "CC0", "", num_rows=2, licence=licence)
        pools.append(build(space, make_config(source), num_replicas=None))

    assert pools[0].manifest.fingerprint != pools[1].manifest.fingerprint
    assert pools[0].manifest.root == pools[1].manifest.root
    assert [pool.rows[1].licence for pool in pools] == ["", "MIT"]


def test_an_adapter_stands_under_the_licences_of_its_task_its_train_rows_and_its_pool(opened, licensed):
    rows = opened.task.rows_by_split["train"]
    stated = (dataclasses.replace(rows[0], licence="MIT"), *rows)
    task: Task = dataclasses.replace(
        opened.task, licence="Apache-2.0", rows_by_split={**opened.task.rows_by_split, "train": stated}
    )

    assert join_licences(task, licensed) == "Apache-2.0, CC0, MIT, cc-by-4.0"
    assert join_licences(task, None) == "Apache-2.0, MIT"
    assert join_licences(opened.task, None) == ""


def test_the_registered_version_names_them(opened, licensed, monkeypatch):
    tags = {}
    monkeypatch.setattr(adapt, "fetch_adapter", lambda path: path)
    monkeypatch.setattr(adapt, "set_alias", lambda *args: None)
    monkeypatch.setattr(
        adapt, "register_adapter", lambda *args, **options: tags.update(options["tags"]) or MagicMock()
    )
    config = SimpleNamespace(name="n", split="dev", track=SimpleNamespace(registered_name=None))
    verified = SimpleNamespace(form="lora", num_equal=1, num_prompts=1, mean_gap_nats=0.0, dtype="float32")
    report = SimpleNamespace(suite_names=list)
    adapt._register(config, opened, licensed, None, None, MagicMock(), report, verified)

    assert tags["delia.licence"] == "CC0, cc-by-4.0"
