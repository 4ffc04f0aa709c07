"""What kills an engine is cornered and given up; the process that dies is played by an exception."""

import subprocess
import sys
from collections.abc import Sequence

import psutil
import pytest

from delia.errors import EngineError
from delia.generate.attempts import MAX_DEATHS_IN_A_ROW, MAX_SINGLE, AttemptLog, CarefulEngine
from delia.generate.engine import ENGINE_FAULT, Completion, Request

REQUESTS = [Request(request_id=f"r{place}", prompt_ids=(place,)) for place in range(16)]


class ProcessDiedError(Exception):
    """The process that held the engine is gone."""


class LocalLog:
    """An `AttemptLog` that is called as an actor is, and survives the process that calls it."""

    def __init__(self, **settings: int) -> None:
        self._log = AttemptLog(**{"max_quarantined": 16, "max_ahead": 8, **settings})

    def __getattr__(self, name: str):
        method = getattr(self._log, name)
        return type("Method", (), {"remote": staticmethod(lambda *args: method(*args))})


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.setattr("delia.generate.calls.ray.get", lambda value: value)


def run(requests: list[Request], killers: set[str], *, max_quarantined: int = 16):
    """Ask again in a new process, as Ray does, until a whole batch is answered."""
    log, batches = LocalLog(max_quarantined=max_quarantined), []

    def generate(asked: Sequence[Request]) -> list[Completion]:
        batches.append([item.request_id for item in asked])
        if killers & set(batches[-1]):
            raise ProcessDiedError
        return [
            Completion(request_id=item.request_id, token_ids=item.prompt_ids, finish_reason="stop")
            for item in asked
        ]

    for _ in range(200):
        try:
            return CarefulEngine(generate, log, num_callers=2).ask(requests), batches
        except ProcessDiedError:
            continue
    raise AssertionError("it never ended")


def test_a_batch_that_kills_nothing_is_asked_once():
    answers, batches = run(REQUESTS, set())
    assert [item.token_ids for item in answers] == [item.prompt_ids for item in REQUESTS]
    assert len(batches) == 1


@pytest.mark.parametrize("killer", ["r0", "r7", "r15"])
def test_the_request_that_kills_is_given_up_and_the_others_are_answered_in_their_order(killer):
    answers, batches = run(REQUESTS, {killer})

    assert [item.request_id for item in answers] == [item.request_id for item in REQUESTS]
    (given_up,) = [item for item in answers if item.finish_reason == ENGINE_FAULT]
    assert given_up.request_id == killer
    assert given_up.error == f"the engine died of it {MAX_SINGLE} times: its process died"
    assert batches.count([killer]) == MAX_SINGLE


def test_several_killers_are_found_in_one_batch():
    answers, _ = run(REQUESTS, {"r1", "r2", "r9"})
    assert {item.request_id for item in answers if item.finish_reason == ENGINE_FAULT} == {"r1", "r2", "r9"}


def test_the_largest_batch_is_cornered_before_the_engine_counts_as_broken():
    many = [Request(request_id=f"r{place}", prompt_ids=(place,)) for place in range(4096)]
    answers, _ = run(many, {"r0"})
    assert [item.request_id for item in answers if item.finish_reason == ENGINE_FAULT] == ["r0"]


def test_an_accident_quarantines_nothing():
    """A process that is killed from outside, at any batch, twice: the same requests succeed later."""
    log, deaths = LocalLog(max_quarantined=0), iter((True, True))

    def generate(asked: Sequence[Request]) -> list[Completion]:
        if next(deaths, False):
            raise ProcessDiedError
        return [Completion(request_id=item.request_id, token_ids=(), finish_reason="stop") for item in asked]

    for _ in range(2):
        with pytest.raises(ProcessDiedError):
            CarefulEngine(generate, log, num_callers=1).ask(REQUESTS)
    answers = CarefulEngine(generate, log, num_callers=1).ask(REQUESTS)
    assert {item.finish_reason for item in answers} == {"stop"}


def test_more_killers_than_allowed_end_the_job():
    with pytest.raises(EngineError, match=r"died of 2 requests, engine\.max_quarantined=1"):
        run(REQUESTS, {"r3", "r12"}, max_quarantined=1)


def test_an_engine_that_answers_nothing_ends_the_job_soon():
    everything = [Request(request_id=f"r{place}", prompt_ids=(place,)) for place in range(1 << 16)]
    with pytest.raises(EngineError, match=r"died \d+ times in a row and answered nothing"):
        run(everything, {item.request_id for item in everything})
    assert MAX_DEATHS_IN_A_ROW >= 20


REPLICA = """
import subprocess, sys
from delia.errors import EngineDiedError
from delia.generate.attempts import CarefulEngine
from delia.generate.engine import Request

SHARD = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True)"
ENGINE = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SHARD + '; time.sleep(600)'!r}]); {SHARD}"

def die(requests):
    engine = subprocess.Popen([sys.executable, "-c", ENGINE + "; time.sleep(600)"], stdout=subprocess.PIPE)
    print(engine.stdout.readline().decode(), engine.stdout.readline().decode(), flush=True)
    raise EngineDiedError("it failed")

careful = CarefulEngine(die, None, num_callers=1)
careful._call = lambda *args: None
careful.ask([Request(request_id="r", prompt_ids=(1,))])
"""


def is_alive(process_id: int) -> bool:
    """Tell whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        return bool(psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_replica_whose_engine_died_ends_the_processes_of_its_engine_before_itself():
    """The engine is a process below the replica, a shard one below the engine; both ignore a polite request."""
    replica = subprocess.run([sys.executable, "-c", REPLICA], stdout=subprocess.PIPE, text=True, check=False)
    below = [int(word) for word in replica.stdout.split()]
    alive = [process_id for process_id in below if is_alive(process_id)]
    for process_id in alive:
        psutil.Process(process_id).kill()

    assert (replica.returncode, len(below)) == (1, 2)
    assert alive == []


# ---- what is begun, and when


def test_as_many_blocks_are_begun_as_the_reader_leaves_room_for():
    log = AttemptLog(max_quarantined=0, max_ahead=2)
    first = [log.admit(key, "web") for key in "abc"]
    log.count_taken()

    assert first == ["begin", "begin", "wait"]
    assert [log.admit(key, "web") for key in "cd"] == ["begin", "wait"]


def test_a_block_whose_process_was_lost_is_begun_again_and_counted_once():
    log = AttemptLog(max_quarantined=0, max_ahead=2)

    assert [log.admit(key, "web") for key in "aaabc"] == ["begin", "begin", "begin", "begin", "wait"]


def test_a_lost_block_that_is_no_longer_wanted_leaves_its_place_to_another():
    log = AttemptLog(max_quarantined=0, max_ahead=1)
    log.admit("a", "web")
    log.refuse(["web"])

    assert [log.admit("a", "web"), log.admit("b", "self")] == ["skip", "begin"]


def test_a_log_that_has_forgotten_what_was_begun_admits_no_more_than_it_should():
    log = AttemptLog(max_quarantined=0, max_ahead=1)
    log.count_taken()

    assert [log.admit(key, "web") for key in "ab"] == ["begin", "wait"]
