from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.serve.conftest import Stack, alive, wait_for

Start = Callable[..., Stack]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_children_and_grandchildren(start: Start, number: signal.Signals) -> None:
    stack = start()
    stack.until_ready()
    pids = stack.pids()
    assert len(pids) == 4
    assert all(map(alive, pids))
    stack.process.send_signal(number)
    assert stack.process.wait(10) == 0
    assert not any(map(alive, pids))


def test_what_ignores_sigterm_is_killed_after_the_grace_period(start: Start) -> None:
    stack = start(engine={"stubborn": True}, grace=0.5)
    stack.until_ready()
    pids = stack.pids()
    stack.process.terminate()
    assert stack.process.wait(10) == 0
    assert not any(map(alive, pids))


def test_a_second_signal_does_not_wait_for_the_grace_period(start: Start) -> None:
    stack = start(engine={"stubborn": True}, grace=60)
    stack.until_ready()
    pids = stack.pids()
    stack.process.terminate()
    wait_for(lambda: "Stopping." in stack.text())
    stack.process.terminate()
    assert stack.process.wait(10) == 0
    assert not any(map(alive, pids))


@pytest.mark.parametrize("name", ["engine", "gateway"])
def test_the_death_of_one_stops_the_other_and_fails(start: Start, name: str) -> None:
    stack = start(**{name: {"dies_after": 1.5}})
    stack.until_ready()
    pids = stack.pids()
    assert stack.process.wait(15) == 1
    assert f"The {name} ended with exit status 7" in stack.text()
    assert not any(map(alive, pids))


def test_a_child_that_cannot_start_shows_its_reason(start: Start) -> None:
    stack = start(engine={"refuse": "the bundle was fitted on another model"})
    assert stack.process.wait(15) == 1
    text = stack.text()
    assert "engine | error: the bundle was fitted on another model" in text
    assert "The engine ended with exit status 2" in text
    assert "endpoint is up" not in text
    assert not any(map(alive, stack.pids()))


def test_nobody_is_invited_before_all_are_ready(start: Start) -> None:
    began = time.monotonic()
    stack = start(engine={"delay": 1.5})
    stack.until_ready()
    assert time.monotonic() - began > 1.5
    assert "the self-test is running" in stack.text()


def test_a_start_that_takes_too_long_is_given_up(start: Start) -> None:
    stack = start(engine={"delay": 600}, start_seconds=1.0)
    assert stack.process.wait(15) == 1
    assert "Not ready after 1 s" in stack.text()
    assert not any(map(alive, stack.pids()))


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_killed_supervisor_leaves_no_process_and_no_key(start: Start, stubborn: bool) -> None:
    stack = start(engine={"stubborn": stubborn}, grace=0.5)
    stack.until_ready()
    pids, key_file = stack.pids(), stack.key_file()
    assert key_file.exists()
    stack.process.kill()
    stack.process.wait()
    wait_for(lambda: not any(map(alive, pids)))
    wait_for(lambda: not key_file.parent.exists())


def test_the_key_is_removed_on_a_clean_stop(start: Start) -> None:
    stack = start()
    stack.until_ready()
    key_file = stack.key_file()
    assert key_file.exists()
    stack.process.terminate()
    stack.process.wait(10)
    assert not key_file.parent.exists()


def test_verbose_shows_what_the_services_write(start: Start) -> None:
    stack = start(verbose=True)
    stack.until_ready()
    wait_for(lambda: "  engine | listening" in stack.text() and " gateway | listening" in stack.text())
