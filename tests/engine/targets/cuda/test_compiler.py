"""The compiler and its cache on disk. Needs NVRTC, no GPU."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from engine.targets.cuda.compiler import CompileError, Compiler
from engine.targets.cuda.source import Source, expand

SOURCE = Source("tiny", 'extern "C" __global__ void kernel(float* x) { x[threadIdx.x] += 1.0f; }\n')


def cached(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cubin"))


def test_a_cubin_is_made_without_a_gpu() -> None:
    assert Compiler("sm_80").cubin(SOURCE)[:4] == b"\x7fELF"


def test_the_cache_folder_is_private_and_used(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    code = Compiler("sm_80", folder).cubin(SOURCE)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (file,) = cached(folder)
    assert file.read_bytes().endswith(code)
    before = file.stat().st_mtime_ns
    assert Compiler("sm_80", folder).cubin(SOURCE) == code
    assert file.stat().st_mtime_ns == before


def test_a_corrupt_cubin_is_compiled_anew(tmp_path: Path) -> None:
    compiler = Compiler("sm_80", tmp_path / "cache")
    code = compiler.cubin(SOURCE)
    (file,) = cached(tmp_path / "cache")
    for damage in (b"", file.read_bytes()[:-1], b"\0" * 40 + code):
        file.write_bytes(damage)
        assert compiler.cubin(SOURCE) == code


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    Compiler("sm_80", tmp_path).cubin(SOURCE)
    assert not cached(tmp_path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_survived(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert Compiler("sm_80", tmp_path).cubin(SOURCE)


def test_a_folder_that_cannot_be_made_is_survived(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Compiler("sm_80", tmp_path / "file" / "cache").cubin(SOURCE)


def test_many_compile_at_once_into_one_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        codes = set(pool.map(lambda _: Compiler("sm_80", tmp_path / "cache").cubin(SOURCE), range(8)))
    assert len(codes) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cubin"]


def test_the_key_depends_on_source_and_architecture() -> None:
    keys = {Compiler(arch).key(text) for arch in ("sm_80", "sm_90a") for text in ("a", "b")}
    assert len(keys) == 4


def test_progress_counts_distinct_sources() -> None:
    seen: list[tuple[int, int]] = []
    Compiler("sm_80").cubins([SOURCE, SOURCE], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


def test_an_error_names_the_kernel_and_the_architecture() -> None:
    with pytest.raises(CompileError, match=r"'broken'.*sm_80"):
        Compiler("sm_80").cubin(Source("broken", "no C++"))


def test_spills_are_errors_of_the_gate_only() -> None:
    # 300 live values with at most 40 registers.
    body = "".join(f"float v{i} = x[{i} * threadIdx.x];\n" for i in range(300))
    body += "__syncthreads();\n" + "".join(f"x[{i}] = v{i} * v{(i + 151) % 300};\n" for i in range(300))
    text = f'extern "C" __global__ void __launch_bounds__(1024, 1) kernel(float* x) {{ {body} }}\n'
    assert Compiler("sm_80").cubin(Source("spills", text))
    with pytest.raises(CompileError, match="spilled"):
        Compiler("sm_80", strict=True).cubin(Source("spills", text))


def test_includes_are_put_in_line_once() -> None:
    text = expand('#include "types.cuh"\n#include "ptx/memory.cuh"\n#include "types.cuh"\n')
    assert "#include" not in text
    assert text.count("struct half") == 1
