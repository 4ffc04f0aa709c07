"""A prompt that ends the engine's process, on real Ray: it is given up, all others are answered."""

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
