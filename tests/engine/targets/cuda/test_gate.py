"""The gate on kernels that should and should not pass. Needs NVRTC and the CUDA binary tools, no GPU."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from engine.targets.cuda import covering, gate
from engine.targets.cuda.architecture import SM_80
from engine.targets.cuda.compiler import Compiler
from engine.targets.cuda.kernel import Instruction, Kernel, Launch
from engine.targets.cuda.source import Source


def _has_tools() -> bool:
    spec = find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return all(
        shutil.which(name) or any(next(folder.glob(f"**/bin/{name}"), None) for folder in folders)
        for name in ("cuobjdump", "nvdisasm")
    )


pytestmark = pytest.mark.skipif(not _has_tools(), reason="cuobjdump and nvdisasm are not installed")
PLAIN = 'extern "C" __global__ void kernel(float* x) { x[threadIdx.x] += 1.0f; }\n'
INDEXED = (
    'extern "C" __global__ void kernel(float* x, int n) {\n'
    "  float v[64];\n  for (int i = 0; i < 64; ++i) v[i] = x[i];\n"
    "  for (int i = 0; i < n; ++i) v[(i * n) & 63] += v[i & 63];\n  x[n] = v[n & 63];\n}\n"
)


def verdict(text: str, shared_bytes: int = 0, instruction: Instruction = Instruction.NONE) -> gate.Verdict:
    kernel = Kernel("test", Source("test", text), 32, shared_bytes, instruction)
    compiler = Compiler("sm_80")
    return gate.inspect(SM_80, kernel, compiler.cubin(kernel.source), gate.tool("cuobjdump"))


def test_a_clean_kernel_passes() -> None:
    assert verdict(PLAIN).failure == ""


def test_too_much_shared_memory_fails() -> None:
    assert "shared memory" in verdict(PLAIN, shared_bytes=SM_80.shared_bytes + 1).failure


def test_a_missing_matrix_instruction_fails() -> None:
    assert "no HMMA" in verdict(PLAIN, instruction=Instruction.MMA).failure


def test_moves_count_in_the_innermost_loops_with_products() -> None:
    def machine(*lines: str) -> str:
        return "\n".join(
            f"        /*{16 * i:04x}*/                   {line} ;  /* 0x0 */" for i, line in enumerate(lines)
        )

    loop = ("R2UR UR4, R1", "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24", "R2UR UR5, R2", "@P0 BRA 0x10")
    assert gate.moves_between_products(machine(*loop)) == 1  # the first comes before the loop
    assert (
        gate.moves_between_products(machine(*loop, "R2UR UR6, R3", "@P1 BRA 0x0")) == 1
    )  # nor does an outer loop count
    assert gate.moves_between_products(machine("R2UR UR4, R1", "FADD R1, R1, R1", "@P0 BRA 0x0")) == 0
    assert gate.moves_between_products(machine(*loop[:3], "@P0 BRA 0x40", "EXIT")) == 0


def test_counts_and_failures_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def launches(_: object) -> list[tuple[str, Launch]]:
        kernels = [Kernel("good", Source("good", PLAIN), 32), Kernel("bad", Source("bad", INDEXED), 32)]
        return [(kernel.family, Launch(kernel, (1, 1, 1), ())) for kernel in kernels]

    monkeypatch.setattr(covering, "launches", launches)
    assert gate.main(["sm_80"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sm_80 bad: ") and "local memory" in line.lower() for line in lines)
    assert lines[-1].startswith("2 kernels for 1 architectures: 1 passed, 1 failed;")
