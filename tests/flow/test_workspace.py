"""Connecting to Ray: a slow start is tried again, and nothing else is."""

import pytest
import ray

from delia.flow import workspace
from delia.flow.workspace import RayConfig, connect

SLOW = "The current node timed out during startup. This could happen because ..."


@pytest.fixture
def start(monkeypatch):
    """Let `ray.init` raise what a test lists, one a call; return the calls."""
    calls: list[dict] = []
    errors: list[Exception] = []

    def init(*args, **settings):
        calls.append(settings)
        if errors:
            raise errors.pop(0)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv(workspace.JOB_ENVIRONMENT, raising=False)
    return calls, errors


def test_a_node_that_starts_too_slowly_is_started_again(start):
    calls, errors = start
    errors += [Exception(SLOW)] * (workspace.START_ATTEMPTS - 1)
    connect(RayConfig(num_cpus=3))
    assert [call["num_cpus"] for call in calls] == [3] * workspace.START_ATTEMPTS


def test_a_node_that_never_starts_is_an_error(start):
    calls, errors = start
    errors += [Exception(SLOW)] * workspace.START_ATTEMPTS
    with pytest.raises(Exception, match="timed out during startup"):
        connect(RayConfig())
    assert len(calls) == workspace.START_ATTEMPTS


def test_another_error_is_not_tried_again(start):
    calls, errors = start
    errors += [ConnectionError("no cluster there")]
    with pytest.raises(ConnectionError, match="no cluster there"):
        connect(RayConfig(address="192.0.2.1:6379"))
    assert len(calls) == 1
    assert calls[0]["num_cpus"] is None


def test_ray_still_says_it_in_these_words():
    """The words are all there is to know a slow start by."""
    from ray._private import node

    with open(node.__file__) as file:
        assert workspace.SLOW_START in file.read()
