"""`GET /docs`: the OpenAPI document as a page for people, made once, when the app is made.

HTML and a style of our own, under the policy of the page at `/`: no script, nothing from another host. FastAPI's own
page loads a script from a content delivery network, which a server without a way out cannot, and which could read the
API keys that are typed into it.
"""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from service.routes.page import File, send_file

router = APIRouter()

Node = Mapping[str, Any]

_SHORT = 80  # characters of a schema that is shown at once

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Tilewave: the API</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="/page/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/page/page.css">
<link rel="stylesheet" href="/page/reference.css">
</head>
"""


@router.get("/docs", include_in_schema=False)
async def api_page(request: Request) -> Response:
    """Every route: its parameters, its body, its answers."""
    return send_file(request, request.app.state.reference)


def render(document: Node) -> File:
    """The page for an OpenAPI document."""
    sections: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            sections.setdefault(operation["tags"][0], []).append(_operation(method.upper(), path, operation))
    info = document["info"]
    body = [
        '<header><h1><img src="/page/icon.svg" alt="" width="28" height="28">',
        f" {escape(info['title'])} {escape(info['version'])}</h1>",
        '<nav aria-label="Server"><a href="/">Page</a> <a href="/openapi.json">OpenAPI document</a></nav></header>',
        f"<main><p>{escape(info['summary'])} Where the server has API keys, send one as "
        "<code>Authorization: Bearer …</code>.</p>",
        *(f"<section><h2>{escape(tag)}</h2>{''.join(parts)}</section>" for tag, parts in sections.items()),
        "</main>",
    ]
    return File.of(f"{_HEAD}<body>{''.join(body)}</body></html>".encode(), "html")


def _operation(method: str, path: str, operation: Node) -> str:
    summary = f"<b>{method}</b> <code>{escape(path)}</code> <span>{escape(operation['summary'])}</span>"
    parts = [f"<p>{_text(operation)}</p>"]
    parameters = operation.get("parameters", ())
    if parameters:
        rows = (
            (p["name"], p["in"], "yes" if p["required"] else "no", _text(p), _json(p["schema"])) for p in parameters
        )
        parts.append(_table("Parameters", ("name", "in", "required", "meaning", "schema"), rows))
    body = operation.get("requestBody")
    if body is not None:
        parts.append(_table("Body", ("type", "schema"), _forms(body)))
    answers = (
        (status, _text(answer), kind, schema)
        for status, answer in operation["responses"].items()
        for kind, schema in _forms(answer) or [("", "")]
    )
    parts.append(_table("Answers", ("status", "meaning", "type", "schema"), answers))
    return f"<details><summary>{summary}</summary>{''.join(parts)}</details>"


def _forms(node: Node) -> list[tuple[str, str]]:
    """The media types of a body or an answer, and a schema for each."""
    return [(kind, _json(form.get("schema", {}))) for kind, form in node.get("content", {}).items()]


def _text(node: Node) -> str:
    return escape(node.get("description", ""))


def _json(schema: Node) -> str:
    """Short ones in a line, long ones to be opened."""
    text = escape(orjson.dumps(schema).decode())
    if len(text) <= _SHORT:
        return f"<code>{text}</code>"
    pretty = escape(orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode())
    return f"<details><summary>schema</summary><pre>{pretty}</pre></details>"


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    header = "".join(f'<th scope="col">{name}</th>' for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><caption>{caption}</caption><thead><tr>{header}</tr></thead>{lines}</table>"
    # On a phone it is scrolled: by keyboard, too.
    return f'<div class="wide" role="group" aria-label="{caption}" tabindex="0">{table}</div>'
