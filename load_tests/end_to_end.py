"""Whole models through HTTP beside LitServe and mosec with ONNX Runtime, and against the engine alone."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import engine
from load_tests import peers
from load_tests.http_client import Exchange, Results, closed_loop, post
from load_tests.payloads import photos
from load_tests.report import Report
from load_tests.servers import Server, running, tilewave
from load_tests.workloads import Make, default_repository, images, our_label, texts

IMAGES, TEXTS = "efficientnet-lite0", "all-minilm-l6-v2"
LEAST_OF_ENGINE = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this program."""
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each turn")
    parser.add_argument("--warm-up", type=float, default=20.0, help="seconds of load before the first turn")
    parser.add_argument("--turns", type=int, default=3, help="of all servers, one after the other; the best counts")
    parser.add_argument("--models", nargs="*", default=[IMAGES, TEXTS], choices=[IMAGES, TEXTS])


def measure(options: argparse.Namespace, folder: Path) -> Report:
    """The servers of one model take turns; only one has requests at a time."""
    report = Report("Models through HTTP", vars(options))
    for name in options.models:
        root = default_repository(folder, name)
        kind = "images" if name == IMAGES else "texts"
        with ExitStack() as opened:
            ours = opened.enter_context(tilewave(root, folder, *options.server_arguments.split()))
            lit = opened.enter_context(running(peers.litserve(kind, folder, root / name)))
            mosec = opened.enter_context(running(peers.mosec(kind, folder, root / name)))
            cases = {
                "tilewave": (ours, _ours(name)),
                "litserve": (lit, _litserve(name)),
                "mosec": (mosec, _mosec(name)),
            }
            best: dict[str, Results] = {}
            shape = (1, 1)
            for process, make in cases.values():  # our engine makes a plan for each shape of a batch it meets
                asyncio.run(closed_loop(process.port, make, options.connections, options.warm_up))
            for _ in range(options.turns):
                for server, (process, make) in cases.items():
                    before = _batches(ours, name)
                    results = asyncio.run(closed_loop(process.port, make, options.connections, options.seconds))
                    if server not in best or results.rate > best[server].rate:
                        best[server] = results
                        rows, runs, tokens = (a - b for a, b in zip(_batches(ours, name), before, strict=True))
                        if server == "tilewave" and runs:
                            shape = (max(round(rows / runs), 1), max(round(tokens / rows), 1))
        alone = engine_rate(root / name, *shape)
        for server, results in best.items():
            report.add(model=name, server=server, connections=options.connections, **results.row())
        report.add(
            model=name, server=f"engine alone, batch {shape[0]}, {shape[1]} tokens", requests_per_s=round(alone, 1)
        )
        for server, results in best.items():
            wrong = len(results.problems) + results.statuses.total() - results.statuses[200]
            report.check(f"{name}, {server}: every answer is 200 and right", not wrong, wrong)
        for peer in ("litserve", "mosec"):
            ratio = best["tilewave"].rate / best[peer].rate
            report.check(f"{name}: throughput above {peer}'s", ratio > 1, f"{ratio:.2f} times")
        ratio = best["tilewave"].rate / alone
        report.check(
            f"{name}: at least {LEAST_OF_ENGINE} of the engine alone", ratio >= LEAST_OF_ENGINE, f"{ratio:.2f}"
        )
    return report


def _batches(server: Server, name: str) -> tuple[float, float, float]:
    """Rows, runs, and tokens with padding (0 for images), so far."""
    rows, runs = (server.metric(f"inference_batch_size_{part}", model=name) for part in ("sum", "count"))
    tokens = server.metric("inference_batch_tokens_sum", model=name)
    return rows, runs, tokens + server.metric("inference_padding_tokens_total", model=name)


def _ours(name: str) -> Make:
    if name == IMAGES:
        return images(f"/v1/models/{name}/images", our_label)
    return texts(f"/v1/models/{name}/tokens", "text")


def _mosec(name: str) -> Make:
    return (
        images("/inference", lambda body: str(json.loads(body)["label"]))
        if name == IMAGES
        else texts("/inference", "text")
    )


def _litserve(name: str) -> Make:
    if name != IMAGES:
        return texts("/predict", "text")
    prepared = []
    for photo in photos():
        body = json.dumps({"image": base64.b64encode(photo.jpeg).decode()}).encode()
        request = post("/predict", body, {"Content-Type": "application/json"})
        problem = lambda answer, photo=photo: (  # noqa: E731
            None if photo.label in (None, json.loads(answer.body)["label"]) else "another label"
        )
        prepared.append(Exchange(request, problem))
    return lambda source: source.choice(prepared)


def engine_rate(folder: Path, batch: int, tokens: int, seconds: float = 5.0) -> float:
    """Rows a second of the engine at a batch size; texts are so many tokens long."""
    model = engine.load(str(folder / "1" / "model.onnx"))
    try:
        generator = np.random.default_rng(0)
        feeds = {}
        for spec in model.inputs:
            shape = [
                batch if axis == 0 else dim if isinstance(dim, int) else tokens for axis, dim in enumerate(spec.shape)
            ]
            if spec.dtype.kind == "f":
                feeds[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
            else:
                feeds[spec.name] = np.ones(shape, spec.dtype)
        model.run(feeds)
        runs, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            model.run(feeds)
            runs += 1
        return runs * batch / (time.perf_counter() - began)
    finally:
        model.close()
