"""The direct way of small requests that are all there: from the connection to the engine and back by plain calls,
without a task, without ASGI.

FastAPI, its middlewares and a task take several times as long as all the rest of a small request. What is checked,
counted, logged and answered is the same, by the same functions: `exchange.py`, `inference.py` and the jobs of the
routes. What this does not take (`Direct.find`) goes through ASGI. Called by `direct_connection.py`; event loop only.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from service.codecs.compression import asked_for
from service.errors import ClientGone, ServiceError, Unavailable
from service.exchange import UNANSWERED, Headers, RawHeaders, Requests, headers_of
from service.inference import Answer, InferenceRequest, Job, Outputs, Preparation, open_request
from service.logs import request_id
from service.preprocess import Preprocessing
from service.routes.images import images_job, is_form
from service.routes.infer import infer_job
from service.routes.responses import JsonResponse, failure
from service.routes.tokens import INLINE_CHARACTERS, tokens_job
from service.serving import Serving

Send = Callable[[int, RawHeaders, bytes], None]
"""Write an answer: its status, its headers but for the length, its body."""

_LARGEST_BODY = 1 << 20  # the rest costs more than ASGI adds, and its body should come with back pressure


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the app that can be answered directly; `with_query` where its query says nothing, `with_forms` where
    a form is a body as any."""

    path: str
    pattern: re.Pattern[bytes]
    job: Callable[[InferenceRequest, bytes, Headers], Job | Preparation]
    largest_body: int
    with_query: bool = False
    with_forms: bool = True


def _pattern(path: str) -> tuple[str, re.Pattern[bytes]]:
    return path, re.compile(re.sub(r"\{\w+\}", "([^/%]+)", path).encode())


_ROUTES = (
    Route(*_pattern("/v2/models/{model}/infer"), infer_job, _LARGEST_BODY, with_query=True),
    Route(*_pattern("/v1/models/{model}/tokens"), tokens_job, INLINE_CHARACTERS),
    Route(*_pattern("/v1/models/{model}/images"), images_job, _LARGEST_BODY, with_forms=False),
    Route(*_pattern("/v2/models/{model}/versions/{version}/infer"), infer_job, _LARGEST_BODY, with_query=True),
)


@lru_cache(4096)
def _route_of(url: bytes) -> tuple[Route, tuple[str, ...], str] | None:
    """The route that a URL names, the names in it, its path."""
    path, _, query = url.partition(b"?")
    for route in _ROUTES:
        found = route.pattern.fullmatch(path)
        if found is not None and path.isascii() and (route.with_query or not query):
            return route, tuple(name.decode() for name in found.groups()), path.decode()
    return None


class Direct:
    """Makes the requests that go directly."""

    def __init__(self, serving: Serving, requests: Requests) -> None:
        self.serving = serving
        self.requests = requests
        self.open: set[DirectRequest] = set()

    def find(self, url: bytes, raw: list[tuple[bytes, bytes]]) -> "DirectRequest | None":
        """The POST request with this URL and these headers, if it can go directly: a short body of known length that
        nobody has to unpack, for a route that answers at once; without traces, which follow tasks."""
        named = _route_of(url)
        if named is None or self.requests.tracer is not None:
            return None
        route, names, path = named
        headers = headers_of(raw)
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or not self.takes(route, int(length)):
            return None
        if b"content-encoding" in headers or asked_for(headers.get(b"accept-encoding", b"")) is not None:
            return None
        if not route.with_forms and is_form(headers):
            return None
        return DirectRequest(self, route, names, path, headers)

    def takes(self, route: Route, length: int) -> bool:
        """Whether a body of so many bytes may go directly."""
        return length <= min(route.largest_body, self.serving.settings.max_body_bytes)

    def shut_down(self) -> None:
        """Answer what is still running when the drain time is over."""
        for request in list(self.open):
            request.cut_short()


class DirectRequest:
    """One request. Either `begin` follows, or it goes through ASGI and never was here."""

    __slots__ = (
        "_direct", "_exchange", "_headers", "_inference", "_job", "_names", "_path", "_preprocessing", "_route",
        "_send",
    )  # fmt: skip

    def __init__(self, direct: Direct, route: Route, names: tuple[str, ...], path: str, headers: Headers) -> None:
        self._direct, self._route, self._names, self._path = direct, route, names, path
        self._headers = headers
        self._inference: InferenceRequest | None = None
        self._preprocessing: Preprocessing[Any] | None = None

    def again(self) -> "DirectRequest":
        """A further request with this one's URL and headers."""
        return DirectRequest(self._direct, self._route, self._names, self._path, self._headers)

    def takes(self, length: int) -> bool:
        """Whether it could have come with a body of so many bytes."""
        return self._direct.takes(self._route, length)

    def begin(self, body: bytes, send: Send) -> None:
        """The body is there. `send` is called once, perhaps at once, unless `gone` comes before."""
        direct = self._direct
        self._send = send
        exchange = self._exchange = direct.requests.begin("POST", self._path, self._headers)
        direct.open.add(self)
        token = request_id.set(exchange.identity)
        try:
            direct.requests.check("POST", self._path, self._headers)
            served = direct.serving.accepting(*self._names)
            inference = open_request(direct.serving, served, self._headers)
            inference.begin()
            self._inference = inference
            inference.received()
            job = self._route.job(inference, body, self._headers)
            if isinstance(job, Preparation):
                done = partial(self._prepared, job.job)
                self._preprocessing = direct.serving.preprocess.begin(job.calls, done, inference.deadline)
            else:
                self._start(inference, job)
        except Exception as error:
            self._fail(error)
        finally:
            request_id.reset(token)

    def _prepared(self, job: Callable[[list[Any]], Job], results: list[Any] | Exception) -> None:
        """The preprocessing threads are done."""
        inference = self._inference
        assert inference is not None
        self._preprocessing = None
        token = request_id.set(self._exchange.identity)
        try:
            if isinstance(results, Exception):
                self._fail(results)
            else:
                self._start(inference, job(results))
        except Exception as error:
            self._fail(error)
        finally:
            request_id.reset(token)

    def _start(self, inference: InferenceRequest, job: Job) -> None:
        self._job = job
        inference.start(job, self._returned)

    def _returned(self, outputs: Outputs | ServiceError) -> None:
        """The engine is done."""
        inference = self._inference
        assert inference is not None
        token = request_id.set(self._exchange.identity)
        try:
            if isinstance(outputs, ServiceError):
                self._fail(outputs)
                return
            if self._job.is_long(outputs):
                call = partial(self._job.answer, outputs)
                pool = self._direct.serving.preprocess
                self._preprocessing = pool.begin((call,), self._written, inference.deadline)
            else:
                self._succeed(inference, self._job.answer(outputs))
        except Exception as error:
            self._fail(error)
        finally:
            request_id.reset(token)

    def _written(self, answers: list[Answer] | Exception) -> None:
        """A preprocessing thread has made the answer."""
        inference = self._inference
        assert inference is not None
        self._preprocessing = None
        token = request_id.set(self._exchange.identity)
        try:
            if isinstance(answers, Exception):
                self._fail(answers)
            else:
                self._succeed(inference, answers[0])
        except Exception as error:
            self._fail(error)
        finally:
            request_id.reset(token)

    def _succeed(self, inference: InferenceRequest, answer: Answer) -> None:
        answer = inference.timed(answer)
        self._inference = None
        try:
            self._close(200, answer.headers, answer.body)
        finally:
            inference.end(None)  # after the write: the client need not wait for the counting

    def _fail(self, error: Exception) -> None:
        self._end_inference(error)
        self._respond(failure(error, self._path))

    def _end_inference(self, error: Exception) -> None:
        inference, self._inference = self._inference, None
        if self._preprocessing is not None:
            self._preprocessing.cancel()
            self._preprocessing = None
        if inference is not None:
            inference.abandon()
            inference.end(error)

    def _respond(self, response: JsonResponse) -> None:
        headers = [header for header in response.raw_headers if header[0] != b"content-length"]
        self._close(response.status_code, headers, bytes(response.body))

    def _close(self, status: int, headers: RawHeaders, body: bytes) -> None:
        exchange = self._exchange
        exchange.status = status
        self._direct.open.discard(self)
        self._send(status, [*headers, *exchange.own_headers(headers)], body)
        exchange.end(self._route.path)

    def gone(self) -> None:
        """The client has closed the connection: what waits is dropped."""
        if self not in self._direct.open:
            return
        self._direct.open.discard(self)
        token = request_id.set(self._exchange.identity)
        self._end_inference(ClientGone("the client closed the connection"))
        self._exchange.status = UNANSWERED
        self._exchange.end(self._route.path)
        request_id.reset(token)

    def cut_short(self) -> None:
        """The server shuts down before there is an answer."""
        error = Unavailable("the server shut down before the request was done")
        self._end_inference(error)
        self._respond(failure(error, self._path))
