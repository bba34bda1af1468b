"""``python -m engine.targets.cuda.gate``: compiles the covering set for every architecture and inspects the machine
code.

Needs no GPU. A kernel fails that does not compile cleanly, spills registers, uses local memory, asks for more shared
memory than its architecture has, lacks the matrix instruction it is built around, keeps moving descriptors to uniform
registers between products of a whole warpgroup, or arrives at a barrier while its own reads of shared memory are under
way, which a copy that waits for the barrier may then overwrite. The last line gives the counts; the exit status is 1
where anything failed or where there was nothing to compile, 2 for an architecture that is not in the table.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.targets.cuda import covering
from engine.targets.cuda.architecture import ARCHITECTURES, Architecture
from engine.targets.cuda.compiler import CompileError, Compiler
from engine.targets.cuda.kernel import Instruction, Kernel
from engine.targets.cuda.machine_code import disassembled, function_code, run_tool
from engine.targets.cuda.source import Source

_FUNCTION = "kernel"  # the name of every kernel's function
_RESOURCES = re.compile(rf"^\s*Function {_FUNCTION}:\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE)
# A line of machine code: its address, perhaps a predicate, the opcode with its modifiers, operands.
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)[\s.;]", re.MULTILINE)
_LOCAL_ACCESS = frozenset({"LDL", "STL"})
_MACHINE_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
# Descriptors moved to uniform registers in a loop of products: as many as the matrix product's have (gemm_wgmma.cuh).
_MOST_MOVES = 2
# The system's share of a block's shared memory from sm_90 on, which cuobjdump counts as static. The limit is on what we
# ask for.
_SYSTEM_SHARED = 1024
_TOGETHER = 16  # kernels that are disassembled at once
_CONTROL_BIT = 105  # of an instruction, from where on it says how it is scheduled
_NO_COUNTER = 7  # that its result comes with


@dataclass(frozen=True)
class Verdict:
    """What the machine code of one kernel says."""

    architecture: str
    name: str
    registers: int = 0
    shared_bytes: int = 0
    failure: str = ""


def inspect(architecture: Architecture, kernel: Kernel, code: bytes, machine: str) -> Verdict:
    """Check one cubin, whose function is `machine` code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
    match = _RESOURCES.search(usage)
    if match is None:
        return Verdict(architecture.name, kernel.source.name, failure=f"no resource usage in {usage!r}")
    registers, stack, static_shared, local = map(int, match.groups())
    used = opcodes(machine)
    shared = kernel.shared_bytes + static_shared
    if architecture.dependent_launch:  # sm_90 on
        shared -= min(static_shared, _SYSTEM_SHARED)
    failures = [
        f"stack {stack}" if stack else "",
        f"local memory {local}" if local or used & _LOCAL_ACCESS else "",
        "" if shared <= architecture.shared_bytes else f"{shared} bytes of shared memory",
        *_wrong_instructions(kernel, used, machine),
        *_early_arrivals(kernel, code, machine),
    ]
    failure = ", ".join(filter(None, failures))
    return Verdict(architecture.name, kernel.source.name, registers, shared, failure)


def opcodes(machine: str) -> frozenset[str]:
    """The opcodes, without modifiers, of disassembled code."""
    return frozenset(_OPCODE.findall(machine))


def _wrong_instructions(kernel: Kernel, used: frozenset[str], machine: str) -> Iterator[str]:
    if not used:
        yield f"no machine code of a function '{_FUNCTION}'"
    if kernel.instruction is not Instruction.NONE and kernel.instruction.value not in used:
        yield f"no {kernel.instruction.value}"
    if kernel.instruction.is_wgmma:
        moves = moves_between_products(machine)
        if moves > _MOST_MOVES:
            yield f"{moves} R2UR in the loop of {kernel.instruction.value}"


def _early_arrivals(kernel: Kernel, code: bytes, machine: str) -> Iterator[str]:
    """Of kernels whose threads read the operands of their products themselves."""
    if kernel.instruction is Instruction.MMA:
        early = arrivals_before_reads_end(function_code(code, _FUNCTION), machine)
        if early:
            yield f"{early} arrivals at barriers while reads of shared memory are under way"


def arrivals_before_reads_end(code: bytes, machine: str) -> int:
    """How often a thread arrives at a barrier in shared memory before all that it has read from there has come. Each
    instruction of `code` says in its last bits which of six counters its result comes with, if any, and which ones it
    waits for; `machine` is the same as text, in order."""
    under_way, early = set[int](), 0
    for i, (_, text) in enumerate(_MACHINE_INSTRUCTION.findall(machine)):
        control = int.from_bytes(code[16 * i : 16 * (i + 1)], "little") >> _CONTROL_BIT
        comes_with, waits_for = control >> 5 & 7, control >> 11 & 63
        under_way -= {counter for counter in range(6) if waits_for >> counter & 1}
        opcode = next(word for word in text.split() if not word.startswith("@"))
        early += opcode.startswith("SYNCS.ARRIVE") and bool(under_way)
        if opcode.startswith("LDS") and comes_with != _NO_COUNTER:  # of matrices, too: LDSM
            under_way.add(comes_with)
    return early


def moves_between_products(machine: str) -> int:
    """How often the innermost loops with a product of a warpgroup move an ordinary register to a uniform one. Such
    moves wait for the warp, and cost attention a tenth of its speed."""
    code = [(int(address, 16), text) for address, text in _MACHINE_INSTRUCTION.findall(machine)]
    loops: list[tuple[int, int]] = []
    for address, text in code:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            loops.append((int(branch[1], 16), address))
    moves = 0
    for begin, end in loops:
        body = [text for address, text in code if begin <= address <= end]
        inner = any(begin <= other[0] and other[1] <= end and other != (begin, end) for other in loops)
        if not inner and any("GMMA" in text for text in body):
            moves += sum("R2UR" in text for text in body)
    return moves


Kernels = dict[Source, Kernel]


def covering_set(architecture: Architecture) -> Kernels:
    """The kernels of the covering set for one architecture, by their sources."""
    return {launch.kernel.source: launch.kernel for _, launch in covering.launches(architecture)}


def in_turn(sets: Sequence[Kernels]) -> list[Kernels]:
    """The same sets, with each kernel that several of them have in one of them: these take turns."""
    turn = 0
    left: list[Kernels] = [{} for _ in sets]
    for source in dict.fromkeys(source for kernels in sets for source in kernels):
        having = [i for i, kernels in enumerate(sets) if source in kernels]
        chosen = having[turn % len(having)]
        left[chosen][source] = sets[chosen][source]
        turn += len(having) > 1
    return left


def check(architecture: Architecture, kernels: Kernels, workers: int) -> list[Verdict]:
    """Compile and inspect kernels for one architecture."""
    compiler = Compiler(architecture.name, cache=None, workers=workers)

    def compiled(kernel: Kernel) -> bytes | Verdict:
        try:
            return compiler.cubin(kernel.source)
        except CompileError as error:
            return Verdict(architecture.name, kernel.source.name, failure=" ".join(str(error).split()))

    def inspected(some: Sequence[Kernel]) -> list[Verdict]:
        made = [compiled(kernel) for kernel in some]
        codes = [function_code(code, _FUNCTION) if isinstance(code, bytes) else b"" for code in made]
        return [
            inspect(architecture, kernel, code, machine) if isinstance(code, bytes) else code
            for kernel, code, machine in zip(some, made, disassembled(architecture.name, codes), strict=True)
        ]

    every = list(kernels.values())
    with ThreadPoolExecutor(workers) as pool:
        groups = pool.map(inspected, (every[i : i + _TOGETHER] for i in range(0, len(every), _TOGETHER)))
        return [verdict for group in groups for verdict in group]


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.targets.cuda.gate", description=__doc__)
    parser.add_argument("architectures", nargs="*", default=list(ARCHITECTURES), help="default: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--in-turn", action="store_true", help="compile a kernel that several architectures have for one of them"
    )
    parser.add_argument("--verbose", action="store_true", help="a line for every kernel")
    options = parser.parse_args(None if arguments is None else list(arguments))
    unknown = [name for name in options.architectures if name not in ARCHITECTURES]
    if unknown:
        parser.error(f"there are no kernels for {', '.join(unknown)}; there are for {', '.join(ARCHITECTURES)}")
    start = time.monotonic()
    verdicts: list[Verdict] = []
    sets = [covering_set(ARCHITECTURES[name]) for name in options.architectures]
    for name, kernels in zip(options.architectures, in_turn(sets) if options.in_turn else sets, strict=True):
        found = check(ARCHITECTURES[name], kernels, options.workers)
        verdicts += found or [Verdict(name, "(covering set)", failure="nothing to compile")]
    for verdict in verdicts:
        if verdict.failure or options.verbose:
            outcome = f"FAILED: {verdict.failure}" if verdict.failure else "ok"
            used = f"{verdict.registers} registers, {verdict.shared_bytes} B"
            print(f"{verdict.architecture} {verdict.name}: {used}: {outcome}")
    failed = sum(1 for verdict in verdicts if verdict.failure)
    widest = max((verdict.registers for verdict in verdicts), default=0)
    print(
        f"{len(verdicts)} kernels for {len(options.architectures)} architectures: {len(verdicts) - failed} passed, "
        f"{failed} failed; at most {widest} registers, 0 spills in what passed; {time.monotonic() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
