"""Every error the service answers with: one table from exception to HTTP status and metric label.

Codecs, the repository, the engine client and the routes raise these; `app.py` turns them into answers through
`describe` and `document`. Adding an error is adding a class and its row in `TABLE`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from starlette.exceptions import HTTPException

from service.workers.messages import FailureCode


class Outcome(StrEnum):
    """The `outcome` label of `inference_requests_total`."""

    SUCCESS = "success"
    INVALID = "invalid"
    TOO_LARGE = "too_large"
    NOT_FOUND = "not_found"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    FAILED = "failed"


class ServiceError(Exception):
    """An error whose message goes to the client as it is. `retry_after`, in seconds, says when the same request may
    succeed; `soon` is what it is where nothing better is known."""

    soon: ClassVar[float | None] = None

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = self.soon if retry_after is None else retry_after


class InvalidRequest(ServiceError):
    """The client sent something that can never be answered."""


class Unsupported(InvalidRequest):
    """A part of a protocol that this server does not have, or does not allow."""


class Unauthorized(ServiceError):
    """No API key, or none that is known."""


class Forbidden(ServiceError):
    """The API key has not the right to do this, or nobody has."""


class UnsupportedEncoding(ServiceError):
    """A Content-Encoding that the service does not read."""


class TooLarge(ServiceError):
    """The request is over a limit of the service."""


class SlowBody(ServiceError):
    """The body did not arrive in time."""


class NotFound(ServiceError):
    """No such model, version or path."""


class Overloaded(ServiceError):
    """A bounded queue is full."""

    soon: ClassVar[float | None] = 1.0


class Unavailable(ServiceError):
    """What passes by itself: the model is loading, the server starts or drains, its engine is being restarted."""

    soon: ClassVar[float | None] = 1.0


class NotServed(Unavailable):
    """The model cannot be served, or shall not be, until somebody changes that."""

    soon: ClassVar[float | None] = None


class DeadlineExceeded(ServiceError):
    """The request's own deadline, or the server's, passed before the answer was there."""


class ClientGone(ServiceError):
    """The client closed the connection; nobody reads this answer."""


class EngineFailed(ServiceError):
    """The engine could not run a request that looked right."""


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """What an exception means to a client and to the metrics."""

    status: int
    outcome: Outcome

    @property
    def openai_type(self) -> str:
        """The `type` of an error in the OpenAI shape, as that API has it."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


TABLE: Mapping[type[BaseException], ErrorRow] = {
    InvalidRequest: ErrorRow(400, Outcome.INVALID),
    Unauthorized: ErrorRow(401, Outcome.INVALID),
    Forbidden: ErrorRow(403, Outcome.INVALID),
    UnsupportedEncoding: ErrorRow(415, Outcome.INVALID),
    TooLarge: ErrorRow(413, Outcome.TOO_LARGE),
    SlowBody: ErrorRow(408, Outcome.CANCELLED),
    NotFound: ErrorRow(404, Outcome.NOT_FOUND),
    Overloaded: ErrorRow(429, Outcome.OVERLOADED),
    Unavailable: ErrorRow(503, Outcome.UNAVAILABLE),
    DeadlineExceeded: ErrorRow(504, Outcome.DEADLINE),
    ClientGone: ErrorRow(499, Outcome.CANCELLED),
    EngineFailed: ErrorRow(500, Outcome.FAILED),
}

_UNKNOWN = ErrorRow(500, Outcome.FAILED)

_FROM_ENGINE: Mapping[FailureCode, type[ServiceError]] = {
    FailureCode.INVALID_INPUT: InvalidRequest,
    FailureCode.TOO_LARGE: TooLarge,
    FailureCode.OVERLOADED: Overloaded,
    FailureCode.DEADLINE: DeadlineExceeded,
    FailureCode.NOT_LOADED: Unavailable,
    FailureCode.OUT_OF_MEMORY: Unavailable,
    FailureCode.WORKER_LOST: Unavailable,
    FailureCode.ENGINE: EngineFailed,
}


def describe(error: BaseException) -> ErrorRow:
    """The table's row for an exception: that of its nearest listed class, else 500."""
    if isinstance(error, HTTPException):
        outcome = Outcome.NOT_FOUND if error.status_code == 404 else Outcome.INVALID
        return ErrorRow(error.status_code, outcome)
    for kind in type(error).__mro__:
        row = TABLE.get(kind)
        if row is not None:
            return row
    return _UNKNOWN


# What /v1 has of our own; all the rest of it is OpenAI's.
_OUR_V1 = re.compile(r"/v1/models/[^/]+/(images|tokens)")


def document(message: str, row: ErrorRow, path: str) -> dict[str, Any]:
    """The body of an error answer: `{"error": message}`, but where OpenAI's clients ask, which look for an object with
    `message` there and print nothing else."""
    if not path.startswith("/v1/") or _OUR_V1.fullmatch(path):
        return {"error": message}
    return {"error": {"message": message, "type": row.openai_type, "param": None, "code": row.outcome.value}}


def from_engine(code: FailureCode, reason: str, retry_after: float | None) -> ServiceError:
    """The exception for a failure that a worker reported."""
    return _FROM_ENGINE[code](reason, retry_after)
