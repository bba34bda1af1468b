"""Peers in processes of their own: they answer in time, or they are ended and do not count."""

from __future__ import annotations

import time
from multiprocessing import Pipe
from threading import Thread

import pytest

from benchmarks.gpu.remote import Remote, _serve
from tests.benchmarks.fakes import Dying, Impossible, Recipe, Slow


def test_a_contender_works_from_afar() -> None:
    with Remote(Recipe(), 60) as remote:
        contender = remote.contender("works")
        assert contender.error() == 2e-3
        assert contender.round_us() == 7.0
        with pytest.raises(RuntimeError, match="does not compile"):
            remote.contender("broken")
        stuck = remote.contender("stuck")
        assert stuck.round_us() == 10.0
        with pytest.raises(RuntimeError, match="illegal memory access"):
            stuck.round_us()
        assert contender.round_us() == 7.0


def test_one_that_does_not_get_ready_is_ended() -> None:
    begin = time.monotonic()
    with Remote(Slow(600), 3) as remote:
        with pytest.raises(RuntimeError, match="did not finish within 3 s"):
            remote.contender("slow")
        assert not remote.alive
        with pytest.raises(RuntimeError, match="did not finish"):
            remote.contender("next")
    assert time.monotonic() - begin < 60


def test_a_second_one_is_not_begun_when_the_first_took_too_long() -> None:
    ours, theirs = Pipe()
    server = Thread(target=_serve, args=(theirs, Slow(0.2), 0.2))
    server.start()
    assert ours.recv() == {"next": "not tried: 0 of 0.2 s had passed"}
    ours.send(("round_us", "slow"))
    assert ours.recv() == 10.0
    ours.close()
    server.join(10)
    assert not server.is_alive()


def test_a_process_that_ends_is_said_to_have() -> None:
    with Remote(Dying(), 60) as remote, pytest.raises(RuntimeError, match="its process ended"):
        remote.contender("any")


def test_a_recipe_that_cannot_begin_says_why() -> None:
    with Remote(Impossible(), 60) as remote, pytest.raises(RuntimeError, match="No module named 'timm'"):
        remote.contender("any")
