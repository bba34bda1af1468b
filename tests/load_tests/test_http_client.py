"""The client of the measurements counts what it got: answers, refusals, ends of connections, silence."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from load_tests.http_client import (
    GIVEN_UP,
    HUNG,
    REFUSED,
    Connection,
    Exchange,
    Results,
    closed_loop,
    exchange,
    open_loop,
    post,
)
from load_tests.report import Report
from load_tests.servers import free_port

RIGHT = b'{"outputs": 1}'


def one(path: str) -> Exchange:
    return Exchange(post(path, b"{}"), lambda answer: None if answer.body == RIGHT else "wrong")


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Does what the path says."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(2)
            path = head.split(b" ")[1]
            if path == b"/end":
                return
            if path == b"/last":  # and nothing says so
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(RIGHT), RIGHT))
                return
            if path == b"/half":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
                return
            if path == b"/hang":
                await asyncio.sleep(60)
            status, body = {
                b"/good": (b"200 OK", RIGHT),
                b"/wrong": (b"200 OK", b"{}"),
                b"/full": (b"429 Too Many Requests", b'{"error": "full"}'),
                b"/odd": (b"429 Too Many Requests", b'{"detail": "full"}'),
            }[path]
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def run(load: Callable[[int], Awaitable[Results]]) -> Results:
    async def with_server() -> Results:
        server = await asyncio.start_server(_serve, "127.0.0.1", 0)
        try:
            return await load(server.sockets[0].getsockname()[1])
        finally:
            server.close()

    return asyncio.run(with_server())


def test_everything_is_counted_as_what_it_was() -> None:
    paths = ["/good", "/wrong", "/full", "/odd", "/end"] * 3 + ["/hang"]
    waiting = iter(paths)
    results = run(lambda port: closed_loop(port, lambda _: one(next(waiting)), 1, count=len(paths), timeout=1))
    assert results.statuses == {200: 6, 429: 6, GIVEN_UP: 3, HUNG: 1}
    assert sorted(results.problems) == ['an error like b\'{"detail": "full"}\''] * 3 + ["wrong"] * 3
    assert len(results.latencies) == 6


def test_an_idle_connection_that_was_closed_is_made_anew() -> None:
    async def load(port: int) -> Results:
        results = Results()
        connection = Connection(port)
        for path in ("/last", "/good", "/good"):
            await exchange(connection, one(path), results, 1.0)
            await asyncio.sleep(0.05)
        connection.close()
        return results

    results = run(load)
    assert (results.statuses, results.renewed, results.second_tries) == ({200: 3}, 1, 0)


def test_a_request_is_sent_again_once_and_only_where_no_answer_had_begun() -> None:
    def ask(paths: list[str]) -> Results:
        waiting = iter(paths)
        return run(lambda port: closed_loop(port, lambda _: one(next(waiting)), 1, count=len(paths)))

    results = ask(["/good", "/end", "/good"])
    assert (results.statuses, results.second_tries) == ({200: 2, GIVEN_UP: 1}, 1), "the second try ended so, too"
    results = ask(["/good", "/half", "/half"])
    assert (results.statuses, results.second_tries) == ({200: 1, GIVEN_UP: 2}, 0)
    results = ask(["/end"])
    assert (results.statuses, results.second_tries) == ({GIVEN_UP: 1}, 0), "a new connection has no second try"


def test_a_port_that_nobody_listens_at_is_no_answer_that_was_lost() -> None:
    port = free_port()
    results = asyncio.run(closed_loop(port, lambda _: one("/good"), 1, count=2))
    assert results.statuses == {REFUSED: 2}


def test_a_closed_loop_ends_with_what_runs_beside_it() -> None:
    results = run(lambda port: closed_loop(port, lambda _: one("/good"), 4, meanwhile=lambda: asyncio.sleep(0.2)))
    assert set(results.statuses) == {200} and 0.2 <= results.seconds < 5


def test_an_open_loop_offers_its_rate_whatever_comes_back() -> None:
    def make(source: random.Random) -> Exchange:
        return one(source.choice(("/good", "/hang")))

    results = run(lambda port: open_loop(port, make, rate=200, seconds=0.5, timeout=0.3))
    assert 50 < results.statuses.total() < 200
    assert set(results.statuses) == {200, HUNG}


def test_percentiles_are_of_the_good_answers() -> None:
    results = Results(seconds=2.0)
    for milliseconds in range(1, 101):
        results.count(200, milliseconds / 1000, None)
    results.count(429, 9.0, None)
    assert (results.percentile(50), results.percentile(99)) == (0.051, 0.1)
    assert results.rate == 50
    assert results.row()["statuses"] == {"200": 100, "429": 1}


def test_a_report_fails_where_something_does_not_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("Name", {"seconds": 1})
    report.add(server="a", rate=1234.5)
    report.check("holds", True, 1)
    assert report.finish(tmp_path / "a.json") == 0
    report.check("does not", False, 2)
    assert report.finish(tmp_path / "a.json") == 1
    printed = capsys.readouterr().out
    assert "\nPASS: Name; 1 of 1 checks hold; 0 s\n" in printed
    assert "NO: does not (found: 2)" in printed and printed.endswith("\nFAIL: Name; 1 of 2 checks hold; 0 s\n")
    assert json.loads((tmp_path / "a.json").read_text())["checks"]["does not"] == {"holds": False, "found": 2}
