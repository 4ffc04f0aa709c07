"""What tests of whole flows share: a small task, and adapters as training leaves them, without training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from delia.flow.trial import ArmConfig, plan_arm, seal_adapter
from delia.flow.workspace import Workspace, open_workspace
from delia.mix.mixture import MixConfig
from delia.model.adapted import LoraConfig, attach, collect
from delia.model.loading import load_base
from delia.recipes.starter import STARTER
from delia.schema import Message, SeedTask, Task
from delia.store.adapters import write_adapter
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
