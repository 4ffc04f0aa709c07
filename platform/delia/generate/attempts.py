"""Requests that an engine dies of are found and given up; the others are answered.

    ask(requests) -> as a whole -> as a whole, alone -> in halves, alone -> one request, three times -> given up

A replica that dies is restarted by Ray, and its block begins again. An actor on the cluster counts how often
a set of requests was begun and never ended: it lives outside the replica, so it sees what no handler can
(out of memory, a crash in native code). From the second time on, requests run alone in their engine:
otherwise a batch could be blamed for its neighbour.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NoReturn

import psutil
from ray.exceptions import RayActorError

from delia.errors import EngineDiedError, EngineError
from delia.generate.calls import call
from delia.generate.engine import ENGINE_FAULT, Completion, Request
from delia.rng import hash_text

Verdict = Literal["try", "try_alone", "halve", "give_up"]
Admission = Literal["begin", "wait", "skip"]
Ask = Callable[[Sequence[Request]], list[Completion]]

MAX_WHOLE = 2
"""How often a batch is begun as a whole before it is halved."""
MAX_SINGLE = 3
"""How often one request is begun before it is given up."""
MAX_DEATHS_IN_A_ROW = 24
"""More than it takes to corner one request among 2^15: the engine itself is broken."""
END_SECONDS = 10.0
"""How long is waited for killed processes to be gone."""
POLL_SECONDS = 0.1
"""How often a replica asks whether the reader has come on; the blocks that it is at go on meanwhile."""


class AttemptLog:
    """Counts begun and unended attempts by key; knows what may be begun. An actor of the cluster, not of a replica.

    No more than `max_ahead` blocks are begun that the reader has not taken: Ray Data bounds results by their
    bytes alone, and text is small.
    """

    def __init__(self, *, max_quarantined: int, max_ahead: int) -> None:
        """Start with nothing begun."""
        self._blocks: set[str] = set()
        self._num_ahead = 0
        self._max_ahead = max_ahead
        self._begun: dict[str, int] = {}
        self._errors: dict[str, str] = {}
        self._quarantined: set[str] = set()
        self._tried: set[str] = set()
        self._deaths_in_a_row = 0
        self._max_quarantined = max_quarantined
        self._skipped: set[str] = set()

    def refuse(self, sources: Sequence[str]) -> None:
        """Note sources whose blocks are no longer wanted."""
        self._skipped.update(sources)

    def admit(self, key: str, source: str) -> Admission:
        """Return whether a block is to be begun, now or later; one whose replica was lost has been counted."""
        is_counted = key in self._blocks
        if source in self._skipped:
            if is_counted:
                self.count_taken()
            return "skip"
        if not is_counted:
            if self._num_ahead >= self._max_ahead:
                return "wait"
            self._blocks.add(key)
            self._num_ahead += 1
        return "begin"

    def count_taken(self) -> None:
        """Note that the reader is done with one block; a log that was restarted has forgotten some."""
        self._num_ahead = max(0, self._num_ahead - 1)

    def begin(self, key: str, num_requests: int, max_attempts: int) -> tuple[Verdict, str]:
        """Return what to do with a set of requests that is begun now, and the last known error.

        Raises:
            EngineError: Process after process died, and none answered anything.
        """
        count = self._begun[key] = self._begun.get(key, 0) + 1
        error = self._errors.get(key, "its process died")
        if key in self._tried:
            self._tried.discard(key)
            self._deaths_in_a_row += 1
        if self._deaths_in_a_row > MAX_DEATHS_IN_A_ROW:
            raise EngineError(
                f"the engine died {self._deaths_in_a_row} times in a row and answered nothing in between"
                f" (last: {error}); see the workers' logs, and try a smaller engine.max_num_seqs or"
                " engine.gpu_memory_utilization"
            )
        if num_requests == 1 and count > MAX_SINGLE:
            return "give_up", error
        if num_requests > 1 and count > max_attempts:
            return "halve", error
        self._tried.add(key)
        return ("try_alone" if count > 1 or max_attempts == 1 else "try"), error

    def fail(self, key: str, error: str) -> None:
        """Note why an attempt is about to end its process."""
        self._errors[key] = error

    def end(self, key: str) -> None:
        """Forget what was answered; what was halved or given up stays known for the next process."""
        self._begun.pop(key, None)
        self._tried.discard(key)
        self._deaths_in_a_row = 0

    def quarantine(self, key: str, error: str) -> None:
        """Count a request that is given up.

        Raises:
            EngineError: There are more of them than the settings allow.
        """
        self._quarantined.add(key)
        if len(self._quarantined) > self._max_quarantined:
            raise EngineError(
                f"the engine died of {len(self._quarantined)} requests, engine.max_quarantined="
                f"{self._max_quarantined} (last: {error}); see the workers' logs, or raise the limit"
            )


class CarefulEngine:
    """Asks an engine and survives, with Ray's restarts, the requests that kill it."""

    def __init__(self, generate: Ask, log: Any, *, num_callers: int) -> None:
        """Remember the engine, the log's actor handle, and how many batches may run side by side."""
        self._generate = generate
        self._log = log
        self._num_callers = num_callers
        self._places = threading.Semaphore(num_callers)
        self._one_alone = threading.Lock()
        self._door = threading.Lock()

    def ask(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer a batch, in order; a request that was given up has the finish reason `engine_fault`."""
        return self._ask(list(requests), max_attempts=MAX_WHOLE) if requests else []

    def enter(self, block: str, source: str) -> bool:
        """Wait until a block may be begun; return False where the job wants no more of its source."""
        with self._door:  # one asks for all who wait
            while (admission := self._call("admit", block, source)) == "wait":
                time.sleep(POLL_SECONDS)
        return bool(admission != "skip")

    def leave_empty(self) -> None:
        """Note that a block's result is empty: the reader is not told of it."""
        self._call("count_taken")

    def _ask(self, requests: list[Request], *, max_attempts: int) -> list[Completion]:
        key = hash_text(*(f"{item.request_id} {item.prompt_ids}" for item in requests))
        verdict, error = self._call("begin", key, len(requests), max_attempts) or ("try", "")
        if verdict == "give_up":
            self._call("quarantine", key, error)
            return [_give_up(requests[0], error)]
        if verdict == "halve":
            middle = len(requests) // 2
            halves = (requests[:middle], requests[middle:])
            return [item for half in halves for item in self._ask(half, max_attempts=1)]
        with self._alone() if verdict == "try_alone" else self._places:
            answered = self._try(requests, key)
        self._call("end", key)
        return answered

    def _try(self, requests: list[Request], key: str) -> list[Completion]:
        """Ask once; an engine that raises is not trusted again, so its process ends and Ray starts another."""
        try:
            return self._generate(requests)
        except EngineDiedError as error:
            self._call("fail", key, str(error))
            end_process()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait until no other batch is in the engine, and keep others out."""
        with self._one_alone:
            for _ in range(self._num_callers):
                self._places.acquire()
        try:
            yield
        finally:
            for _ in range(self._num_callers):
                self._places.release()

    def _call(self, method: str, *args: str | int) -> Any:
        """Call the log; one that died with its node is no reason to stop."""
        try:
            return call(getattr(self._log, method), *args)
        except RayActorError:
            return None


def end_process() -> NoReturn:
    """End this process at once, and before it all that it began: no handler of theirs is waited for.

    Shards of a model are processes below this one that Ray does not know. They would hold their GPUs' memory for a
    while longer, and the replica that takes this one's place would not find it free.
    """
    below = psutil.Process().children(recursive=True)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(below, timeout=END_SECONDS)
    os._exit(1)


def _give_up(request: Request, error: str) -> Completion:
    return Completion(
        request_id=request.request_id,
        token_ids=(),
        finish_reason=ENGINE_FAULT,
        num_prompt_tokens=len(request.prompt_ids),
        error=f"the engine died of it {MAX_SINGLE} times: {error}",
    )
