"""A base that a job could not load here, or not write back, is refused before any work."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from delia.errors import ConfigError, TrainError
from delia.flow.adapt import open_job
from delia.recipes.starter import STARTER, starter_sep
from delia.store.models import ModelConfig, resolve_model
from delia.train.settings import StageConfig, TrainConfig


def test_a_job_over_a_quantised_base_is_refused_without_a_gpu(tmp_path):
    recipe = starter_sep().model_copy(update={"output_dir": str(tmp_path)})
    quantised = recipe.model.model_copy(update={"quantisation": "nf4"})
    with pytest.raises(ConfigError, match=r"model\.quantisation=nf4 needs a GPU"):
        open_job(recipe.model_copy(update={"model": quantised}))


def test_a_full_tuning_of_a_base_that_could_not_be_written_back_is_refused(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(resolve_model(STARTER), base)
    stages = (StageConfig(max_steps=1, parts=("base",)),)
    arm = starter_sep().arm
    arm = arm.model_copy(update={"train": TrainConfig(lora=None, stages=stages)})
    recipe = starter_sep().model_copy(
        update={"arm": arm, "model": ModelConfig(path=str(base)), "output_dir": str(tmp_path)}
    )
    open_job(recipe)
    weights = load_file(base / "model.safetensors")
    save_file(
        weights | {"model.old.inv_freq": torch.zeros(2)},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(TrainError, match=r"other names \(files alone: \['model\.old\.inv_freq'\]"):
        open_job(recipe)
