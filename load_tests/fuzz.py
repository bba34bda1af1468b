"""Hostile requests: every route with every method and malformed bodies, and what schemathesis makes of the schema."""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import random
import re
import struct
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

from load_tests import peers
from load_tests.http_client import Answer
from load_tests.report import Report
from load_tests.servers import Server, tilewave
from load_tests.workloads import default_repository, identity_repository

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD")
ALLOWED = {200, 400, 404, 405, 408, 413, 415, 429, 431, 503, 504}
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
_TIMEOUT_S = 30.0
_NAMES = ("identity", "all-minilm-l6-v2", "nobody", "..%2f..%2fetc%2fpasswd", "%00", "a%0d%0ab", "x" * 3000, "ä")

Body = tuple[bytes, dict[str, str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--requests", type=int, default=20_000, help="hand-made ones")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--examples", type=int, default=300, help="of schemathesis, for each operation; 0: without it")
    parser.add_argument("--seed", type=int, default=0)


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """Both against one server, which must serve as before at the end."""
    report = Report("Fuzz", vars(options))
    root = default_repository(folder, "all-minilm-l6-v2")
    identity_repository(folder).joinpath("identity").rename(root / "identity")
    arguments = ("--shared-memory-prefixes", "/tilewave_fuzz_", "--body-timeout", "2", "--header-timeout", "2")
    with tilewave(root, folder, *arguments, *options.server_arguments.split()) as server:
        routes = _routes(server)
        statuses, problems = asyncio.run(_attack(server, routes, options))
        report.add(
            kind="hand-made", routes=len(routes), requests=statuses.total(), statuses=dict(sorted(statuses.items()))
        )
        report.check("at least 20 routes", len(routes) >= 20, len(routes))
        report.check(
            "no status but those that are documented", set(statuses) <= ALLOWED, sorted(set(statuses) - ALLOWED)
        )
        report.check('every error is {"error": …}, and every connection ends in an answer', not problems, problems[:5])
        if options.examples:
            _schemathesis(report, server, folder, options)
        report.check("the server is ready", server.is_ready(), server.is_ready())
    log = server.log.read_text(errors="replace")
    unhandled = len(re.findall(r"unhandled error|Traceback", log))
    report.check("nothing unhandled in the log", unhandled == 0, unhandled)
    return report


def _routes(server: Server) -> dict[str, tuple[str, ...]]:
    """Paths and the methods they have, and some that have none."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/openapi.json", timeout=30) as answer:
        paths = json.load(answer)["paths"]
    known = {path: tuple(method.upper() for method in methods) for path, methods in sorted(paths.items())}
    return {**known, **dict.fromkeys(("/openapi.json", "/docs", "/nope", "//", "/v2/trace/setting"), ("GET",))}


async def _attack(
    server: Server, routes: dict[str, tuple[str, ...]], options: argparse.Namespace
) -> tuple[Counter[int], list[str]]:
    statuses: Counter[int] = Counter()
    problems: list[str] = []
    cases = ((route, method) for route in routes for method in METHODS)
    first = list(cases)  # every route with every method once at least
    left = options.requests

    async def worker(seed: int) -> None:
        nonlocal left
        source = random.Random(options.seed * 1000 + seed)
        while left > 0:
            left -= 1
            route, method = first.pop() if first else _choose(routes, source)
            path = re.sub(r"\{model\}", lambda _: source.choice(_NAMES), route)
            path = re.sub(r"\{version\}", lambda _: source.choice(("1", "9", "x", "-1", "1" * 40)), path)
            path = re.sub(r"\{region\}", lambda _: source.choice(("r", "%2e%2e", "x" * 300)), path)
            if path.endswith("/unload") and "nobody" not in path:
                continue  # or nothing is there to be attacked any more
            body, headers = source.choice(_BODIES)(source)
            sent = _request(method, path, body, headers, source)
            status, problem = await _send(server.port, sent, method)
            statuses[status] += 1
            if problem is not None:
                problems.append(f"{method} {path[:80]} {body[:60]!r}: {problem}")

    await asyncio.gather(*(worker(seed) for seed in range(options.connections)))
    return statuses, problems


def _choose(routes: dict[str, tuple[str, ...]], source: random.Random) -> tuple[str, str]:
    """Mostly methods that a route has: the others are one 405 like another."""
    route = source.choice(list(routes))
    return route, source.choice(routes[route] if source.random() < 0.9 else METHODS)


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


# ---- bodies


def _tensor(source: random.Random) -> dict[str, object]:
    """An input that may be right, with something in it that may be not."""
    tensor: dict[str, object] = {"name": "input", "shape": [1, 64], "datatype": "FP32", "data": [0.5] * 64}
    changes: tuple[tuple[str, object], ...] = (
        ("shape", [-1, 64]), ("shape", [1 << 40, 64]), ("shape", [0, 64]), ("shape", []), ("shape", "1"),
        ("shape", [1.5, 64]), ("shape", [1] * 5000), ("data", [1] * 63), ("data", [None] * 64), ("data", [[0.5] * 64]),
        ("data", [[[[]]]]), ("data", "x"), ("data", [1e999] * 64), ("data", [True] * 64), ("data", [10**400] * 64),
        ("datatype", "INT64"), ("datatype", "FP16"), ("datatype", 7), ("name", "nobody"), ("name", None),
        ("parameters", []), ("parameters", {"binary_data_size": 10**30}), ("parameters", {"binary_data_size": 256}),
        ("parameters", {"shared_memory_region": "r", "shared_memory_byte_size": 256}), ("more", {}),
    )  # fmt: skip
    for _ in range(source.randint(0, 2)):
        key, value = source.choice(changes)
        tensor[key] = value
    return tensor


def _infer(source: random.Random) -> Body:
    outputs: tuple[object, ...] = (
        [], [{"name": "output"}] * 2, [{"name": "nobody"}], 3,
        [{"name": "output", "parameters": {"classification": 3}}],
        [{"name": "output", "parameters": {"binary_data": True}}], [None],
        [{"name": "output", "parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 1}}],
    )  # fmt: skip
    document: dict[str, object] = {"inputs": [_tensor(source)] * source.choice((1, 1, 1, 0, 2, 50))}
    if source.random() < 0.5:
        document["outputs"] = source.choice(outputs)
    if source.random() < 0.3:
        parameters = {"timeout": -1, "priority": 1 << 70, "binary_data_output": 3, "sequence_id": 3, "x": [[]]}
        key = source.choice(sorted(parameters))
        document["parameters"] = {key: parameters[key]}
    text = json.dumps(document).encode()
    if source.random() < 0.5:
        return text, {}
    length = source.choice((len(text), 0, -1, len(text) + 1, 10**18, "x", len(text) // 2))
    return text + bytes(source.choice((0, 1, 255, 256, 257))), {"Inference-Header-Content-Length": str(length)}


def _deep(source: random.Random) -> Body:
    depth = source.choice((100, 1023, 1024, 1025, 100_000))
    return source.choice((b"[", b'{"inputs":', b'{"ids":[')) * depth, {}


def _noise(source: random.Random) -> Body:
    return source.randbytes(source.choice((0, 1, 100, 10_000))), {
        "Content-Type": source.choice(("", "text/x", "image/png"))
    }


def _compressed(source: random.Random) -> Body:
    body = source.choice((bytes(1 << 20), b"{}", b'{"text": "a"}'))
    packed = gzip.compress(body)
    packed = source.choice((packed, packed[:-4], packed + b"more", packed * 2, body))
    return packed, {"Content-Encoding": source.choice(("gzip", "deflate", "br", "gzip, gzip", "ä"))}


@cache
def _packed_zeros() -> bytes:
    return gzip.compress(bytes(100 << 20), 9)


def _bomb(_: random.Random) -> Body:
    return _packed_zeros(), {"Content-Encoding": "gzip"}


def _tokens(source: random.Random) -> Body:
    bodies: tuple[object, ...] = (
        {"text": "a"}, {"text": [""]}, {"text": []}, {"text": ["\ud800"]}, {"text": "x" * 100_000},
        {"text": ["a"] * 3000},
        {"ids": [[-1]]}, {"ids": [[1 << 40]]}, {"ids": [[]]}, {"ids": [[1.0]]}, {"ids": [[1] * 5000]},
        {"ids": {"a": 1}},
        {"ids": [[101, 102]], "text": "a"}, {"model": "all-minilm-l6-v2", "input": "a", "encoding_format": "x"},
        {"model": "all-minilm-l6-v2", "input": [[101, "a"]]}, {"model": 3, "input": None}, {"ready": "yes"},
        {"key": "/tilewave_fuzz_none", "byte_size": 1}, {"key": "/../etc", "byte_size": 1}, {"key": None},
        {"parameters": {"config": "{}", "file:1/model.onnx": "AAAA"}}, {"parameters": 3}, None, 3, "x", [], True,
    )  # fmt: skip
    return json.dumps(source.choice(bodies)).encode(), {}


def _form_body(source: random.Random) -> Body:
    boundary = source.choice(("b", "x" * 100, ""))
    part = source.choice(('form-data; name="image"; filename="a.png"', 'form-data; name="a"', "", 'form-data; name="ü'))
    one = f"--{boundary}\r\nContent-Disposition: {part}\r\n\r\n".encode("latin-1") + source.randbytes(20) + b"\r\n"
    body = one * source.choice((0, 1, 70)) + source.choice((f"--{boundary}--\r\n".encode(), b"", b"--"))
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def _headers(source: random.Random) -> Body:
    name, value = source.choice(
        (
            ("X-Timeout-Ms", "-1"), ("X-Timeout-Ms", "1" * 400), ("X-Timeout-Ms", "1"), ("X-Priority", "101"),
            ("X-Priority", "a"), ("X-Request-Id", "\x7f"), ("X-Request-Id", "x" * 5000), ("Accept-Encoding", "gzip"),
            ("Expect", "100-continue"), ("Upgrade", "websocket"), ("Authorization", "Bearer x"), ("Cookie", "a=" * 900),
            ("Range", "bytes=0-1"), ("Content-Type", "\x01"), ("traceparent", "00-x-y-z"),
        )
    )  # fmt: skip
    return b'{"text": "a"}', {name: value}


def _image(source: random.Random) -> Body:
    width = struct.pack(">I", source.choice((0, 1, 100_000, 2**31)))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + width * 2 + b"\x08\x02\0\0\0" + source.randbytes(
        30
    ), {}


_BODIES: tuple[Callable[[random.Random], Body], ...] = (
    *(_infer,) * 6, *(_tokens,) * 4, _deep, _noise, _noise, _compressed, _compressed, _bomb,
    _form_body, _headers, _headers, _image,
)  # fmt: skip


# ---- schemathesis


def _schemathesis(report: Report, server: Server, folder: Path, options: argparse.Namespace) -> None:
    """The OpenAPI document taken at its word. Models are not unloaded: nothing would be left to ask."""
    tool = peers.environment("schemathesis") / "schemathesis"
    command = [
        str(tool), "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks", CHECKS, "--workers", "1",
        "--max-examples", str(options.examples), "--seed", str(options.seed), "--phases", "examples,coverage,fuzzing",
        "--exclude-path-regex", "unload", "--request-timeout", str(_TIMEOUT_S), "--continue-on-failure", "--no-color",
        "--suppress-health-check", "all", "--warnings", "off",
    ]  # fmt: skip
    before = server.metric("http_responses_total")
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=7200)
    (folder / "schemathesis.txt").write_text(ended.stdout + ended.stderr)
    made = server.metric("http_responses_total") - before
    report.add(kind="schemathesis", requests=int(made), exit_status=ended.returncode)
    report.check(f"schemathesis finds nothing ({CHECKS})", ended.returncode == 0, ended.stdout[-1500:])
    report.check(
        "both together sent at least 20,000 requests, unless asked for fewer",
        made + options.requests >= min(20_000, options.requests),
        int(made + options.requests),
    )
