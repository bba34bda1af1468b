"""The operator set of the IR: small and closed. One module per family; import from here."""

from engine.ir.ops.base import Cost, Op, OperandTypes, ResultTypes, broadcast_shapes
from engine.ir.ops.heavy import Attention, Conv, ConvBlock, ConvExcitation, ConvMax, ConvMean, Excitation, Gemm
from engine.ir.ops.light import (
    Norm,
    NormKind,
    Pointwise,
    Pool,
    PoolKind,
    Reduce,
    ReduceKind,
    RowFactors,
    Softmax,
    factors_shape,
)
from engine.ir.ops.move import Concat, Gather, Opaque, Pad, PadMode, Resize, ResizeMode, ShapeTensor, Undefined
from engine.ir.ops.recurrent import Cell, Recurrent
from engine.ir.ops.running import Running, RunningKind
from engine.ir.ops.select import Scatter, ScatterKind, TopK
from engine.ir.ops.view import Expand, Reshape, Slice, Transpose, View

__all__ = [
    "Attention",
    "Cell",
    "Concat",
    "Conv",
    "ConvBlock",
    "ConvExcitation",
    "ConvMax",
    "ConvMean",
    "Cost",
    "Excitation",
    "Expand",
    "Gather",
    "Gemm",
    "Norm",
    "NormKind",
    "Op",
    "Opaque",
    "OperandTypes",
    "Pad",
    "PadMode",
    "Pointwise",
    "Pool",
    "PoolKind",
    "Recurrent",
    "Reduce",
    "ReduceKind",
    "Reshape",
    "Resize",
    "ResizeMode",
    "ResultTypes",
    "RowFactors",
    "Running",
    "RunningKind",
    "Scatter",
    "ScatterKind",
    "ShapeTensor",
    "Slice",
    "Softmax",
    "TopK",
    "Transpose",
    "Undefined",
    "View",
    "broadcast_shapes",
    "factors_shape",
]
