"""A prompt that ends the engine's process, on real Ray: it is given up, all others are answered."""

import json
import os
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray

from delia.config import MethodConfig
from delia.flow.pool import PoolConfig, build_pool, pool_fingerprint
from delia.flow.workspace import Workspace
from delia.generate.attempts import Ask
from delia.generate.engine import ENGINE_FAULT, EngineConfig, Request, SamplingConfig, ScriptedConfig
from delia.generate.pipeline import answer_requests, run_script, to_blocks
from delia.schema import Message
from delia.store.models import ModelConfig
from delia.store.pools import Pool, read_rejections
from delia.store.tasks import TaskConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig

driver = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("pool_driver.py"))))
FATAL = 77
STARTER = ModelConfig(path="package://delia.starter/weights")


def collect(engine: EngineConfig, *, fatal: bool) -> dict[str, dict[str, object]]:
    requests = [
        Request(request_id=f"r{place}", prompt_ids=(9, FATAL if fatal and place == 5 else 10, 11), seed=place)
        for place in range(24)
    ]
    tables = run_script(
        answer_requests,
        to_blocks(requests, engine.batch_size),
        model=STARTER,
        engine=engine,
        sampling=SamplingConfig(max_tokens=8),
        end_ids=(2,),
    )
    seconds = ["engine_seconds", "device_seconds"]
    return {row["request_id"]: row for table in tables for row in table.drop_columns(seconds).to_pylist()}


def test_a_fatal_prompt_is_given_up_and_nothing_else_is_lost(cluster):
    engine = EngineConfig(
        kind="scripted", num_replicas=2, batch_size=8, scripted=ScriptedConfig(fatal_id=FATAL)
    )
    answers = collect(engine, fatal=True)
    healthy = collect(engine, fatal=False)

    given_up = answers.pop("r5")
    assert (given_up["finish_reason"], given_up["token_ids"]) == (ENGINE_FAULT, [])
    assert "its process died" in str(given_up["error"])
    del healthy["r5"]
    assert answers == healthy


@dataclass(frozen=True)
class DiesOnce:
    """A script that ends its process at the first block of all, and has `ballast` to be sent with."""

    marker: Path
    ballast: bytes

    def __call__(self, block: pa.Table, ask: Ask) -> pa.Table:
        if not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        return answer_requests(block, ask)


def test_a_replica_is_restarted_also_where_it_was_sent_more_than_fits_its_call(cluster, tmp_path):
    """Ray warns that such arguments may be lost."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    engine = EngineConfig(kind="scripted", batch_size=2)
    requests = [Request(request_id=f"r{place}", prompt_ids=(9, 10, 11), seed=place) for place in range(8)]
    tables = run_script(
        DiesOnce(tmp_path / "died", bytes(10_000_000)),
        to_blocks(requests, engine.batch_size),
        model=STARTER,
        engine=engine,
        sampling=SamplingConfig(max_tokens=8),
        end_ids=(2,),
    )
    answered = [name for table in tables for name in table["request_id"].to_pylist()]

    assert (tmp_path / "died").exists()
    assert sorted(answered) == [request.request_id for request in requests]


# ---- in a pool

ANIMALS = ("fox", "cat", "wolf", "owl", "bear", "dog", "hen", "frog")
LETHAL = 5
"""The place of the candidate that the engine dies of."""


def answer_animals(path: Path, *, num_rows: int) -> PoolConfig:
    """Return a pool of answers to a file of questions, each with a word of its own."""
    turns = [
        [{"role": "user", "content": f"what does the {name} eat ?"}, {"role": "assistant", "content": name}]
        for name in ANIMALS
    ]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    file = SourceConfig(name="file", rows=TaskConfig(path=str(path), licence="MIT"), num_rows=len(ANIMALS))
    answers = SourceConfig(
        name="answers",
        synthesizer=MethodConfig(method="delia.methods.synthesizer.answering.Answering"),
        feeds_on=("file",),
        num_rows=num_rows,
        max_candidates=len(ANIMALS),
    )
    sampling = SamplingConfig(max_tokens=48)  # none is cut
    return PoolConfig(
        synthesize=SynthesizeConfig(sources=(file, answers), sampling=sampling, chunk_size=4),
        curate=driver.POOL.curate,
    )


def find_own_id(space: Workspace) -> int:
    """Return an id that stands in the prompt of the lethal candidate and in no other."""
    prompts = [
        set(space.chat.encode_prompt((Message(role="user", content=f"what does the {name} eat ?"),)))
        for name in ANIMALS
    ]
    return min(prompts.pop(LETHAL).difference(*prompts))


def build(space: Workspace, config: PoolConfig, engine: EngineConfig | None) -> Pool:
    return build_pool(config, space, engine=engine, log=lambda metrics, step: None)


@pytest.mark.system
def test_a_pool_ends_whole_and_keeps_the_candidate_that_was_given_up_with_the_reason(
    cluster, local_stage, tmp_path
):
    space, fresh = (driver.open_space(str(tmp_path / name)) for name in ("faulty", "healthy"))
    faulty = EngineConfig(
        kind="scripted", num_replicas=2, scripted=ScriptedConfig(fatal_id=find_own_id(space))
    )
    config = answer_animals(tmp_path / "rows.jsonl", num_rows=len(ANIMALS) - 1)
    pool = build(space, config, faulty)
    address = space.address("pools", pool_fingerprint(config, space))
    (given_up,) = read_rejections(address)

    assert (given_up.source, given_up.index, given_up.reason) == ("answers", LETHAL, ENGINE_FAULT)
    assert given_up.text == "the engine died of it 3 times: its process died"
    assert pool.manifest.counts == {"accepted": 2 * len(ANIMALS) - 1, "rejected_engine_fault": 1}

    shutil.rmtree(address)
    again = build(space, config, None)  # what was given up is stored, and is not tried again
    assert (again.manifest.root, read_rejections(address)) == (pool.manifest.root, [given_up])

    local_stage()
    everything = answer_animals(tmp_path / "rows.jsonl", num_rows=len(ANIMALS))
    healthy = build(fresh, everything, EngineConfig(kind="scripted"))
    assert pool.rows == tuple(row for row in healthy.rows if (row.source, row.index) != ("answers", LETHAL))
