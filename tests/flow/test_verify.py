"""Verified export: what vLLM serves is what HF + PEFT loads, and an adapter that does nothing is seen."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from delia.errors import EngineError, ExportError
from delia.evaluate.harness import BASE, EvalReport, EvaluateConfig, evaluate
from delia.flow.verify import MAX_GAP_NATS, choose_rows, measure_drift, verify_export
from delia.flow.workspace import Workspace, open_workspace
from delia.generate.engine import EngineConfig
from delia.model.adapted import LoraConfig, attach, collect
from delia.model.loading import load_base
from delia.model.logprobs import continue_greedily, load_adapted, score_sequences
from delia.schema import Message, SeedTask, Task
from delia.store.adapters import CONFIG, write_adapter
from delia.store.models import ModelConfig

STARTER = ModelConfig(path="package://delia.starter/weights")
MAX_TOKENS = 16
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)
QUESTIONS = (
    "what does the fox say ?",
    "what is the colour of the wolf ?",
    "name a cat .",
    "who is the king ?",
)
ROWS = tuple(
    SeedTask(task_id=f"{text} {mark}", messages=(Message(role="user", content=f"{text}{mark}"),))
    for text in QUESTIONS
    for mark in (" <sep>", "")
)


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Workspace:
    task = Task(name="t", digest="d", rows_by_split={"train": (), "dev": ROWS, "test": ()}, tokens=("<sep>",))
    return open_workspace(str(tmp_path_factory.mktemp("runs")), STARTER, task)


def save_adapter(model, directory: Path) -> str:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors = collect(model, trained, scaling=LORA.alpha / LORA.rank)
    write_adapter(directory, tensors, vocab_size=model.config.vocab_size, base_model=STARTER.path)
    return str(directory)


@pytest.fixture(scope="module")
def adapters(space, tmp_path_factory) -> dict[str, str]:
    """An adapter as it starts, and the same after a few steps at a high rate: LoRA and the token's row."""
    folder = tmp_path_factory.mktemp("adapters")
    model = attach(load_base(STARTER), lora=LORA, token_ids=tuple(space.chat.token_ids.values()))
    addresses = {"untrained": save_adapter(model, folder / "untrained")}
    answer = Message(role="assistant", content="the red king and the grey fox say no")
    chats = [space.chat.encode_chat((*row.messages, answer)) for row in ROWS[::2]]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        for chat in chats:
            ids_BT = torch.tensor([chat.input_ids])
            labels_BT = ids_BT.masked_fill(~torch.tensor([chat.loss_mask]), -100)
            model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    addresses["trained"] = save_adapter(model, folder / "trained")
    return addresses


def make_report(token_ids: tuple[tuple[int, ...], ...], logprobs) -> EvalReport:
    names = tuple(row.task_id for row in ROWS)
    return EvalReport(
        task_ids=names,
        suites=names,
        phrasings=names,
        completions=names,
        token_ids=token_ids,
        logprobs=logprobs,
        scores={},
    )


def score_answers(model, prompts, answers) -> tuple[tuple[float, ...], ...]:
    """Return the log-probability of each id of each answer."""
    sequences = [
        ([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))
        for prompt, ids in zip(prompts, answers, strict=True)
    ]
    return tuple(tuple(scores.tolist()) for scores in score_sequences(model, sequences))


@pytest.fixture(scope="module")
def reports(space, adapters) -> dict[str, EvalReport]:
    """What an engine that serves the adapters rightly would answer."""
    prompts = [space.chat.encode_prompt(row.prompt) for row in ROWS]
    models = {label: load_adapted(STARTER, Path(address)) for label, address in adapters.items()}
    models["base"] = load_base(STARTER)
    answers = {
        label: tuple(continue_greedily(model, prompts, max_tokens=MAX_TOKENS, end_ids=space.chat.end_ids))
        for label, model in models.items()
    }
    return {
        label: make_report(ids, score_answers(models[label], prompts, ids)) for label, ids in answers.items()
    }


def verify(space: Workspace, address: str, report: EvalReport, *, num_rows: int = 8):
    return verify_export(address, report, ROWS, space, num_rows=num_rows, max_tokens=MAX_TOKENS)


# ---- which rows


def test_rows_with_the_token_are_compared_and_spread_over_the_file():
    rows = [
        SeedTask(task_id=str(i), messages=(Message(role="user", content="a <sep>" if i % 2 else "a"),))
        for i in range(20)
    ]
    assert choose_rows(rows, ("<sep>",), 5) == [1, 5, 9, 13, 17]
    assert choose_rows(rows, ("<sep>",), 100) == list(range(1, 20, 2))
    assert choose_rows(rows, (), 4) == [0, 5, 10, 15]
    assert choose_rows(rows, ("<other>",), 2) == [0, 10]

    turns = (Message(role="system", content="a <sep>"), Message(role="user", content="a"))
    rows[7] = SeedTask(task_id="7", messages=turns)
    assert choose_rows(rows, ("<sep>",), 100) == list(range(1, 20, 2))


def test_the_reference_answer_is_no_prompt():
    """A token that only the answer holds is not what the prompt shows."""
    rows = [
        SeedTask(
            task_id="a",
            messages=(Message(role="user", content="a"), Message(role="assistant", content="<sep>")),
        ),
        SeedTask(
            task_id="b",
            messages=(Message(role="user", content="<sep>"), Message(role="assistant", content="a")),
        ),
    ]
    assert choose_rows(rows, ("<sep>",), 2) == [1]


# ---- what is held


def test_an_export_that_is_served_as_trained_passes_with_its_numbers(cluster, space, adapters, reports):
    assert reports["trained"].token_ids != reports["base"].token_ids, "the adapter is too weak to be seen"
    result = verify(space, adapters["trained"], reports["trained"])
    assert (result.num_prompts, result.num_equal, result.first_divergence) == (4, 4, "")
    assert result.dtype == "float32"
    assert result.mean_gap_nats == pytest.approx(0.0, abs=1e-5)
    assert result.mean_change_nats > 0.1


def test_an_adapter_that_changes_nothing_does_not_pass(cluster, space, adapters, reports):
    with pytest.raises(
        ExportError, match="differ from the base's by 0 nats on 4 prompts; the adapter is ignored or"
    ):
        verify(space, adapters["untrained"], reports["untrained"])


def test_an_engine_that_ignores_the_adapter_does_not_pass(cluster, space, adapters, reports):
    with pytest.raises(ExportError, match="of 4 greedy completions differ between vLLM and HF"):
        verify(space, adapters["trained"], reports["base"])


def test_an_engine_that_ignores_an_adapter_which_changes_no_id_does_not_pass(
    cluster, space, adapters, reports
):
    """The ids are the adapter's, by luck; what the engine thinks of them is the base's."""
    prompts = [space.chat.encode_prompt(row.prompt) for row in ROWS]
    ids = reports["trained"].token_ids
    by_base = make_report(ids, score_answers(load_base(STARTER), prompts, ids))
    with pytest.raises(ExportError, match=r"from the adapter's and \S+ from the base's; it must be clearly"):
        verify(space, adapters["trained"], by_base)


def test_one_changed_token_is_seen_and_shown(cluster, space, adapters, reports):
    ids = list(reports["trained"].token_ids)
    ids[2] = (*ids[2][:-1], ids[2][-1] + 1)  # the second row with the token
    with pytest.raises(ExportError, match="1 of 4 greedy completions differ") as caught:
        verify(space, adapters["trained"], replace(reports["trained"], token_ids=tuple(ids)))
    assert f"first: HF {reports['trained'].token_ids[2]} against vLLM {ids[2]}" in str(caught.value)


@pytest.fixture(scope="module")
def space_in_bfloat16(space) -> Workspace:
    return replace(space, model=STARTER.model_copy(update={"dtype": "bfloat16"}))


def shift(report: EvalReport, nats: float) -> EvalReport:
    return replace(report, logprobs=tuple(tuple(x + nats for x in row) for row in report.logprobs))


def test_rounded_engines_may_differ_in_ids_but_not_in_log_probabilities(
    cluster, space_in_bfloat16, adapters, reports
):
    """In bfloat16 two engines round apart: what each thinks of the same ids must still agree."""
    prompts = [space_in_bfloat16.chat.encode_prompt(row.prompt) for row in ROWS]
    model = load_adapted(space_in_bfloat16.model, Path(adapters["trained"]))
    ids = list(reports["trained"].token_ids)
    ids[2] = ids[2][:-1]  # the second row with the token
    report = make_report(tuple(ids), score_answers(model, prompts, ids))

    result = verify(space_in_bfloat16, adapters["trained"], shift(report, -0.04))
    assert (result.dtype, result.num_prompts) == ("bfloat16", 4)
    assert result.num_equal < 4
    assert result.mean_gap_nats == pytest.approx(0.04, rel=0.05)
    with pytest.raises(ExportError, match=r"by 0.06 nats a token, over the 0.05 that bfloat16 explains"):
        verify(space_in_bfloat16, adapters["trained"], shift(report, 0.06))


def test_an_engine_that_ignores_the_adapter_does_not_pass_in_bfloat16_either(
    cluster, space_in_bfloat16, adapters, reports
):
    with pytest.raises(ExportError, match=r"nats a token, over the 0.05"):
        verify(space_in_bfloat16, adapters["trained"], reports["base"])


def test_an_adapter_that_would_kill_an_engine_is_refused_before_it_is_loaded(
    cluster, space, adapters, reports, tmp_path
):
    for file in Path(adapters["trained"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / CONFIG).read_text()) | {"modules_to_save": ["lm_head"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(EngineError, match="can't load an adapter with modules_to_save"):
        verify(space, str(tmp_path), reports["trained"])


def test_drift_is_what_the_adapter_does_to_the_bases_own_text(cluster, space, adapters, reports):
    prompts = [space.chat.encode_prompt(row.prompt) for row in ROWS]
    sequences = [
        ([*prompt, *ids], [False] * len(prompt) + [True] * len(ids))
        for prompt, ids in zip(prompts, reports["base"].token_ids, strict=True)
    ]
    drift = measure_drift(adapters, sequences, STARTER)
    assert list(drift) == ["untrained", "trained"]
    assert drift["untrained"] == pytest.approx(0.0, abs=1e-6)
    assert drift["trained"] > 0.05


def serve_by_vllm(space: Workspace, adapters: dict[str, str], model: ModelConfig) -> dict[str, EvalReport]:
    rows = tuple(
        replace(row, messages=(*row.messages, Message(role="assistant", content="no"))) for row in ROWS
    )
    scored = evaluate(
        {"base": BASE, **adapters},
        rows,
        EvaluateConfig(max_tokens=MAX_TOKENS),
        model=model,
        engine=EngineConfig(kind="vllm", max_model_len=128, max_num_seqs=32, lora_rank=LORA.rank),
        chat=space.chat,
        metrics=("exact_match",),
    )
    return dict(scored)


@pytest.mark.system
def test_vllm_serves_what_was_trained_token_for_token(cluster, space, adapters, reports):
    served = serve_by_vllm(space, adapters, STARTER)
    assert {label: report.token_ids for label, report in served.items()} == {
        label: report.token_ids for label, report in reports.items()
    }
    result = verify(space, adapters["trained"], served["trained"])
    assert (result.num_prompts, result.num_equal) == (4, 4)
    assert result.mean_gap_nats < 1e-3, "vLLM's log-probabilities are not those of its ids"
    with pytest.raises(ExportError, match="the adapter is ignored or was not trained"):
        verify(space, adapters["untrained"], served["untrained"])


@pytest.mark.system
def test_vllm_in_bfloat16_agrees_with_hf_within_rounding(cluster, space_in_bfloat16, adapters):
    served = serve_by_vllm(space_in_bfloat16, adapters, space_in_bfloat16.model)
    result = verify(space_in_bfloat16, adapters["trained"], served["trained"])
    assert 0 < result.mean_gap_nats <= MAX_GAP_NATS["bfloat16"]
    with pytest.raises(ExportError, match=r"over the 0.05 that bfloat16 explains"):
        verify(space_in_bfloat16, adapters["trained"], served["base"])
