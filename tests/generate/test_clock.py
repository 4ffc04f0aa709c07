"""An engine's seconds, shared among those who are in it; cases worked by hand."""

import threading
import time

import pytest

from delia.generate.clock import Account, SharedClock


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch):
    """Stop time, and let a test pass it."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_callers_side_by_side_are_charged_alike_whoever_leaves_first(pass_time):
    """First alone for 1 s, then two for 4 s, then the second alone for 2 s: 1 + 2 and 2 + 2."""
    clock, first, second = SharedClock(), Account(), Account()
    outer, inner = clock.running(first), clock.running(second)
    outer.__enter__()
    pass_time(1)
    inner.__enter__()
    pass_time(4)
    outer.__exit__(None, None, None)
    pass_time(2)
    inner.__exit__(None, None, None)
    pass_time(8)

    assert (first.seconds, second.seconds) == (3.0, 4.0)


def test_a_caller_who_comes_again_pays_for_its_own_time_alone(pass_time):
    clock, caller, other = SharedClock(), Account(), Account()
    with clock.running(caller):
        pass_time(1)
    with clock.running(other):
        pass_time(5)
        with clock.running(caller):
            pass_time(4)

    assert (caller.seconds, other.seconds) == (3.0, 7.0)


def test_who_leaves_by_an_error_is_charged_and_gone(pass_time):
    clock, failed, other = SharedClock(), Account(), Account()
    with pytest.raises(ValueError), clock.running(failed):
        pass_time(2)
        raise ValueError
    with clock.running(other):
        pass_time(3)

    assert (failed.seconds, other.seconds) == (2.0, 3.0)


def test_many_threads_together_are_charged_the_time_that_passed():
    clock, accounts = SharedClock(), [Account() for _ in range(16)]

    def work(account: Account) -> None:
        for _ in range(5):
            with clock.running(account):
                time.sleep(0.002)

    started = time.monotonic()
    threads = [threading.Thread(target=work, args=(account,)) for account in accounts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - started

    assert 5 * 0.002 <= sum(account.seconds for account in accounts) <= elapsed
