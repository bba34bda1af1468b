"""HTTP processes as an engine process sees them: one socket and two regions of shared memory each. Used by child.py.

The process that started the engine is client 0; further front ends have numbers of their own, which are the upper bits
of their requests' ids (`client_of`), so that every report finds its way back.
"""

import errno
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from service.workers.messages import Cancel, FailureCode, Infer, InferFailed, InferResult, Report
from service.workers.shared_memory import Blocks, Leases, RegionFull, map_region
from service.workers.wire import FrameReader, FromEngine, Release, Starved, ToEngine, decode_command, encode

_ID_BITS = 40
_RECEIVE_BYTES = 256 << 10
_WAIT_FOR_MEMORY_S = 30.0
_SEND_S = 5  # a front end that takes nothing for so long hangs, and shall not stop the others
FIRST_CLIENT = 0


def first_id(client: int) -> int:
    """The smallest id of a client's requests."""
    return (client << _ID_BITS) + 1


def client_of(request_id: int) -> int:
    """The client whose request it is."""
    return request_id >> _ID_BITS


@dataclass(frozen=True, slots=True)
class Connection:
    """Descriptors of a connection: the socket, the memory of requests, that of answers."""

    socket: int
    requests: int
    answers: int

    @classmethod
    def of(cls, received: Sequence[int]) -> "Connection":
        """That of the descriptors that have come. Raises OSError where some could not: this process may open no more
        files. Then those that did are closed."""
        if len(received) == len(fields(cls)):
            return cls(*received)
        for descriptor in received:
            os.close(descriptor)
        raise OSError(errno.EMFILE, "no file descriptors are left for a connection; raise the limit (ulimit -Hn)")


@dataclass(slots=True)
class _State:
    """What of a client's is under way; behind the client's lock."""

    in_flight: set[int] = field(default_factory=set)
    stopping: bool = False


class Client:
    """One connection. What `serve` calls, it calls on its own thread."""

    def __init__(self, number: int, connection: Connection) -> None:
        self.number = number
        self._socket = socket.socket(fileno=connection.socket)
        if number != FIRST_CLIENT:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
        self._sending = threading.Lock()
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # its put() is safe wherever an array dies
        try:
            self._leases = Leases(map_region(connection.requests), self._ended.put)
            self._blocks = Blocks(map_region(connection.answers))
        finally:
            os.close(connection.requests)
            os.close(connection.answers)
        self._clogged = False
        self._lock = threading.Lock()
        self._state = _State()

    def serve(self, on_message: Callable[["Client", ToEngine], None], on_pause: Callable[[], None]) -> None:
        """Read until the socket ends. `on_pause` follows all messages that came together."""
        frames = FrameReader()
        while data := self._receive():
            for text, payload in frames.feed(data):
                self._handle(text, payload, on_message)
            on_pause()

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_RECEIVE_BYTES)
        except OSError:
            return b""

    def _handle(self, text: bytes, payload: bytes, on_message: Callable[["Client", ToEngine], None]) -> None:
        """One command; nothing here keeps its tensors alive until the next one comes."""
        command = decode_command(text, payload, self._leases)
        if isinstance(command, Release):
            self._clogged = False
            self._blocks.give_back(command.start)
            return
        if isinstance(command, Infer):
            with self._lock:
                self._state.in_flight.add(command.id)
        elif isinstance(command, Cancel):
            with self._lock:
                self._state.in_flight.discard(command.id)
        on_message(self, command)

    def stop(self) -> None:
        """The client wants no more once its requests are answered."""
        with self._lock:
            self._state.stopping = True

    def is_finished(self) -> bool:
        """Whether a client that stops has all its answers; true once."""
        with self._lock:
            finished = self._state.stopping and not self._state.in_flight
            self._state.stopping = self._state.stopping and not finished
            return finished

    def abandoned(self) -> list[int]:
        """Requests that nobody waits for any more: the client is gone."""
        with self._lock:
            left, self._state.in_flight = sorted(self._state.in_flight), set()
            return left

    def settle(self, reports: Sequence[Report]) -> None:
        """Note which requests are answered."""
        with self._lock:
            self._state.in_flight -= {r.id for r in reports if isinstance(r, InferResult | InferFailed)}

    def wait_for_release(self, seconds: float) -> bool:
        """Give a block back as soon as there is one; False if there was none for so long."""
        try:
            self.send(Release(self._ended.get(timeout=seconds)))
        except queue.Empty:
            return False
        return True

    def report(self, reports: Sequence[Report]) -> None:
        """Send reports; all in one write, unless answers have to wait for memory, which may be that of answers before
        them."""
        ready: list[bytes] = []
        for report in reports:
            try:
                ready.append(encode(report, self._blocks))
            except RegionFull:
                self._send_bytes(b"".join((*ready, encode(Starved(), self._blocks))))
                ready = [self._encoded_late(report)]
        self._send_bytes(b"".join(ready))

    def _encoded_late(self, report: Report) -> bytes:
        """The report once there is memory for it; where there never is, that the request failed."""
        try:
            return encode(report, self._blocks, 0.0 if self._clogged else _WAIT_FOR_MEMORY_S)
        except RegionFull as error:
            assert isinstance(report, InferResult), "only answers are large"
            reason = f"the answer needs {error.nbytes} bytes of shared memory; raise --transfer-bytes or ask for less"
            if not error.never:
                self._clogged = True  # others shall not wait again until it reads
                reason = "the shared memory is full of answers that are not sent yet"
            code = FailureCode.TOO_LARGE if error.never else FailureCode.OVERLOADED
            return encode(InferFailed(report.id, code, reason, None if error.never else 1.0), self._blocks)

    def send(self, message: FromEngine) -> None:
        """Send one message."""
        self._send_bytes(encode(message, self._blocks))

    def _send_bytes(self, data: bytes) -> None:
        try:
            with self._sending:
                self._socket.sendall(data)
        except OSError:
            self.disconnect()

    def disconnect(self) -> None:
        """End the connection; `serve` returns."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already
