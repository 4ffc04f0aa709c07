"""Pools of several sources: rounds, files of rows, and where a source ends."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.curate.stopping import StopConfig
from delia.errors import ConfigError, PoolError, TaskFileError
from delia.flow.pool import PoolConfig, build_pool
from delia.flow.supply import check_sources
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.methods.synthesizer.magpie import Magpie
from delia.store.tables import read_table
from delia.store.tasks import TaskConfig
from delia.synthesize.socket import SynthesisContext
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

pytestmark = pytest.mark.usefixtures("local_acceptance")

LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)


def make_source(name: str, method: str | None = None, **fields: object) -> SourceConfig:
    synthesizer = MethodConfig(method=f"delia.methods.synthesizer.{method}") if method else None
    return SourceConfig(name=name, synthesizer=synthesizer, **{"num_rows": 6, **fields})


def make_pool_config(*sources: SourceConfig, stop: StopConfig | None = None) -> PoolConfig:
    synthesize = SynthesizeConfig(sources=sources, sampling=SamplingConfig(max_tokens=16), chunk_size=8)
    return PoolConfig(synthesize=synthesize, curate=LOOSE, stop=stop or StopConfig())


def write_rows(path: Path, *questions: str) -> TaskConfig:
    """Write a file of questions, each answered with its last word."""
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text.split()[-1]}]}
        for text in questions
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return TaskConfig(path=str(path), licence="MIT")


@pytest.fixture
def web_source(make_config) -> SourceConfig:
    return make_config(max_candidates=400).synthesize.sources[0]


def test_a_source_feeds_on_the_accepted_rows_of_a_closed_one(space, local_stage, build, web_source):
    local_stage()
    answers = make_source("answers", "answering.Answering", feeds_on=("web",), num_rows=4, max_candidates=8)
    config = make_pool_config(web_source.model_copy(update={"num_rows": 8}), answers)
    rows = build(space, config).rows
    web = [row for row in rows if row.source == "web"]
    answered = [row for row in rows if row.source == "answers"]

    assert [row.instruction for row in answered] == [web[row.index].instruction for row in answered]
    assert len(answered) == 4
    assert [row.messages[-1] for row in answered] != [web[row.index].messages[-1] for row in answered]


def test_what_a_source_feeds_on_decides_its_recipe(space, local_stage, build, web_source):
    """A larger first round is another one: its second round can't be taken from storage."""
    local_stage()
    answers = make_source("answers", "answering.Answering", feeds_on=("web",), num_rows=4)
    for num_rows in (8, 9):
        config = make_pool_config(web_source.model_copy(update={"num_rows": num_rows}), answers)
        build(space, config)

    assert len(list((Path(space.output_dir) / "candidates").iterdir())) == 1 + 2


def test_rows_of_a_file_become_a_source_in_the_files_order_and_cost_nothing(
    space, tmp_path, build, read_back
):
    rows = write_rows(tmp_path / "rows.jsonl", "the fox", "the owl", "the fox", "the cat")
    config = make_pool_config(make_source("file", rows=rows, num_rows=3))
    pool = build(space, config, num_replicas=None)

    assert [row.instruction for row in pool.rows] == ["the fox", "the owl", "the cat"]
    assert len({row.row_id for row in pool.rows}) == 3
    assert pool.manifest.details["cost"]["output_tokens"] == 0
    assert [(item.reason, item.index) for item in read_back(space, config)] == [("duplicate", 2)]


def test_rows_of_a_file_have_lengths_and_are_held_to_their_limits(space, tmp_path, build, read_back):
    """They cost nothing: a budget of generated tokens does not end their source."""
    rows = write_rows(tmp_path / "rows.jsonl", "the fox", "the owl " * 60, "the cat")
    config = make_pool_config(
        make_source("file", rows=rows, num_rows=2), stop=StopConfig(max_output_tokens=1)
    )
    curate = config.curate.model_copy(update={"max_prompt_tokens": 100})
    config = config.model_copy(update={"curate": curate})
    pool = build(space, config, num_replicas=None)

    assert [row.instruction for row in pool.rows] == ["the fox", "the cat"]
    assert [(item.reason, item.index) for item in read_back(space, config)] == [("too_long", 1)]
    for row in pool.rows:
        assert row.num_prompt_tokens == len(space.chat.encode_prompt(row.messages[:-1]))
        assert row.num_output_tokens == sum(space.chat.encode_chat(row.messages).loss_mask)


def test_a_malformed_row_of_a_file_is_a_rejection_with_its_place_and_ends_no_job(
    space, tmp_path, local_acceptance, build, read_back
):
    rows = write_rows(tmp_path / "rows.jsonl", "the fox", "the owl", "the cat", "the dog")
    lines = Path(rows.path).read_text().split("\n")
    Path(rows.path).write_text("\n".join((lines[0], '{"messages": []}', lines[2], "{", lines[3])))
    config = make_pool_config(make_source("file", rows=rows, num_rows=3))
    check_sources(config, ())
    pool = build(space, config, num_replicas=None)
    rejections = read_back(space, config)

    assert [(row.index, row.instruction) for row in pool.rows] == [
        (0, "the fox"),
        (2, "the cat"),
        (4, "the dog"),
    ]
    assert pool.manifest.counts == {"accepted": 3, "rejected_malformed": 2}
    assert [(item.reason, item.index) for item in rejections] == [("malformed", 1), ("malformed", 3)]
    assert rejections[0].text.startswith(f"{rows.path}: line 2: no user turn")
    assert rejections[1].text.startswith(f"{rows.path}: line 4: not JSON")
    assert len({item.row_id for item in rejections}) == 2


def test_a_file_of_malformed_rows_alone_is_refused_with_the_first(space, tmp_path, local_acceptance, build):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "the fox", "answer": "red"}\n' * 3)
    config = make_pool_config(make_source("file", rows=TaskConfig(path=str(path)), num_rows=3))

    for begin in (
        lambda config: check_sources(config, ()),
        lambda config: build(space, config, num_replicas=None),
    ):
        with pytest.raises(TaskFileError, match=r"line 1: .* fit no layout.*none of the 3 rows"):
            begin(config)


def test_how_much_is_left_is_estimated_of_sources_that_draw_and_not_of_files_or_what_feeds_on_rows(
    space, tmp_path, local_stage, build, web_source
):
    local_stage()
    rows = write_rows(tmp_path / "rows.jsonl", *(f"question {i}" for i in range(20)))
    file = make_source("file", rows=rows, num_rows=20)
    answers = make_source("answers", "answering.Answering", feeds_on=("file",), num_rows=4, max_candidates=8)
    for sources, drawn in (((web_source, file, answers), {"web"}), ((file, answers), set())):
        metrics: dict[str, float] = {}
        pool = build(space, make_pool_config(*sources), log=lambda values, step: metrics.update(values))  # noqa: B023
        novelty = pool.manifest.details["diversity"]["novelty"]
        estimates = {name: item["estimated_distinct"] for name, item in novelty.items()}

        assert {name for name, value in estimates.items() if value is not None} == drawn
        assert {name for name, item in novelty.items() if item["unseen_mass"] is not None} == drawn
        assert all(item["new_unique_rate"] > 0 for item in novelty.values())
        left = sum(estimates[name] - novelty[name]["num_distinct"] for name in drawn)
        assert metrics.get("curate/estimated_left") == (pytest.approx(left, abs=1e-4) if drawn else None)


def test_an_imported_row_is_known_by_its_content_wherever_it_stands(opened, tmp_path, build):
    ids = []
    for number, questions in enumerate((("the fox", "the owl"), ("the owl", "the fox"))):
        space = dataclasses.replace(opened, output_dir=str(tmp_path / str(number)))
        rows = write_rows(tmp_path / "rows.jsonl", *questions)
        pool = build(space, make_pool_config(make_source("f", rows=rows, num_rows=2)), num_replicas=None)
        ids.append({row.instruction: row.row_id for row in pool.rows})

    assert ids[0] == ids[1]


def test_a_source_that_says_nothing_new_ends_early_and_says_so(space, tmp_path, build):
    rows = write_rows(
        tmp_path / "rows.jsonl", *("the fox", "the owl", "the cat", "the dog"), *["the fox"] * 20
    )
    stop = StopConfig(min_new_share=0.3, window=8)
    config = make_pool_config(make_source("file", rows=rows, num_rows=20), stop=stop)
    pool = build(space, config, num_replicas=None)

    assert len(pool.rows) == 4
    assert pool.manifest.counts["rejected_duplicate"] == 6  # 2 of the last 8 are new
    assert pool.manifest.details["stopped"] == {
        "file": "novelty: 4 of 20 rows, 0 output tokens, 0.25 of the last instructions new"
    }


def test_a_budget_of_tokens_ends_a_source_at_a_place_that_its_candidates_decide(
    opened, local_stage, tmp_path, build, read_back, web_source
):
    pools = []
    for order_seed in (None, 3):
        local_stage(order_seed)
        space = dataclasses.replace(opened, output_dir=str(tmp_path / str(order_seed)))
        config = make_pool_config(web_source, stop=StopConfig(max_output_tokens=200))
        pools.append(build(space, config))
    decided = {item.row_id for item in (*pools[0].rows, *read_back(space, config))}
    chunks = [read_table(str(path)) for path in (Path(space.output_dir) / "candidates").rglob("*.parquet")]
    spent = [
        item["spent_output_tokens"]
        for chunk in chunks
        for item in chunk.to_pylist()
        if item["row_id"] in decided
    ]

    assert pools[0].rows == pools[1].rows
    assert 200 <= sum(spent) < 200 + 2 * 16
    assert pools[0].manifest.details["stopped"]["web"].startswith("tokens: ")


def test_a_source_that_ends_with_nothing_is_an_error(space, tmp_path, build):
    rows = write_rows(tmp_path / "rows.jsonl", "the fox")
    config = make_pool_config(make_source("f", rows=rows), stop=StopConfig(window=1, min_new_share=0.5))
    with pytest.raises(PoolError, match="gave 1 of 6 rows before its candidates ran out"):
        build(space, config, num_replicas=None)


def test_a_prompt_without_room_is_a_named_rejection_and_ends_no_job(space, local_stage, build, web_source):
    local_stage()
    config = make_pool_config(web_source.model_copy(update={"num_rows": 100, "max_candidates": 8}))
    short = config.model_copy(update={"synthesize": config.synthesize.model_copy(update={"max_length": 30})})
    with pytest.raises(PoolError, match=r"rejected: {.*'prompt_too_long': \d"):
        build(space, short)


def test_the_engines_own_limit_decides_no_text(opened, local_stage, tmp_path, read_back, web_source):
    local_stage()
    synthesize = make_pool_config(web_source).synthesize.model_copy(update={"max_length": 50})
    config = make_pool_config(web_source).model_copy(update={"synthesize": synthesize})
    roots = []
    for max_model_len in (50, 512):
        space = dataclasses.replace(opened, output_dir=str(tmp_path / str(max_model_len)))
        engine = EngineConfig(kind="scripted", max_model_len=max_model_len)
        roots.append(build_pool(config, space, engine=engine, log=lambda metrics, step: None).manifest.root)
        reasons = Counter(item.reason for item in read_back(space, config))

    assert roots[0] == roots[1]
    assert reasons["unfinished"] + reasons["prompt_too_long"] > 0
    with pytest.raises(ConfigError, match=r"max_length=50 is over engine\.max_model_len=49"):
        engine = EngineConfig(kind="scripted", max_model_len=49)
        build_pool(
            make_pool_config(web_source).model_copy(
                update={"synthesize": synthesize.model_copy(update={"chunk_size": 4})}
            ),
            opened,
            engine=engine,
            log=lambda metrics, step: None,
        )


def test_a_source_that_has_ended_costs_nothing_more_while_another_goes_on(
    space, local_stage, build, make_config, monkeypatch
):
    """`self` is given one row in eight, `web` nearly every one: it ends long before."""
    plain = Magpie.__call__

    def give_few(self: Magpie, context: SynthesisContext, index: int, completions: object) -> object:
        is_lucky = context.source == "web" or index % 8 == 0
        return plain(self, context, index, completions) if is_lucky else context.reject(index, "unlucky", "-")

    monkeypatch.setattr(Magpie, "__call__", give_few)
    config = make_config(max_candidates=400)
    ledgers = []
    for order_seed in (None, 3):
        local_stage(order_seed)
        own = dataclasses.replace(space, output_dir=f"{space.output_dir}/{order_seed}")
        pool = build(own, config)
        last = {row.source: row.index for row in pool.rows}
        seen = 8 * (last["web"] // 8 + 1)
        if order_seed is None:  # blocks come as they were planned
            chunks = list((Path(own.output_dir) / "candidates").rglob("*.parquet"))
            assert len(chunks) == seen // 8 + last["self"] // 8 + 1
        ledgers.append(pool.manifest.details["cost"])

    assert last["web"] < last["self"] / 2
    assert ledgers[0] == ledgers[1]
    assert ledgers[0]["device_seconds"] == 0.5 * (seen + 8 * (last["self"] // 8 + 1))
