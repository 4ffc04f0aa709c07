"""The loop on a GPU, by Ray Train over NCCL: the CPU's losses, and an adapter that loads without one."""

import pytest
import torch

from delia.model.logprobs import load_adapted
from delia.train.launch import run_training

pytestmark = pytest.mark.gpu
FORMS = {
    "float32": {},
    "sharded, in the host's memory": {"offload": True},
    "compiled, recomputed": {"compile": True, "gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture
def train_on_gpu(cluster, tmp_path):
    """Return a function that trains a task as a job does, and gives its losses by step and the adapter."""
    assert torch.cuda.is_available()

    def train(task, name: str):
        losses = {}
        run_training(
            task,
            name=name,
            storage=str(tmp_path / "storage"),
            output=str(tmp_path / name),
            log=lambda metrics, step: losses.__setitem__(step, metrics["train/loss"]),
        )
        return losses, tmp_path / name

    return train


@pytest.mark.parametrize("form", FORMS)
def test_a_run_on_nccl_has_the_losses_of_the_cpu(train_on_gpu, train_here, make_input, measure_loss, form):
    rounding = 2e-2 if "dtype" in FORMS[form] else 1e-4
    on_cpu = train_here(make_input())
    task = make_input(use_gpu=True, **FORMS[form])
    losses, adapter = train_on_gpu(task, "gpu")
    assert losses.keys() == on_cpu.losses.keys()
    assert on_cpu.losses[12] < on_cpu.losses[1] - 0.2
    assert list(losses.values()) == pytest.approx(list(on_cpu.losses.values()), rel=rounding)

    loaded = measure_loss(load_adapted(make_input().model, adapter), task)
    expected = measure_loss(load_adapted(make_input().model, on_cpu.adapter), task)
    assert loaded == pytest.approx(expected, rel=rounding)
