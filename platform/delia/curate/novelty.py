"""How new the instructions of a source still are, and how many more its method has to give.

    instructions of all candidates, in index order --Novelty.add--> rates of new ones, Chao1, unseen mass

The figures are functions of the candidates in index order, so a rule that stops on them stops at one
index, whatever ran. They count exact repeats of normalised texts, accepted or not.

The estimates take the candidates for independent draws from one distribution, which holds for
self-sampling at a fixed prompt; of a file, or of a method that walks a grid or a list of seed rows, they would say
nothing and are left out.
Sources: the unseen mass is Good's (1953, "The population frequencies of species and the estimation of
population parameters", Biometrika 40, credited there to Turing); the number of distinct instructions is
Chao1 in its bias-corrected form, a lower bound, with the log-normal interval (Chao 1984, Scand. J. Statist.
11; Chao 1987, Biometrics 43); variances as in Colwell's EstimateS, equations 6 and 7.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import xxhash

from delia.curate.ngrams import normalise

WINDOW = 1000
"""Candidates over which a rate is taken."""
_MAX_RATES = 20
_Z95 = 1.96


@dataclass(frozen=True, kw_only=True)
class NoveltyReport:
    """What the candidates of one source say about those still to come.

    Attributes:
        num_candidates: Candidates with an instruction.
        num_distinct: Different instructions among them.
        new_unique_rate: Share of the latest window's instructions that no earlier candidate had, in 0..1.
        new_unique_rates: The same over the course, in at most 20 stretches of equal length.
        unseen_mass: Probability that the next candidate's instruction is a new one, in 0..1; None, as what follows,
            where the candidates are no independent draws.
        estimated_distinct: Different instructions that there are at least (Chao1).
        interval: 95 % interval of that.
    """

    num_candidates: int
    num_distinct: int
    new_unique_rate: float
    new_unique_rates: tuple[float, ...]
    unseen_mass: float | None
    estimated_distinct: float | None
    interval: tuple[float, float] | None

    @property
    def estimated_left(self) -> float | None:
        """Return how many instructions at least have not been seen yet."""
        return None if self.estimated_distinct is None else self.estimated_distinct - self.num_distinct


def estimate_distinct(num_distinct: int, num_once: int, num_twice: int) -> tuple[float, float, float]:
    """Return the Chao1 estimate of the number of species and its 95 % interval.

    Where at most one species was seen once, nothing speaks for more, and the interval is a point.

    Args:
        num_distinct: Species seen.
        num_once: Species seen exactly once.
        num_twice: Species seen exactly twice.
    """
    unseen = num_once * (num_once - 1) / (2 * (num_twice + 1))
    if unseen == 0:
        return float(num_distinct), float(num_distinct), float(num_distinct)
    variance = unseen + num_once * (2 * num_once - 1) ** 2 / (4 * (num_twice + 1) ** 2)
    if num_twice:
        variance += num_once**2 * num_twice * (num_once - 1) ** 2 / (4 * (num_twice + 1) ** 4)
    else:
        variance -= num_once**4 / (4 * (num_distinct + unseen))
    spread = math.exp(_Z95 * math.sqrt(math.log(1 + max(0.0, variance) / unseen**2)))
    return num_distinct + unseen, num_distinct + unseen / spread, num_distinct + unseen * spread


class Novelty:
    """Counts the instructions of one source's candidates."""

    def __init__(self, *, window: int = WINDOW) -> None:
        """Start with none; keeps a hash and a count of each different instruction, a byte a candidate."""
        self._window = window
        self._times: Counter[int] = Counter()
        self._num_candidates = 0
        self._is_new = bytearray()

    def add(self, instruction: str) -> None:
        """Count the next candidate's instruction."""
        number = xxhash.xxh3_64_intdigest(normalise(instruction).encode("utf-8", "surrogatepass"))
        self._is_new.append(number not in self._times)
        self._times[number] += 1
        self._num_candidates += 1

    @property
    def rate(self) -> float:
        """Return the share of new instructions among the latest window's, 1 before the first candidate."""
        latest = self._is_new[-self._window :]
        return sum(latest) / len(latest) if latest else 1.0

    def report(self, *, is_drawn: bool = True) -> NoveltyReport:
        """Return all figures of the candidates so far; estimates only where they are independent draws."""
        frequencies = Counter(self._times.values())
        num_distinct, num_once = len(self._times), frequencies[1]
        estimate, low, high = estimate_distinct(num_distinct, num_once, frequencies[2])
        size = max(self._window, -(-self._num_candidates // _MAX_RATES))
        stretches = [self._is_new[start : start + size] for start in range(0, self._num_candidates, size)]
        report = NoveltyReport(
            num_candidates=self._num_candidates,
            num_distinct=num_distinct,
            new_unique_rate=self.rate,
            new_unique_rates=tuple(sum(stretch) / len(stretch) for stretch in stretches),
            unseen_mass=num_once / self._num_candidates if self._num_candidates else 1.0,
            estimated_distinct=estimate,
            interval=(low, high),
        )
        return (
            report if is_drawn else replace(report, unseen_mass=None, estimated_distinct=None, interval=None)
        )
