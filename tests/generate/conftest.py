"""What both modules of engines share: requests on the starter, and one vLLM that is started once."""

from collections.abc import Callable, Iterator

import pytest
import ray

from delia.chat import ChatEncoder, load_chat
from delia.generate.engine import Completion, Engine, EngineConfig, Request, build_engine
from delia.rng import derive_seed
from delia.schema import Message
from delia.starter.world import draw_held_out
from delia.store.models import ModelConfig, resolve_model

STARTER = ModelConfig(path="package://delia.starter/weights")


@pytest.fixture(scope="session")
def chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)))


class HostedEngine:
    """An engine in an actor: vLLM wants a process of its own, this one has imported all there is."""

    def __init__(self, host) -> None:
        self._host = host

    def generate(self, requests, sampling, *, end_ids):
        return ray.get(self._host.generate.remote(list(requests), sampling, tuple(end_ids)))


@pytest.fixture(scope="session")
def vllm_engine(cluster) -> Iterator[Engine]:
    """vLLM on the starter; it lives as long as the session, so it takes no logical CPU from other tests."""

    @ray.remote(num_cpus=0)
    class Host:
        def __init__(self, model, config):
            self._engine = build_engine(model, config)

        def generate(self, requests, sampling, end_ids):
            return self._engine.generate(requests, sampling, end_ids=end_ids)

    config = EngineConfig(kind="vllm", max_model_len=256, max_num_seqs=64, lora_rank=8)
    host = Host.options(max_concurrency=4).remote(STARTER, config)
    yield HostedEngine(host)
    ray.kill(host)


@pytest.fixture(scope="session")
def questions() -> tuple[str, ...]:
    """Questions of the starter's world that its training never showed."""
    return tuple(item.prompt()[-1]["content"] for item in draw_held_out("engines", num_items=24))


@pytest.fixture(scope="session")
def requests(chat: ChatEncoder, questions: tuple[str, ...]) -> list[Request]:
    return [
        Request(
            request_id=f"r{place}",
            prompt_ids=tuple(chat.encode_prompt((Message(role="user", content=text),))),
            seed=derive_seed("engines", place),
        )
        for place, text in enumerate(questions)
    ]


@pytest.fixture(scope="session")
def count_changed() -> Callable[[list[Completion], list[Completion]], int]:
    """Return a function that counts the completions whose ids differ between two lists."""

    def count(some: list[Completion], other: list[Completion]) -> int:
        return sum(a.token_ids != b.token_ids for a, b in zip(some, other, strict=True))

    return count
