"""Which statuses a request can be answered with, by the server's own OpenAPI document. Called by `fuzz.py` and by the
service's tests, for every answer that they get."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

_WITHOUT_ROUTE = frozenset({400, 401, 403, 404, 408, 431, 500, 503})
_OTHER_METHOD = (_WITHOUT_ROUTE - {404}) | {405}
_FILES = re.compile(r"/docs|/openapi\.json|/page/[^/]+")  # which the document leaves out
_OF_FILES = frozenset({200, 304, 404}) | _OTHER_METHOD


class Documented:
    """The statuses of an OpenAPI document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        paths = sorted(document["paths"].items(), key=lambda entry: entry[0].count("{"))  # names before parameters
        self._paths = [
            (
                re.compile(re.sub(r"\{\w+\}", "[^/]+", path)),
                {method.upper(): frozenset(map(int, found["responses"])) for method, found in operations.items()},
            )
            for path, operations in paths
        ]

    def statuses(self, method: str, path: str) -> frozenset[int]:
        """Those of a request; `path` is as it was sent, without the query."""
        plain = unquote(path)
        if _FILES.fullmatch(plain):
            return _OF_FILES
        for pattern, operations in self._paths:
            if pattern.fullmatch(plain):
                return operations.get(method, _OTHER_METHOD)
        return _WITHOUT_ROUTE

    def problem(self, method: str, path: str, status: int) -> str | None:
        """What is wrong with a status; None if nothing is."""
        if status in self.statuses(method, path):
            return None
        return f"{method} {path[:80]} is answered with {status}, which is not documented"
