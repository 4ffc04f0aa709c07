"""What curation does around the curators of a pool: a curator a source, then selection, report and scores.

settings, workspace --open_curation--> Curation; --open_screener--> its Screener, for other processes too
Curation.curators, .targets      accept candidates, a source each
Curation.select                  keeps `num_rows` of a source's accepted rows, where settings say so
Curation.describe                diversity -> the manifest's details and the log
Curation.score                   likelihoods -> scores.parquet
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from delia.config import build_method
from delia.curate.diversity import choose_sample, measure_diversity
from delia.curate.embedding import Embedder, load_embedder
from delia.curate.leaks import ControlTexts
from delia.curate.likelihood import LIKELIHOOD, score_answers
from delia.curate.pipeline import Curator
from delia.curate.screening import Screener
from delia.curate.selection import Selector, select_rows
from delia.curate.settings import CurateConfig
from delia.flow.workspace import Workspace
from delia.model.loading import load_base
from delia.rng import derive_seed
from delia.schema import Rejection, Row, SeedTask
from delia.store.candidates import from_row_table
from delia.store.scores import write_scores


@dataclass(frozen=True, kw_only=True)
class Curation:
    """The curators of a pool's sources and what is done with the rows that they accept.

    Attributes:
        curators: Source -> its curator.
        targets: Source -> rows that its curator accepts; with `curate.select`, more than it keeps.
    """

    config: CurateConfig
    space: Workspace
    num_rows: Mapping[str, int]
    curators: Mapping[str, Curator]
    targets: Mapping[str, int]
    embed: Embedder
    selector: Selector | None

    def select(self, source: str, rows: Sequence[Row]) -> tuple[list[Row], list[Rejection]]:
        """Return what the pool keeps of a source's accepted rows, in index order, and rejections of the others."""
        config, num_rows = self.config.select, self.num_rows[source]
        if config is None or self.selector is None or len(rows) <= num_rows:
            return list(rows), []
        seed = derive_seed("select", config.seed, source)
        return select_rows(rows, self.selector, num_rows=num_rows, seed=seed, embed=self.embed)

    def describe(
        self, tables: Iterable[pa.Table], num_rows: int, *, drawn: Collection[str]
    ) -> tuple[dict[str, object], dict[str, float]]:
        """Measure the diversity of a pool; return the manifest's details and the metrics to log.

        Args:
            tables: Its rows.
            num_rows: How many they are.
            drawn: Sources whose candidates are independent draws: how much is left is estimated of these alone.
        """
        report = measure_diversity(
            _pick(tables, choose_sample(num_rows)),
            self.embed,
            num_rows=num_rows,
            embedder=self.config.embedder,
            novelty={
                name: curator.novelty.report(is_drawn=name in drawn)
                for name, curator in self.curators.items()
            },
        )
        metrics = {
            "curate/distinct_2": report.distinct[1],
            "curate/vendi_score": report.vendi_score,
            "curate/nearest_distance": report.nearest_mean,
            "curate/cell_coverage": report.cell_coverage,
            "curate/cell_entropy": report.cell_entropy,
            "curate/opening_entropy": report.opening_entropy,
            "curate/new_unique_rate": self.measure_new_unique_rate(self.curators),
            "curate/diversity_seconds": report.seconds,
        }
        left = [item.estimated_left for item in report.novelty.values() if item.estimated_left is not None]
        if left:
            metrics["curate/estimated_left"] = sum(left)
        return {"diversity": report.to_details()}, metrics

    def measure_new_unique_rate(self, sources: Iterable[str]) -> float:
        """Return the lowest rate of new instructions among the latest windows of some sources, in 0..1."""
        return min(self.curators[name].novelty.rate for name in sources)

    def score(self, address: str, tables: Iterable[pa.Table]) -> None:
        """Write the likelihood of each row's answer beside the pool, where settings ask for it."""
        if not self.config.score_likelihood:
            return
        model = load_base(self.space.model)
        row_ids: list[str] = []
        values: list[float] = []
        for table in tables:
            rows = from_row_table(table)
            row_ids += [row.row_id for row in rows]
            values += score_answers(model, self.space.chat, rows)
        write_scores(address, row_ids, {LIKELIHOOD: values})


def open_curation(
    config: CurateConfig,
    space: Workspace,
    *,
    num_rows: Mapping[str, int],
    eval_rows: Sequence[SeedTask],
    allowed_modules: tuple[str, ...] = (),
) -> Curation:
    """Build a curator for each source, and what comes after them.

    Args:
        config: What is kept.
        space: Model, chat format and task; dev and test are kept out of the pool.
        num_rows: Source -> rows that the pool is to have of it.
        eval_rows: Rows of `config.decontaminate`, kept out too; this node may not see their files.
        allowed_modules: Modules outside `delia.methods` that settings may name.

    Raises:
        ConfigError: No such embedder, language or selector.
    """
    embed = load_embedder(config.embedder, model=space.model, chat=space.chat)
    screener = open_screener(config, space, eval_rows=eval_rows, embed=embed)
    select = config.select
    return Curation(
        config=config,
        space=space,
        num_rows=num_rows,
        curators={name: Curator(screener) for name in num_rows},
        targets={name: select.count_accepted(count) if select else count for name, count in num_rows.items()},
        embed=embed,
        selector=build_method(select, allowed_modules=allowed_modules) if select else None,
    )


def open_screener(
    config: CurateConfig, space: Workspace, *, eval_rows: Sequence[SeedTask], embed: Embedder | None = None
) -> Screener:
    """Build what screens the candidates of all sources of a pool.

    Args:
        config: What is kept.
        space: See `open_curation`.
        eval_rows: See `open_curation`.
        embed: The embedder that the settings name; None loads it where a rule asks for it.

    Raises:
        ConfigError: No such embedder or language.
    """
    if embed is None and config.semantic_threshold is not None:
        embed = load_embedder(config.embedder, model=space.model, chat=space.chat)
    splits = space.task.rows_by_split
    return Screener(
        config,
        eval_rows=[*splits["dev"], *splits["test"], *eval_rows],
        train_rows=splits["train"],
        control_texts=ControlTexts(space.chat.table.control_ids, task_tokens=space.chat.token_ids),
        embed=embed,
    )


def _pick(tables: Iterable[pa.Table], places: Sequence[int]) -> list[Row]:
    """Return the rows at ascending places."""
    picked: list[Row] = []
    first, wanted = 0, list(places)
    for table in tables:
        here = [place - first for place in wanted if place < first + table.num_rows]
        picked += from_row_table(table.take(here)) if here else ()
        wanted, first = wanted[len(here) :], first + table.num_rows
    return picked
