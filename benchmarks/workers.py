"""Processes that get cases ready side by side, and then measure them: one case at a time where times are taken, all at
once where none are. Called by `gpu/preparing.py` and `gpu/accuracy.py`; knows neither devices nor PyTorch.

What compiles for minutes, hangs or crashes does so in a process of its own: it costs the cases of that process and no
others. A process that is not ready in time is ended, and another takes its cases, without what took so long
(`Recipe.plain`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Generic, Protocol, TypeVar, cast

from benchmarks.measure import reason

ANSWER_SECONDS = 90.0  # for one case, once everything is ready
GRACE_SECONDS = 30.0  # after the time for compiling is up: what was compiling gives up, the rest is made ready
_MOST = 16

R = TypeVar("R", covariant=True)
T = TypeVar("T")


class Bench(Protocol[R]):
    """Cases that are ready to be measured, in a process of their own."""

    def measure(self, name: str) -> R:
        """What comes out of the case of that name."""
        ...


class Recipe(Protocol[R]):
    """Says how a bench is made, in the other process. Pickled, so it holds plain data."""

    @property
    def names(self) -> Sequence[str]:
        """Its cases."""
        ...

    def build(self) -> Bench[R]:
        """Get everything ready."""
        ...

    def plain(self) -> Recipe[R]:
        """The same without what may take too long."""
        ...


class Lost(RuntimeError):
    """A process ended, or was ended because it did not answer."""


def most_workers() -> int:
    """How many processes are used where nothing else is said: one for each core, and no more than 16, because each
    takes some GB on either side."""
    return min(_MOST, os.cpu_count() or 1)


def groups(cases: Sequence[tuple[str, T]], most: int) -> list[list[T]]:
    """Cases, each given with its model, in groups for a process each: those of one model, and the largest groups are
    halved as long as there are fewer than `most`."""
    found = [[case for model, case in cases if model == name] for name in dict.fromkeys(model for model, _ in cases)]
    while len(found) < most and (largest := max(found, key=len, default=[])) and len(largest) > 1:
        place = found.index(largest)
        found[place : place + 1] = [largest[::2], largest[1::2]]
    return found


class Worker(Generic[R]):
    """The process of one recipe. It begins at once."""

    def __init__(self, recipe: Recipe[R], environment: Mapping[str, str]) -> None:
        self.recipe = recipe
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # Daemons are ended with this program, whatever becomes of it.
        self._process = context.Process(target=serve, args=(theirs, recipe), daemon=True)
        with _environment(environment):
            self._process.start()
        theirs.close()

    def ready(self, seconds: float) -> bool:
        """Whether it has got ready within so many seconds. Raises Lost where it ended, RuntimeError with its reason
        where it cannot."""
        if not self.connection.poll(max(0.0, seconds)):
            return False
        self._received()
        return True

    def measure(self, name: str, seconds: float = ANSWER_SECONDS) -> R:
        """What comes out of a case. Raises Lost (and ends the process where it does not answer), RuntimeError."""
        self.ask(name)
        if not self.connection.poll(seconds):
            self.close()
            raise Lost(f"no answer within {seconds:.0f} s")
        return self.answer()

    def ask(self, name: str) -> None:
        """Have a case measured; `answer` gives what comes out. Raises Lost."""
        try:
            self.connection.send(name)
        except OSError:
            raise Lost("its process ended") from None

    def answer(self) -> R:
        """The next answer, waiting for it. Raises as `measure`."""
        found: R = self._received()
        return found

    def _received(self) -> Any:
        try:
            failed, found = self.connection.recv()
        except (EOFError, OSError):
            raise Lost("its process ended") from None
        if failed:
            raise RuntimeError(found)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def serve(connection: Connection, recipe: Recipe[Any]) -> None:
    """The other process: get ready, say so, then measure what is asked for until the pipe ends."""
    try:
        bench = recipe.build()
        connection.send((False, None))
    except Exception as problem:
        traceback.print_exc()
        connection.send((True, reason(problem)))
        return
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        try:
            answer = (False, bench.measure(name))
        except Exception as problem:
            traceback.print_exc()
            answer = (True, reason(problem))
        connection.send(answer)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What a process finds in its environment when it begins: libraries read it when they are imported."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


Result = tuple[str, R | str]
"""The name of a case, and what came out or why nothing did."""


def one_at_a_time(
    recipes: Sequence[Recipe[R]], environment: Mapping[str, str], ready_by: float, deadline: float
) -> Iterator[Result[R]]:
    """Measure every case while nothing else runs, once all recipes are ready. Times are those of `time.monotonic`.

    What is not ready by `ready_by` is begun anew as `Recipe.plain`, once. After `deadline` no case is begun.
    """
    workers = [Worker(recipe, environment) for recipe in recipes]
    try:
        failures = _all_ready(workers, environment, min(ready_by, deadline), deadline)
        for worker in workers:
            failure = failures.get(id(worker), "")
            for name in worker.recipe.names:
                if time.monotonic() >= deadline:
                    return
                if not failure:
                    try:
                        yield name, worker.measure(name)
                        continue
                    except Lost as problem:
                        failure = reason(problem)
                    except RuntimeError as problem:
                        yield name, reason(problem)
                        continue
                yield name, failure
            worker.close()  # its memory is free for the next
    finally:
        for worker in workers:
            worker.close()


def _all_ready(
    workers: list[Worker[R]], environment: Mapping[str, str], ready_by: float, deadline: float
) -> dict[int, str]:
    """Wait until all are ready, replacing those that are not in time or have ended; why the others are not, by `id`."""
    failures: dict[int, str] = {}
    replaced: list[int] = []
    for place, worker in enumerate(workers):
        try:
            if worker.ready(ready_by - time.monotonic()):
                continue
            print(f"{worker.recipe.names[0]} …: not ready in time, begun anew without what took so long", flush=True)
        except Lost:
            print(f"{worker.recipe.names[0]} …: its process ended, begun anew without what took long", flush=True)
        except RuntimeError as problem:
            failures[id(worker)] = reason(problem)
            continue
        worker.close()
        workers[place] = Worker(worker.recipe.plain(), environment)
        replaced.append(place)
    for place in replaced:
        worker = workers[place]
        try:
            if not worker.ready(min(deadline - time.monotonic(), 2 * ANSWER_SECONDS)):
                worker.close()
                failures[id(worker)] = "not ready in time"
        except RuntimeError as problem:
            failures[id(worker)] = reason(problem)
    return failures


def all_at_once(recipes: Sequence[Recipe[R]], environment: Mapping[str, str], deadline: float) -> Iterator[Result[R]]:
    """Measure every case, all recipes at the same time, in the order in which they come out. After `deadline` what is
    still out is given up."""
    workers = {worker.connection: worker for worker in (Worker(recipe, environment) for recipe in recipes)}
    left = {connection: list(worker.recipe.names) for connection, worker in workers.items()}
    waiting = set(workers)
    """For those to get ready."""
    try:
        while workers and (seconds := deadline - time.monotonic()) > 0:
            for connection in cast("list[Connection]", wait(list(workers), seconds)):
                worker, names = workers[connection], left[connection]
                try:
                    if connection in waiting:
                        worker.answer()
                        waiting.remove(connection)
                        for name in names:
                            worker.ask(name)
                    else:
                        answer: R | str = worker.answer()
                        yield names.pop(0), answer
                except RuntimeError as problem:
                    ended = isinstance(problem, Lost) or connection in waiting
                    for name in list(names) if ended else names[:1]:
                        names.remove(name)
                        yield name, reason(problem)
                if not names:
                    workers.pop(connection).close()
    finally:
        for worker in workers.values():
            worker.close()


class Expired(BaseException):
    """The time for something is up. No Exception: compilers catch those on their way and go on another way."""


@contextmanager
def time_limit(until: float) -> Iterator[None]:
    """Raises Expired in the block at `until` (of `time.monotonic`), and again every 5 s where that is held up. In the
    main thread only."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise Expired

    def expired(number: int, frame: FrameType | None) -> None:
        raise Expired

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
