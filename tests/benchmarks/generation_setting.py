"""What all ways of generating are given: model, sampling, the same questions, and the rules of curation.

world --draw_questions--> different questions --accept_questions--> those that curation accepts --> a file
answers --count_accepted--> unique rows that the same rules accept of them
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from delia.curate.settings import CurateConfig
from delia.flow.curation import open_curation
from delia.flow.pool import PoolConfig, build_pool
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.rng import make_random
from delia.schema import Message, Row
from delia.starter.world import draw_item
from delia.store.models import ModelConfig
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

MODEL = ModelConfig(path="package://delia.starter/weights")
SAMPLING = SamplingConfig(max_tokens=96)
ENGINE = EngineConfig(num_replicas=1, max_model_len=512)
# a tiny world's sentences share most of their words: at 0.95 few are near duplicates
CURATE = CurateConfig(near_duplicate_threshold=0.95)
# base's states of two questions have a median cosine of 0.869; one question in 200 has another one this near
STRICT = CURATE.model_copy(
    update={
        "languages": ("en",),
        "reject_refusals": True,
        "embedder": "base",
        "semantic_threshold": 0.9999,
    }
)
"""Every rule of curation, those that are off by default too."""
LLM_OPTIONS = {"max_model_len": 512, "max_num_seqs": ENGINE.max_num_seqs, "dtype": "float32"}
DRAWN_PER_PROMPT = 3
"""Questions that are drawn for each that is asked; curation accepts one of two or three."""


@dataclass(frozen=True)
class Answers:
    """What a peer gave: seconds, output tokens with the end tokens, and an answer for each prompt in order."""

    start_seconds: float
    seconds: float
    output_tokens: int
    texts: Sequence[str]
    finish_reasons: Sequence[str]


def draw_questions(count: int) -> list[str]:
    """Return different questions of the starter's world."""
    rng = make_random("bench questions")
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw_item(rng).prompt()[-1]["content"]] = None
    return list(found)


def write_questions(questions: Sequence[str], path: Path) -> None:
    """Write questions as a file of rows, which a pool may take for a source."""
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "-"}]}
        for text in questions
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))


def give_source(path: Path, num_rows: int) -> SourceConfig:
    """Return a source that is a file of questions, or the first accepted ones of them."""
    return SourceConfig(name="given", rows=TaskConfig(path=str(path)), num_rows=num_rows)


def accept_questions(num_prompts: int, space: Workspace, folder: Path) -> list[str]:
    """Return different questions that curation accepts, in order: what all are asked to answer."""
    path = folder / "drawn.jsonl"
    write_questions(draw_questions(DRAWN_PER_PROMPT * num_prompts), path)
    config = PoolConfig(synthesize=SynthesizeConfig(sources=(give_source(path, num_prompts),)), curate=CURATE)
    pool = build_pool(config, space, engine=None, log=lambda metrics, step: None)
    return [row.instruction for row in pool.rows]


def count_accepted(questions: Sequence[str], answers: Answers, space: Workspace) -> int:
    """Return the unique rows that the rules accept of a peer's answers."""
    curation = open_curation(CURATE, space, num_rows={"answers": len(questions)}, eval_rows=())
    curator = curation.curators["answers"]
    given = zip(questions, answers.texts, answers.finish_reasons, strict=True)
    curator.feed(
        Row(
            row_id=str(place),
            index=place,
            source="answers",
            messages=(Message(role="user", content=question), Message(role="assistant", content=text)),
            finish_reason=reason,
        )
        for place, (question, text, reason) in enumerate(given)
    )
    return curator.num_accepted
