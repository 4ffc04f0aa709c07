"""A prompt that ends the engine's process, on real Ray: it is given up, all others are answered."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray

from delia.generate.attempts import Ask
from delia.generate.engine import ENGINE_FAULT, EngineConfig, Request, SamplingConfig, ScriptedConfig
from delia.generate.pipeline import answer_requests, run_script, to_blocks
from delia.store.models import ModelConfig

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
    return {
        row["request_id"]: row for table in tables for row in table.drop_columns("engine_seconds").to_pylist()
    }


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
