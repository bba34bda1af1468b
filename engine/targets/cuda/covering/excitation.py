"""The covering set's squeeze-and-excite layers."""

from __future__ import annotations

from collections.abc import Iterator

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.ops import Excitation
from engine.plan.plan import Step
from engine.plan.tensor import Tensor, row_major
from engine.targets.cuda.covering.build import ACC, F16, F32, add, arg, make_step, mul, weight
from engine.targets.cuda.excitation import launch_layers
from engine.targets.cuda.kernel import Context, Launch, workspace


def excitation_step(images: int, channels: int, hidden: int, outputs: int, dtype: DType = F16) -> Step:
    """SiLU in between, a sigmoid behind, biases in fp32."""
    first, second = add(ACC, arg(3, F32)), add(ACC, arg(4, F32))
    silu = mul(first, ex.apply(PointOp.SIGMOID, first))
    op = Excitation(silu, (ex.cast(ex.apply(PointOp.SIGMOID, second), dtype),))
    weights = [weight(hidden, channels, 1, 1, dtype=dtype), weight(outputs, hidden, 1, 1, dtype=dtype)]
    biases = [weight(hidden, 1, 1, dtype=F32), weight(outputs, 1, 1, dtype=F32)]
    name = f"excitation {images}x{channels} {hidden} {dtype.value}"
    return make_step(op, [(dtype, (images, channels, 1, 1)), *weights, *biases], name)


def excitation_steps() -> Iterator[Step]:
    """An image to a block and two, hidden units in whole vectors and not."""
    yield excitation_step(1, 1152, 48, 1152)
    yield excitation_step(300, 240, 10, 240, DType.BF16)


def excitations(context: Context) -> Iterator[tuple[str, Launch]]:
    """Of sums in parts."""
    for images, dtype in ((2, F16), (300, DType.BF16)):
        step = excitation_step(images, 144, 6, 144, dtype)
        shape = (images, 98, 144)
        sums = Tensor(workspace(4 * images * 98 * 144), F32, shape, row_major(shape))
        yield f"{step.name} of sums", launch_layers(step, sums, 56 * 56, context)
