"""Score adapters once and keep it: addresses x rows -> reports from storage or from one engine run."""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow.compute as compute

from delia.config import fingerprint
from delia.evaluate.harness import EvalReport, EvaluateConfig, evaluate, report_from_table
from delia.flow.encoding import encode_rows
from delia.flow.serving import serve
from delia.flow.verify import measure_drift
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig
from delia.schema import SeedTask
from delia.store.adapters import fetch_adapter
from delia.store.pools import Pool
from delia.store.tables import Manifest, commit, is_finished, join, read_table, write_table
from delia.track.registry import digest_directory
from delia.train.settings import TrainConfig

SCORES = "scores.parquet"


def eval_address(
    config: EvaluateConfig,
    space: Workspace,
    adapter: str,
    rows: tuple[SeedTask, ...],
    *,
    engine: EngineConfig,
) -> str:
    """Return where the scores of an adapter on these rows are kept; an empty address is the base's.

    An adapter is known by its files' content: versions fetched from a registry end in one name.
    """
    scope = fingerprint(
        config,
        space.model_id,
        space.chat.template_hash,
        space.task.digest,
        f"{engine.kind} {space.model.dtype}",
        *space.task.metrics,
        *(row.task_id for row in rows),
    )
    identity = digest_directory(fetch_adapter(adapter)) if adapter else "base"
    return space.address("evals", f"{identity}-{scope}")


def evaluate_adapters(
    config: EvaluateConfig,
    space: Workspace,
    addresses: Mapping[str, str],
    rows: tuple[SeedTask, ...],
    *,
    engine: EngineConfig,
    on_done: Callable[[str], None] = lambda label: None,
) -> dict[str, EvalReport]:
    """Score each adapter on rows, those already scored from storage, the others in the form that vLLM serves.

    Args:
        config: Lengths.
        space: Model, chat format and task.
        addresses: Label -> address of an adapter directory, empty for the base.
        rows: Rows of dev or test.
        engine: How the model is served; its `lora_rank` is set from the adapters.
        on_done: Called with each label that was scored now.
    """
    places = {
        label: eval_address(config, space, address, rows, engine=engine)
        for label, address in addresses.items()
    }
    missing = {label: address for label, address in addresses.items() if not is_finished(places[label])}
    if missing:
        served = {label: serve(address, space) for label, address in missing.items()}
        scored = evaluate(
            {label: found.adapter for label, found in served.items()},
            rows,
            config,
            model=space.model,
            engine=engine.model_copy(update={"lora_rank": max(found.rank for found in served.values())}),
            chat=space.chat,
            metrics=space.task.metrics,
            models={label: found.model for label, found in served.items()},
        )
        for label, report in scored:  # kept one by one: a kill loses the unfinished ones alone
            _keep(
                places[label],
                report,
                parents={"adapter": missing[label] or "base", "task": space.task.digest},
            )
            on_done(label)
    return {label: report_from_table(read_table(join(place, SCORES))) for label, place in places.items()}


def _keep(address: str, report: EvalReport, *, parents: dict[str, str]) -> None:
    write_table(join(address, SCORES), report.to_table())
    name = address.rpartition("/")[2]
    counts = {"rows": len(report.task_ids)}
    commit(address, Manifest(kind="eval", fingerprint=name, root=name, counts=counts, parents=parents))


def measure_pool_drift(
    addresses: Mapping[str, str], space: Workspace, pool: Pool | None, *, train: TrainConfig, num_rows: int
) -> dict[str, float]:
    """Return off-task KL in nats a token by label, on rows that the base wrote; none without a pool.

    The rows come from the end of the pool's first source; a pool larger than the mixtures keeps some of them
    untrained. Those that are longer than `train.max_length` are left out, whatever training does with its own.
    """
    if pool is None or num_rows == 0 or not len(pool.index.sources):
        return {}
    sources = pool.index.sources
    places = np.flatnonzero(compute.equal(sources, sources[0]).to_numpy())[-num_rows:]
    chats = [row.messages for row in pool.index.read(places.tolist())]
    short = train.model_copy(update={"on_long": "drop"})
    encoded = [row for row in encode_rows(chats, short, space.chat) if row is not None]
    sequences = [(list(row.input_ids), list(row.loss_mask)) for row in encoded]
    return measure_drift(dict(addresses), sequences, space.model) if sequences else {}
