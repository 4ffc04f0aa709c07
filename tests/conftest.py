"""The environment of every test and of every worker that a test starts."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    HF_HUB_DISABLE_TELEMETRY="1",
)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One Ray cluster of 4 logical CPUs for all tests that need one; it starts once."""
    import ray  # late: most tests need none

    from delia.flow.workspace import RayConfig, connect

    connect(RayConfig(num_cpus=4))
    yield
    ray.shutdown()


@dataclass
class LocalStage:
    """Stands for `run_script` in this process, with blocks in any order; remembers what it answered."""

    order_seed: int | None = None
    answered: list[str] = field(default_factory=list)

    def __call__(
        self,
        script: Any,
        blocks: Sequence[Any],
        *,
        model: Any,
        engine: Any,
        sampling: Any,
        end_ids: Sequence[int],
    ) -> Iterator[Any]:
        import pyarrow as pa  # late, as all of this platform: an import of `delia` may be under test

        from delia.generate.engine import build_engine
        from delia.generate.pipeline import ENGINE_SECONDS
        from delia.rng import make_random

        sent = pickle.loads(pickle.dumps(script))  # as to an actor
        scripted = build_engine(model, engine)

        def ask(requests: Sequence[Any]) -> list[Any]:
            self.answered += [request.request_id for request in requests]
            return scripted.generate(requests, sampling, end_ids=end_ids)

        ordered = list(blocks)
        if self.order_seed is not None:
            make_random(self.order_seed).shuffle(ordered)
        for block in ordered:
            table = sent(block, ask)
            yield table.append_column(ENGINE_SECONDS, pa.array([0.5] * table.num_rows, pa.float64()))


@pytest.fixture
def local_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalStage]:
    """Put a new local stage in the place of Ray's, and return it."""

    def put(order_seed: int | None = None) -> LocalStage:
        stage = LocalStage(order_seed)
        monkeypatch.setattr("delia.synthesize.pipeline.run_script", stage)
        return stage

    return put


SHAPES = ("llama", "qwen2", "qwen3", "gemma2", "mistral")


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    """The name of each architecture that is tested, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def make_shape() -> Callable[..., Any]:
    """Return a function of an architecture's name: its smallest random model, in float32.

    Windows are shorter than some rows of a test, heads share keys, and Gemma 2 bounds its scores and logits.
    """
    import torch  # late, as all of these
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(name: str, **settings: Any) -> Any:
        standard = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 128,
            "initializer_range": 0.15,
            "sliding_window": 6,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "tie_word_embeddings": name in {"qwen2", "gemma2"},
        }
        if name == "gemma2":
            standard |= {
                "query_pre_attn_scalar": 8,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
            }
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **(standard | settings), attn_implementation="eager")
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)

    return make
