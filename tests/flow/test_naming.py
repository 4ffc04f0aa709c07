"""Names of pools and adapters: other weights, templates, embedders or method texts make another, places do not."""

import dataclasses
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from delia.config import MethodConfig
from delia.curate.settings import CurateConfig
from delia.errors import ConfigError
from delia.flow import trial
from delia.flow.pool import PoolConfig, pool_fingerprint
from delia.flow.trial import ArmConfig, plan_arm
from delia.flow.workspace import Workspace
from delia.mix.mixture import MixConfig
from delia.store.models import ModelConfig
from delia.synthesize.sources import SourceConfig, SynthesizeConfig
from delia.train.settings import StageConfig, TrainConfig

MAGPIE = "delia.methods.synthesizer.magpie.Magpie"
OWN = """from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Own:
    request: str = "Write a question."
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The starter's directory, to be changed."""
    folder = tmp_path / "weights"
    shutil.copytree(Path("platform/delia/starter/weights").resolve(), folder)
    return folder


def make_pool(method: str = MAGPIE, *, model: ModelConfig | None = None, **knobs: object) -> PoolConfig:
    source = SourceConfig(
        name="web", synthesizer=MethodConfig(method=method, knobs=knobs), model=model, num_rows=8
    )
    return PoolConfig(synthesize=SynthesizeConfig(sources=(source,)))


def change_last_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})


def test_a_teacher_is_its_weights_its_dtype_and_its_template_wherever_it_lies(opened, weights, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")

    def name(folder: Path = weights, **settings: object) -> str:
        return pool_fingerprint(make_pool(model=ModelConfig(path=str(folder), **settings)), opened)

    change_last_tensor(weights)
    names = [name(), name(dtype="bfloat16"), name(chat_template=str(template))]
    template.write_text("{{ messages }}.")
    names.append(name(chat_template=str(template)))
    shutil.copytree(weights, tmp_path / "moved")
    change_last_tensor(weights)
    names.append(name())
    assert len(set(names)) == len(names)
    assert name(tmp_path / "moved") == names[0]


def test_the_base_is_read_in_a_dtype(opened):
    half = dataclasses.replace(opened, model=opened.model.model_copy(update={"dtype": "bfloat16"}))
    assert pool_fingerprint(make_pool(), half) != pool_fingerprint(make_pool(), opened)


def test_an_embedder_is_what_lies_in_its_directory(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("delia.flow.naming.check_embedder", lambda name: None)  # it need not be installed
    embedder = tmp_path / "embedder"
    embedder.mkdir()
    save_file({"weight": torch.zeros(8)}, embedder / "model.safetensors")
    config = make_pool().model_copy(update={"curate": CurateConfig(embedder=str(embedder))})
    before = pool_fingerprint(config, opened)
    save_file({"weight": torch.ones(8)}, embedder / "model.safetensors")
    assert pool_fingerprint(config, opened) != before


def test_a_default_that_is_spelled_out_is_the_same_knob(opened):
    assert pool_fingerprint(make_pool(answered_by=""), opened) == pool_fingerprint(make_pool(), opened)
    assert pool_fingerprint(make_pool(system="be short"), opened) != pool_fingerprint(make_pool(), opened)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of a user's, importable as `own_method_of_a_user`."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "own_method_of_a_user.py"
    module.write_text(OWN)
    monkeypatch.delitem(sys.modules, module.stem, raising=False)
    return module


def test_who_changes_the_text_of_a_method_gets_another_pool(opened: Workspace, own_module: Path):
    def name() -> str:
        config = make_pool(f"{own_module.stem}.Own")
        return pool_fingerprint(config, opened, allowed_modules=(own_module.stem,))

    before = name()
    assert name() == before
    own_module.write_text(OWN.replace("question", "hard question"))
    assert name() != before


def test_a_method_that_is_not_allowed_is_not_imported_to_be_named(opened, own_module):
    with pytest.raises(ConfigError, match="allow it with --allow-module own_method_of_a_user"):
        pool_fingerprint(make_pool(f"{own_module.stem}.Own"), opened)
    assert own_module.stem not in sys.modules


def test_a_teacher_that_is_the_base_is_refused_beside_it(opened: Workspace, weights: Path):
    method = MethodConfig(method=MAGPIE)
    teacher = ModelConfig(path=str(weights))
    sources = (
        SourceConfig(name="web", synthesizer=method, num_rows=8),
        SourceConfig(name="taught", synthesizer=method, num_rows=8, model=teacher),
    )
    with pytest.raises(ConfigError, match="sources 'web' and 'taught' give the same rows: one method"):
        pool_fingerprint(PoolConfig(synthesize=SynthesizeConfig(sources=sources)), opened)

    change_last_tensor(weights)
    assert pool_fingerprint(PoolConfig(synthesize=SynthesizeConfig(sources=sources)), opened)


def test_who_changes_the_text_of_a_weighter_gets_another_adapter(opened: Workspace, own_module: Path):
    def name() -> str:
        train = TrainConfig(
            stages=(StageConfig(max_steps=1),), token_weighter=MethodConfig(method=f"{own_module.stem}.Own")
        )
        arm = ArmConfig(mix=MixConfig(diverse_ratio=0.0), train=train)
        return plan_arm(arm, opened, None, allowed_modules=(own_module.stem,)).fingerprint

    before = name()
    assert name() == before
    own_module.write_text(OWN.replace("question", "hard question"))
    assert name() != before


def test_arms_of_one_name_are_one_training(opened: Workspace, monkeypatch: pytest.MonkeyPatch):
    """They would write one directory of checkpoints side by side."""
    trained, sealed = [], []
    monkeypatch.setattr(trial, "build_input", lambda arm, *args, **options: (arm.fingerprint, {}))
    monkeypatch.setattr(trial, "forward_log", lambda log, **options: nullcontext(log))
    remote = SimpleNamespace(remote=lambda task, *args: trained.append(task) or len(trained))
    monkeypatch.setattr(trial, "_train_remotely", remote)
    waiting = SimpleNamespace(wait=lambda refs, num_returns: (refs[:1], refs[1:]), get=lambda ref: None)
    monkeypatch.setattr(trial, "ray", waiting)
    monkeypatch.setattr(trial, "seal_adapter", lambda arm, *args, **options: sealed.append(arm.address))
    monkeypatch.setattr(trial, "read_adapter", lambda address: address)
    stages = (StageConfig(max_steps=1),)
    arms = {
        name: plan_arm(
            ArmConfig(
                mix=MixConfig(diverse_ratio=0.0),
                train=TrainConfig(stages=stages, seed=seed, num_workers=num_workers),
            ),
            opened,
            None,
        )
        for name, seed, num_workers in (("plain", 0, 1), ("other", 1, 1), ("main", 0, 2))
    }
    adapters = trial.train_arms(
        arms, opened, None, logs=dict.fromkeys(arms, lambda metrics, step: None), max_concurrent=2
    )

    assert trained == [arms["plain"].fingerprint, arms["other"].fingerprint]
    assert sealed == [arms["plain"].address, arms["other"].address]
    assert adapters == {name: arm.address for name, arm in arms.items()}
