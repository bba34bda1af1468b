"""The OpenAPI document: what FastAPI makes of the routes, corrected to what the server does. Called when the app is
made."""

from typing import Any

from fastapi import FastAPI

from service.access import right_for

_OF_FASTAPI = "422"  # what it says of every route with parameters; ours answer 400
_OF_KEYS = ("401", "403")


def describe(app: FastAPI) -> dict[str, Any]:
    """Correct the document that `/openapi.json` gives from now on, and return it."""
    document = app.openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop(_OF_FASTAPI, None)
            if right_for(path) is None:
                for status in _OF_KEYS:
                    responses.pop(status)
    document["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
    document["security"] = [{}, {"key": []}]
    return document
