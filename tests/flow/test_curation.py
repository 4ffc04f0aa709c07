"""What curation adds to a pool: selection, the diversity report, scores, and the chat's control tokens."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from delia.config import MethodConfig
from delia.curate.likelihood import LIKELIHOOD, score_answers
from delia.curate.selection import SelectConfig
from delia.curate.settings import CurateConfig
from delia.curate.stopping import StopConfig
from delia.errors import ConfigError, PoolError
from delia.flow.pool import PoolConfig, build_pool, pool_fingerprint
from delia.flow.workspace import Workspace, open_workspace
from delia.generate.engine import SamplingConfig
from delia.model.loading import load_base
from delia.schema import Message, Row, SeedTask, Task
from delia.starter.world import draw_item
from delia.store.candidates import to_candidate_table
from delia.store.models import ModelConfig
from delia.store.pools import Pool, read_rejections
from delia.store.scores import read_scores
from delia.store.tables import write_table
from delia.synthesize.dialogue import Dialogue
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
QUESTION = (Message(role="user", content="say fox in lingo"), Message(role="assistant", content="ka mu"))
TASK = Task(
    name="t",
    digest="d",
    rows_by_split={"train": (SeedTask(task_id="t0", messages=QUESTION),), "dev": (), "test": ()},
    tokens=("<sep>",),
)
LOOSE = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None)
NUM_CANDIDATES = 64
RNG = random.Random(0)
TEXTS = list(dict.fromkeys(draw_item(RNG).prompt()[-1]["content"] for _ in range(300)))


def make_config(curate: CurateConfig = LOOSE, *, num_rows: int = 12) -> PoolConfig:
    sources = tuple(
        SourceConfig(
            name=name,
            synthesizer=MethodConfig(
                method="delia.methods.synthesizer.magpie.Magpie", knobs={"system": name}
            ),
            num_rows=num_rows // share,
            max_candidates=NUM_CANDIDATES,
        )
        for name, share in (("web", 1), ("self", 2))
    )
    synthesize = SynthesizeConfig(sources=sources, sampling=SamplingConfig(max_tokens=16), chunk_size=16)
    return PoolConfig(synthesize=synthesize, curate=curate)


def write_stored_candidates(
    space: Workspace, change: Callable[[int, str], str] = lambda _, text: text
) -> None:
    """Store candidates of both sources where synthesis would look for them."""
    config = make_config().synthesize
    dialogue = Dialogue(
        sources=config.sources,
        sampling=config.sampling,
        model=space.model,
        max_length=config.max_length,
        task_tokens=dict(space.chat.token_ids),
        tokens=tuple(space.chat.token_ids),
        seed_tasks=space.task.rows_by_split["train"],
    )
    for number, source in enumerate(config.sources):
        recipe = dialogue.part(source.name)[1].recipe
        for start in range(0, NUM_CANDIDATES, config.chunk_size):
            rows = [
                Row(
                    row_id=f"{source.name}-{index}",
                    index=index,
                    source=source.name,
                    messages=(
                        Message(role="user", content=change(index, TEXTS[index + number * 100])),
                        Message(role="assistant", content=f"answer {index % 8}"),
                    ),
                    num_output_tokens=index % 5,
                )
                for index in range(start, start + config.chunk_size)
            ]
            name = f"{start:09d}-{start + config.chunk_size:09d}.parquet"
            spent = pa.array([row.num_output_tokens for row in rows], pa.int64())
            table = to_candidate_table(rows).append_column("spent_output_tokens", spent)
            write_table(space.address("candidates", f"{recipe}/{name}"), table)


def curate(space: Workspace, config: PoolConfig, metrics: dict[str, float] | None = None) -> Pool:
    logged = {} if metrics is None else metrics
    return build_pool(config, space, engine=None, log=lambda values, step: logged.update(values))


@pytest.fixture(autouse=True)
def accept_here(local_acceptance: None) -> None:
    """No test here is about where pools are accepted."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return open_workspace(str(tmp_path_factory.mktemp("curation")), STARTER, TASK)


@pytest.fixture
def space(opened: Workspace, tmp_path: Path) -> Workspace:
    space = dataclasses.replace(opened, output_dir=str(tmp_path))
    write_stored_candidates(space)
    return space


def select_by(method: str, **knobs: object) -> CurateConfig:
    config = SelectConfig(method=f"delia.methods.selector.{method}", knobs=knobs, oversample=2.5)
    return LOOSE.model_copy(update={"select": config})


# ---- the report


def test_every_pool_reports_its_diversity_in_the_manifest_and_the_log(space):
    metrics: dict[str, float] = {}
    pool = curate(space, make_config(), metrics)
    report = pool.manifest.details["diversity"]

    assert (report["num_rows"], report["num_sampled"], report["embedder"]) == (18, 18, "hashed")
    assert report["vendi_score"] == pytest.approx(metrics["curate/vendi_score"], abs=1e-4)
    assert report["distinct"][1] == pytest.approx(metrics["curate/distinct_2"], abs=1e-4)
    assert metrics["curate/diversity_seconds"] > 0
    assert metrics["curate/new_unique_rate"] == 1.0
    assert metrics["curate/estimated_left"] > 0
    assert {name: item["num_candidates"] for name, item in report["novelty"].items()} == {
        "web": 12,
        "self": 6,
    }
    assert set(report["cluster_coverage"]) == {"web", "self"}


def test_a_pool_made_twice_has_one_manifest(space, opened, tmp_path):
    again = dataclasses.replace(opened, output_dir=str(tmp_path / "again"))
    write_stored_candidates(again)
    config = make_config(select_by("k_center.KCenter"))

    assert curate(space, config).manifest == curate(again, config).manifest


# ---- selection


@pytest.mark.parametrize(
    "method", ["k_center.KCenter", "facility_location.FacilityLocation", "stratified.Stratified"]
)
def test_a_selected_pool_has_as_many_rows_of_each_source_out_of_more_accepted_ones(space, method):
    config = make_config(select_by(method))
    pool = curate(space, config)
    rejections = read_rejections(space.address("pools", pool_fingerprint(config, space)))

    for source, num_rows in (("web", 12), ("self", 6)):
        kept = {row.index for row in pool.rows if row.source == source}
        dropped = {item.index for item in rejections if item.source == source}
        assert len(kept) == num_rows
        assert kept | dropped == set(range(int(2.5 * num_rows)))
        assert kept & dropped == set()
    assert pool.manifest.counts == {"accepted": 18, "rejected_not_selected": 27}


def test_a_selected_pool_is_more_diverse_than_the_first_rows(space):
    first = curate(space, make_config()).manifest.details["diversity"]
    selected = curate(space, make_config(select_by("k_center.KCenter"))).manifest.details["diversity"]

    assert selected["vendi_score"] > first["vendi_score"]
    assert selected["nearest_mean"] > first["nearest_mean"]


def test_a_source_that_cannot_accept_enough_to_choose_from_is_an_error_and_no_smaller_choice(space):
    with pytest.raises(PoolError, match="source 'web' gave 64 of 75 rows"):
        curate(space, make_config(select_by("k_center.KCenter"), num_rows=30))


def test_a_source_that_the_stop_rule_ends_says_what_it_has_and_out_of_how_many_it_was_chosen(space):
    """A candidate costs two tokens on average: 40 give 20 rows, of which 12 are kept, and 20 give 10."""
    ends = {}
    for num_tokens in (40, 20):
        stop = StopConfig(max_output_tokens=num_tokens)
        config = make_config(select_by("k_center.KCenter")).model_copy(update={"stop": stop})
        ends[num_tokens] = curate(space, config).manifest.details["stopped"]
    tail = "output tokens, 1.00 of the last instructions new"

    assert ends[40] == {"web": f"tokens: 12 of 12 rows, chosen from 20 accepted ones, not from 30, 40 {tail}"}
    assert ends[20] == {
        "web": f"tokens: 10 of 12 rows, chosen from 10 accepted ones, not from 30, 20 {tail}",
        "self": f"tokens: 6 of 6 rows, chosen from 10 accepted ones, not from 15, 20 {tail}",
    }


def test_a_selector_outside_the_methods_needs_permission(space):
    select = SelectConfig(method="os.path.join")

    with pytest.raises(ConfigError, match="allow it with --allow-module"):
        curate(space, make_config(LOOSE.model_copy(update={"select": select})))


# ---- scores


def test_likelihoods_are_stored_beside_the_pool_and_leave_its_root_as_it_is(space):
    plain = curate(space, make_config())
    scored = make_config(LOOSE.model_copy(update={"score_likelihood": True}))
    pool = curate(space, scored)
    ids = [row.row_id for row in pool.rows]
    scores = read_scores(space.address("pools", pool_fingerprint(scored, space)), ids)

    assert pool.manifest.root == plain.manifest.root
    assert scores[LIKELIHOOD] == pytest.approx(score_answers(load_base(STARTER), space.chat, pool.rows))
    assert read_scores(space.address("pools", pool_fingerprint(make_config(), space)), ids) == {}


# ---- leaks, languages, meanings


def test_a_row_that_spells_a_control_token_of_the_chat_is_kept_out_of_the_pool(opened, tmp_path):
    space = dataclasses.replace(opened, output_dir=str(tmp_path / "leaks"))
    write_stored_candidates(space, lambda i, text: f"{text} <|end|>" if i % 3 == 0 else f"{text} <sep>")
    pool = curate(space, make_config())

    assert pool.manifest.counts == {"accepted": 18, "rejected_template_leak": 6 + 3}
    assert all("<sep>" in row.instruction for row in pool.rows)


def test_semantic_duplicates_are_found_with_the_workspaces_own_model(space):
    by_meaning = LOOSE.model_copy(update={"embedder": "base", "semantic_threshold": 0.9})
    pool = curate(space, make_config(by_meaning))

    assert pool.manifest.counts["rejected_semantic_duplicate"] > 0
    assert pool.manifest.details["diversity"]["embedder"] == "base"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [({"embedder": "no/such/model"}, "which is no directory"), ({"languages": ("xx",)}, "ISO 639-1")],
)
def test_a_setting_that_names_nothing_is_refused_before_anything_is_generated(space, setting, reason):
    config = make_config(LOOSE.model_copy(update=setting))

    with pytest.raises(ConfigError, match=reason):
        curate(space, config)
    assert not Path(space.output_dir, "pools").exists()
