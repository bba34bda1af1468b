"""The kernel contract of the CUDA target: what a kernel is before compilation, and what one launch of it looks like.

Every kernel is ``kernel(const __grid_constant__ Params p)``; `Params` is generated from the launch's arguments, so the
host's packing and the device's struct come from one list. Compile-time: tiles, stages, dtypes, expressions, whether
accesses are aligned. Run-time: sizes, strides, addresses. The last argument is always the stamp slot, null where nobody
measures; a kernel that looks up tables has its step's status word, too. Lowering needs no device: arguments name
buffers, and `program.py` turns them into addresses when it captures a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Protocol, TypeAlias

import numpy as np

from engine.ir.dtype import DType
from engine.ir.ops import Op
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.source import Source

USUAL_LEVELS = 4  # row levels of a kernel's tensors, unless one has more
ALIGNMENT = 256  # bytes; every device buffer starts at a multiple


@dataclass(frozen=True, eq=False)
class Pointer:
    """The address of byte `offset` of a buffer. `ctype` is the element type the kernel sees."""

    buffer: Buffer
    offset: int = 0
    ctype: str = "half"


@dataclass(frozen=True, eq=False)
class TensorArgument:
    """A `Tensor` struct of kernels/epilogue/access.cuh."""

    pointer: Pointer
    rows: tuple[int, ...]
    column: int


@dataclass(frozen=True)
class LevelSizes:
    """A `Levels` struct of kernels/epilogue/access.cuh, outermost first."""

    sizes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A 2-D TMA descriptor of fp16, bf16, e4m3 or fp32 rows: `columns` are contiguous, `rows` lie `row_stride` elements
    apart. fp32 is rounded to tf32 on the way."""

    pointer: Pointer
    rows: int
    columns: int
    row_stride: int
    box_rows: int
    box_columns: int
    outer: tuple[tuple[int, int], ...] = ()
    """Size and stride (in elements) of further axes, of which a box has one place: none, or two (ptx/tma_outer.cuh)."""
    exact: bool = False
    """fp32 comes as it is."""


@dataclass(frozen=True, eq=False)
class PixelMap:
    """A TMA descriptor in im2col mode of an image of fp16, bf16 or fp32, channels innermost; fp32 is rounded to tf32 on
    the way. A copy brings `box_channels` of `box_pixels` pixels, in the order of a bounding box that the walk goes
    through along x, then y (then z), then from image to image.

    Per spatial axis, x first: `sizes`, `strides` between pixels in elements, `lower` and `upper` corners of the box,
    counted from the image's first and last pixel, and the `steps` from pixel to pixel.
    """

    pointer: Pointer
    channels: int
    images: int
    image_stride: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    steps: tuple[int, ...]
    box_channels: int
    box_pixels: int

    @property
    def extent(self) -> int:
        """The elements from the first to the last one."""
        along = zip((self.channels, *self.sizes, self.images), (1, *self.strides, self.image_stride), strict=True)
        return 1 + sum((size - 1) * stride for size, stride in along)


AnyMap: TypeAlias = TensorMap | PixelMap


@dataclass(frozen=True)
class I64:
    """A 64-bit integer, such as a stride. Plain integers are 32 bits wide."""

    value: int


@dataclass(frozen=True)
class I64s:
    """An array of 64-bit integers."""

    values: tuple[int, ...]


@dataclass(frozen=True)
class StatusWord:
    """The address of a 32-bit word that the kernel sets to 1 where it meets an index outside the table that it looks
    up; null where nobody reads it."""


@dataclass(frozen=True)
class F64:
    """A 64-bit float. Plain floats are 32 bits wide."""

    value: float


@dataclass(frozen=True)
class Ahead:
    """How many steps of a loop a kernel asks for before the kernel before has ended: a 32-bit integer, 0 where the
    launch is to tell its own time, all of which lies behind that end."""

    steps: int


Number: TypeAlias = I64 | I64s | F64 | Ahead | int | float
Argument: TypeAlias = Pointer | TensorArgument | LevelSizes | AnyMap | StatusWord | Number


class Instruction(Enum):
    """The matrix instruction a kernel is built around, by its name in the machine code."""

    NONE = ""
    MMA = "HMMA"
    WGMMA = "HGMMA"
    WGMMA_FP8 = "QGMMA"
    WGMMA_INT8 = "IGMMA"

    @property
    def is_wgmma(self) -> bool:
        """Whether a whole warpgroup multiplies."""
        return self in (Instruction.WGMMA, Instruction.WGMMA_FP8, Instruction.WGMMA_INT8)


@dataclass(frozen=True)
class Kernel:
    """A kernel before compilation. `family` is what metrics call it; `cluster` blocks along x form a cluster."""

    family: str
    source: Source
    threads: int
    shared_bytes: int = 0
    instruction: Instruction = Instruction.NONE
    cluster: int = 1


@dataclass(frozen=True, eq=False)
class Launch:
    """One run of a kernel over `grid` blocks."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, Argument], ...]

    @property
    def looks_up(self) -> bool:
        """Whether it reads tables by indices, and has a status word."""
        return any(isinstance(argument, StatusWord) for _, argument in self.arguments)


_TENSOR_MAP = np.dtype([("words", "u8", 16)], align=True)


def max_levels(arguments: Sequence[tuple[str, Argument]]) -> int:
    """The row levels that `Tensor` and `Levels` of kernels/epilogue/access.cuh have room for in a launch."""
    counts = (
        len(a.rows if isinstance(a, TensorArgument) else a.sizes)
        for _, a in arguments
        if isinstance(a, TensorArgument | LevelSizes)
    )
    return max(USUAL_LEVELS, *counts, 0)


def _declaration(name: str, argument: Argument, levels: int = USUAL_LEVELS) -> tuple[str, np.dtype]:
    """The member's C++ declaration and its NumPy type; tensors have room for `levels` row levels."""
    match argument:
        case Pointer(ctype=ctype):
            return f"{ctype}* {name};", np.dtype("u8")
        case TensorArgument():
            return f"Tensor {name};", np.dtype([("data", "u8"), ("row", "i8", levels), ("column", "i8")], align=True)
        case LevelSizes():
            return f"Levels {name};", np.dtype([("size", "u4", levels)], align=True)
        case TensorMap() | PixelMap():
            return f"TensorMap {name};", _TENSOR_MAP
        case I64():
            return f"i64 {name};", np.dtype("i8")
        case I64s(values=values):
            return f"i64 {name}[{len(values)}];", np.dtype(("i8", (len(values),)))
        case StatusWord():
            return f"u32* {name};", np.dtype("u8")
        case F64():
            return f"double {name};", np.dtype("f8")
        case float():
            return f"float {name};", np.dtype("f4")
        case _:
            return f"{'int' if name.startswith('pad_') else 'u32'} {name};", np.dtype("i4")


def params_struct(arguments: Sequence[tuple[str, Argument]]) -> str:
    """`struct Params` of a launch. Tensor maps come first: they are aligned to 64 bytes."""
    lines = [f"  {_declaration(name, argument)[0]}" for name, argument in _ordered(arguments)]
    return "struct Params {\n" + "\n".join(lines) + "\n  Stamp* stamp;\n};\n"


def _ordered(arguments: Sequence[tuple[str, Argument]]) -> list[tuple[str, Argument]]:
    return sorted(arguments, key=lambda item: not isinstance(item[1], AnyMap))


def pack(
    arguments: Sequence[tuple[str, Argument]],
    address: Callable[[Pointer], int],
    encode: Callable[[AnyMap], bytes],
    stamp: int,
    status: int = 0,
    alone: bool = False,
) -> bytes:
    """The bytes of `Params`. `address` places pointers, `encode` makes the 128 bytes of a tensor map; `stamp` and
    `status` are the addresses of stamp slot and status word. `alone`: nothing is done ahead (see `Ahead`)."""
    ordered, levels = _ordered(arguments), max_levels(arguments)
    fields = [(name, _declaration(name, argument, levels)[1]) for name, argument in ordered]
    record = np.zeros(1, np.dtype([*fields, ("stamp", "u8")], align=True))
    for name, argument in ordered:
        match argument:
            case Pointer():
                record[name] = address(argument)
            case TensorArgument(pointer=pointer, rows=rows, column=column):
                record[name]["data"] = address(pointer)
                record[name]["row"][0, : len(rows)] = rows
                record[name]["column"] = column
            case LevelSizes(sizes=sizes):
                record[name]["size"][0, : len(sizes)] = sizes
            case TensorMap() | PixelMap():
                record[name]["words"] = np.frombuffer(encode(argument), "u8")
            case I64(value=value) | F64(value=value):
                record[name] = value
            case I64s(values=values):
                record[name] = values
            case Ahead(steps=steps):
                record[name] = 0 if alone else steps
            case StatusWord():
                record[name] = status
            case _:
                record[name] = argument
    record["stamp"] = stamp
    packed = record.tobytes()
    maps = any(isinstance(argument, AnyMap) for _, argument in arguments)
    return packed + bytes(-len(packed) % 64) if maps else packed


def workspace_bytes(launches: Iterable[Launch]) -> int:
    """The scratch memory that launches need which run one after the other and all find theirs at one address."""
    given = (argument for launch in launches for _, argument in launch.arguments)
    placed = (argument for argument in given if isinstance(argument, Pointer | TensorArgument | AnyMap))
    used = (argument if isinstance(argument, Pointer) else argument.pointer for argument in placed)
    return max((p.buffer.nbytes for p in used if p.buffer.kind is BufferKind.WORKSPACE), default=0)


def with_scratch_behind(launches: Sequence[Launch], scratch: Buffer) -> list[Launch]:
    """The same launches, with what they leave to each other in `scratch` in their workspace, behind what they need of
    that themselves."""
    own = ceildiv(workspace_bytes(launches), ALIGNMENT) * ALIGNMENT
    behind = Buffer(scratch.name, BufferKind.WORKSPACE, own + scratch.nbytes)

    def moved(pointer: Pointer) -> Pointer:
        return replace(pointer, buffer=behind, offset=own + pointer.offset) if pointer.buffer is scratch else pointer

    def argument(given: Argument) -> Argument:
        if isinstance(given, Pointer):
            return moved(given)
        if isinstance(given, TensorArgument | AnyMap):
            return replace(given, pointer=moved(given.pointer))
        return given

    return [
        replace(launch, arguments=tuple((name, argument(given)) for name, given in launch.arguments))
        for launch in launches
    ]


@dataclass
class WeightStore:
    """Weights in the layouts that kernels want: each packed once, on the host, and shared by all plans of a model.

    `target.py` keeps the device's copy of each buffer.
    """

    _packed: dict[tuple[object, ...], tuple[list[np.ndarray], Buffer]] = field(default_factory=dict)

    def packed(self, tensor: Tensor, layout: str, transform: Callable[[np.ndarray], np.ndarray]) -> Buffer:
        """`transform(content of tensor)` as a buffer. `layout` names what `transform` does, completely."""
        return self.packed_together([tensor], layout, transform)

    def packed_together(self, tensors: Sequence[Tensor], layout: str, transform: Callable[..., np.ndarray]) -> Buffer:
        """The same of several tensors, whose contents `transform` takes in their order, in one buffer."""
        sources, parts = list[np.ndarray](), list[object]()
        for tensor in tensors:
            source = tensor.buffer.data
            assert source is not None, f"{tensor.buffer.name} is not a constant"
            sources.append(source)
            parts.append((id(source), tensor.offset, tensor.shape, tensor.strides, tensor.dtype))
        key = (*parts, layout)
        if key not in self._packed:
            data = np.ascontiguousarray(transform(*map(content, tensors)))
            buffer = Buffer(f"{tensors[0].buffer.name}:{layout}", BufferKind.CONSTANT, data.nbytes, data)
            # The sources are kept alive with their packed form, so that their ids stay their own.
            self._packed[key] = (sources, buffer)
        return self._packed[key][1]


Choice: TypeAlias = Mapping[str, str | int | float | bool]
"""A tile that was timed (choices.py, conv_choices.py)."""


@dataclass(frozen=True)
class Context:
    """What lowering a step needs to know beside the step. `tf32`: products of fp32 operands round them to the nearest
    tf32, or take them in two parts (gemm.py); else they are as exact as fp32. `choices`: tiles that were timed on the
    device, of products by `choices.key_of`, of convolutions by `conv_choices.key_of`."""

    architecture: Architecture
    multiprocessors: int
    weights: WeightStore
    tf32: bool = False
    choices: Mapping[str, Choice] = field(default_factory=dict)


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


STORAGE = {
    DType.F64: "double", DType.F32: "float", DType.F16: "half", DType.BF16: "bfloat16", DType.F8E4M3: "e4m3",
    DType.I64: "i64", DType.I32: "i32", DType.I16: "i16", DType.I8: "i8", DType.U64: "u64", DType.U32: "u32",
    DType.U16: "u16", DType.U8: "u8", DType.BOOL: "bool",
}  # fmt: skip
"""Types of kernels/types.cuh in which elements lie in memory."""


def pointer_to(tensor: Tensor) -> Pointer:
    """The address of a tensor's first element."""
    return Pointer(tensor.buffer, tensor.offset * tensor.dtype.itemsize, STORAGE[tensor.dtype])


def workspace(nbytes: int) -> Buffer:
    """Memory for what launches of a step leave to the next, or blocks to each other. All steps find theirs at one
    place, so a step has one; its content before and after has no meaning."""
    return Buffer("workspace", BufferKind.WORKSPACE, nbytes)


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


def launch(
    family: str,
    body: str,
    config: Mapping[str, int | bool | str],
    functors: Sequence[Functor],
    arguments: Mapping[str, Argument],
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int = 0,
    instruction: Instruction = Instruction.NONE,
    helpers: str = "",
    cluster: int = 1,
) -> Launch:
    """A launch of kernel file `body` with the compile-time `config` and the generated `functors`.

    A `config` value that is a string is a type. `helpers` is device code that the body calls. `cluster`: the blocks
    along x that form a cluster, as the body says.
    """
    every = [*arguments.items(), *(item for functor in functors for item in functor.arguments)]
    config = {"width": 8, "max_levels": max_levels(every), **config}
    constants = [
        f"using {name} = {value};" if isinstance(value, str) else f"constexpr {_ctype(value)} {name} = {int(value)};"
        for name, value in config.items()
    ]
    tensor_map = any(isinstance(argument, AnyMap) for _, argument in every)
    text = "\n".join(
        [
            '#include "types.cuh"',
            '#include "scheduler/stamp.cuh"',
            '#include "scheduler/group_reduce.cuh"' if "operation" in config else "",
            *(['#include "ptx/tma.cuh"'] if tensor_map else []),
            "namespace config {",
            *constants,
            "}",
            '#include "epilogue/access.cuh"',
            '#include "epilogue/math.cuh"',
            # Structs of one kernel file, which a member may point to.
            *dict.fromkeys(a.ctype + ";" for _, a in every if isinstance(a, Pointer) and a.ctype.startswith("struct ")),
            params_struct(every),
            *(functor.code for functor in functors),
            helpers,
            f'#include "{body}"\n',
        ]
    )
    named = {key: value for key, value in config.items() if not isinstance(value, str) and key != "max_levels"}
    name = "_".join([family, *(f"{key}{int(value)}" for key, value in named.items())])
    return Launch(Kernel(family, Source(name, text), threads, shared_bytes, instruction, cluster), grid, tuple(every))


def _ctype(value: int | bool) -> str:
    return "bool" if isinstance(value, bool) else "int"


@dataclass(frozen=True)
class Reads:
    """What a functor costs: registers that eight columns of a row of all that it reads take, of what is the same in
    every row, and of what varies from row to row, `by_row` of them a number for all columns of one; and about how many
    instructions it computes an element in."""

    fixed: int = 0
    varying: int = 0
    instructions: int = 0
    by_row: int = 0


def without_stages() -> None:
    """`stage` of a functor without a staged form."""


@dataclass(frozen=True, eq=False)
class Functor:
    """Generated device code (a struct) and the arguments it reads. Made by `codegen.py`. `stage` makes the staged form
    of an epilogue, which few products ask for. `dividing`: what an epilogue of divided rows is in kernels that leave
    the division to it."""

    code: str
    arguments: tuple[tuple[str, Argument], ...]
    reads: Reads
    stage: Callable[[], Staged | None] = without_stages
    dividing: Functor | None = None

    @cached_property
    def staged(self) -> Staged | None:
        """The same epilogue for results that go through shared memory; None where it has no such form."""
        return self.stage()


@dataclass(frozen=True)
class RowMatrix:
    """Rows of 16-bit elements, `stride` elements apart. `map`: where the copy engine can read and write them."""

    pointer: Pointer
    stride: int

    @property
    def in_words(self) -> bool:
        """Whether every row begins at a multiple of 4 bytes."""
        return self.pointer.offset % 4 == 0 and self.stride % 2 == 0

    def map(self, rows: int, columns: int, box_rows: int, box_columns: int) -> TensorMap:
        """The descriptor of so many rows and columns."""
        return TensorMap(self.pointer, rows, columns, self.stride, box_rows, box_columns)


@dataclass(frozen=True, eq=False)
class Staged:
    """The same epilogue for results that go through shared memory (kernels/mma/staging.cuh): `code` computes two
    neighbouring columns of the one `result`, from operands that are the same in every row, others that are the same in
    every column (`reads_rows`), and one full tile, if any. Made by `staging.py`."""

    code: str
    arguments: tuple[tuple[str, Argument], ...]
    result: RowMatrix
    tile: RowMatrix | None
    reads_rows: bool = False
    ragged: bool = False
    """Rows of the result begin anywhere: consumers store them themselves (kernels/mma/ragged_stores.cuh)."""


def ceildiv(a: int, b: int) -> int:
    return -(-a // b)
