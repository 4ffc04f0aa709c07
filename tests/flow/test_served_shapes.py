"""Verified export of every shape: vLLM over the form that it needs, and over the merged model, is HF + PEFT.

The embedding of each base is tied, so whatever holds a token's row has an output head of its own.
"""

from pathlib import Path

import pytest

from delia.errors import ExportError, StoreError
from delia.evaluate.harness import BASE, EvalReport, EvaluateConfig, evaluate
from delia.flow.evaluation import evaluate_adapters
from delia.flow.export import export_adapter
from delia.flow.serving import choose_serving
from delia.flow.trial import ArmConfig, plan_arm, train_arms
from delia.flow.verify import verify_export
from delia.flow.workspace import Workspace, open_workspace
from delia.generate.engine import EngineConfig
from delia.mix.mixture import MixConfig
from delia.schema import Message, SeedTask, Task
from delia.store.models import ModelConfig
from delia.store.serving import write_served
from delia.train.settings import StageConfig, TrainConfig

ENGINE = EngineConfig(kind="vllm", max_model_len=96, max_num_seqs=16)
CONFIG = EvaluateConfig(max_tokens=12)
FORM_BY_SHAPE = {
    "Llama": "lora",
    "Qwen3": "lora",
    "Qwen2": "patched_base",
    "Mistral": "patched_base",
    "Gemma2": "patched_base",
}
QUESTIONS = ("what does the fox say ?", "what is the colour of the wolf ?", "name a cat .", "who is king ?")
ROWS = tuple(
    SeedTask(
        task_id=text,
        messages=(
            Message(role="user", content=f"<sep> {text} <other>"),
            Message(role="assistant", content="no"),
        ),
    )
    for text in QUESTIONS
)


def open_space(folder: Path, base: Path) -> Workspace:
    rows = {"train": ROWS, "dev": ROWS, "test": ()}
    task = Task(name="t", digest="d", rows_by_split=rows, tokens=("<sep>", "<other>"))
    return open_workspace(str(folder / "runs"), ModelConfig(path=str(base)), task)


def verify(address: Path, report: EvalReport, space: Workspace):
    return verify_export(str(address), report, ROWS, space, num_rows=len(ROWS), max_tokens=CONFIG.max_tokens)


def evaluate_model(model: Path, space: Workspace) -> EvalReport:
    """Answer the rows with a model alone."""
    served = evaluate(
        {"merged": BASE},
        ROWS,
        CONFIG,
        model=ModelConfig(path=str(model)),
        engine=ENGINE,
        chat=space.chat,
        metrics=("exact_match",),
    )
    return dict(served)["merged"]


# a LoRA with token rows is what the starter's own tests serve: those shapes wait for the long suites
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(name, marks=pytest.mark.soak if form == "lora" else pytest.mark.system)
        for name, form in FORM_BY_SHAPE.items()
    ],
)
def test_vllm_serves_what_peft_loads(cluster, tiny_base, tiny_adapter, tmp_path, shape):
    base = tiny_base(shape)
    space = open_space(tmp_path, base)
    address = tiny_adapter(base, token_ids=tuple(space.chat.token_ids.values()))
    needed = evaluate_adapters(CONFIG, space, {"a": str(address)}, ROWS, engine=ENGINE)["a"]
    result = verify(address, needed, space)
    assert (result.form, result.num_equal, result.num_prompts) == (FORM_BY_SHAPE[shape], 4, 4)
    assert result.mean_gap_nats < 1e-5
    assert result.mean_base_gap_nats > 0.1

    merged = write_served("merged", base, address, tmp_path / "merged", dtype="float32").model
    report = evaluate_model(merged, space)
    assert report.token_ids == needed.token_ids
    assert verify(address, report, space).mean_gap_nats < 1e-5


@pytest.mark.system
def test_a_full_tuning_is_served_as_the_model_that_it_is(cluster, tiny_base, tmp_path):
    """Over a tied base whose class in vLLM takes no LoRA on its embedding; the token's row is in the model."""
    space = open_space(tmp_path, tiny_base("Qwen2"))
    stage = StageConfig(max_steps=8, parts=("base", "token_rows"), learning_rate=1e-2, warmup_steps=0)
    train = TrainConfig(lora=None, stages=(stage,), global_batch_size=4)
    arm = plan_arm(ArmConfig(mix=MixConfig(diverse_ratio=0.0), train=train), space, None)
    logs = {"full": lambda metrics, step: None}
    address = train_arms({"full": arm}, space, None, logs=logs, max_concurrent=1)["full"].path
    report = evaluate_adapters(CONFIG, space, {"a": address}, ROWS, engine=ENGINE)["a"]
    result = verify(Path(address), report, space)
    assert (result.form, result.num_equal) == ("whole", 4)
    assert result.mean_gap_nats < 1e-5
    assert result.mean_base_gap_nats > 0.1
    with pytest.raises(StoreError, match="model of its own; there is nothing to export"):
        export_adapter(address, str(tmp_path / "export"))


@pytest.mark.system
def test_a_dora_is_served_merged(cluster, tiny_base, peft_adapter, tmp_path):
    base = tiny_base("Llama")
    space, address = open_space(tmp_path, base), peft_adapter(base, r=4, use_dora=True)
    assert choose_serving(str(address), space.model).form == "merged"
    report = evaluate_adapters(CONFIG, space, {"a": str(address)}, ROWS, engine=ENGINE)["a"]
    result = verify(address, report, space)
    assert (result.form, result.num_equal) == ("merged", 4)
    assert result.mean_gap_nats < 1e-5


@pytest.mark.system
def test_a_form_that_another_adapter_made_is_seen(cluster, tiny_base, tiny_adapter, tmp_path):
    base = tiny_base("Mistral")
    space = open_space(tmp_path, base)
    ids = tuple(space.chat.token_ids.values())
    address, other = (tiny_adapter(base, token_ids=ids, seed=seed) for seed in (1, 2))
    report = evaluate_adapters(CONFIG, space, {"a": str(other)}, ROWS, engine=ENGINE)["a"]
    with pytest.raises(ExportError, match="greedy completions differ between vLLM and HF"):
        verify(address, report, space)
