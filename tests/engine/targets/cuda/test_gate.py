"""The gate on kernels that should and should not pass. Needs NVRTC and the CUDA binary tools, no GPU."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from engine.targets.cuda import covering, gate
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.compiler import Compiler
from engine.targets.cuda.kernel import Instruction, Kernel, Launch
from engine.targets.cuda.machine_code import disassembled, function_code
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
    (found,) = gate.check(SM_80, {kernel.source: kernel}, 1)
    return found


def test_a_clean_kernel_passes() -> None:
    assert verdict(PLAIN).failure == ""


def test_too_much_shared_memory_fails() -> None:
    assert "shared memory" in verdict(PLAIN, shared_bytes=SM_80.shared_bytes + 1).failure


def test_a_missing_matrix_instruction_fails() -> None:
    assert "no HMMA" in verdict(PLAIN, instruction=Instruction.MMA).failure


def ring(early: bool) -> str:
    """Reads from shared memory and arrives at a barrier, before what it read is used or behind that."""
    arrive = 'asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");'
    use = "x[threadIdx.x] = v;"
    return (
        'extern "C" __global__ void kernel(float* x) {\n  __shared__ __align__(8) float s[66];\n'
        "  const unsigned barrier = static_cast<unsigned>(__cvta_generic_to_shared(s + 64));\n"
        "  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(s + (threadIdx.x ^ 1)));\n"
        "  s[threadIdx.x] = x[threadIdx.x];\n  __syncthreads();\n  float v;\n"
        '  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(place) : "memory");\n'
        f"  {arrive if early else use}\n  {use if early else arrive}\n}}\n"
    )


def test_no_arrival_may_come_before_what_was_read() -> None:
    for early in (True, False):
        kernel = Kernel("test", Source("test", ring(early)), 32, 0, Instruction.MMA)
        (found,) = gate.check(SM_90A, {kernel.source: kernel}, 1)
        assert ("1 arrivals at barriers while reads" in found.failure) == early


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


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                      /* 0x00000a0000017a02 */
                                                                               /* 0x000fe40000000f00 */
        /*0010*/              @!P0 HMMA.16816.F32 R40, R64, R62, R40 ;         /* 0x0000003e4028723c */
        /*0020*/              @UP1 UIADD3 UR4, UR5, UR6, URZ ;                 /* 0x0000000605047290 */
        /*0030*/               @P0 BRA `(.L_HGMMA) ;
        /*0040*/                   EXIT ;
"""


def test_opcodes_stand_behind_predicates_and_before_modifiers() -> None:
    assert gate.opcodes(SASS) == {"MOV", "HMMA", "UIADD3", "BRA", "EXIT"}


def test_codes_that_are_disassembled_at_once_are_told_apart() -> None:
    compiler = Compiler("sm_80")
    cubins = [compiler.cubin(Source("test", text)) for text in (PLAIN, PLAIN.replace("+= 1", "*= 3"), PLAIN)]
    codes = [function_code(cubin, "kernel") for cubin in cubins]
    alone = [disassembled("sm_80", [code])[0] for code in codes]
    together = disassembled("sm_80", [codes[0], b"", *codes[1:]])
    assert together[1] == ""
    assert [opcodes_in_order(text) for text in (together[0], *together[2:])] == [opcodes_in_order(t) for t in alone]
    assert "FADD" in together[0] and "FMUL" in together[2] and "FMUL" not in together[3]
    assert all(16 * len(text.splitlines()) == len(code) for text, code in zip(alone, codes, strict=True))


def opcodes_in_order(machine: str) -> list[str]:
    return [line.split("*/")[1].split()[0] for line in machine.splitlines()]


def test_a_matrix_instruction_elsewhere_than_in_the_kernel_is_none() -> None:
    """A variable of the same name, and another function that has the instruction, as a substring search would find."""
    named = PLAIN.replace("kernel", "HMMA_first").replace("x[", "x[1 + ")
    other = (
        'extern "C" __global__ void other(unsigned* x) {\n  unsigned d[2] = {x[0], x[1]};\n'
        '  asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3}, {%4}, {%0,%1};"\n'
        '    : "+r"(d[0]), "+r"(d[1]) : "r"(x[2]), "r"(x[3]), "r"(x[4]));\n  x[5] = d[0];\n}\n'
    )
    assert "no HMMA" in verdict(named + other + PLAIN, instruction=Instruction.MMA).failure
    assert verdict(other.replace("other", "kernel"), instruction=Instruction.MMA).failure == ""


def test_kernels_of_several_architectures_take_turns() -> None:
    kernels = {name: Kernel(name, Source(name, f"// {name}"), 32) for name in "abcde"}
    older = {kernels[name].source: kernels[name] for name in "abcd"}
    newer = {kernels[name].source: kernels[name] for name in "bcde"}
    left = gate.in_turn([older, newer])
    assert ["".join(kernel.family for kernel in one.values()) for one in left] == ["abd", "ce"]


def test_code_without_the_kernel_fails() -> None:
    assert verdict(PLAIN.replace("kernel", "misnamed")).failure


def test_nothing_to_compile_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(covering, "launches", lambda _: [])
    assert gate.main(["sm_80"]) == 1
    assert "sm_80 (covering set): 0 registers, 0 B: FAILED: nothing to compile" in capsys.readouterr().out


def test_an_architecture_without_kernels_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gate.main(["sm_80", "sm_75"])
    assert ended.value.code == 2
    assert "no kernels for sm_75; there are for sm_80, " in capsys.readouterr().err


def test_counts_and_failures_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def launches(_: object) -> list[tuple[str, Launch]]:
        kernels = [Kernel("good", Source("good", PLAIN), 32), Kernel("bad", Source("bad", INDEXED), 32)]
        return [(kernel.family, Launch(kernel, (1, 1, 1), ())) for kernel in kernels]

    monkeypatch.setattr(covering, "launches", launches)
    assert gate.main(["sm_80"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sm_80 bad: ") and "local memory" in line.lower() for line in lines)
    assert lines[-1].startswith("2 kernels for 1 architectures: 1 passed, 1 failed;")
