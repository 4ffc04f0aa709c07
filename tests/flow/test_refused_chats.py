"""Chats that the template refuses: one candidate's is a rejection with its reason, every candidate's ends the job."""

import dataclasses
import json
from pathlib import Path

import pytest

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.errors import ChatError
from delia.flow.pool import PoolConfig
from delia.flow.workspace import Workspace, open_workspace
from delia.generate.engine import SamplingConfig
from delia.recipes.starter import STARTER
from delia.schema import MAX_REJECTED_TEXT, Message, Messages, SeedTask, Task
from delia.store.tables import exists
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

ALTERNATING = """{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"""
WORDS = ("fox", "cat", "wolf", "owl", "bear", "dog", "hen", "frog")
REFUSED = 2
"""The place of the row that begins with a system's turn."""


def make_chats() -> list[Messages]:
    """Return a question and its answer for each word, one of them under a system's turn."""
    chats: list[Messages] = [
        (Message(role="user", content=f"what of the {word} ?"), Message(role="assistant", content=word))
        for word in WORDS
    ]
    chats[REFUSED] = (Message(role="system", content="be brief"), *chats[REFUSED])
    return chats


@pytest.fixture
def strict_space(tmp_path: Path) -> Workspace:
    """The starter under a template that refuses all but a user's and an assistant's turns by turns."""
    plain = Path("platform/delia/starter/weights/chat_template.jinja").read_text()
    (tmp_path / "strict.jinja").write_text(ALTERNATING + plain)
    train = tuple(SeedTask(task_id=f"t{i}", messages=chat) for i, chat in enumerate(make_chats()))
    rows = {"train": train, "dev": (), "test": ()}
    model = STARTER.model_copy(update={"chat_template": str(tmp_path / "strict.jinja")})
    return open_workspace(str(tmp_path / "runs"), model, Task(name="t", digest="d", rows_by_split=rows))


def make_config(*sources: SourceConfig) -> PoolConfig:
    curate = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)
    synthesize = SynthesizeConfig(sources=sources, sampling=SamplingConfig(max_tokens=64), chunk_size=4)
    return PoolConfig(synthesize=synthesize, curate=curate)


@pytest.mark.parametrize("on", ["local_stage", pytest.param("cluster", marks=pytest.mark.system)])
def test_a_candidate_that_the_template_refuses_is_kept_with_the_reason_and_the_others_are_answered(
    on, request, strict_space, tmp_path, build, read_back
):
    if on == "local_stage":
        request.getfixturevalue(on)()
    else:
        request.getfixturevalue(on)
    answers = SourceConfig(
        name="answers",
        synthesizer=MethodConfig(method="delia.methods.synthesizer.answering.Answering"),
        num_rows=len(WORDS) - 2,  # one answer is empty
        max_candidates=len(WORDS),
    )
    config = make_config(answers)
    pool = build(strict_space, config)
    (refused,) = (item for item in read_back(strict_space, config) if item.reason != "empty")

    assert (refused.source, refused.index, refused.reason) == ("answers", REFUSED, "unrenderable")
    assert "roles must alternate user/assistant" in refused.text
    assert len(refused.text) <= MAX_REJECTED_TEXT
    assert {row.index for row in pool.rows} < {0, 1, 3, 4, 5, 6, 7}
    assert len(pool.rows) == len(WORDS) - 2


def test_an_imported_row_that_the_template_refuses_is_no_row_of_a_pool(
    strict_space, local_acceptance, tmp_path, build, read_back
):
    rows = [{"messages": [dataclasses.asdict(turn) for turn in chat]} for chat in make_chats()]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = TaskConfig(path=str(tmp_path / "rows.jsonl"))
    config = make_config(SourceConfig(name="file", rows=path, num_rows=len(WORDS) - 1))
    pool = build(strict_space, config, num_replicas=None)
    (refused,) = read_back(strict_space, config)

    assert (refused.source, refused.index, refused.reason) == ("file", REFUSED, "unrenderable")
    assert "roles must alternate user/assistant" in refused.text
    assert [row.index for row in pool.rows] == [0, 1, 3, 4, 5, 6, 7]


def test_a_later_turn_that_the_template_refuses_is_rejected_with_what_it_cost(
    strict_space, local_stage, build, read_back, monkeypatch
):
    """Every second candidate is answered under a system's turn, which the template refuses."""
    ask = (
        Message(role="user", content="name the colour of the red fox , the grey wolf and the black cat ."),
    )
    monkeypatch.setattr(
        "delia.methods.synthesizer.magpie.Magpie.__call__",
        lambda self, context, index, said: (
            context.answer(index, said, before=(Message(role="system", content="be brief"),) * (index % 2))
            if said
            else context.ask(index, ask, turn="instruction")
        ),
    )
    local_stage()
    method = MethodConfig(method="delia.methods.synthesizer.magpie.Magpie")
    config = make_config(SourceConfig(name="web", synthesizer=method, num_rows=3, max_candidates=64))
    pool = build(strict_space, config)
    refused = [item for item in read_back(strict_space, config) if item.reason == "unrenderable"]

    assert refused
    assert {item.index % 2 for item in refused} == {1}
    assert {row.index % 2 for row in pool.rows} == {0}
    assert all(item.num_output_tokens > 0 for item in refused)


def test_what_the_template_refuses_of_every_candidate_is_an_error_before_anything_is_generated(
    strict_space, local_stage, build
):
    stage = local_stage()
    method = MethodConfig(method="delia.methods.synthesizer.magpie.Magpie", knobs={"system": "be brief"})
    config = make_config(SourceConfig(name="web", synthesizer=method, num_rows=3))

    with pytest.raises(ChatError, match=r"^source 'web': no candidate of it .* alternate .* `chat_template`"):
        build(strict_space, config)
    assert stage.answered == []
    assert not exists(strict_space.address("candidates", ""))
