"""A source's file that is changed gives another pool, of its new rows alone, also where the old one was half done."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.flow.acceptance import AcceptanceLostError
from delia.flow.pool import PoolConfig, pool_fingerprint
from delia.generate.engine import SamplingConfig
from delia.store.pools import Pool
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

pytestmark = pytest.mark.usefixtures("local_acceptance")

ANIMALS = ("fox", "cat", "wolf", "owl", "bear", "dog", "hen", "frog")
FOODS = ("bread", "milk", "rice", "corn", "fish", "soup", "cake", "honey")
LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)


class StoppedError(Exception):
    """The job is ended from outside."""


def write_questions(path: Path, *words: str, licence: str = "MIT") -> None:
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": f"what of the {word} ?", "completion": word, "licence": licence} for word in words]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def make_config(path: Path, *, is_answered: bool = True) -> PoolConfig:
    """Return a pool of a file of eight rows and, in a second round, its questions answered in two chunks."""
    file = SourceConfig(name="file", rows=TaskConfig(path=str(path)), num_rows=8)
    answers = SourceConfig(
        name="answers",
        synthesizer=MethodConfig(method="delia.methods.synthesizer.answering.Answering"),
        feeds_on=("file",),
        num_rows=5,
        max_candidates=8,
    )
    synthesize = SynthesizeConfig(
        sources=(file, answers) if is_answered else (file,),
        sampling=SamplingConfig(max_tokens=64),
        chunk_size=4,
    )
    return PoolConfig(synthesize=synthesize, curate=LOOSE)


def read_words(pool: Pool, source: str) -> list[str]:
    return [row.instruction.split()[3] for row in pool.rows if row.source == source]


def stop_after(num_candidates: int) -> Callable[..., None]:
    def log(metrics: dict[str, float], num_seen: int) -> None:
        if num_seen > num_candidates:
            raise StoppedError

    return log


def test_what_a_file_holds_decides_the_name_of_a_pool_and_where_it_lies_does_not(space, tmp_path):
    names = []
    for words in (("fox",), ("fox", "cat"), ("cat", "fox"), ("fox", "owl")):
        write_questions(tmp_path / "rows.jsonl", *words)
        names.append(pool_fingerprint(make_config(tmp_path / "rows.jsonl"), space))
    write_questions(tmp_path / "rows.jsonl", "fox", "owl", licence="CC0")
    names.append(pool_fingerprint(make_config(tmp_path / "rows.jsonl"), space))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n{")
    names.append(pool_fingerprint(make_config(tmp_path / "rows.jsonl"), space))
    assert len(set(names)) == len(names)

    write_questions(tmp_path / "moved" / "rows.jsonl", "fox", "owl")
    assert pool_fingerprint(make_config(tmp_path / "moved" / "rows.jsonl"), space) == names[3]


def test_a_changed_file_gives_another_pool_and_an_unchanged_one_the_same(space, tmp_path, local_stage, build):
    config = make_config(tmp_path / "rows.jsonl")
    pools = []
    for words, num_generated in ((ANIMALS, 8), (ANIMALS, 0), (FOODS, 8)):
        write_questions(tmp_path / "rows.jsonl", *words)
        stage = local_stage()
        pools.append(build(space, config))
        assert len(stage.answered) == num_generated

    first, again, changed = pools
    assert read_words(first, "file") == list(ANIMALS)
    assert again.manifest.fingerprint == first.manifest.fingerprint
    assert read_words(changed, "file") == list(FOODS)
    assert set(read_words(changed, "answers")) <= set(FOODS)


def test_a_pool_that_was_left_half_finished_takes_no_old_chunk_once_its_file_has_changed(
    space, tmp_path, local_stage, build
):
    config = make_config(tmp_path / "rows.jsonl")
    write_questions(tmp_path / "rows.jsonl", *ANIMALS)
    stage = local_stage()
    with pytest.raises(StoppedError):
        build(space, config, log=stop_after(8))
    assert len(stage.answered) == 4  # one chunk of two lies there

    write_questions(tmp_path / "rows.jsonl", *FOODS)
    local_stage()
    changed = build(space, config)
    whole = build(dataclasses.replace(space, output_dir=f"{space.output_dir}/fresh"), config)
    assert set(read_words(changed, "answers")) <= set(FOODS)
    assert changed.rows == whole.rows

    write_questions(tmp_path / "rows.jsonl", *ANIMALS)
    stage = local_stage()
    resumed = build(space, config)
    assert stage.answered == [f"answers:{index}" for index in range(4, 8)]
    assert read_words(resumed, "file") == list(ANIMALS)


def test_a_file_that_changes_under_a_job_does_not_change_its_pool(space, tmp_path, build):
    """The curating process dies once, and all rows are decided on again."""
    config = make_config(tmp_path / "rows.jsonl", is_answered=False)
    write_questions(tmp_path / "rows.jsonl", *ANIMALS)
    name = pool_fingerprint(config, space)
    is_lost = iter((True, False))

    def lose_and_change(metrics: dict[str, float], num_seen: int) -> None:
        if next(is_lost, False):
            write_questions(tmp_path / "rows.jsonl", *FOODS)
            raise AcceptanceLostError("its node went")

    pool = build(space, config, num_replicas=None, log=lose_and_change)
    assert pool.manifest.fingerprint == name
    assert read_words(pool, "file") == list(ANIMALS)
