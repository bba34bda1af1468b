"""When a connection ends that nothing is wrong with: between two requests, when room is needed, when the server shuts
down, and when its client does not read. `connection.py` has the rest of a connection's life.

A client may send its next request in the very moment in which the server closes an idle connection, and never learn
whether that was read. So idle connections are kept for longer than load balancers keep theirs; none is closed on which
something has arrived (uvloop runs timers after what it has read, which may have taken long); and a server that shuts
down first tells its clients, with their next answer, not to come back over the same connection.
"""

import asyncio
import fcntl
import heapq
import termios

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_GOODBYE_S = 0.5  # in which a client that is busy sends its next request
_SLOWEST_READER = 1000  # bytes a second
_ROOM = 32  # a 32nd of the idle connections is closed at a time, so that looking for them costs each new one little
_PASSED_OVER = 8  # of those that seem idle, and are about to send or do not read


class KeptConnection(HttpToolsProtocol):
    """A connection and its time between requests. Event loop only."""

    keep_alive_timeout: int  # seconds
    reading_timeout: float  # seconds in which a client must take something of its answer

    shutting_down = False
    _closing: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None
    _unsent = 0  # bytes of answers when the client was looked at last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self.timeout_keep_alive = self.keep_alive_timeout

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        for timer in (self._closing, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def has_unread(self) -> bool:
        """Whether something has arrived that nobody has seen yet."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        return any(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))

    def on_headers_complete(self) -> None:
        """A request has begun; the last one where the server shuts down."""
        super().on_headers_complete()
        if self.shutting_down:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """The answer is written, and may not be read."""
        super().on_response_complete()
        self.watch_reader()

    def arm_keep_alive(self) -> None:
        """The connection is idle from now on."""
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close what has been idle for long enough, unless its next request has just come."""
        if not self.transport.is_closing() and not self.has_unread():
            self.transport.close()

    def shutdown(self) -> None:
        """The next answer is the last; a client that asks for none in a moment is not waited for."""
        self.shutting_down = True
        if self.cycle is None or self.cycle.response_complete:
            self._closing = self.loop.call_later(_GOODBYE_S, self._close_if_idle)
        else:
            self.cycle.keep_alive = False

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()

    def make_room(self) -> bool:
        """Close the connections that have been idle longest; whether there were any."""
        kept = (connection for connection in self.connections if isinstance(connection, KeptConnection))
        ends = ((connection.end_of_pause(), id(connection), connection) for connection in kept)
        idle = [(end, number, connection) for end, number, connection in ends if end is not None]
        wanted, closed = max(len(idle) // _ROOM, 1), 0
        for _, _, connection in heapq.nsmallest(wanted + _PASSED_OVER, idle):
            transport = connection.transport
            if transport.is_closing() or transport.get_write_buffer_size() or connection.has_unread():
                continue
            transport.close()
            self.connections.discard(connection)  # its end is noticed only after others have come
            closed += 1
            if closed == wanted:
                break
        return closed > 0

    def end_of_pause(self) -> float | None:
        """When the time between two requests is over; None within a request."""
        return None if self.timeout_keep_alive_task is None else self.timeout_keep_alive_task.when()

    def watch_reader(self) -> None:
        """An answer has been written: see that the client takes it."""
        if self._reading is not None:
            self._reading.cancel()  # an answer begins only when most of the one before has been taken
            self._reading = None
        self._unsent = self.transport.get_write_buffer_size()
        if self._unsent:
            self._reading = self.loop.call_later(self.reading_timeout, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """A client that asks for much and reads nothing would hold its answer in memory for ever."""
        left = self.transport.get_write_buffer_size()
        if left and self._unsent - left < _SLOWEST_READER * self.reading_timeout:
            self.transport.abort()
        else:
            self.watch_reader()
