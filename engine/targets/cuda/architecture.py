"""What the GPU architectures offer, as far as kernels are chosen by it. One table; the gate compiles for every row."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import DeviceError

KIB = 1024


@dataclass(frozen=True)
class Architecture:
    """One compilation target. `shared_bytes` is the most dynamic shared memory a block may ask for (CUDA C++
    Programming Guide, "Technical Specifications per Compute Capability")."""

    name: str
    shared_bytes: int
    registers: int = 65536  # per multiprocessor, 32-bit
    wgmma: bool = False  # TMA with wgmma: sm_90a only, not forward compatible
    dependent_launch: bool = False  # griddepcontrol: from sm_90 on


SM_80 = Architecture("sm_80", 163 * KIB)
SM_90A = Architecture("sm_90a", 227 * KIB, wgmma=True, dependent_launch=True)
ARCHITECTURES = {
    a.name: a
    for a in (
        SM_80,
        Architecture("sm_86", 99 * KIB),
        Architecture("sm_89", 99 * KIB),
        SM_90A,
        Architecture("sm_100", 227 * KIB, dependent_launch=True),
        Architecture("sm_120", 99 * KIB, dependent_launch=True),
    )
}
_BY_CAPABILITY = {
    (8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90a",
    (10, 0): "sm_100", (10, 3): "sm_100", (12, 0): "sm_120", (12, 1): "sm_120",
}  # fmt: skip


CAPABILITIES = frozenset(_BY_CAPABILITY)
"""The compute capabilities that there are kernels for."""


def for_capability(major: int, minor: int) -> Architecture:
    """The architecture whose machine code a device of this compute capability runs. Raises DeviceError for one
    that is not in `CAPABILITIES`."""
    name = _BY_CAPABILITY.get((major, minor))
    if name is None:
        raise DeviceError(
            f"the GPU has compute capability {major}.{minor}; the kernels are built for "
            f"{', '.join(f'{a}.{b}' for a, b in _BY_CAPABILITY)}. Use device='cpu'."
        )
    return ARCHITECTURES[name]


def share_of(shared_bytes: int, blocks: int) -> int:
    """The dynamic shared memory that each of `blocks` blocks on one multiprocessor may ask for, where a single one may
    ask for `shared_bytes`: the system takes 1 KiB of every block's."""
    return (shared_bytes + KIB) // blocks - KIB
