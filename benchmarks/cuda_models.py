"""``python -m benchmarks.cuda_models MODEL.onnx …``: whole models on the GPU, checked against ONNX Runtime on the CPU
in fp32, then timed beside PyTorch eager in fp16 under a CUDA graph (the same architecture from timm and transformers,
NHWC).

A row counts only where every output is within 5e-3 (relative L2) of the fp32 reference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import cupy
import numpy as np
import onnxruntime
import torch

from benchmarks.cuda_timing import captured, interleaved_us
from engine import frontend, passes
from engine.feeds import sample_feeds
from engine.model import Model
from engine.targets.cuda.target import CudaTarget, Executable

TOLERANCE = 5e-3
IMAGE_BATCHES = (1, 7, 32, 128)
TOKEN_SIZES = ((1, 16), (1, 128), (7, 33), (32, 128), (128, 128), (4, 256))


@dataclass(frozen=True)
class Row:
    """One model at one size. `run_us` is `Model.run` with host copies; `ours_us` and `peer_us` device time of a
    graph."""

    suite: str
    case: str
    ours_us: float
    peer_us: float
    ratio: float
    run_us: float
    rel_err: float
    launches: int
    commit: str
    date: str


class _Replay:
    """An executable's graph, with the interface that `interleaved_us` wants: it runs on the current stream."""

    def __init__(self, executable: Executable, target: CudaTarget) -> None:
        self.executable, self.target = executable, target

    def replay(self) -> None:
        self.executable.launch(cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream))


def peer_of(name: str, feeds: Mapping[str, np.ndarray]) -> Callable[[], torch.Tensor]:
    """The same architecture in PyTorch, with random weights, on the same inputs."""
    if "efficientnet" in name:
        import timm

        net = timm.create_model("tf_efficientnet_lite0").eval().cuda().half().to(memory_format=torch.channels_last)
        image = torch.from_numpy(feeds["input"]).cuda().half().to(memory_format=torch.channels_last)
        return lambda: net(image)
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    bert = BertModel(config, add_pooling_layer=False).eval().cuda().half()
    ids = {key: torch.from_numpy(value).cuda() for key, value in feeds.items()}
    return lambda: bert(**ids).last_hidden_state


def measure(path: Path, sizes: Mapping[str, int], model: Model, target: CudaTarget, commit: str) -> Row:
    """Check and time one size of a model. Raises RuntimeError where the outputs disagree."""
    feeds = sample_feeds(model.graph, sizes)
    if "attention_mask" in feeds:
        feeds = {**feeds, **token_feeds(feeds)}
    ours = model.run(feeds)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = dict(zip(ours, session.run(list(ours), dict(feeds)), strict=True))
    error = max(float(np.linalg.norm(ours[k] - expected[k]) / np.linalg.norm(expected[k])) for k in ours)
    if not error <= TOLERANCE:
        raise RuntimeError(f"{path.name} {sizes}: relative error {error:.1e}; not timed")
    executable = target.bind(model.plan(sizes))
    begin = time.perf_counter()
    runs = 50
    for _ in range(runs):
        model.run(feeds)
    run_us = (time.perf_counter() - begin) / runs * 1e6
    with torch.inference_mode():
        work = peer_of(path.parent.parent.name, feeds)
        peer = captured(lambda: _discard(work()))
        times = interleaved_us({"ours": (_Replay(executable, target), 1), "peer": (peer, 1)})
    case = f"{path.parent.parent.name} {' '.join(f'{k}={v}' for k, v in sizes.items())}"
    return Row(
        "model", case, round(times["ours"], 1), round(times["peer"], 1), round(times["peer"] / times["ours"], 2),
        round(run_us, 1), float(f"{error:.1e}"), len(executable.kernels), commit, date.today().isoformat(),
    )  # fmt: skip


def _discard(value: object) -> None:
    del value


def token_feeds(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Token ids of the vocabulary, and a mask of ragged lengths."""
    rng = np.random.default_rng(0)
    batch, sequence = feeds["attention_mask"].shape
    lengths = rng.integers(max(1, sequence // 2), sequence + 1, batch)
    mask = (np.arange(sequence)[None] < lengths[:, None]).astype(np.int64)
    ids = rng.integers(0, 30000, (batch, sequence))
    return {"attention_mask": mask, "input_ids": ids, "token_type_ids": np.zeros((batch, sequence), np.int64)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_models", description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    rows, failed = [], 0
    for path in options.models:
        start = time.perf_counter()
        target = CudaTarget(0)
        model = Model(passes.run(frontend.read(path), CudaTarget.traits), target)
        images = any(spec.name == "input" for spec in model.inputs)
        every = (
            [{"batch": b} for b in IMAGE_BATCHES] if images else [{"batch": b, "sequence": s} for b, s in TOKEN_SIZES]
        )
        model.run(sample_feeds(model.graph, every[0]))
        print(f"{path.parent.parent.name}: first answer {time.perf_counter() - start:.2f} s after the start of loading")
        for sizes in every:
            try:
                row = measure(path, sizes, model, target, commit)
            except RuntimeError as error:
                print(f"FAILED {error}")
                failed += 1
                continue
            rows.append(row)
            print(
                f"{row.case:46} ours {row.ours_us:8.1f} us  peer {row.peer_us:8.1f}  x{row.ratio:5.2f}  "
                f"run {row.run_us:8.1f} us  "
                f"{row.launches} launches  err {row.rel_err:.1e}",
                flush=True,
            )
        feeds = sample_feeds(model.graph, every[-1])
        before = target.memory()
        for step in sorted(model.profile(feeds, 64), key=lambda step: -step.seconds)[:14]:
            print(f"    {step.seconds * 1e6:8.1f} us {step.roofline:5.2f} {step.kernel:10} {step.step[:70]}")
        print(f"    memory {dict(target.memory())}, unchanged: {before == target.memory()}")
        model.close()
    options.results.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name(0)
    file = options.results / f"cuda-models-{device.lower().replace(' ', '-')}.json"
    record = {"device": device, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
