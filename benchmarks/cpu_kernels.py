"""``python -m benchmarks.cpu_kernels``: our matrix products and convolutions on the CPU beside ONNX Runtime's.

One line per shape: both GFLOP/s, their ratio, the fraction of this machine's measured ceiling, and the relative error.
Both run the same one-layer model with bias and clamp (GELU where said), alternating in one process. Images come and go
channels first, as in ONNX: a convolution's line includes what each side does about that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import engine
from engine.cli.check import relative_error
from engine.targets.cpu.ceilings import ceilings
from engine.targets.cpu.codegen.isa import host_isa


@dataclass(frozen=True)
class Shape:
    """A product of m rows, or a convolution of an image of `m` × `m` positions with a kernel of `kernel` × `kernel`."""

    m: int
    k: int
    n: int
    kernel: int = 0
    groups: int = 1
    gelu: bool = False

    @property
    def name(self) -> str:
        if not self.kernel:
            return f"gemm {self.m}x{self.k}x{self.n}{' gelu' if self.gelu else ''}"
        kind = "depthwise" if self.groups > 1 else "conv"
        return f"{kind} {self.kernel}x{self.kernel} {self.m}x{self.m}x{self.k}->{self.n}"

    @property
    def input(self) -> list[int]:
        return [1, self.k, self.m, self.m] if self.kernel else [self.m, self.k]

    @property
    def output(self) -> list[int]:
        return [1, self.n, self.m, self.m] if self.kernel else [self.m, self.n]

    @property
    def flops(self) -> int:
        if not self.kernel:
            return 2 * self.m * self.k * self.n
        return 2 * self.m**2 * self.n * self.kernel**2 * self.k // self.groups


SHAPES = (
    Shape(12544, 32, 16), Shape(12544, 16, 96), Shape(3136, 96, 24), Shape(784, 144, 40), Shape(196, 480, 80),
    Shape(196, 672, 112), Shape(49, 1152, 320), Shape(1, 1280, 1000), Shape(64, 384, 384), Shape(64, 1536, 384),
    Shape(64, 384, 1536, gelu=True), Shape(512, 384, 1536, gelu=True), Shape(512, 3072, 768), Shape(1, 4096, 4096),
    Shape(56, 64, 64, 3), Shape(28, 128, 128, 3), Shape(14, 256, 256, 3), Shape(7, 512, 512, 3), Shape(112, 3, 32, 3),
    Shape(112, 32, 32, 3, 32), Shape(28, 240, 240, 5, 240), Shape(14, 672, 672, 5, 672),
)  # fmt: skip


def model(shape: Shape, rng: np.random.Generator) -> bytes:
    """The one-layer model of a shape."""
    if shape.kernel:
        w = rng.standard_normal((shape.n, shape.k // shape.groups, shape.kernel, shape.kernel))
        pad = [shape.kernel // 2] * 4
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=pad, group=shape.groups)]
    else:
        w = rng.standard_normal((shape.k, shape.n))
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    constants = {"w": w, "b": rng.standard_normal(shape.n)}
    if shape.gelu:
        nodes.append(helper.make_node("Gelu", ["y"], ["z"]))
    else:
        nodes.append(helper.make_node("Clip", ["y", "low", "high"], ["z"]))
        constants |= {"low": np.array(0.0), "high": np.array(6.0)}
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape.input)],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, shape.output)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    made.ir_version = 9
    return bytes(made.SerializeToString())


def measure(shape: Shape, threads: int, rounds: int) -> tuple[float, float, float]:
    """(our seconds, the peer's seconds, relative error)."""
    rng = np.random.default_rng(0)
    content = model(shape, rng)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feeds = {"x": rng.standard_normal(shape.input).astype(np.float32)}
    with engine.load(content, device="cpu", threads=threads) as loaded:
        error = relative_error(loaded.run(feeds)["z"], session.run(["z"], feeds)[0])
        ours, peer = [], []
        for _ in range(rounds):
            ours.append(_round(lambda: loaded.run(feeds)))
            time.sleep(0.02)  # the peer's threads spin for a while after a run
            peer.append(_round(lambda: session.run(["z"], feeds)))
            time.sleep(0.02)
    return median(ours), median(peer), error


def _round(function: Callable[[], object], budget: float = 0.05) -> float:
    """Median seconds per call."""
    function()
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds per shape (default: %(default)s)")
    arguments = parser.parse_args()
    peak = ceilings(host_isa(), arguments.threads).flops
    print(f"{'layer':34} {'ours':>9} {'ORT':>9} GFLOP/s {'ratio':>6} {'of peak':>8}  error")
    for shape in SHAPES:
        ours, peer, error = measure(shape, arguments.threads, arguments.rounds)
        rate = shape.flops / ours
        print(
            f"{shape.name:34} {rate / 1e9:9.1f} {shape.flops / peer / 1e9:9.1f} {'':7} {peer / ours:6.2f} "
            f"{rate / peak:8.2f}  {error:.1e}"
        )


if __name__ == "__main__":
    main()
