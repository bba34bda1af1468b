"""Hostile requests: every route with every method and malformed bodies, and what schemathesis makes of the schema."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from load_tests import peers
from load_tests.documented import Documented
from load_tests.fuzz_bodies import malformed, prepare
from load_tests.http_client import Answer
from load_tests.report import Report
from load_tests.servers import Server, tilewave
from load_tests.workloads import default_repository, identity_repository

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_TIMEOUT_S = 30.0
_CONFIGURATION = """\
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]  # what a request with X-Timeout-Ms: 1 asks for
"""
_MODELS = ("identity", "all-minilm-l6-v2", "efficientnet-lite0")
_NAMES = (*_MODELS, "nobody", "..%2f..%2fetc%2fpasswd", "%00", "a%0d%0ab", "x" * 3000, "ä")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--requests", type=int, default=20_000, help="hand-made ones")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--examples", type=int, default=150, help="of schemathesis, for each operation; 0: without it")
    parser.add_argument("--seed", type=int, default=0)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Both against one server, which must serve as before at the end."""
    report = Report("Fuzz", vars(options))
    root = default_repository(folder, *_MODELS[1:])
    identity_repository(folder).joinpath("identity").rename(root / "identity")
    arguments = ("--shared-memory-prefixes", "/tilewave_fuzz_", "--body-timeout", "2", "--header-timeout", "2")
    with tilewave(root, folder, *arguments, *options.server_arguments.split()) as server:
        document = _document(server)
        routes = _routes(document)
        statuses, problems = asyncio.run(_attack(server, routes, Documented(document), options))
        report.add(
            kind="hand-made", routes=len(routes), requests=statuses.total(), statuses=dict(sorted(statuses.items()))
        )
        report.check("at least 20 routes", len(routes) >= 20, len(routes))
        report.check("no server error", not {500, 501, 502} & set(statuses), statuses[500])
        text = (
            'every status is documented for its route, every error is {"error": …}, every connection ends in an answer'
        )
        report.check(text, not problems, problems[:5])
        if options.examples:
            _schemathesis(report, server, folder, options, statuses.total())
        report.check("the server is ready", server.is_ready(), server.is_ready())
    log = server.log.read_text(errors="replace")
    unhandled = len(re.findall(r"unhandled error|Traceback", log))
    report.check("nothing unhandled in the log", unhandled == 0, unhandled)
    return report


def _document(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/openapi.json", timeout=30) as answer:
        document: dict[str, Any] = json.load(answer)
    return document


def _routes(document: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Paths and the methods they have, and some that have none."""
    paths = sorted(document["paths"].items())
    known = {path: tuple(method.upper() for method in methods) for path, methods in paths}
    return {**known, **dict.fromkeys(("/openapi.json", "/docs", "/nope", "//", "/v2/trace/setting"), ("GET",))}


async def _attack(
    server: Server, routes: dict[str, tuple[str, ...]], documented: Documented, options: argparse.Namespace
) -> tuple[Counter[int], list[str]]:
    prepare()
    statuses: Counter[int] = Counter()
    problems: list[str] = []
    cases = ((route, method) for route in routes for method in METHODS)
    first = list(cases)  # every route with every method once at least
    left = options.requests

    async def worker(seed: int) -> None:
        nonlocal left
        source = random.Random(options.seed * 1000 + seed)
        while left > 0:
            route, method = first.pop() if first else _choose(routes, source)
            name = _name(source)
            if route.endswith("/unload") and name in _MODELS:
                name = "nobody"  # or nothing is there to be attacked any more
            path = route.replace("{model}", name)
            path = re.sub(r"\{version\}", lambda _: source.choice(("1", "9", "x", "-1", "1" * 40)), path)
            path = re.sub(r"\{region\}", lambda _: source.choice(("r", "%2e%2e", "x" * 300)), path)
            left -= 1
            body, headers = malformed(route, source)
            sent = _request(method, path, body, headers, source)
            status, problem = await _send(server.port, sent, method)
            statuses[status] += 1
            problem = problem or documented.problem(method, path, status)
            if problem is not None:
                problems.append(f"{method} {path[:80]} {body[:60]!r}: {problem}")

    await asyncio.gather(*(worker(seed) for seed in range(options.connections)))
    return statuses, problems


def _choose(routes: dict[str, tuple[str, ...]], source: random.Random) -> tuple[str, str]:
    """Mostly methods that a route has: the others are one 405 like another."""
    route = source.choice(list(routes))
    return route, source.choice(routes[route] if source.random() < 0.9 else METHODS)


def _name(source: random.Random) -> str:
    """Mostly of a model that is there: what is wrong with a body is found only behind one."""
    return source.choice(_MODELS if source.random() < 0.7 else _NAMES)


def _request(method: str, path: str, body: bytes, headers: dict[str, str], source: random.Random) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if source.random() < 0.2:  # in pieces of any size
        lines.append("Transfer-Encoding: chunked")
        pieces, position = [], 0
        while position < len(body):
            size = source.choice((1, 7, 1000, len(body)))
            piece = body[position : position + size]
            pieces.append(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            position += size
            if len(pieces) > 2000:
                size = len(body)
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + b"".join(pieces) + b"0\r\n\r\n"
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body


async def _send(port: int, request: bytes, method: str) -> tuple[int, str | None]:
    """The status, and what is wrong with the answer."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                while head.startswith(b"HTTP/1.1 100 "):
                    head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.read()
            finally:
                writer.close()
    except (asyncio.IncompleteReadError, OSError) as error:
        return 0, f"no answer: {error!r}"
    except TimeoutError:
        return 0, f"no answer in {_TIMEOUT_S:g} s"
    status = int(head.split(b" ", 2)[1])
    return status, None if status == 200 or method == "HEAD" else _form(Answer(status, {}, body))


def _form(answer: Answer) -> str | None:
    try:
        document = json.loads(answer.body)
        error = document["error"]
        right = list(document) == ["error"] and isinstance(error if isinstance(error, str) else error["message"], str)
    except (ValueError, KeyError, TypeError):
        right = False
    return None if right else f"{answer.status} with {answer.body[:100]!r}"


# ---- schemathesis


def _schemathesis(report: Report, server: Server, folder: Path, options: argparse.Namespace, before_it: int) -> None:
    """The OpenAPI document taken at its word. Models are not unloaded: nothing would be left to ask."""
    tool = peers.environment("schemathesis") / "schemathesis"
    configuration = folder / "schemathesis.toml"
    configuration.write_text(_CONFIGURATION)
    command = [
        str(tool), "--config-file", str(configuration), "run", f"http://127.0.0.1:{server.port}/openapi.json",
        "--checks", CHECKS, "--workers", "1", "--max-examples", str(options.examples), "--seed", str(options.seed),
        "--phases", "examples,coverage,fuzzing", "--exclude-path-regex", "unload", "--request-timeout", str(_TIMEOUT_S),
        "--continue-on-failure", "--no-color", "--suppress-health-check", "all", "--warnings", "off",
    ]  # fmt: skip
    before = server.metric("http_responses_total")
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=7200)
    (folder / "schemathesis.txt").write_text(ended.stdout + ended.stderr)
    made = server.metric("http_responses_total") - before
    report.add(kind="schemathesis", requests=int(made), exit_status=ended.returncode)
    found = "nothing" if ended.returncode == 0 else f"{ended.stdout[-1500:]} {ended.stderr[-500:]}"
    report.check(f"schemathesis finds nothing ({CHECKS})", ended.returncode == 0, found)
    report.check(
        "both together sent at least 20,000 requests, unless asked for fewer",
        made + before_it >= min(20_000, options.requests),
        int(made + before_it),
    )
