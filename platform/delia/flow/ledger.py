"""What a pool cost: tokens and time, of all its candidates and for each row that was accepted."""

import math
from collections.abc import Mapping
from dataclasses import asdict

from delia.store.candidates import Cost

LOGGED = (
    "synthesize/device_seconds",
    "synthesize/prompt_tokens_per_row",
    "synthesize/output_tokens_per_row",
    "synthesize/engine_seconds_per_row",
    "synthesize/device_seconds_per_row",
)
"""Logged at the pool's end; tokens and the engine's seconds were logged as they were spent."""


def account(cost: Cost, num_rows: int) -> dict[str, float]:
    """Return the ledger of a pool: what was spent, rejected rows included, in all and for each row.

    Device seconds that are not known are left out.
    """
    ledger = {name: float(value) for name, value in asdict(cost).items() if not math.isnan(value)}
    return ledger | {f"{name}_per_row": value / max(1, num_rows) for name, value in ledger.items()}


def to_metrics(ledger: Mapping[str, float]) -> dict[str, float]:
    """Return what is logged of a ledger."""
    named = {name: name.removeprefix("synthesize/") for name in LOGGED}
    return {name: ledger[key] for name, key in named.items() if key in ledger}
