"""The gate: may a version become champion, and the one place that makes it so.

    scores and paired differences  ->  Decision (pure)  ->  `champion` and `previous_champion` moved

The rule is non-inferiority: on every suite the *lower* bound of candidate minus champion must lie
above minus the margin. "No worse within its interval" would let every small suite pass; here a wide
interval refuses. Scores are better when higher. MLflow's alias is last-writer-wins, hence the lock.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from pydantic import Field

from delia.config import FrozenConfig
from delia.errors import ConfigError, GateError
from delia.track.connection import lock_file
from delia.track.registry import ModelVersionInfo, get_version, get_version_by_alias, set_alias
from delia.track.runs import Tracker

CHAMPION = "champion"
PREVIOUS_CHAMPION = "previous_champion"


class Interval(Protocol):
    """A score with its confidence bounds, as `delia.evaluate` computes them."""

    @property
    def estimate(self) -> float:
        """The score itself."""

    @property
    def low(self) -> float:
        """The lower bound."""

    @property
    def high(self) -> float:
        """The upper bound."""


class GateConfig(FrozenConfig):
    """What a candidate must hold.

    `margin` is how much worse than the champion a suite may truly be, in the score's own unit;
    `margins` sets it for single suites. `floors` are scores that the lower bound must reach.
    """

    margin: float = Field(default=0.02, ge=0)
    margins: dict[str, float] = Field(default_factory=dict)
    floors: dict[str, float] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A verdict, its reasons, and the champion that the candidate was compared with."""

    promote: bool
    reasons: tuple[str, ...]
    champion: str | None


def decide(
    candidate: Mapping[str, Interval],
    differences: Mapping[str, tuple[float, float, float]] | None,
    config: GateConfig,
    *,
    champion: str | None = None,
) -> Decision:
    """Decide whether a candidate may become champion.

    Args:
        candidate: Its score by suite.
        differences: (estimate, low, high) of candidate minus champion by suite, from paired rows;
            None for the first champion, which only has floors to hold.
        config: Margins and floors.
        champion: The version that `differences` compare with.

    Returns:
        With all failed rules as reasons, or, where none failed, with what held.

    Raises:
        ConfigError: Differences without the champion's version, or the other way round.
    """
    if (differences is None) != (champion is None):
        raise ConfigError(
            f"differences and the champion's version go together, got champion={champion!r} and"
            f" {'no' if differences is None else len(differences)} differences; pass both or neither"
        )
    held: list[str] = []
    failed: list[str] = [] if candidate else ["no suite was scored"]
    for suite in sorted({*config.margins, *config.floors, *(differences or {})} - set(candidate)):
        failed.append(f"{suite}: a margin, a floor or the champion names this suite, and it was not scored")
    for suite, score in candidate.items():
        floor = config.floors.get(suite)
        if floor is not None:
            text = f"{suite}: lower bound {score.low:.4f} of {score.estimate:.4f}, floor {floor:.4f}"
            (held if score.low >= floor else failed).append(text)
        if differences is None:
            continue
        if suite not in differences:
            failed.append(f"{suite}: not compared with champion {champion}")
            continue
        estimate, low, high = differences[suite]
        margin = config.margins.get(suite, config.margin)
        text = f"{suite}: difference {estimate:+.4f} [{low:+.4f}, {high:+.4f}], must lie above {-margin:+.4f}"
        (held if low > -margin else failed).append(text)  # NaN fails
    first = () if champion else ("first champion: only floors apply",)
    return Decision(promote=not failed, reasons=tuple(failed) or (*first, *held), champion=champion)


def check_lock_dir(lock_dir: str) -> None:
    """Refuse a bucket: a lock is a file that the kernel frees at death.

    Raises:
        ConfigError: With the setting to change.
    """
    if "://" in lock_dir:
        raise ConfigError(
            f"the gate's lock needs a local or mounted directory, not {lock_dir!r}; set lock_dir"
        )


def promote(tracker: Tracker, name: str, version: str, decision: Decision, lock_dir: str) -> ModelVersionInfo:
    """Move `champion` to a version and keep the old one as `previous_champion`; safe to run again.

    Args:
        tracker: The connection.
        name: The registered model.
        version: The candidate's version.
        decision: What `decide` said about it.
        lock_dir: A directory that every promoting process sees: local, or a mounted share.

    Raises:
        GateError: The decision is negative, or the champion is not the one it was compared with.
        StoreError: There is no such version.
    """
    if not decision.promote:
        raise GateError(f"models:/{name}/{version} is not promoted: {'; '.join(decision.reasons)}")
    check_lock_dir(lock_dir)
    candidate = get_version(tracker, f"models:/{name}/{version}")
    with lock_file(Path(lock_dir) / f"{quote(name, safe='')}.gate.lock"):
        current = _read_champion(tracker, name)
        if current == candidate.version:
            return candidate
        if current != decision.champion:
            raise GateError(
                f"models:/{name}/{version} was compared with champion {decision.champion}, now it is"
                f" {current}; evaluate against that one and decide again"
            )
        if current is not None:  # first: a crash in between must not lose it
            set_alias(tracker, name, PREVIOUS_CHAMPION, current)
        set_alias(tracker, name, CHAMPION, candidate.version)
        after = _read_champion(tracker, name)
        if after != candidate.version:
            raise GateError(
                f"champion of {name!r} was set to {version} and is {after}: somebody moves the alias"
                " without the gate; only the gate may"
            )
    return candidate


def _read_champion(tracker: Tracker, name: str) -> str | None:
    found = get_version_by_alias(tracker, name, CHAMPION)
    return found.version if found else None
