"""Adapters x suites -> scores, generated greedily by the engine that will serve them.

    rows of dev or test + adapters --one engine run--> completions --metrics--> EvalReport a label

A row without a reference is scored against the base model's own answer to its `base_messages`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from pydantic import Field

from delia.chat import ChatEncoder
from delia.config import FrozenConfig
from delia.errors import EngineError
from delia.evaluate.intervals import Interval, mean_interval, wilson_interval
from delia.evaluate.scoring import METRICS
from delia.generate.engine import Completion, EngineConfig, Request, SamplingConfig
from delia.generate.pipeline import answer_requests, run_script, to_blocks, to_completions
from delia.schema import SeedTask
from delia.store.models import ModelConfig

TARGET = "target of base"
"""The label of the base's own answers that stand in for references; no adapter's."""
BASE = ""
"""The address that stands for the base model without an adapter."""


class EvaluateConfig(FrozenConfig):
    """What scores are made of."""

    max_tokens: int = Field(default=128, gt=0)
    num_kl_rows: int = Field(default=128, ge=0)
    num_verify_rows: int = Field(default=16, gt=0)


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Scores of one adapter, a row of a suite each; arrays run parallel.

    `scores[metric]` are in 0..1; `token_ids` are the greedy completions without the end token,
    `logprobs` theirs, in nats, by the engine that generated them.
    """

    task_ids: tuple[str, ...]
    suites: tuple[str, ...]
    phrasings: tuple[str, ...]
    completions: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    scores: Mapping[str, tuple[float, ...]]

    def suite_names(self) -> list[str]:
        """Return the suites in their order of appearance."""
        return list(dict.fromkeys(self.suites))

    def select(self, suite: str, metric: str) -> tuple[np.ndarray, list[str]]:
        """Return a suite's scores [n] and the clusters of its intervals: phrasings, rows where one is all."""
        chosen = [i for i, name in enumerate(self.suites) if name == suite]
        several = len({self.phrasings[i] for i in chosen}) > 1
        names = self.phrasings if several else self.task_ids
        values = self.scores[metric]
        return np.array([values[i] for i in chosen]), [names[i] for i in chosen]

    def interval(self, suite: str, metric: str) -> Interval:
        """Return a suite's mean with its interval: Wilson where scores are 0 or 1, else bootstrap.

        A single row says nothing of the spread: its interval is all of 0..1.
        """
        values, clusters = self.select(suite, metric)
        if set(values.tolist()) <= {0.0, 1.0}:
            return wilson_interval(int(values.sum()), len(values))
        if len(values) == 1:
            return Interval(estimate=float(values[0]), low=0.0, high=1.0)
        return mean_interval(values, clusters, seed=0)

    def to_table(self) -> pa.Table:
        """Return one row a task row, for Parquet."""
        columns = {
            "task_id": list(self.task_ids),
            "suite": list(self.suites),
            "phrasing": list(self.phrasings),
            "completion": list(self.completions),
            "token_ids": pa.array([list(ids) for ids in self.token_ids], pa.list_(pa.int32())),
            "logprobs": pa.array([list(values) for values in self.logprobs], pa.list_(pa.float32())),
        }
        return pa.table({**columns, **{name: list(values) for name, values in self.scores.items()}})


def report_from_table(table: pa.Table) -> EvalReport:
    """Read back what `EvalReport.to_table` wrote."""
    columns = table.to_pydict()
    return EvalReport(
        task_ids=tuple(columns["task_id"]),
        suites=tuple(columns["suite"]),
        phrasings=tuple(columns["phrasing"]),
        completions=tuple(columns["completion"]),
        token_ids=tuple(tuple(ids) for ids in columns["token_ids"]),
        logprobs=tuple(tuple(values) for values in columns["logprobs"]),
        scores={name: tuple(columns[name]) for name in table.column_names if name in METRICS},
    )


def evaluate(
    adapters: Mapping[str, str],
    rows: Sequence[SeedTask],
    config: EvaluateConfig,
    *,
    model: ModelConfig,
    engine: EngineConfig,
    chat: ChatEncoder,
    metrics: Sequence[str],
    models: Mapping[str, ModelConfig] = MappingProxyType({}),
) -> Iterator[tuple[str, EvalReport]]:
    """Score adapters on rows, in one engine run a model; yield each as soon as its last row is answered.

    Args:
        adapters: Label -> address of an adapter directory; `BASE` for the model alone.
        rows: Rows of dev or test; their `suite` groups the scores.
        config: Lengths.
        model: The base model.
        engine: How it is served; its `lora_rank` must admit the adapters.
        chat: The chat format that the adapters were trained with.
        metrics: Names in `scoring.METRICS`.
        models: Label -> the model that is served for it, where that is not the base.

    Yields:
        (label, report).
    """
    prompts = [tuple(chat.encode_prompt(row.prompt)) for row in rows]
    targets_of_base = [
        Request(request_id=f"{TARGET}:{index}", prompt_ids=tuple(chat.encode_prompt(row.base_messages)))
        for index, row in enumerate(rows)
        if row.reference is None
    ]
    missing = {TARGET: len(targets_of_base), **dict.fromkeys(adapters, len(rows))}
    requests_by_model = {model: targets_of_base}
    for label, address in adapters.items():
        requests_by_model.setdefault(models.get(label, model), []).extend(
            Request(request_id=f"{label}:{index}", prompt_ids=prompt, adapter=address)
            for index, prompt in enumerate(prompts)
        )
    tables = chain.from_iterable(
        _answer(requests, served, engine, config, chat) for served, requests in requests_by_model.items()
    )
    answered: dict[str, Completion] = {}
    waiting = dict.fromkeys(adapters)
    for table in tables:
        for completion in to_completions(table):
            answered[completion.request_id] = completion
            missing[completion.request_id.rpartition(":")[0]] -= 1
        complete = [] if missing[TARGET] else [label for label in waiting if not missing[label]]
        for label in complete:
            del waiting[label]
            targets = [_target(row, answered.get(f"{TARGET}:{i}"), chat) for i, row in enumerate(rows)]
            completions = [answered.pop(f"{label}:{i}") for i in range(len(rows))]
            yield label, _score(rows, targets, completions, chat, metrics)


def _answer(
    requests: Sequence[Request],
    model: ModelConfig,
    engine: EngineConfig,
    config: EvaluateConfig,
    chat: ChatEncoder,
) -> Iterator[pa.Table]:
    """Answer one model's requests; the engine takes LoRA only where one brings an adapter."""
    takes_lora = any(request.adapter for request in requests)
    return run_script(
        answer_requests,
        to_blocks(requests, engine.batch_size),
        model=model,
        engine=engine if takes_lora else engine.model_copy(update={"lora_rank": None}),
        sampling=SamplingConfig(temperature=0.0, max_tokens=config.max_tokens),
        end_ids=chat.end_ids,
    )


def _target(row: SeedTask, by_base: Completion | None, chat: ChatEncoder) -> str:
    """Return a row's reference, or the base's own answer where it has none."""
    if row.reference is not None:
        return row.reference
    if by_base is None:
        raise EngineError(f"row {row.task_id} has no reference, and the base did not answer for it")
    return chat.decode(by_base.token_ids)


def _score(
    rows: Sequence[SeedTask],
    targets: Sequence[str],
    completions: Sequence[Completion],
    chat: ChatEncoder,
    metrics: Sequence[str],
) -> EvalReport:
    texts = [chat.decode(completion.token_ids) for completion in completions]
    return EvalReport(
        task_ids=tuple(row.task_id for row in rows),
        suites=tuple(row.suite for row in rows),
        phrasings=tuple(row.phrasing or row.task_id for row in rows),
        completions=tuple(texts),
        token_ids=tuple(completion.token_ids for completion in completions),
        logprobs=tuple(completion.logprobs for completion in completions),
        scores={
            name: tuple(METRICS[name](text, target) for text, target in zip(texts, targets, strict=True))
            for name in metrics
        },
    )
