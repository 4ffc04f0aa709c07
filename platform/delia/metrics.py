"""The names of all metrics: one table for MLflow, for Ray's exporter and for the dashboards.

    "train/loss"  ->  MLflow's metric `train/loss`, Ray's metric `delia_train_loss`
    a counter     ->  Prometheus reads it as `delia_synthesize_accepted_total`

A name is `room/quantity` and is written here once: tracking refuses a name that is not in the
table, and a test holds the dashboards to it. Scores are a family with open names, because task files
bring their suites: `score_name` writes them in MLflow, while Prometheus has the single
`delia_evaluate_score` with the labels `suite` and `metric`. A quantity of every source or layer has a
label too: `labelled` writes `train/source_loss/magpie` in MLflow, and Prometheus has the label `source`.
"""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from delia.errors import ConfigError

Kind = Literal["counter", "gauge"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One quantity over time; a counter only grows, a gauge is the latest value.

    With a `label` there is one for each of its values, such as each source.
    """

    name: str
    unit: str
    kind: Kind
    description: str
    label: str = ""


METRICS: tuple[Metric, ...] = (
    Metric("synthesize/candidates", "rows", "counter", "Candidates that the engine answered"),
    Metric("synthesize/accepted", "rows", "counter", "Candidates that became rows of the pool"),
    Metric("synthesize/rejected", "rows", "counter", "Candidates that were dropped, with a reason"),
    Metric("synthesize/prompt_tokens", "tokens", "counter", "Tokens of all prompts, in all turns"),
    Metric("synthesize/output_tokens", "tokens", "counter", "Tokens of all answers, in all turns"),
    Metric("synthesize/engine_seconds", "seconds", "counter", "Time in which engines had work, added up"),
    Metric("synthesize/device_seconds", "seconds", "gauge", "Engine time by a replica's GPUs, or its CPUs"),
    Metric("synthesize/prompt_tokens_per_row", "tokens", "gauge", "Prompt tokens spent on an accepted row"),
    Metric("synthesize/output_tokens_per_row", "tokens", "gauge", "Answer tokens spent on an accepted row"),
    Metric("synthesize/engine_seconds_per_row", "seconds", "gauge", "Engine time spent on an accepted row"),
    Metric("synthesize/device_seconds_per_row", "seconds", "gauge", "Device time spent on an accepted row"),
    Metric("synthesize/seconds", "seconds", "gauge", "Wall time of the whole synthesis"),
    Metric("curate/distinct_2", "1", "gauge", "Different word bigrams of a pool's instructions over all"),
    Metric("curate/vendi_score", "rows", "gauge", "Effective number of different instructions in the sample"),
    Metric("curate/nearest_distance", "1", "gauge", "Mean cosine distance to the nearest instruction"),
    Metric("curate/cell_coverage", "1", "gauge", "Share of fixed cells of the embedding space with a row"),
    Metric("curate/cell_entropy", "nats", "gauge", "Entropy of a pool's rows over those cells"),
    Metric("curate/opening_entropy", "nats", "gauge", "Entropy over opening words and their content words"),
    Metric(
        "curate/new_unique_rate",
        "1",
        "gauge",
        "New instructions among the latest candidates; of the sources, the lowest",
    ),
    Metric(
        "curate/estimated_left",
        "rows",
        "gauge",
        "Distinct instructions that sources of one prompt have left at least (Chao1)",
    ),
    Metric("curate/diversity_seconds", "seconds", "gauge", "Wall time of the diversity report"),
    Metric("mix/task_rows", "rows", "gauge", "Task rows in the mixture"),
    Metric("mix/diverse_rows", "rows", "gauge", "Diverse rows in the mixture"),
    Metric("mix/diverse_ratio", "1", "gauge", "Diverse rows per task row"),
    Metric("train/loss", "nats", "gauge", "Mean loss per trained token of the step"),
    Metric("train/gradient_norm", "1", "gauge", "Norm of the gradient before clipping"),
    Metric("train/learning_rate", "1", "gauge", "Learning rate of the step"),
    Metric("train/tokens_per_second", "tokens/second", "gauge", "Tokens of prompts and answers per second"),
    Metric(
        "train/trained_tokens_per_second", "tokens/second", "gauge", "Tokens that the loss counts per second"
    ),
    Metric(
        "train/peak_memory_bytes",
        "bytes",
        "gauge",
        "Most memory the first worker has held",
    ),
    Metric("train/step_seconds", "seconds", "gauge", "Wall time of one optimizer step"),
    Metric("train/source_loss", "nats", "gauge", "Mean loss per trained token of a source's rows", "source"),
    Metric("train/source_gradient_norm", "1", "gauge", "Norm of a source's gradient on its probe", "source"),
    Metric("train/gradient_cosine", "1", "gauge", "Cosine of the task's and the diverse rows' gradients"),
    Metric(
        "train/buffering_change", "1", "gauge", "Change of the diverse gradient by a task step, over its norm"
    ),
    Metric("train/buffering_cosine", "1", "gauge", "Cosine of that change and the task's gradient"),
    Metric("train/off_task_kl", "nats", "gauge", "Divergence from the base on diverse probe rows, per token"),
    Metric(
        "train/token_cosine", "1", "gauge", "The token's centred cosine to its words, less controls'", "layer"
    ),
    Metric("train/token_rank", "1", "gauge", "Median rank of its words among those read, 0 nearest", "layer"),
    Metric(
        "train/token_p_value",
        "1",
        "gauge",
        "Of token_cosine, when words are permuted within sets of like frequency",
        "layer",
    ),
    Metric("train/meter_seconds", "seconds", "gauge", "Wall time of the latest reading of the meters"),
    Metric("train/meter_share", "1", "gauge", "Share of the time of training that the meters took"),
    Metric("evaluate/score", "1", "gauge", "A suite's score; MLflow: one name for each, `score_name`"),
    Metric("evaluate/off_task_kl", "nats", "gauge", "Divergence from the base off the task, per token"),
    Metric("search/trials", "trials", "gauge", "Trials that ran to their end"),
    Metric("search/best_score", "1", "gauge", "Task score and kept score of the best trial, added"),
    Metric("adapt/stage", "1", "gauge", "Number of the stage that runs, from 1"),
    Metric("adapt/stage_seconds", "seconds", "gauge", "Wall time of the stage that ended last"),
)

METRIC_BY_NAME = {metric.name: metric for metric in METRICS}
_WORD = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
_VALUE = re.compile(r"[A-Za-z0-9_.-]+")
_SCORE = re.compile(r"evaluate/[a-z0-9]+(_[a-z0-9]+)+")


def prometheus_name(metric: Metric) -> str:
    """Return the name to hand to `ray.util.metrics`: `delia_room_quantity`."""
    return f"delia_{metric.name.replace('/', '_')}"


def series_name(metric: Metric) -> str:
    """Return the name that a query uses: Prometheus appends `_total` to a counter's.

    Ray also puts `ray_` before every name; `dashboards/prometheus.yml` takes it off again.
    """
    return f"{prometheus_name(metric)}_total" if metric.kind == "counter" else prometheus_name(metric)


def score_name(suite: str, metric: str) -> str:
    """Return MLflow's name of a score: `evaluate/<suite>_<metric>`.

    Raises:
        ConfigError: A part is not of lower-case letters, digits and single underscores.
    """
    for part in (suite, metric):
        if not _WORD.fullmatch(part):
            raise ConfigError(
                f"a suite and its metric are named with a-z, 0-9 and single underscores, got {part!r};"
                " rename it in the task file"
            )
    return check_metric(f"evaluate/{suite}_{metric}")


def labelled(metric: str, value: object) -> str:
    """Return MLflow's name of a quantity of one source or layer: `<metric>/<value>`.

    Raises:
        ConfigError: The metric has no label, or the value is not of letters, digits, `_`, `.` and `-`.
    """
    return check_metric(f"{metric}/{value}")


def split_label(name: str) -> tuple[Metric, str] | None:
    """Return the metric of the table that a name means, and its label's value, "" without one."""
    if name in METRIC_BY_NAME:
        return METRIC_BY_NAME[name], ""
    base, _, value = name.rpartition("/")
    metric = METRIC_BY_NAME.get(base)
    return (metric, value) if metric is not None and metric.label and _VALUE.fullmatch(value) else None


def check_metric(name: str) -> str:
    """Return `name` if the table has it, with its label's value if it has one, or it is a score's.

    A name that is all but one of the table's is taken for a slip, not for a score.

    Raises:
        ConfigError: The name is unknown; the message has the nearest one.
    """
    if split_label(name) is not None:
        return name
    if _SCORE.fullmatch(name) and not difflib.get_close_matches(name, METRIC_BY_NAME, n=1, cutoff=0.9):
        return name
    near = difflib.get_close_matches(name, METRIC_BY_NAME, n=1)
    hint = f"did you mean {near[0]!r}? else " if near else ""
    raise ConfigError(f"no metric {name!r} in delia.metrics.METRICS; {hint}add it to the table")
