"""What /metrics says of a stretch of time: the difference of two scrapes. Pure but for `fetch`."""

from __future__ import annotations

import json
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]
"""Values by sample name and labels."""


@dataclass(frozen=True)
class Ceilings:
    """What the device allows, as the server has measured it: FLOP/s, bytes/s of memory and of the cache."""

    device: str
    flops: float
    memory: float
    cache: float


@dataclass(frozen=True)
class KernelTime:
    """One kernel and operator of one model: launches, seconds, FLOPs and bytes in a stretch of time."""

    model: str
    kernel: str
    op: str
    launches: float
    seconds: float
    flops: float
    bytes: float
    cached_bytes: float

    def roofline(self, ceilings: Ceilings) -> float:
        """The least time that its work takes / its time; the formula of docs/metrics.md."""
        moving = (self.bytes - self.cached_bytes) / ceilings.memory + self.cached_bytes / ceilings.cache
        return max(self.flops / ceilings.flops, moving) / self.seconds


@dataclass(frozen=True)
class Split:
    """Where the time of a stretch went. Seconds are sums over the requests that were answered well; `rest` is what of
    their duration the other parts leave: reading, writing, and waiting for the event loop."""

    wall: float
    requests: float
    queue: float
    preprocess: float
    compute: float
    rest: float
    batches: float
    rows: float
    tokens: float
    padding: float
    server_cpu: float
    kernels: tuple[KernelTime, ...]

    @property
    def kernel_seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)


def fetch(target: str, headers: Mapping[str, str]) -> Samples:
    """Scrape a server. Raises OSError."""
    return parse(_get(f"{target}/metrics", headers).decode())


def fetch_ceilings(target: str, headers: Mapping[str, str]) -> Mapping[str, Ceilings]:
    """Of each model that is ready, by its name. Raises OSError."""
    found = {}
    for model in json.loads(_get(f"{target}/v1/models", headers))["data"]:
        if model["state"] == "READY":
            document = json.loads(_get(f"{target}/v2/models/{model['id']}/profile", headers))["device"]
            threads = f", {document['threads']} threads" if document["threads"] else ""  # a GPU has none to count
            device = f"{document['name']} ({document['arch']}{threads})"
            peaks = (document["peak_flops"], document["peak_bytes"], document["peak_cache_bytes"])
            found[model["id"]] = Ceilings(device, *peaks)
    return found


def _get(address: str, headers: Mapping[str, str]) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(address, headers=dict(headers)), timeout=30) as answer:
        body: bytes = answer.read()
        return body


def parse(text: str) -> Samples:
    """The samples of an exposition in the text format."""
    families: Iterable[Any] = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


_FIELDS = ("launches", "seconds", "flops", "bytes", "cached_bytes")


def split(before: Samples, after: Samples, wall: float) -> Split:
    """What came between two scrapes that are `wall` seconds apart."""
    grown = {key: value - before.get(key, 0.0) for key, value in after.items()}
    total: defaultdict[str, float] = defaultdict(float)
    by_kernel: defaultdict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for (name, labels), value in grown.items():
        total[name] += value
        if name.startswith("engine_kernel_") and name.endswith("_total"):
            of = dict(labels)
            fields = by_kernel[of["model"], of["kernel"], of["op"]]
            field = name.removeprefix("engine_kernel_").removesuffix("_total")
            fields[field] = fields.get(field, 0.0) + value  # versions of a model together
    kernels = [
        KernelTime(*key, *(fields[field] for field in _FIELDS))
        for key, fields in by_kernel.items()
        if fields["seconds"] > 0
    ]
    queue, preprocess, compute = (
        total[f"inference_{part}_duration_seconds_sum"] for part in ("queue", "preprocess", "compute")
    )
    return Split(
        wall=wall,
        requests=total["inference_compute_duration_seconds_count"],
        queue=queue,
        preprocess=preprocess,
        compute=compute,
        rest=max(total["inference_request_duration_seconds_sum"] - queue - preprocess - compute, 0.0),
        batches=total["inference_batch_size_count"],
        rows=total["inference_batch_size_sum"],
        tokens=total["inference_batch_tokens_sum"],
        padding=total["inference_padding_tokens_total"],
        server_cpu=total["process_cpu_seconds_total"],
        kernels=tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)),
    )
