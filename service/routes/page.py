"""`GET /`: the page, for people; its files are in service/page/ and served from memory.

The page is static: everything it shows it asks for like any other client, with the user's own key. So these paths need
none. Nothing of it comes from elsewhere, and the policy sent with it lets nothing in: no inline script or style, no
other host, no frame around it.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.errors import NotFound
from service.routes.documents import PAGE_ANSWER

router = APIRouter(tags=["operations"])

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",  # a new version of the service is a new page; the tag makes asking cheap
}


@dataclass(frozen=True, slots=True)
class File:
    """A file of a page, and what says whether it is still the same."""

    content: bytes
    media_type: str
    tag: str

    @classmethod
    def of(cls, content: bytes, kind: str) -> "File":
        """One of a kind in _TYPES."""
        return cls(content, _TYPES[kind], f'"{hashlib.sha256(content).hexdigest()[:20]}"')


@cache
def _files() -> dict[str, File]:
    """Every file of the page, by its name."""
    found = {}
    for entry in files("service.page").iterdir():
        kind = entry.name.rpartition(".")[2]
        if kind in _TYPES:
            found[entry.name] = File.of(entry.read_bytes(), kind)
    return found


@router.get("/", response_class=Response, responses=PAGE_ANSWER)
async def page(request: Request) -> Response:
    """The page: try the models, see how they run."""
    return _answer(request, "index.html")


@router.get("/page/{name}", response_class=Response, include_in_schema=False)
async def page_file(request: Request, name: str) -> Response:
    """A file of the page."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    file = _files().get(name)
    if file is None:
        raise NotFound(f"the page has no file '{name[:64]}'")
    return send_file(request, file)


def send_file(request: Request, file: File) -> Response:
    """A file of a page, with what keeps everything else out; 304 where the client has it."""
    headers = {**_HEADERS, "etag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers={**headers, "content-type": file.media_type})
