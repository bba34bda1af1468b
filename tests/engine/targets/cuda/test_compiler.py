"""The compiler and its cache on disk. Needs NVRTC, no GPU."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from engine.targets.cuda.compiler import CompileError, Compiler, LogProgress
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


def test_a_disk_that_refuses_files_is_survived_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    compiler = Compiler("sm_80", tmp_path / "cache")
    assert compiler.cubin(SOURCE) == compiler.cubin(SOURCE)
    assert [record.message for record in caplog.records] == [
        "compiled kernels are not kept, so that every start compiles them again: [Errno 30] Read-only file system"
    ]


def test_a_full_disk_leaves_no_rest_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert Compiler("sm_80", tmp_path / "cache").cubin(SOURCE)
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_made_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert Compiler("sm_80", tmp_path / "file" / "cache").cubin(SOURCE)
    assert "are not kept" in caplog.text


def test_many_compile_at_once_into_one_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        codes = set(pool.map(lambda _: Compiler("sm_80", tmp_path / "cache").cubin(SOURCE), range(8)))
    assert len(codes) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cubin"]


def test_two_processes_compile_at_once_into_one_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.engine.targets.cuda.test_compiler import *; "
        "sys.stdin.read(1); sys.stdout.buffer.write(Compiler('sm_80', Path(sys.argv[1])).cubin(SOURCE))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache")]
    root = Path(__file__).parents[4]
    processes = [subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"x")
        process.stdin.flush()
    codes = {process.communicate(timeout=60)[0] for process in processes}
    assert codes == {Compiler("sm_80").cubin(SOURCE)}
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".cubin"]


def test_a_fresh_cubin_does_not_come_from_the_cache(tmp_path: Path) -> None:
    compiler = Compiler("sm_80", tmp_path / "cache")
    code = compiler.cubin(SOURCE)
    compiler.cache.write(compiler.key(SOURCE.text), b"whole, and no code")
    assert compiler.cubin(SOURCE) == b"whole, and no code"
    assert compiler.cubin(SOURCE, fresh=True) == code
    assert compiler.cubin(SOURCE) == code


def test_the_key_depends_on_source_and_architecture() -> None:
    keys = {Compiler(arch).key(text) for arch in ("sm_80", "sm_90a") for text in ("a", "b")}
    assert len(keys) == 4


def test_progress_counts_distinct_sources() -> None:
    seen: list[tuple[int, int]] = []
    Compiler("sm_80").cubins([SOURCE, SOURCE], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 1)]


def test_progress_counts_what_the_cache_lacks(tmp_path: Path) -> None:
    compiler = Compiler("sm_80", tmp_path / "cache")
    sources = [Source(name, SOURCE.text + f"// {name}\n") for name in "abc"]
    compiler.cubin(sources[1])
    seen: list[tuple[int, int]] = []
    found = compiler.cubins(sources, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert found == {source: compiler.cubin(source) for source in sources}
    compiler.cubins(sources, lambda done, total: seen.append((done, total)))
    assert len(seen) == 2


def test_progress_is_logged_at_most_once_a_second_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]

    def messages(times: list[float]) -> list[str]:
        caplog.clear()
        now[0] = 0.0
        progress = LogProgress(lambda: now[0])
        for done, time in enumerate(times, start=1):
            now[0] = time
            progress(done, len(times))
        return [record.message for record in caplog.records]

    with caplog.at_level(logging.INFO):
        assert messages([0.4, 0.9, 1.1, 1.5, 2.0, 2.3, 2.4]) == [
            "compiled 3 of 7 kernels, 1.1 s", "compiled 6 of 7 kernels, 2.3 s", "compiled 7 of 7 kernels, 2.4 s",
        ]  # fmt: skip
        assert messages([0.4, 0.9]) == []


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
