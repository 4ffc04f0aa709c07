"""A step over several workers: the loop's own loss and gradients are those of one worker, on every mesh.

Float32, dropout 0, 1e-5 relative, parameter by parameter; only in bfloat16 is one worker sharded too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from delia.model.adapted import LoraConfig
from delia.store.models import ModelConfig
from delia.train.building import TrainInput, build_order
from delia.train.packing import pack_batch
from delia.train.settings import MetersConfig, StageConfig

TOLERANCE = 1e-5
SEED = 5
"""Its first batch has the token, of however few rows."""

TRAINED: dict[str, dict[str, Any]] = {
    "lora": {
        "seed": SEED,
        "stages": (StageConfig(max_steps=1),),
        "lora": LoraConfig(rank=4, alpha=8, dropout=0.0),
    },
    "full": {
        "seed": SEED,
        "stages": (StageConfig(max_steps=1, parts=("base", "token_rows")),),
        "lora": None,
    },
}


@dataclass
class Step:
    """What the loop had of a step, whole: `mesh` is the shape of that which parameters lie on, () for none.

    `gathered` names the parameters that the first worker had whole after a reading of the meters, after the
    last forward pass and after its backward pass.
    """

    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]
    mesh: tuple[int, ...]
    gathered: dict[str, list[str]]
    readings: dict[str, float]


@pytest.fixture
def step_together(work_together) -> Callable[[TrainInput], Step]:
    """Return a function that makes one step of a task, in as many processes as it has workers."""

    def step(task: TrainInput) -> Step:
        run, folder = work_together(task, does="step")
        return Step(loss=run.losses[1], readings=run.readings.get(0, {}), **torch.load(folder / "step.pt"))

    return step


@pytest.fixture(params=list(TRAINED))
def trained(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings that train LoRA with token rows, or the base with token rows."""
    return TRAINED[request.param]


def split(task: TrainInput) -> list[list[list[int]]]:
    """Return the rows of a task's first step by worker and micro-batch."""
    config = task.config
    return pack_batch(
        build_order(task, config.stages[0]).batch(0),
        task.rows.lengths_R.tolist(),
        num_workers=config.num_workers,
        max_tokens=config.max_tokens_per_micro_batch,
    )


def count_trained(task: TrainInput) -> list[int]:
    """Return how many trained tokens each worker has in a task's first step."""
    return [sum(int(task.rows.num_trained_R[part].sum()) for part in parts) for parts in split(task)]


def measure_distances(found: Step, expected: Step) -> dict[str, float]:
    """Return by parameter how far its gradient is from the expected one, as a share of that one's norm."""
    assert found.gradients.keys() == expected.gradients.keys()
    assert [name for name, gradient in expected.gradients.items() if not gradient.any()] == []
    return {
        name: float((found.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.gradients.items()
    }


def assert_same_step(found: Step, expected: Step) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    assert found.norm == pytest.approx(expected.norm, rel=TOLERANCE)
    far = {name: far for name, far in measure_distances(found, expected).items() if not far <= TOLERANCE}
    assert far == {}


@pytest.mark.parametrize("batch_size", [1, 7])
def test_two_workers_have_the_gradients_of_one(step_together, make_input, trained, batch_size):
    """Of one row the second worker has nothing, of seven it has three times the first's."""
    task = make_input(**trained, global_batch_size=batch_size, num_workers=2)
    assert count_trained(task) == {1: [2, 0], 7: [8, 23]}[batch_size]
    found, expected = step_together(task), step_together(make_input(**trained, global_batch_size=batch_size))
    assert (found.mesh, expected.mesh) == ((2,), ())
    assert_same_step(found, expected)


@pytest.mark.system  # four processes
@pytest.mark.parametrize("batch_size", [3, 24])
@pytest.mark.parametrize(("group", "mesh"), [(None, (4,)), (2, (2, 2))], ids=["FSDP", "HSDP"])
def test_four_workers_have_the_gradients_of_one(step_together, make_input, trained, group, mesh, batch_size):
    """In shards of a quarter, and in two copies of two halves each; of three rows one worker has nothing."""
    task = make_input(**trained, global_batch_size=batch_size, num_workers=4, shard_group=group)
    assert count_trained(task) == {3: [6, 2, 2, 0], 24: [27, 21, 20, 28]}[batch_size]
    found = step_together(task)
    assert found.mesh == mesh
    assert_same_step(found, step_together(make_input(**trained, global_batch_size=batch_size)))


@pytest.mark.system  # four processes
@pytest.mark.parametrize("group", [None, 2], ids=["FSDP", "HSDP"])
def test_meters_count_each_shard_once(step_together, make_input, group):
    """Norms and cosines over all shards, of which two copies hold each twice."""
    settings = TRAINED["lora"] | {"meters": MetersConfig(num_rows=4, num_words=40)}
    one, four = (
        step_together(make_input(**settings, **workers)).readings
        for workers in ({}, {"num_workers": 4, "shard_group": group})
    )
    costs = ("train/meter_seconds", "train/meter_share")
    expected = {name: value for name, value in one.items() if name not in costs}
    assert expected["train/source_gradient_norm/diverse"] > 0
    assert {name: four[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("token_ids", [(), (7,)], ids=["KL", "neighbours"])
def test_no_worker_keeps_what_it_gathered(step_together, make_input, token_ids):
    """Whichever pass without a backward ends a reading; between forward and backward the root alone is whole.

    What stays gathered costs memory, and a later pass reads it for the parameters, changed or not.
    """
    settings = TRAINED["lora"] | {"meters": MetersConfig(num_rows=4, num_words=40)}
    task = make_input(**settings, token_ids=token_ids, num_workers=2)
    step = step_together(replace(task, instruction_ids=(40, 41, 42)))
    layers = {name.rpartition("/")[2] for name in step.readings if "token_rank" in name}
    assert layers == ({"0", "1", "2"} if token_ids else set())  # the embedding and the two layers
    assert "train/off_task_kl" in step.readings
    assert (step.gathered["reading"], step.gathered["backward"]) == ([], [])
    roots = step.gathered["forward"]
    assert any("embed_tokens" in name for name in roots)
    assert [name for name in roots if ".layers." in name] == []


@pytest.fixture
def make_input_of(make_input, make_shape, tmp_path) -> Callable[..., TrainInput]:
    """Return a function of an architecture's name and settings: training on its smallest random model."""

    def make(name: str, **settings: Any) -> TrainInput:
        if not (tmp_path / name).exists():
            make_shape(name).save_pretrained(tmp_path / name)
        task = make_input(**settings)
        return replace(task, model=ModelConfig(path=str(tmp_path / name), dtype=task.model.dtype))

    return make


def test_every_architecture_has_the_gradients_of_one_worker(step_together, make_input_of, shape, trained):
    found, expected = (step_together(make_input_of(shape, **trained, num_workers=count)) for count in (2, 1))
    assert (found.mesh, expected.mesh) == ((2,), ())
    assert_same_step(found, expected)


def test_workers_in_bfloat16_add_their_gradients_up_in_float32(step_together, make_input_of, trained):
    """So two are within 1e-5 of one that has the same micro-batches, far closer than it is to float32.

    A micro-batch's gradient is rounded to bfloat16, but in the same way on any worker: what the number of
    workers scales it by is a power of two. The sum of such gradients is float32's.
    """
    settings = trained | {"dtype": "bfloat16", "global_batch_size": 8, "max_tokens_per_micro_batch": 27}
    two, one = (make_input_of("qwen2", **settings, num_workers=count) for count in (2, 1))
    parts = [part for parts in split(two) for part in parts]
    assert sorted(parts) == sorted(split(one)[0])
    assert len(parts) > 2
    found, expected = step_together(two), step_together(one)
    assert (found.mesh, expected.mesh) == ((2,), (1,))
    assert_same_step(found, expected)
    whole = step_together(make_input_of("qwen2", **settings | {"dtype": "float32"}))
    assert min(measure_distances(whole, expected).values()) > 10 * TOLERANCE, "the model was not in bfloat16"
