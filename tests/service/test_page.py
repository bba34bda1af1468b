"""The page's files as the server gives them: complete, cacheable, open to everybody, and letting nothing in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

import service.page
from docs.page.__main__ import MOST_BYTES
from service.routes.reference import render
from tests.service.conftest import ROOT, Running, Start, error_of

FOLDER = Path(service.page.__file__).parent
FILES = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".css", ".js", ".svg"))


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_there_with_its_type(shared: Running, name: str) -> None:
    answer = shared.client.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
    assert answer.headers["content-type"].startswith(kind)


def test_the_page_asks_for_what_is_there_and_nothing_else(shared: Running) -> None:
    page = shared.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    asked = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {"/page/main.js", "/page/page.css", "/page/icon.svg"} <= set(asked)
    for address in asked:
        assert shared.client.get(address).status_code == 200, address
    imported = {name for file in FOLDER.glob("*.js") for name in re.findall(r'from "\./([^"]+)"', file.read_text())}
    assert imported < set(FILES)


def test_the_api_s_page_shows_every_route_and_asks_nobody_else(shared: Running) -> None:
    answer = shared.client.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    asked = re.findall(r'(?:src|href|action)="([^"]+)"', answer.text)
    assert {"/page/reference.css", "/openapi.json", "/"} <= set(asked)
    for address in asked:
        assert address.startswith("/") and not address.startswith("//")
        assert shared.client.get(address).status_code == 200, address
    assert "<script" not in answer.text and "style=" not in answer.text and "//" not in answer.text
    document = shared.client.get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            (shown,) = re.findall(
                rf"<details><summary><b>{method.upper()}</b> <code>{re.escape(path)}</code>(.*?)"
                r"(?=</section>|<details><summary><b>)", answer.text, re.DOTALL
            )  # fmt: skip
            for name in operation["responses"]:
                assert f"<td>{name}</td>" in shown
            for parameter in operation.get("parameters", ()):
                assert f"<td>{parameter['name']}</td>" in shown
    tag = answer.headers["etag"]
    assert shared.client.get("/docs", headers={"if-none-match": tag}).status_code == 304
    assert shared.client.get("/redoc").status_code == 404


def test_what_a_document_says_is_text_to_the_api_s_page() -> None:
    operation = {"tags": ["<b>"], "summary": "<i>", "description": "<u>", "responses": {"200": {"description": "<s>"}}}
    document = {"info": {"title": "t", "version": "1", "summary": "s"}, "paths": {"/<a>": {"get": operation}}}
    shown = render(document).content.decode()
    for text in ("b", "i", "u", "s", "a"):
        assert f"&lt;{text}&gt;" in shown
    assert "<i>" not in shown and "<u>" not in shown


@pytest.mark.parametrize("path", ["/", "/docs", "/page/main.js", "/page/page.css"])
def test_nothing_from_elsewhere_is_let_in(shared: Running, path: str) -> None:
    headers = shared.client.get(path).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert not any("unsafe" in value or "http" in value or "*" in value for value in policy.values())
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_what_has_not_changed_is_not_sent_again(shared: Running) -> None:
    tag = shared.client.get("/page/main.js").headers["etag"]
    again = shared.client.get("/page/main.js", headers={"if-none-match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert shared.client.get("/page/page.css", headers={"if-none-match": tag}).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "%2e%2e", "%2e%2e%2fapp.py", "index.html%00"])
def test_other_files_are_not_given_away(shared: Running, name: str) -> None:
    answer = shared.client.get(f"/page/{name}")
    assert answer.status_code in (404, 405) and error_of(answer)


def test_the_page_needs_no_key_and_what_it_shows_does(start: Start, repository: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("inference 0123456789abcdef\n")
    keys.chmod(0o600)
    server = start(repository, api_keys=keys)
    for path in ("/", *(f"/page/{name}" for name in FILES)):
        assert server.client.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/v2/models/identity/profile"):
        assert server.client.get(path).status_code == 401
    key = {"authorization": "Bearer 0123456789abcdef"}
    assert server.client.get("/v2/models/identity/profile", headers=key).status_code == 200


def test_the_documents_show_pictures_of_the_page_and_they_are_small() -> None:
    """`make screenshots` makes them."""
    texts = [(path, path.read_text()) for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    shown = {
        path.parent / name for path, text in texts for name in re.findall(r"\]\(((?:docs/)?page/\w+\.webp)\)", text)
    }
    assert {path.stem for path in shown} == {"try", "kernels", "dark", "phone"}
    assert shown == set((ROOT / "docs" / "page").glob("*.webp"))
    for path in shown:
        assert path.stat().st_size <= MOST_BYTES
        with Image.open(path) as picture:
            assert picture.format == "WEBP" and picture.width >= 700
