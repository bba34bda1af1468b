"""Machine code of cubins: taken out of their ELF files (System V ABI, 64 bits) and disassembled with nvdisasm, many at
once, since it takes 0.3 s to begin. Used by the gate."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_SECTION_TABLE, _SECTION_COUNTS = 0x28, 0x3A  # of the ELF header: e_shoff; e_shentsize, e_shnum, e_shstrndx
_SECTION = struct.Struct("<IIQQQQ")  # sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/")
_INSTRUCTION_BYTES = 16


def tool(name: str) -> str:
    """The path of a CUDA binary tool: on the PATH, or from its pip package. Exits where it is missing."""
    found = shutil.which(name)
    if found is None:
        import nvidia

        for root in nvidia.__path__:
            for candidate in Path(root).glob(f"**/bin/{name}"):
                return str(candidate)
        sys.exit(f"{name} is missing: install nvidia-cuda-{name}")
    return found


def run_tool(name: str, *arguments: str) -> str:
    """What a CUDA binary tool prints. Exits where it fails."""
    result = subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{name} {' '.join(arguments)} failed:\n{result.stderr}")
    return result.stdout


def function_code(cubin: bytes, name: str) -> bytes:
    """The instructions of the function called `name`; empty where there is none."""
    (table,) = struct.unpack_from("<Q", cubin, _SECTION_TABLE)
    size, count, names = struct.unpack_from("<HHH", cubin, _SECTION_COUNTS)
    sections = [_SECTION.unpack_from(cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    for place, _, _, _, offset, length in sections:
        begin = strings + place
        if cubin[begin : cubin.index(b"\0", begin)] == f".text.{name}".encode():
            return cubin[offset : offset + length]
    return b""


def disassembled(architecture: str, codes: Sequence[bytes]) -> list[str]:
    """The text of each code for an architecture (``sm_90a``): a line for each instruction, with its address among
    all of them."""
    if not any(codes):
        return ["" for _ in codes]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        printed = run_tool("nvdisasm", "--binary", architecture.replace("sm_", "SM"), file.name)
    lines = [(int(found[1], 16), line) for line in printed.splitlines() if (found := _LINE.match(line))]
    if _INSTRUCTION_BYTES * len(lines) != sum(map(len, codes)):
        sys.exit(f"nvdisasm printed {len(lines)} instructions of {sum(map(len, codes))} bytes")
    texts, place, begin = list[str](), 0, 0
    for code in codes:
        begin += len(code)
        end = place
        while end < len(lines) and lines[end][0] < begin:
            end += 1
        texts.append("\n".join(line for _, line in lines[place:end]))
        place = end
    return texts
