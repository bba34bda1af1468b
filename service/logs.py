"""Log lines of the service: the standard `logging`, as text for people or one JSON object a line. Called by
`__main__`."""

import logging
import sys
import time
from contextvars import ContextVar

import orjson

from service.settings import LogFormat, LogLevel

request_id: ContextVar[str] = ContextVar("request_id", default="")


class _Console(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """UTC, milliseconds."""
        return _utc(record)

    def format(self, record: logging.LogRecord) -> str:
        """One line, the request id at its end."""
        identity = request_id.get()
        return super().format(record) + (f" request_id={identity}" if identity else "")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One JSON object."""
        line = {
            "time": _utc(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id.get():
            line["request_id"] = request_id.get()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def _utc(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def configure(level: LogLevel, form: LogFormat) -> None:
    """Send every logger to standard error in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form is LogFormat.JSON else _Console())
    logging.basicConfig(level=level.value.upper(), handlers=[handler], force=True)
