"""Candidates by chunk: in index order, kept, found again, and equal however they were made."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from delia.config import MethodConfig
from delia.errors import ConfigError, StoreError
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.rng import hash_text
from delia.schema import Message, Row, SeedTask
from delia.store.candidates import Candidate
from delia.store.models import ModelConfig
from delia.store.tables import list_names, read_table, write_table
from delia.synthesize.dialogue import Dialogue
from delia.synthesize.pipeline import StoredChunk, Synthesis, plan_chunks
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
MAGPIE = "delia.methods.synthesizer.magpie.Magpie"
ENGINE = EngineConfig(kind="scripted")
SYSTEM = "name the colour of the red fox , the grey wolf and the black cat ."
SEED = SeedTask(
    task_id="t0",
    phrasing="in lingo",
    messages=(Message(role="user", content="say fox in lingo"), Message(role="assistant", content="ka mu")),
)


def make_source(
    name: str = "magpie", *, system: str = SYSTEM, num_rows: int = 10, **fields: int
) -> SourceConfig:
    method = MethodConfig(method=MAGPIE, knobs={"system": system})
    return SourceConfig(name=name, synthesizer=method, num_rows=num_rows, **fields)


def make_config(*sources: SourceConfig, chunk_size: int = 8, max_tokens: int = 16) -> SynthesizeConfig:
    sampling = SamplingConfig(max_tokens=max_tokens)
    return SynthesizeConfig(sources=sources or (make_source(),), sampling=sampling, chunk_size=chunk_size)


def make_dialogue(config: SynthesizeConfig, **fields: object) -> Dialogue:
    own = {"model": STARTER, "seed_tasks": (SEED,), "max_length": config.max_length, **fields}
    return Dialogue(sources=config.sources, sampling=config.sampling, **own)


def run(config: SynthesizeConfig, address: Path, *, engine: EngineConfig | None = ENGINE, **fields: object):
    dialogue = make_dialogue(config, **fields)
    synthesis = Synthesis(dialogue, chunk_size=config.chunk_size, address=str(address))
    yield from synthesis.read_stored()
    if engine is not None:
        yield from synthesis.generate(engine)


def flatten(chunks: Iterable[StoredChunk]) -> list[Candidate]:
    return [candidate for chunk in chunks for candidate in chunk.read().candidates]


def find_recipe(config: SynthesizeConfig, **fields: object) -> str:
    return make_dialogue(config, **fields).part(config.sources[0].name)[1].recipe


# ---- chunks


def test_chunks_of_one_source_cover_four_candidates_a_row_without_gap_or_overlap():
    chunks = plan_chunks([make_source(num_rows=10)], 8)

    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(s, s + 8) for s in range(0, 40, 8)]
    assert chunks[1].name == "000000008-000000016.parquet"


def test_max_candidates_bounds_the_chunks_in_whole_chunks():
    chunks = plan_chunks([make_source(max_candidates=17)], 8)

    assert [chunk.stop for chunk in chunks] == [8, 16, 24]


def test_chunks_of_two_sources_are_interleaved_in_proportion_to_their_rows():
    chunks = plan_chunks([make_source("a", num_rows=20), make_source("b", num_rows=10)], 8)

    assert [chunk.source for chunk in chunks[:6]] == ["a", "b", "a", "a", "b", "a"]
    assert [sum(chunk.source == name for chunk in chunks) for name in "ab"] == [10, 5]


@pytest.mark.parametrize("order_seed", [None, 1, 2, 3])
def test_candidates_come_in_index_order_whichever_batch_is_done_first(local_stage, tmp_path, order_seed):
    local_stage(order_seed)
    config = make_config(make_source("a"), make_source("b", system="the owl"))
    chunks = list(run(config, tmp_path))

    for name in "ab":
        assert [item.index for item in flatten(chunks) if item.source == name] == list(range(40))
    assert all({item.source for item in chunk.read().candidates} == {chunk.source} for chunk in chunks)


def test_candidates_are_equal_in_any_order_and_in_chunks_of_any_size(local_stage, tmp_path):
    results = []
    for order_seed, size in ((None, 8), (5, 8), (6, 20)):
        local_stage(order_seed)
        results.append(flatten(list(run(make_config(chunk_size=size), tmp_path / f"{order_seed}"))))

    assert results[0] == results[1] == results[2]
    assert sum(isinstance(item, Row) for item in results[0]) > 10


def test_a_reader_that_stops_ends_generation_and_keeps_what_is_whole(local_stage, tmp_path):
    stage = local_stage()
    chunks = run(make_config(), tmp_path)
    next(chunks)
    chunks.close()

    assert {int(name.partition(":")[2]) for name in stage.answered} == set(range(8))
    assert list_names(str(tmp_path / find_recipe(make_config()))) == ["000000000-000000008.parquet"]


# ---- stored candidates


def test_a_stored_chunk_is_not_generated_again(local_stage, tmp_path):
    local_stage()
    first = flatten(list(run(make_config(), tmp_path)))
    folder = tmp_path / find_recipe(make_config())
    for path in sorted(folder.iterdir())[1::2]:
        path.unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    stage = local_stage(4)
    again = flatten(list(run(make_config(), tmp_path)))

    assert again == first
    assert {int(name.partition(":")[2]) for name in stage.answered} == {*range(8, 16), *range(24, 32)}
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


def test_without_an_engine_what_is_stored_is_yielded_up_to_the_first_gap_and_nothing_is_generated(
    local_stage, tmp_path
):
    local_stage()
    first = flatten(list(run(make_config(), tmp_path)))
    stage = local_stage()
    (tmp_path / find_recipe(make_config()) / "000000024-000000032.parquet").unlink()

    assert flatten(list(run(make_config(), tmp_path, engine=None))) == first[:24]
    assert list(run(make_config(), tmp_path / "other", engine=None)) == []
    assert stage.answered == []


def test_what_a_killed_job_left_half_written_is_not_taken_for_a_chunk(local_stage, tmp_path):
    folder = tmp_path / find_recipe(make_config())
    folder.mkdir()
    (folder / "000000000-000000008.parquet.partial-77").write_bytes(b"PAR1")
    stage = local_stage()

    assert len(flatten(list(run(make_config(), tmp_path)))) == 40
    assert len(set(stage.answered)) == 40


def test_a_chunk_that_lacks_candidates_is_named_and_not_taken(local_stage, tmp_path):
    local_stage()
    list(run(make_config(), tmp_path))
    short = tmp_path / find_recipe(make_config()) / "000000008-000000016.parquet"
    write_table(str(short), read_table(str(short)).slice(0, 5))
    chunks = list(run(make_config(), tmp_path))

    assert len(chunks[0].read().candidates) == 8
    with pytest.raises(
        StoreError, match=f"'{short}' holds 5 candidates of 8; remove it and run its job again"
    ):
        chunks[1].read()


def test_a_larger_pool_under_another_name_reuses_the_chunks_and_its_rows_bear_its_name(local_stage, tmp_path):
    local_stage()
    first = flatten(list(run(make_config(), tmp_path)))
    stage = local_stage()
    renamed = make_config(make_source("self", num_rows=12))
    again = flatten(list(run(renamed, tmp_path)))

    assert {int(name.partition(":")[2]) for name in stage.answered} == set(range(40, 48))
    assert {item.source for item in again} == {"self"}
    assert [item.row_id for item in again[:40]] == [item.row_id for item in first]


# ---- identity


def test_a_row_id_is_the_hash_of_its_recipe_and_its_index(local_stage, tmp_path):
    local_stage()
    recipe = find_recipe(make_config())
    candidates = flatten(list(run(make_config(), tmp_path)))

    assert [item.row_id for item in candidates] == [hash_text(recipe, str(index)) for index in range(40)]


def test_rows_and_rejections_carry_their_source_their_reason_and_their_cost(local_stage, tmp_path):
    local_stage()
    candidates = flatten(list(run(make_config(), tmp_path)))
    chat = make_dialogue(make_config()).part("magpie")[1].chat
    rows = [item for item in candidates if isinstance(item, Row)]
    rejections = [item for item in candidates if not isinstance(item, Row)]

    assert len(rows) > 10
    unfinished = [item for item in rejections if item.reason == "unfinished"]
    assert len(unfinished) > 0
    assert {item.num_output_tokens for item in unfinished} == {16}
    assert all(item.num_output_tokens > 0 for item in rejections)
    for row in rows:
        assert [message.role for message in row.messages] == ["system", "user", "assistant"]
        assert row.messages[0].content == SYSTEM
        assert row.num_prompt_tokens == len(chat.encode_prompt(row.messages[:-1]))
        if row.finish_reason == "stop":
            assert row.num_output_tokens == sum(chat.encode_chat(row.messages).loss_mask)
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    assert all(before.index < after.index for before, after in pairwise(candidates))


# ---- settings


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ([], "sources"),
        ([make_source("a"), make_source("a", system="x")], r"names of their own, got \['a', 'a'\]"),
        ([make_source("a"), make_source("b")], "one method with equal knobs give the same rows"),
    ],
)
def test_sources_that_can_not_be_told_apart_are_refused(sources, reason):
    with pytest.raises(ValidationError, match=reason):
        SynthesizeConfig(sources=tuple(sources))


@pytest.mark.parametrize(
    "fields", [{"name": "a:b"}, {"name": ""}, {"name": "task"}, {"num_rows": 0}, {"max_candidates": 0}]
)
def test_a_source_without_a_usable_name_or_number_is_refused(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        SourceConfig(**{"name": "a", "synthesizer": MethodConfig(method=MAGPIE), "num_rows": 1, **fields})


def test_a_method_outside_the_methods_is_refused_before_anything_is_generated(local_stage, tmp_path):
    stage = local_stage()
    source = SourceConfig(name="a", synthesizer=MethodConfig(method="os.getcwd"), num_rows=1)

    with pytest.raises(ConfigError, match="--allow-module os"):
        list(run(make_config(source), tmp_path))
    assert stage.answered == []
    assert list_names(str(tmp_path)) == []
