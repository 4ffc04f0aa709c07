"""A base that a job could not load here, or not write back, is refused before any work."""

import json
import re
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


def test_shards_that_no_head_fits_into_are_refused_with_the_numbers_that_do(tmp_path):
    """The starter has 6 heads, of keys 3; a teacher is held to the same."""
    recipe = starter_sep().model_copy(update={"output_dir": str(tmp_path)})
    teacher = tmp_path / "teacher"
    shutil.copytree(resolve_model(STARTER), teacher)
    source, *others = recipe.pool.synthesize.sources
    taught = source.model_copy(update={"model": ModelConfig(path=str(teacher))})
    synthesize = recipe.pool.synthesize.model_copy(update={"sources": (taught, *others)})
    recipe = recipe.model_copy(update={"pool": recipe.pool.model_copy(update={"synthesize": synthesize})})

    def open_with(size: int) -> None:
        shards = {"tensor_parallel_size": size, "num_cpus_per_replica": size}
        open_job(recipe.model_copy(update={"engine": recipe.engine.model_copy(update=shards)}))

    for size in (1, 3, 6):
        open_with(size)
    with pytest.raises(
        ConfigError, match=r"_size=4 .* has 6 of queries and 3 of keys; take one of \[1, 3, 6\]"
    ):
        open_with(4)
    config = teacher / "config.json"
    plain = json.loads(config.read_text())
    for num_heads, num_key_heads, fitting in ((4, 4, [1, 2, 4]), (12, 2, [1, 2, 4, 6, 12])):
        heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_key_heads}
        config.write_text(json.dumps(plain | heads))
        with pytest.raises(
            ConfigError, match=rf"_size=3 .*{teacher}' has {num_heads} of .*{re.escape(str(fitting))}"
        ):
            open_with(3)
