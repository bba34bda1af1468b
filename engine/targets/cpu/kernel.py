"""The kernel contract of the CPU target: what a kernel is before compilation, and what one launch of it looks like.

Every kernel is ``void name(ptr args, i64 task, ptr scratch)``. `args` points to 8-byte slots, one per name in
`KernelSpec.parameters`. A launch is cut into `tasks` independent tasks, which any thread may take in any order.
`scratch` is private to the thread, 64-byte aligned, and holds garbage at the start of each task.

What is compile-time (in the spec): dtypes, tile sizes, expressions, instruction set. Sizes, strides and pointers are
run-time arguments, so that another batch or sequence length compiles nothing.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import ClassVar, Protocol, TypeAlias

import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Op
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cpu.codegen.emit import Builder, Module, Value
from engine.targets.cpu.codegen.isa import Isa

SLOT_BYTES = 8


class KernelBuilder(Builder):
    """Writes the body of a kernel, with the slots of `args` by name."""

    def __init__(self, module: Module, parameters: Sequence[str]) -> None:
        super().__init__(module)
        self._index = {name: i for i, name in enumerate(parameters)}
        self.task = Value("%task", "i64")
        self.scratch = Value("%scratch", "ptr")

    def _slot(self, name: str) -> Value:
        return self.offset(Value("%args", "ptr"), self._index[name] * SLOT_BYTES)

    def pointer(self, name: str) -> Value:
        return self.load("ptr", self._slot(name), 8)

    def integer(self, name: str) -> Value:
        return self.load("i64", self._slot(name), 8)

    def real(self, name: str, type_: str = "float") -> Value:
        return self.load(type_, self._slot(name), 8)


@dataclass(frozen=True)
class Code(ABC):
    """A native function and everything that its machine code depends on.

    `repr` is the identity: all fields of the subclasses, frozen dataclasses, must have a complete and stable one.
    """

    isa: Isa
    family: ClassVar[str]

    @cached_property
    def symbol(self) -> str:
        """The function's name: the family and a digest of the fields."""
        return _symbol(self)

    @abstractmethod
    def ir(self) -> str:
        """The LLVM IR of the function, as text."""


@dataclass(frozen=True)
class KernelSpec(Code):
    """A kernel before compilation. Subclasses add its compile-time choices."""

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the argument slots, in order."""

    @abstractmethod
    def emit(self, kernel: KernelBuilder) -> None:
        """Write the body."""

    def ir(self) -> str:
        module = Module(self.isa)
        kernel = KernelBuilder(module, self.parameters)
        self.emit(kernel)
        module.define(self.symbol, [("args", "ptr noalias"), ("task", "i64"), ("scratch", "ptr noalias")], kernel)
        return module.text()


@lru_cache(maxsize=4096)
def _symbol(spec: KernelSpec) -> str:
    # Looked up by the spec's hash: equal specs are made anew for every plan, and writing one out takes long.
    return f"{spec.family}_{hashlib.sha256(repr(spec).encode()).hexdigest()[:20]}"


@dataclass(frozen=True, eq=False)
class Pointer:
    """The address of byte `offset` of a buffer."""

    buffer: Buffer
    offset: int = 0


@dataclass(frozen=True)
class StatusWord:
    """The address of the i64 that a kernel sets to 1 when it meets a value that makes the answer wrong: an index out of
    range. It is 0 when the step starts; afterwards anything else becomes a ShapeError that names the step."""


Slot: TypeAlias = Pointer | StatusWord | int | float


def pointer_to(tensor: Tensor) -> Pointer:
    """The address of a tensor's first element."""
    return Pointer(tensor.buffer, tensor.offset * tensor.dtype.itemsize)


def table(values: Sequence[int] | np.ndarray, dtype: DType = DType.I64) -> Pointer:
    """A small constant array that lives as long as the plan, such as the offsets of a batch."""
    data = np.ascontiguousarray(values, dtype.numpy)
    return Pointer(Buffer("table", BufferKind.PLAN, data.nbytes, data))


@dataclass(frozen=True, eq=False)
class Launch:
    """One parallel run of a kernel: tasks 0 to `tasks` - 1.

    `scratch_bytes` is what each thread needs. A `concurrent` launch does not wait for the launch before it in the same
    step. All launches of a step count as one in metrics, under the family of the first.
    """

    spec: KernelSpec
    args: tuple[Slot, ...]
    tasks: int
    scratch_bytes: int = 0
    concurrent: bool = False


def launch(
    spec: KernelSpec, args: Mapping[str, Slot], tasks: int, scratch_bytes: int = 0, concurrent: bool = False
) -> Launch:
    """A launch with its arguments by name. Every parameter of the spec must be given, and nothing else."""
    if set(args) != set(spec.parameters):
        raise ValueError(f"{spec.family}: arguments {sorted(args)} for parameters {sorted(spec.parameters)}")
    return Launch(spec, tuple(args[name] for name in spec.parameters), tasks, scratch_bytes, concurrent)


@dataclass
class WeightStore:
    """Weights in the layouts that kernels want, each packed once and shared by all plans of a model."""

    _packed: dict[tuple[object, ...], tuple[np.ndarray, Buffer]] = field(default_factory=dict)

    def packed(self, tensor: Tensor, layout: str, pack: Callable[[np.ndarray], np.ndarray]) -> Buffer:
        """`pack(content of tensor)` as a buffer. `layout` names what `pack` does, completely."""
        source = tensor.buffer.data
        assert source is not None, f"{tensor.buffer.name} is not a constant"
        key = (id(source), tensor.offset, tensor.shape, tensor.strides, tensor.dtype, layout)
        if key not in self._packed:
            data = aligned_copy(pack(content(tensor)))
            # The source is kept alive with its packed form, so that its id stays its own.
            buffer = Buffer(f"{tensor.buffer.name}:{layout}", BufferKind.CONSTANT, data.nbytes, data)
            self._packed[key] = (source, buffer)
        return self._packed[key][1]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for _, buffer in self._packed.values())


@dataclass(frozen=True)
class Context:
    """What lowering a step needs to know beside the step."""

    isa: Isa
    threads: int
    weights: WeightStore


class Family(Protocol):
    """A module that has kernels for some operators."""

    def requirements(
        self, op: Op, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
        """What the kernels ask of each input and output. Raises UnsupportedOp where there is no kernel."""
        ...

    def lower(self, step: Step, context: Context) -> list[Launch]:
        """The launches that compute the step."""
        ...


def is_constant(tensor: Tensor) -> bool:
    """Whether the content is known before the plan runs and shared by all plans."""
    return tensor.buffer.kind is BufferKind.CONSTANT


def content(tensor: Tensor) -> np.ndarray:
    """The elements of a constant tensor as a NumPy view."""
    data = tensor.buffer.data
    assert data is not None
    flat = data.reshape(-1).view(tensor.dtype.numpy)
    strides = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """A C-contiguous copy whose address is a multiple of 64 (a cache line, and the widest vector)."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
