"""`jobs/train.py RECIPE --preview N`: what it prints of a recipe's rows and packing, with a pool and without one."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from delia.config import dump_yaml
from delia.flow.adapt import AdaptConfig
from delia.flow.pool import PoolConfig, pool_fingerprint
from delia.flow.stages import preview_training
from delia.flow.trial import ArmConfig
from delia.flow.workspace import Workspace, open_workspace
from delia.mix.mixture import MixConfig
from delia.recipes.starter import STARTER
from delia.store.pools import Pool
from delia.store.tasks import TaskConfig, read_task
from delia.train.preview import COLOURS
from delia.train.settings import StageConfig, TrainConfig

JOB = Path(__file__).parents[2] / "jobs" / "train.py"
FIRST = "<|bos|><|user|> say fox<|end|><|assistant|>[[ ka mu<|end|>]]"


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a preview that would start Ray."""

    def refuse(*args: object) -> None:
        raise AssertionError("a preview starts no Ray")

    monkeypatch.setattr("delia.flow.stages.connect", refuse)


@pytest.fixture
def make_recipe(tmp_path: Path, make_config: Callable[..., PoolConfig]) -> Callable[..., AdaptConfig]:
    """Return a function of what is done with long rows: four rows of a task, the last one long, two of a pool each."""

    def make(on_long: str = "drop") -> AdaptConfig:
        requests = ["say fox", "say owl", "say cat", "say " + "fox " * 120]
        file = tmp_path / "rows.jsonl"
        with file.open("w") as lines:
            for request in requests:
                chat = [{"role": "user", "content": request}, {"role": "assistant", "content": "ka mu"}]
                lines.write(json.dumps({"messages": chat}) + "\n")
        stage = StageConfig(max_steps=3, parts=("lora",))
        train = TrainConfig(stages=(stage,), max_length=100, on_long=on_long, global_batch_size=4)
        return AdaptConfig(
            name="shown",
            model=STARTER,
            task=TaskConfig(path=str(file), dev_fraction=0, test_fraction=0),
            pool=make_config(),
            arm=ArmConfig(mix=MixConfig(diverse_ratio=2), train=train),
            output_dir=str(tmp_path / "runs"),
        )

    return make


def open_space(recipe: AdaptConfig) -> Workspace:
    return open_workspace(recipe.output_dir, recipe.model, read_task(recipe.task))


@pytest.fixture
def make_pool(local_stage, build: Callable[..., Pool]) -> Callable[[AdaptConfig], Pool]:
    """Return a function that makes a recipe's pool in this process."""

    def make(recipe: AdaptConfig) -> Pool:
        local_stage()
        return build(open_space(recipe), recipe.pool)

    return make


def show(recipe: AdaptConfig, *, num_rows: int) -> list[str]:
    """Return the lines of a preview."""
    said: list[str] = []
    preview_training(recipe, num_rows=num_rows, is_coloured=False, say=said.append)
    return said


def test_rows_of_task_and_pool_are_shown_as_the_model_reads_them_with_what_is_trained_and_packed(
    make_recipe, make_pool
):
    recipe = make_recipe()
    pool = make_pool(recipe)
    before = sorted(Path(recipe.output_dir).rglob("*"))
    first, text, _, second, diverse, _, *rest = show(recipe, num_rows=2)
    assert (first, text) == ("row 0 of task: 9 tokens, 3 trained", FIRST)
    source = second.removeprefix("row 3 of ").partition(":")[0]
    assert diverse in {
        "<|bos|>"
        + "".join(f"<|{turn.role}|> {turn.content}<|end|>" for turn in row.messages[:-1])
        + f"<|assistant|>[[ {row.messages[-1].content}<|end|>]]"
        for row in pool.rows
        if row.source == source
    }
    of_all, stage, long_rows = rest
    assert of_all.startswith("rows: 11, 3 of the task; tokens: ")
    assert of_all.endswith("train.max_length=100")
    assert stage.startswith("stage 0: 3 steps of 4 rows on 1 worker, ")
    assert "micro-batches a step and worker: 1 to 1, " in stage
    assert long_rows == "long rows: 1 dropped, 0 truncated"
    assert sorted(Path(recipe.output_dir).rglob("*")) == before


def test_without_its_pool_the_task_is_shown_alone_and_what_makes_the_pool_is_said(make_recipe):
    recipe = make_recipe("truncate_prompt_left")
    space = open_space(recipe)
    address = space.address("pools", pool_fingerprint(recipe.pool, space))
    notice, *rest = show(recipe, num_rows=9)
    assert notice == f"the pool is not made yet ({address}): task rows alone; jobs/synthesize.py makes it\n"
    assert [line.partition(":")[0] for line in rest if line.startswith("row ")] == [
        f"row {number} of task" for number in range(4)
    ]
    assert rest[-3].startswith("rows: 4, 4 of the task; ")
    assert "longest row: 100, " in rest[-3]
    assert rest[-1] == "long rows: 0 dropped, 1 truncated"
    assert not Path(recipe.output_dir).exists()


@pytest.mark.parametrize("colour", ["", "1"])
def test_the_job_prints_as_many_rows_as_it_is_asked_for_and_trains_nothing(
    make_recipe, monkeypatch, tmp_path, capsys, colour
):
    recipe = make_recipe()
    (tmp_path / "config.yaml").write_text(dump_yaml(recipe))
    monkeypatch.setenv("FORCE_COLOR", colour)
    monkeypatch.setattr("sys.argv", [str(JOB), "--from", str(tmp_path / "config.yaml"), "--preview", "1"])
    runpy.run_path(str(JOB), run_name="__main__")
    printed = capsys.readouterr().out
    start, end = COLOURS if colour else ("[[", "]]")
    assert FIRST.replace("[[", start).replace("]]", end) in printed
    assert printed.count("\nrow ") == 1
    assert printed.endswith("long rows: 1 dropped, 0 truncated\n")
    assert not Path(recipe.output_dir).exists()
