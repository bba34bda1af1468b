"""A peer that compiles for long and might hang, in a process of its own: it takes its turn in the rounds all the same.

The process is ended where it does not answer in time, so that torch.compile can neither hang nor disturb the program.
Several compile at once while the program does something else; they are idle while anything is timed.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol

from benchmarks.measure import Contender, reason

_ANSWER_SECONDS = 60.0  # for a check or a round, once compiled
_ALL = ""  # stands for all contenders where failures are named


class Recipe(Protocol):
    """Says how contenders are made, in the other process. Pickled, so it holds plain data."""

    def build(self) -> Mapping[str, Callable[[], Contender]]:
        """What makes each contender, by name."""
        ...


class Remote:
    """The process for one recipe. It starts at once; all its contenders have `seconds` to get ready in."""

    def __init__(self, recipe: Recipe, seconds: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, recipe, seconds), daemon=True)
        self._process.start()
        theirs.close()
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._failures: Mapping[str, str] | None = None

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self) -> None:
        """Until the contenders are ready or their time is up."""
        if self._failures is not None:
            return
        try:
            self._failures = dict(self._receive(self._deadline - time.monotonic()))
        except TimeoutError:
            self._failures = {_ALL: f"did not finish within {self._seconds:g} s"}
        except EOFError:
            self._failures = {_ALL: "its process ended"}
        if _ALL in self._failures:
            self.close()

    def contender(self, name: str) -> Contender:
        """One of the contenders, ready. Raises RuntimeError that says why it is not."""
        self.wait()
        assert self._failures is not None
        failure = self._failures.get(name) or self._failures.get(_ALL)
        if failure:
            raise RuntimeError(failure)
        return _RemoteContender(self, name)

    def ask(self, question: str, name: str) -> float:
        """What the contender's method `question` returns. Raises RuntimeError, TimeoutError, EOFError."""
        self._connection.send((question, name))
        try:
            answer = self._receive(_ANSWER_SECONDS)
        except TimeoutError:
            self.close()  # a late answer would be taken for that to the next question
            raise
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return float(answer)

    def _receive(self, seconds: float) -> Any:
        if not self._connection.poll(max(0.0, seconds)):
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        return self._connection.recv()

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._process.is_alive()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


class _RemoteContender:
    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name = remote, name

    def error(self) -> float:
        return self._remote.ask("error", self._name)

    def round_us(self) -> float:
        return self._remote.ask("round_us", self._name)


def _serve(connection: Connection, recipe: Recipe, seconds: float) -> None:
    """The other process: make the contenders, say which failed, then answer until the pipe ends."""
    begin = time.monotonic()
    # Several of these share the machine's cores; and no workers of their own stay behind when they are ended.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    contenders: dict[str, Contender] = {}
    failures: dict[str, str] = {}
    try:
        makers = recipe.build()
    except Exception as problem:
        makers, failures = {}, {_ALL: reason(problem)}
    for name, make in makers.items():
        passed = time.monotonic() - begin
        if contenders and passed > seconds / 2:
            failures[name] = f"not tried: {passed:.0f} of {seconds:g} s had passed"
            continue
        try:
            contenders[name] = make()
        except Exception as problem:
            failures[name] = reason(problem)
    connection.send(failures)
    while True:
        try:
            question, name = connection.recv()
        except EOFError:
            return
        try:
            connection.send(float(getattr(contenders[name], question)()))
        except Exception as problem:
            connection.send(reason(problem))
