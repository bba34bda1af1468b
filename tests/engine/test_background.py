"""`Turns`: who gets a lock that is wanted by threads in the background and by others."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from engine.background import Turns, background, in_background


def test_a_thread_is_in_the_background_by_itself() -> None:
    seen: list[bool] = []
    with background():
        thread = threading.Thread(target=lambda: seen.append(in_background()))
        thread.start()
        thread.join()
        assert in_background()
    assert seen == [False]
    assert not in_background()


def test_the_background_comes_last() -> None:
    """Two in the background and three others wait for one lock: the others get it first."""
    turns = Turns()
    with background(), turns:
        pass  # the first slice: the next one is due later
    order: list[str] = []
    threads = []

    def wait(name: str, behind: bool) -> None:
        if behind:
            with background(), turns:
                order.append(name)
        else:
            with turns:
                order.append(name)

    with turns:
        for name, behind in (("b", True), ("b", True), ("a", False), ("a", False), ("a", False)):
            threads.append(threading.Thread(target=wait, args=(name, behind)))
            threads[-1].start()
            time.sleep(0.002)
    for thread in threads:
        thread.join(10)
    assert order == ["a", "a", "a", "b", "b"]


def test_the_holder_is_told_when_it_is_wanted_and_when_no_longer() -> None:
    told: list[bool] = []
    wanted = threading.Event()

    def hear(state: bool) -> None:
        told.append(state)
        if state:
            wanted.set()

    turns = Turns(hear)

    def enter() -> None:
        with turns:
            pass

    with background(), turns:
        thread = threading.Thread(target=enter)
        thread.start()
        assert wanted.wait(10)
    thread.join(10)
    assert told == [True, False]


def test_the_background_waits_for_work_that_it_is_kept_from_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No slice becomes due, however late a thread comes.
    monkeypatch.setattr(sys.modules[Turns.__module__], "_SLICE_EVERY_S", 60.0)
    told: list[bool] = []
    turns = Turns(told.append)
    with background(), turns:
        pass  # the first slice: the next one is due later
    order: list[str] = []

    def wait() -> None:
        with background(), turns:
            order.append("background")

    with turns.kept_from_background():
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.002)
        with turns:
            order.append("other")
        assert told == [True]
        order.append("work")
    thread.join(10)
    assert order == ["other", "work", "background"]
    assert told == [True, False]


def test_nobody_is_told_where_nobody_waits() -> None:
    told: list[bool] = []
    turns = Turns(told.append)
    for _ in range(3):
        with turns:
            pass
        with background(), turns:
            pass
    assert told == []


def test_the_background_gets_a_share_of_a_lock_that_is_always_busy() -> None:
    """The holder in the background leaves as soon as it is told to; with slices it gets about a tenth of the time."""
    wanted = threading.Event()
    turns = Turns(lambda state: wanted.set() if state else wanted.clear())
    held = 0.0
    end = time.monotonic() + 1.0

    def busy() -> None:
        while time.monotonic() < end:
            with turns:
                time.sleep(0.002)  # and at once again: there is no gap to slip in

    thread = threading.Thread(target=busy)
    thread.start()
    with background():
        while time.monotonic() < end:
            with turns:
                began = time.monotonic()
                if wanted.wait(0.2):  # not at the end, when nobody wants it any more
                    held += time.monotonic() - began
    thread.join(10)
    assert 0.03 < held < 0.5
