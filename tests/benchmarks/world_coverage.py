"""How much of the starter's world its own user-prefix samples cover: cells of (task kind x format).

instruction --read_cell--> (kind, format) | None;   5,000 accepted rows -> the share of cells with one
"""

import re

from delia.flow.pool import build_pool
from delia.flow.workspace import Workspace
from delia.generate.engine import EngineConfig
from delia.recipes.starter import starter_sep
from delia.starter.formats import FORMATS, PLAIN, ask_phrasings, forbid_phrasings
from delia.starter.kinds import KINDS

Cell = tuple[str, str]

_REQUESTS: dict[str, str] = {
    text: cell
    for item in FORMATS
    for texts, cell in (
        (ask_phrasings(item.name), item.name),
        (item.descriptions, item.name),
        (forbid_phrasings(item.name), f"no-{item.name}"),
    )
    for text in texts
}


def _to_pattern(phrasing: str) -> re.Pattern[str]:
    parts = re.split(r"\{\d\}", phrasing)
    return re.compile("(.+)".join(re.escape(part) for part in parts))


_QUESTIONS = [(kind.name, _to_pattern(phrasing)) for kind in KINDS for phrasing in kind.phrasings]
CELLS: frozenset[Cell] = frozenset(
    (kind.name, cell) for kind in KINDS for cell in (PLAIN, *dict.fromkeys(_REQUESTS.values()))
)


def read_cell(instruction: str) -> Cell | None:
    """Return the kind and the format of an instruction in the world's words; None for any other."""
    found = [(cell, text) for text, cell in _REQUESTS.items() if text in instruction]
    cell, text = max(found, key=lambda item: len(item[1]), default=(PLAIN, ""))
    question = " ".join(instruction.replace(text, " ").split()) if text else instruction
    kinds = {name for name, pattern in _QUESTIONS if pattern.fullmatch(question)}
    return (min(kinds), cell) if kinds else None


def measure_coverage(space: Workspace, *, num_rows: int, engine: EngineConfig) -> tuple[float, float]:
    """Return the share of cells that a pool of `num_rows` has a row in, and the share of rows in any cell."""
    config = starter_sep().pool
    assert config is not None
    source = config.synthesize.sources[0].model_copy(update={"num_rows": num_rows})
    synthesize = config.synthesize.model_copy(update={"sources": (source,)})
    wide = config.model_copy(update={"synthesize": synthesize})
    pool = build_pool(wide, space, engine=engine, log=lambda metrics, step: None)
    cells = [read_cell(row.instruction) for row in pool.rows]
    known = {cell for cell in cells if cell is not None}
    return len(known & CELLS) / len(CELLS), sum(cell is not None for cell in cells) / len(cells)


def describe_coverage(space: Workspace) -> str:
    """Return a sentence for the results."""
    share, known = measure_coverage(space, num_rows=5000, engine=EngineConfig(num_replicas=2))
    return (
        f"5,000 user-prefix samples at T=1 have a row in {share:.1%} of the {len(CELLS)} cells (task kind x format)"
        f" of the starter's world; {known:.1%} of the rows are the world's own wordings."
    )
