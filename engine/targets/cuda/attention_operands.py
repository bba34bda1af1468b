"""What the attention kernels are told of their operands, whichever instructions they are built around. Called by
`attention.py` and `attention_wgmma.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import e, log2

from engine.ir import expr as ex
from engine.ir.ops import Attention
from engine.plan.plan import Step
from engine.plan.tensor import BufferKind, Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import I64, Argument, Functor, I64s, pointer_to
from engine.targets.cuda.spaces import operand, operands, space

LOG2_E = log2(e)


class BiasKind(IntEnum):
    """What the bias of the scores depends on, beside batch and head. In the order of attention_mma.cuh."""

    NONE = 0
    PER_KEY = 1
    FULL = 2


@dataclass(frozen=True)
class Attended:
    """An attention step, with the sizes and arguments that all kernels have."""

    step: Step

    @property
    def op(self) -> Attention:
        assert isinstance(self.step.op, Attention)
        return self.step.op

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, heads, queries and features of the result."""
        batch, heads, queries, features = four(self.step.outputs[0].shape, 1)
        return batch, heads, queries, features

    @property
    def keys(self) -> int:
        return self.step.inputs[1].shape[-2]

    @property
    def bias(self) -> BiasKind:
        if not self.op.has_bias:
            return BiasKind.NONE
        return BiasKind.PER_KEY if self.bias_strides[2] == 0 else BiasKind.FULL

    @property
    def bias_strides(self) -> tuple[int, ...]:
        return four(operand(self.step.inputs[3], len(self.step.outputs[0].shape)).strides, 0)

    def arguments(self) -> dict[str, Argument]:
        _, heads, queries, features = self.sizes
        bias: dict[str, Argument] = {}
        if self.op.has_bias:
            bias = {"bias": pointer_to(self.step.inputs[3]), "bias_stride": I64s(self.bias_strides)}
        if self.op.packed:
            starts = self.step.inputs[3]
            bias = {"starts": pointer_to(starts), "starts_stride": I64(starts.strides[0]), "sequences": self.sequences}
        if self.op.window is not None:
            bias["window"] = self.op.window
        return {
            "scale_log2": self.op.scale * LOG2_E, **bias, "queries": queries, "keys": self.keys, "value_size": features,
            "heads": heads, "heads_per_k": self.heads_per(1), "heads_per_v": self.heads_per(2),
        }  # fmt: skip

    def heads_per(self, which: int) -> int:
        """How many heads of q share one of input `which`."""
        return self.sizes[1] // four(self.step.inputs[which].shape, 1)[1]

    @property
    def sequences(self) -> int:
        """How many sequences lie one after the other, where they are packed."""
        return self.step.inputs[3].shape[0] - 1 if self.op.packed else 0

    @property
    def starts_are_fed(self) -> bool:
        """Whether the starts of packed sequences are there before the first kernel of the plan: an input."""
        return self.op.packed and self.step.inputs[3].buffer.kind is BufferKind.INPUT

    def sequences_code(self) -> str:
        """The struct `Sequences` that says where packed sequences begin."""
        if not self.op.packed:
            return """struct Sequences {
  DEVICE static u32 start(const Params&, u32) { return 0; }
  DEVICE static u32 count(const Params&) { return 0; }
};
"""
        return """struct Sequences {
  DEVICE static u32 start(const Params& p, u32 i) { return static_cast<u32>(p.starts[i * p.starts_stride]); }
  DEVICE static u32 count(const Params& p) { return p.sequences; }
};
"""

    def window_code(self) -> str:
        """The struct `Window`: how near a key has to lie for a query to see it."""
        size = "0" if self.op.window is None else "p.window"
        return f"struct Window {{\n  DEVICE static u32 size(const Params& p) {{ return {size}; }}\n}};\n"

    def bias_code(self) -> str:
        """The struct `Bias` that the kernels call."""
        if not self.op.has_bias:
            return """struct Bias {
  DEVICE static float at(const Params&, u32, u32, u32, u32) { return 0.0f; }
};
"""
        return """struct Bias {
  DEVICE static float at(const Params& p, u32 batch, u32 head, u32 query, u32 key) {
    const i64* stride = p.bias_stride;
    return widen(p.bias[batch * stride[0] + head * stride[1] + query * stride[2] + key * stride[3]]);
  }
};
"""

    def epilogue(self) -> Functor:
        """Rows of the kernels run over batch, head and query."""
        shape, stores = self.step.outputs[0].shape, self.op.stores
        reads = operands(self.step.inputs, ex.arguments(*stores), (), len(shape))
        writes = [operand(tensor, len(shape)) for tensor in self.step.outputs]
        rows = space(shape, range(len(shape) - 1), (len(shape) - 1,), [*reads.values(), *writes])
        placed = dict(zip(reads, rows.operands, strict=False))
        return codegen.epilogue(stores, rows, placed, rows.operands[len(reads) :], rows.columns)


def four(values: tuple[int, ...], head: int) -> tuple[int, ...]:
    """Shape or strides with a head axis."""
    return values if len(values) == 4 else (values[0], head, *values[1:])


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides along batch, head, position and feature; 0 where an axis is broadcast or missing."""
    return four(operand(tensor, len(tensor.shape)).strides, 0)
