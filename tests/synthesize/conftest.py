"""An engine stage in this process, with batches in any order: what Ray does, without its seconds."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pytest

from delia.generate.engine import EngineConfig, Request, SamplingConfig
from delia.generate.pipeline import EngineActor, FollowUp, _to_table
from delia.rng import make_random
from delia.store.models import ModelConfig


@dataclass
class LocalStage:
    """Stands for `stream_completions`; remembers which requests it answered."""

    order_seed: int | None = None
    answered: list[str] = field(default_factory=list)

    def __call__(
        self,
        requests: Sequence[Request],
        *,
        model: ModelConfig,
        engine: EngineConfig,
        sampling: SamplingConfig,
        end_ids: Sequence[int],
        follow_up: FollowUp | None = None,
    ) -> Iterator[pa.Table]:
        sent = pickle.loads(pickle.dumps(follow_up))  # as to an actor
        actor = EngineActor(model, engine, sampling, tuple(end_ids), sent)
        size = engine.batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        if self.order_seed is not None:
            make_random(self.order_seed).shuffle(batches)
        for batch in batches:
            self.answered += [request.request_id for request in batch]
            yield actor(_to_table(batch))


@pytest.fixture
def local_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalStage]:
    """Put a new local stage in the place of Ray's, and return it."""

    def put(order_seed: int | None = None) -> LocalStage:
        stage = LocalStage(order_seed)
        monkeypatch.setattr("delia.synthesize.pipeline.stream_completions", stage)
        return stage

    return put
