"""An acceptance that outlives its killed driver writes the pool beside its successor, in every order of their steps.

Both have decided on the same stored chunks. Each writes in a thread of its own, step by step: it looks whether the pool
is finished, and gives the rows, the rejections and the manifest their names.
"""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from delia.flow.acceptance import Acceptance
from delia.flow.workspace import Workspace
from delia.schema import Rejection
from delia.store import pools
from delia.store.pools import Pool, read_pool, read_rejections
from delia.store.tables import is_finished

NUM_STEPS = 4
ORDERS = [
    tuple(int(step not in steps) for step in range(2 * NUM_STEPS))
    for steps in itertools.combinations(range(2 * NUM_STEPS), NUM_STEPS)
]
"""Whose step it is: the orphan's, 0, or its successor's, 1."""
BUCKET = "orphans"
PATIENCE = 600
"""Seconds that a thread waits for another's steps; the limit only ends a failure."""


class DriverDiedError(Exception):
    """Stands for the death of a driver that has told its acceptance to write."""


class Turns:
    """Threads that take a step when they are told to."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._go: list[threading.Semaphore] = []
        self._stopped = threading.Semaphore(0)
        self._ended: set[int] = set()

    def begin(self, write: Callable[[], Any]) -> None:
        """Start a thread, and wait until it is before its first step."""
        self._go.append(threading.Semaphore(0))
        threading.Thread(target=self._run, args=(len(self._go) - 1, write), daemon=True).start()
        assert self._stopped.acquire(timeout=PATIENCE)

    def take(self, number: int) -> None:
        """Let a thread take its next step; one that has ended takes none."""
        if number not in self._ended:
            self._go[number].release()
            assert self._stopped.acquire(timeout=PATIENCE)

    def pause(self) -> None:
        """Wait for the next turn; whoever is no such thread goes on."""
        number = getattr(self._own, "number", None)
        if number is not None:
            self._stopped.release()
            assert self._go[number].acquire(timeout=PATIENCE)

    def _run(self, number: int, write: Callable[[], Any]) -> None:
        self._own.number = number
        try:
            write()
        finally:
            self._ended.add(number)
            self._stopped.release()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Turns]]:
    """Whose turns the steps of a pool's writing are: those of the last in the list."""
    all_turns = [Turns()]
    look, open_table, commit = pools.is_finished, pools.open_table, pools.commit

    def look_in_turn(address: str) -> bool:
        all_turns[-1].pause()
        return look(address)

    @contextmanager
    def open_in_turn(address: str, schema: Any) -> Iterator[Any]:
        with open_table(address, schema) as writer:
            yield writer
            all_turns[-1].pause()

    def commit_in_turn(address: str, manifest: Any) -> None:
        all_turns[-1].pause()
        commit(address, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(pools, "is_finished", look_in_turn)
        patch.setattr(pools, "open_table", open_in_turn)
        patch.setattr(pools, "commit", commit_in_turn)
        yield all_turns


@pytest.fixture
def whole(space: Workspace, local_stage: Any, build: Any, tmp_path: Path) -> Pool:
    """The pool of a job that nobody kills."""
    local_stage()
    return build(dataclasses.replace(space, output_dir=str(tmp_path / "whole")))


@pytest.fixture
def rejections(whole: Pool, space: Workspace, read_back: Any, tmp_path: Path) -> list[Rejection]:
    """What the pool `whole` rejected."""
    return read_back(dataclasses.replace(space, output_dir=str(tmp_path / "whole")))


@pytest.fixture
def leave_orphan(build: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Workspace], Callable[..., Any]]:
    """Return a function that makes a pool up to its writing, and returns what would write it at an address."""

    def leave(space: Workspace) -> Callable[[str], Any]:
        left: list[Callable[[str], Any]] = []

        class Orphan(Acceptance):
            def write(self, address: str, **options: Any) -> Any:
                write = super().write
                left.append(lambda place: write(place, **options))
                raise DriverDiedError

        with monkeypatch.context() as patch:
            patch.setattr(
                "delia.flow.pool.host_acceptance",
                lambda *args, **options: nullcontext(Orphan(*args, **options)),
            )
            with pytest.raises(DriverDiedError):
                build(space)
        return left[0]

    return leave


def check_orders(
    orders: list[tuple[int, ...]],
    turns: list[Turns],
    space: Workspace,
    leave: Any,
    whole: Pool,
    rejected: Any,
) -> None:
    """Write a pool in each order; once it is finished it is the whole one, whatever is written later."""
    writers = [leave(space), leave(space)]
    for place, order in enumerate(orders):
        address = space.address("pools", f"order-{place}")
        turns.append(Turns())
        for write in writers:
            turns[-1].begin(lambda write=write, address=address: write(address))
        seen = []
        for number in order:
            turns[-1].take(number)
            seen.append(is_finished(address))
            if seen[-1]:
                pool = read_pool(address)
                assert (pool.manifest.root, pool.rows) == (whole.manifest.root, whole.rows)
                assert pool.manifest.counts == whole.manifest.counts
                assert read_rejections(address) == rejected
        assert seen == sorted(seen)
        assert seen[-1], "neither finished the pool"


def test_an_orphan_and_its_successor_write_one_pool_in_every_order(
    space, turns, leave_orphan, whole, rejections
):
    assert len(rejections) > 0
    check_orders(ORDERS, turns, space, leave_orphan, whole, rejections)


def test_an_orphan_and_its_successor_write_one_pool_in_a_bucket(
    space, object_store, turns, leave_orphan, whole, rejections
):
    object_store.create_bucket(Bucket=BUCKET)
    remote = dataclasses.replace(space, output_dir=f"s3://{BUCKET}{space.output_dir}")
    check_orders(ORDERS[::6], turns, remote, leave_orphan, whole, rejections)
