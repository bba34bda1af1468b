"""The client of the measurements: many keep-alive connections in one event loop, as little of its own work as possible.

Requests are bytes made beforehand; an answer's status and body are checked by the caller's function while the next
request is on its way. Closed loop: each connection sends when it has its answer. Open loop: requests are sent at times
that do not depend on answers, each on a connection that is free.

As every client does, it does not send on a connection that the server has closed while it was idle, and sends again,
once, where the server closes a connection just as it is used again. Both are counted.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import orjson

GIVEN_UP = 0
"""The status of a request without an answer: its connection ended."""

REFUSED = -2
"""The status of a request that could not be sent: nobody listened."""

HUNG = -1
"""The status of a request without an answer in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers in lower case, body."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request as bytes, and what is wrong with its answer (None: nothing)."""

    request: bytes
    problem: Callable[[Answer], str | None]


@dataclass(slots=True)
class Results:
    """What came of many requests. `latencies` are seconds of those with status 200."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    renewed: int = 0
    """Connections that the server had closed while they were idle."""
    second_tries: int = 0
    """Requests whose connection, which had been idle, ended before anything of an answer came."""

    def count(self, status: int, seconds: float, problem: str | None) -> None:
        """One request is over."""
        self.statuses[status] += 1
        if status == 200:
            self.latencies.append(seconds)
        if problem is not None:
            self.problems.append(problem)

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile(self, percent: float) -> float:
        """Of the latencies, in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else float("nan")

    def extend(self, other: Results) -> None:
        """Count what came of other requests, too, as if the ones had followed the others."""
        self.seconds += other.seconds
        self.latencies += other.latencies
        self.statuses += other.statuses
        self.problems += other.problems
        self.renewed += other.renewed
        self.second_tries += other.second_tries

    def row(self) -> dict[str, float | int | dict[str, int]]:
        """What is printed and stored."""
        return {
            "requests_per_s": round(self.rate, 1),
            "p50_ms": round(self.percentile(50) * 1e3, 3),
            "p99_ms": round(self.percentile(99) * 1e3, 3),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "wrong": len(self.problems),
            "renewed_connections": self.renewed,
            "second_tries": self.second_tries,
        }


def post(path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
    """A POST request as bytes."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(path: str) -> bytes:
    """A GET request as bytes."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


class _Closed(ConnectionError):
    """A connection ended before anything of an answer came."""


class Connection:
    """One connection. Answers must say their length, as those of every server measured here do."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.renewed = 0
        self.second_tries = 0

    async def ask(self, request: bytes) -> Answer:
        """Send and wait. Raises ConnectionError where the connection ends before the answer does."""
        if self._reader is not None and self._reader.at_eof():
            self.close()
            self.renewed += 1
        if self._writer is None:
            return await self._exchange(request)
        try:
            return await self._exchange(request)
        except _Closed:
            self.second_tries += 1
            return await self._exchange(request)

    async def _exchange(self, request: bytes) -> Answer:
        """Raises _Closed where nothing of an answer came, ConnectionError where not all of it did."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 26)
        assert self._reader is not None
        head = b""
        try:
            self._writer.write(request)
            head = await self._reader.readuntil(b"\r\n\r\n")
            first, *lines = head[:-4].split(b"\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
            body = await self._reader.readexactly(int(headers[b"content-length"]))
        except (asyncio.IncompleteReadError, OSError) as error:
            self.close()
            has_begun = head or (isinstance(error, asyncio.IncompleteReadError) and error.partial)
            raise ConnectionError("half an answer") if has_begun else _Closed from error
        if headers.get(b"connection", b"").lower() == b"close":
            self.close()
        return Answer(int(first.split(b" ", 2)[1]), headers, body)

    def close(self) -> None:
        """End it; the next `ask` makes a new one."""
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None


async def exchange(connection: Connection, one: Exchange, results: Results, timeout: float) -> None:
    """One request, counted."""
    began, renewed, second_tries = time.perf_counter(), connection.renewed, connection.second_tries
    try:
        async with asyncio.timeout(timeout):
            answer = await connection.ask(one.request)
    except ConnectionRefusedError:
        results.count(REFUSED, 0.0, None)
        return
    except ConnectionError:
        results.count(GIVEN_UP, 0.0, None)
        return
    except TimeoutError:
        connection.close()
        results.count(HUNG, 0.0, None)
        return
    finally:
        results.renewed += connection.renewed - renewed
        results.second_tries += connection.second_tries - second_tries
    seconds = time.perf_counter() - began
    results.count(answer.status, seconds, one.problem(answer) if answer.status == 200 else _form(answer))


def _form(answer: Answer) -> str | None:
    """An error must have the form of the service's errors."""
    try:
        document = orjson.loads(answer.body)
    except ValueError:
        document = None
    return (
        None if isinstance(document, dict) and list(document) == ["error"] else f"an error like {answer.body[:100]!r}"
    )


async def closed_loop(
    port: int,
    make: Callable[[random.Random], Exchange],
    connections: int,
    seconds: float = float("inf"),
    count: float = float("inf"),
    timeout: float = 60.0,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> Results:
    """As many requests as fit into `seconds`, or `count` of them. `meanwhile` runs beside; the loop ends after it where
    neither of both is given."""
    results = Results()
    began = time.perf_counter()
    left, ended = count, False

    async def client(seed: int) -> None:
        nonlocal left
        source, connection = random.Random(seed), Connection(port)
        while left > 0 and not ended and time.perf_counter() - began < seconds:
            left -= 1
            before = results.statuses[GIVEN_UP] + results.statuses[REFUSED]
            await exchange(connection, make(source), results, timeout)
            if results.statuses[GIVEN_UP] + results.statuses[REFUSED] > before:
                await asyncio.sleep(0.05)  # the server may be on its way down or up
        connection.close()

    async def beside() -> None:
        nonlocal ended
        if meanwhile is not None:
            await meanwhile()
            ended = seconds == count == float("inf")

    await asyncio.gather(beside(), *(client(seed) for seed in range(connections)))
    results.seconds = time.perf_counter() - began
    return results


async def open_loop(
    port: int, make: Callable[[random.Random], Exchange], rate: float, seconds: float, timeout: float = 60.0
) -> Results:
    """Requests at random times, `rate` a second on average, whatever comes back."""
    results, source = Results(), random.Random(0)
    free: list[Connection] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one(made: Exchange) -> None:
        connection = free.pop() if free else Connection(port)
        await exchange(connection, made, results, timeout)
        free.append(connection)

    began = due = time.perf_counter()
    while due - began < seconds:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        task = asyncio.get_running_loop().create_task(one(make(source)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        due += source.expovariate(rate)
    if tasks:
        await asyncio.wait(tasks)
    results.seconds = time.perf_counter() - began  # the last answers may come long after the last requests
    for connection in free:
        connection.close()
    return results
