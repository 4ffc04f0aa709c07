"""What tests of whole flows share: a small task, adapters as training leaves them, and small pools."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.flow.pool import LogMetrics, PoolConfig, build_pool, pool_fingerprint
from delia.flow.trial import ArmConfig, plan_arm, seal_adapter
from delia.flow.workspace import Workspace, open_workspace
from delia.generate.engine import EngineConfig, SamplingConfig
from delia.mix.mixture import MixConfig
from delia.model.adapted import LoraConfig, attach, collect
from delia.model.loading import load_base
from delia.recipes.starter import STARTER
from delia.schema import Message, Rejection, SeedTask, Task
from delia.store.adapters import write_adapter
from delia.store.pools import Pool, read_rejections
from delia.synthesize.sources import SourceConfig, SynthesizeConfig
from delia.train.settings import StageConfig, TrainConfig

LORA = LoraConfig(rank=2, alpha=2, dropout=0.0)


def make_rows(suite: str, num_rows: int, *, first: int = 0) -> tuple[SeedTask, ...]:
    """Return rows of one suite, two to a wording."""
    return tuple(
        SeedTask(
            task_id=f"{suite}-{i}",
            messages=(
                Message(role="user", content=f"{suite} {i} : say it in the <sep> format ."),
                Message(role="assistant", content=f"it {i}"),
            ),
            suite=suite,
            phrasing=f"wording {i // 2}",
        )
        for i in range(first, first + num_rows)
    )


@pytest.fixture
def small_task() -> Task:
    """Four rows to train on, and two suites of four rows in dev and in test."""
    rows = {
        "train": make_rows("follow", 4),
        "dev": make_rows("follow", 4, first=10) + make_rows("general", 4, first=10),
        "test": make_rows("follow", 4, first=20) + make_rows("general", 4, first=20),
    }
    return Task(name="small", digest="d", rows_by_split=rows, tokens=("<sep>",), long_instruction="say it")


@pytest.fixture
def small_space(small_task, tmp_path) -> Workspace:
    """The small task on the starter."""
    return open_workspace(str(tmp_path / "runs"), STARTER, small_task)


@pytest.fixture
def make_adapter() -> Callable[..., str]:
    """Leave a finished adapter in a workspace; `shift` is the noise on all that is trained."""

    def make(space: Workspace, *, shift: float, seed: int = 0) -> str:
        train = TrainConfig(lora=LORA, stages=(StageConfig(max_steps=1),), seed=seed)
        arm = plan_arm(ArmConfig(mix=MixConfig(diverse_ratio=0.0), train=train), space, None)
        model = attach(load_base(STARTER), lora=LORA, token_ids=tuple(space.chat.token_ids.values()))
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        noise = torch.Generator().manual_seed(seed)
        moved = {
            name: value + shift * torch.randn(value.shape, generator=noise) for name, value in trained.items()
        }
        tensors = collect(model, moved if shift else trained, scaling=1.0)
        write_adapter(Path(arm.address), tensors, vocab_size=model.config.vocab_size, base_model=STARTER.path)
        seal_adapter(arm, space)
        return arm.address

    return make


# ---- pools


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A task of one row on the starter."""
    question = (Message(role="user", content="say fox in lingo"), Message(role="assistant", content="ka mu"))
    rows = {"train": (SeedTask(task_id="t0", messages=question),), "dev": (), "test": ()}
    task = Task(name="t", digest="d", rows_by_split=rows)
    return open_workspace(str(tmp_path_factory.mktemp("pool")), STARTER, task)


@pytest.fixture
def space(opened: Workspace, tmp_path: Path) -> Workspace:
    """The workspace `opened` with nothing in it."""
    return dataclasses.replace(opened, output_dir=str(tmp_path))


@pytest.fixture(scope="session")
def make_config() -> Callable[..., PoolConfig]:
    """Return a function of settings: a pool of two sources by Magpie, `self` half as large as `web`."""
    loose = CurateConfig(near_duplicate_threshold=None, overlap_ngram=None, max_repeated_share=None)
    system = "name the colour of the red fox , the grey wolf and the black cat ."

    def make(
        *,
        num_rows: int = 24,
        max_candidates: int | None = None,
        curate: CurateConfig = loose,
        max_tokens: int = 16,
    ) -> PoolConfig:
        sources = tuple(
            SourceConfig(
                name=name,
                synthesizer=MethodConfig(
                    method="delia.methods.synthesizer.magpie.Magpie", knobs={"system": f"{system} {name}"}
                ),
                num_rows=num_rows // share,
                max_candidates=max_candidates,
            )
            for name, share in (("web", 1), ("self", 2))
        )
        sampling = SamplingConfig(max_tokens=max_tokens)
        synthesize = SynthesizeConfig(sources=sources, sampling=sampling, chunk_size=8)
        return PoolConfig(synthesize=synthesize, curate=curate)

    return make


@pytest.fixture(scope="session")
def build(make_config: Callable[..., PoolConfig]) -> Callable[..., Pool]:
    """Return a function that makes a pool with scripted engines; `num_replicas=None` starts none."""

    def build(
        space: Workspace,
        config: PoolConfig | None = None,
        *,
        num_replicas: int | None = 1,
        log: LogMetrics = lambda metrics, step: None,
    ) -> Pool:
        engine = None if num_replicas is None else EngineConfig(kind="scripted", num_replicas=num_replicas)
        return build_pool(config or make_config(), space, engine=engine, log=log)

    return build


@pytest.fixture(scope="session")
def read_back(make_config: Callable[..., PoolConfig]) -> Callable[..., list[Rejection]]:
    """Return a function that reads the rejections of a pool that was built."""

    def read(space: Workspace, config: PoolConfig | None = None) -> list[Rejection]:
        return read_rejections(space.address("pools", pool_fingerprint(config or make_config(), space)))

    return read
