"""The harness: one engine run scores every adapter, against references or the base's own answers."""

import pytest

from delia.chat import ChatEncoder, load_chat
from delia.evaluate.harness import BASE, EvalReport, EvaluateConfig, evaluate, report_from_table
from delia.evaluate.intervals import mean_interval, wilson_interval
from delia.generate.engine import EngineConfig, Request, SamplingConfig
from delia.generate.scripted import ScriptedEngine
from delia.schema import Message, Messages, SeedTask
from delia.store.models import ModelConfig, resolve_model
from delia.store.tables import read_table, write_table

STARTER = ModelConfig(path="package://delia.starter/weights")
ENGINE = EngineConfig(kind="scripted", batch_size=4)
ADAPTER = "adapters/one"
MAX_TOKENS = 12


def ask(text: str) -> Messages:
    return (Message(role="user", content=text),)


@pytest.fixture(scope="module")
def chat() -> ChatEncoder:
    return load_chat(str(resolve_model(STARTER)))


@pytest.fixture(scope="module")
def answer(chat):
    """Return what the scripted engine says to a prompt, without the harness."""
    engine = ScriptedEngine(STARTER, ENGINE)

    def answer(prompt: Messages, adapter: str = BASE) -> tuple[int, ...]:
        request = Request(request_id="", prompt_ids=tuple(chat.encode_prompt(prompt)), adapter=adapter)
        sampling = SamplingConfig(temperature=0.0, max_tokens=MAX_TOKENS)
        return engine.generate([request], sampling, end_ids=chat.end_ids)[0].token_ids

    return answer


@pytest.fixture(scope="module")
def rows(chat, answer) -> list[SeedTask]:
    """Two rows with a reference, of which the adapter gets the first right, and three without."""
    right = chat.decode(answer(ask("say fox"), ADAPTER))
    reference = (Message(role="assistant", content=right),)
    wrong = (Message(role="assistant", content="nothing of the kind"),)
    return [
        SeedTask(task_id="a", suite="follow", phrasing="p", messages=ask("say fox") + reference),
        SeedTask(task_id="b", suite="follow", phrasing="q", messages=ask("say wolf") + wrong),
        SeedTask(task_id="c", suite="absent", phrasing="p", messages=ask("name"), base_messages=ask("name")),
        SeedTask(task_id="d", suite="absent", messages=ask("say cat"), base_messages=ask("a long request")),
        SeedTask(task_id="e", suite="absent", messages=ask("say dog"), base_messages=ask("say dog")),
    ]


@pytest.fixture(scope="module")
def reports(cluster, chat, rows) -> dict[str, EvalReport]:
    config = EvaluateConfig(max_tokens=MAX_TOKENS)
    scored = evaluate(
        {"base": BASE, "one": ADAPTER},
        rows,
        config,
        model=STARTER,
        engine=ENGINE,
        chat=chat,
        metrics=("exact_match", "chrf"),
    )
    return dict(scored)


def test_each_adapter_answers_every_row_for_itself(reports, rows, answer, chat):
    assert set(reports) == {"base", "one"}
    for label, adapter in (("base", BASE), ("one", ADAPTER)):
        expected = tuple(answer(row.prompt, adapter) for row in rows)
        assert reports[label].token_ids == expected
        assert reports[label].completions == tuple(chat.decode(ids) for ids in expected)
    assert reports["base"].token_ids != reports["one"].token_ids


def test_rows_are_named_and_a_row_without_a_phrasing_is_one_of_its_own(reports):
    report = reports["one"]
    assert report.task_ids == ("a", "b", "c", "d", "e")
    assert report.suites == ("follow", "follow", "absent", "absent", "absent")
    assert report.phrasings == ("p", "q", "p", "d", "e")
    assert report.suite_names() == ["follow", "absent"]


def test_a_reference_is_the_target_where_there_is_one(reports):
    assert reports["one"].scores["exact_match"][:2] == (1.0, 0.0)
    assert reports["one"].scores["chrf"][0] == 1.0
    assert reports["one"].scores["chrf"][1] < 0.5


def test_the_bases_own_answer_is_the_target_where_there_is_none(reports, answer, chat):
    """The base says what it says to `base_messages`: rows c and e are its own prompts, d is another."""
    assert reports["base"].scores["exact_match"][2:] == (1.0, 0.0, 1.0)
    targets = [chat.decode(answer(ask(text))) for text in ("name", "a long request", "say dog")]
    own = [
        float(text.split() == target.split())
        for text, target in zip(reports["one"].completions[2:], targets, strict=True)
    ]
    assert list(reports["one"].scores["exact_match"][2:]) == own


def test_each_model_has_an_engine_of_its_own_and_lora_only_where_a_request_brings_some(
    chat, rows, answer, monkeypatch
):
    """Rows c to e have no reference: the base is asked for them whatever serves the labels."""
    asked = []

    def run_here(script, blocks, *, model, engine, **fields):
        requests = [row for block in blocks for row in block.to_pylist()]
        asked.append((model.path, engine.lora_rank, len(requests)))
        scripted = ScriptedEngine(STARTER, engine)
        for block in blocks:
            yield script(
                block,
                lambda batch: scripted.generate(batch, fields["sampling"], end_ids=fields["end_ids"]),
            )

    monkeypatch.setattr("delia.evaluate.harness.run_script", run_here)
    merged, patched = (STARTER.model_copy(update={"path": name}) for name in ("merged", "patched"))
    scored = evaluate(
        {"merged": BASE, "patched": ADAPTER, "more": ADAPTER},
        rows,
        EvaluateConfig(max_tokens=MAX_TOKENS),
        model=STARTER,
        engine=ENGINE.model_copy(update={"lora_rank": 8}),
        chat=chat,
        metrics=("exact_match",),
        models={"merged": merged, "patched": patched, "more": patched},
    )
    reports = dict(scored)
    assert asked == [(STARTER.path, None, 3), ("merged", None, 5), ("patched", 8, 10)]
    assert list(reports) == ["merged", "patched", "more"]
    assert reports["patched"].token_ids == tuple(answer(row.prompt, ADAPTER) for row in rows)
    assert reports["patched"].scores["exact_match"][:2] == (1.0, 0.0)


def test_zeros_and_ones_get_wilsons_interval(reports):
    assert reports["one"].interval("follow", "exact_match") == wilson_interval(1, 2)
    assert reports["base"].interval("absent", "exact_match") == wilson_interval(2, 3)


def test_other_scores_get_a_bootstrap_over_phrasings():
    phrasings = ("p", "p", "q", "q", "r", "r")
    report = EvalReport(
        task_ids=tuple("abcdef"),
        suites=("follow",) * 4 + ("absent",) + ("follow",),
        phrasings=phrasings,
        completions=("",) * 6,
        token_ids=((),) * 6,
        logprobs=((),) * 6,
        scores={"chrf": (0.25, 0.5, 0.75, 1.0, 0.0, 0.5)},
    )
    expected = mean_interval([0.25, 0.5, 0.75, 1.0, 0.5], ["p", "p", "q", "q", "r"], seed=0)
    assert report.interval("follow", "chrf") == expected
    assert report.interval("absent", "chrf") == wilson_interval(0, 1)
    assert expected.estimate == pytest.approx(0.6)


def test_a_suite_is_selected_with_the_phrasing_of_each_score(reports):
    values, phrasings = reports["base"].select("absent", "exact_match")
    assert (values.tolist(), phrasings) == ([1.0, 0.0, 1.0], ["p", "d", "e"])


def test_a_report_survives_its_table(reports, tmp_path):
    for report in reports.values():
        write_table(str(tmp_path / "scores.parquet"), report.to_table())
        assert report_from_table(read_table(str(tmp_path / "scores.parquet"))) == report
