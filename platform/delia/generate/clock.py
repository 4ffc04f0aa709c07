"""Whose time an engine's time is: several blocks are in one engine at once.

running(account) ... running(another)  -->  account.seconds, another.seconds
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class Account:
    """Seconds of an engine that were spent for one caller."""

    seconds: float = 0.0


class SharedClock:
    """Gives each of n callers inside 1/n of every second, so what one is charged hangs on no one's order of leaving."""

    def __init__(self) -> None:
        """Start with nobody inside."""
        self._lock = threading.Lock()
        self._inside: list[Account] = []
        self._since = 0.0

    @contextmanager
    def running(self, account: Account) -> Iterator[None]:
        """Charge an account until the block is left."""
        with self._lock:
            self._charge()
            self._inside.append(account)
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                self._inside.remove(account)

    def _charge(self) -> None:
        """Share out the time since somebody last entered or left."""
        now = time.monotonic()
        for account in self._inside:
            account.seconds += (now - self._since) / len(self._inside)
        self._since = now
