"""A profile in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

The format is described in "Trace Event Format" (Google, 2016): complete events ``X``, counters ``C``, names ``M``,
times in microseconds. What is shown is the mean run: its steps have their mean times and lie end to end, in plan
order. Where kernels overlap, as dependent launches on a GPU do, the steps end later than the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import engine

_PROCESS, _RUN, _STEPS = 1, 1, 2


def chrome_trace(
    title: str, device: engine.DeviceInfo, rows: Sequence[engine.ProfileRow], run_seconds: float
) -> dict[str, Any]:
    """The document. `run_seconds`: a run as its caller sees it."""
    events = [
        _name("process_name", _RUN, f"{title} on {device.name}"),
        _name("thread_name", _RUN, "run, from call to return"),
        _name("thread_name", _STEPS, "steps"),
        _slice("run", "run", _RUN, 0.0, run_seconds, {}),
    ]
    start = 0.0
    for row in rows:
        rates = {"FLOP/s": row.flops_per_second, "B/s": row.bytes_per_second}
        about = {
            "kernel": row.kernel, "op": row.op, "calls": row.calls, "FLOPs": row.flops, "bytes": row.bytes,
            "cached bytes": row.cached_bytes, **rates, "roofline": row.roofline,
        }  # fmt: skip
        events.append(_slice(row.step, row.kernel, _STEPS, start, row.seconds, about))
        events += [_counter(name, start, value) for name, value in rates.items()]
        start += row.seconds
    events += [_counter(name, start, 0.0) for name in ("FLOP/s", "B/s")]
    ceilings = {"FLOP/s": device.peak_flops, "B/s": device.peak_bytes, "B/s of the cache": device.peak_cache_bytes}
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"device": device.name, "arch": device.arch, "threads": device.threads, "ceilings": ceilings},
    }


def _name(kind: str, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": _PROCESS, "tid": track, "name": kind, "args": {"name": name}}


def _slice(name: str, category: str, track: int, start: float, seconds: float, about: dict[str, Any]) -> dict[str, Any]:
    place = {"pid": _PROCESS, "tid": track, "ts": start * 1e6, "dur": seconds * 1e6}
    return {"ph": "X", "name": name, "cat": category, **place, "args": about}


def _counter(name: str, start: float, value: float) -> dict[str, Any]:
    return {"ph": "C", "pid": _PROCESS, "tid": _STEPS, "name": name, "ts": start * 1e6, "args": {name: value}}
