"""The heavy operators: matrix product, convolution, attention. Each carries its epilogue in `stores`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar, cast

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dim import Dim, floordiv
from engine.ir.dtype import DType
from engine.ir.ops.base import ConcreteShape, Op, OperandTypes, ResultTypes, broadcast_shapes
from engine.ir.ops.light import Pool, factors_shape

IDENTITY = (ex.Acc(),)


@dataclass(frozen=True)
class Gemm(Op):
    """Matrix product `a[…, m, k] @ b[…, k, n]` → [..., m, n] with NumPy broadcasting of the leading axes.

    Transposed operands are `Transpose` views, not attributes. Accumulates in fp32 (fp64 for fp64 operands).

    With `divided` rows of a are divided by their standard deviation, as a layer norm divides them: a third fixed
    operand holds the factor of each row as `RowFactors` has them, and `Acc()` is (a @ b) · factor. With `factors`,
    an epsilon, there is one more result behind the stores: the factors of the rows of the first one; with `offsets` a
    second one behind it, their offsets (`RowFactors`).
    """

    stores: tuple[ex.Expr, ...] = IDENTITY
    divided: bool = False
    factors: float | None = None
    offsets: bool = False
    arity: ClassVar[int] = 2

    @property
    def operands(self) -> int:
        """Number of fixed operands: a, b and, with `divided`, the factors of a's rows."""
        return 2 + self.divided

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        a, b = inputs[0].shape, inputs[1].shape
        if len(a) < 2 or len(b) < 2:
            raise ShapeError(f"Gemm: operands of rank {len(a)} and {len(b)}; both need at least 2")
        if isinstance(a[-1], int) and isinstance(b[-2], int) and a[-1] != b[-2]:
            raise ShapeError(f"Gemm: inner sizes differ: {list(a)} @ {list(b)}")
        shape = (*broadcast_shapes("Gemm", a[:-2], b[:-2]), a[-2], b[-1])
        if self.divided and tuple(inputs[2].shape) != factors_shape(a):
            raise ShapeError(f"Gemm: factors {list(inputs[2].shape)} of rows {list(a)}")
        results = tuple((store.dtype, shape) for store in self.stores)
        found = (1 + self.offsets) * ((DType.F32, factors_shape(shape)),)
        return results if self.factors is None else (*results, *found)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return outputs[0].elements * (2 * inputs[0].shape[-1] + ex.flops(*self.stores))


@dataclass(frozen=True)
class Conv(Op):
    """Convolution `x[n, c, *spatial]` with `w[o, c/groups, *kernel]` → [n, o, *spatial'], any number of spatial axes.

    `pads` gives (begin, end) per spatial axis. With `transposed` it is ONNX ConvTranspose: `w[c, o/groups, *kernel]`,
    and
    `output_padding` enlarges the result. Bias is part of the epilogue: an input of shape [o, 1, …].
    """

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilations: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    stores: tuple[ex.Expr, ...] = IDENTITY
    arity: ClassVar[int] = 2

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        x, w = inputs[0].shape, inputs[1].shape
        if len(x) != len(w) or len(x) != len(self.strides) + 2:
            raise ShapeError(f"Conv: input rank {len(x)}, weight rank {len(w)}, {len(self.strides)} strides")
        per_group = w[0] if self.transposed else w[1]
        expected = per_group if self.transposed else per_group * self.groups
        if isinstance(x[1], int) and isinstance(expected, int) and x[1] != expected:
            raise ShapeError(f"Conv: input has {x[1]} channels, the weight expects {expected}")
        channels = w[1] * self.groups if self.transposed else w[0]
        spatial = tuple(self._output_size(i, x[i + 2], w[i + 2]) for i in range(len(self.strides)))
        for size in spatial:
            if isinstance(size, int) and size < 1:
                raise ShapeError(f"Conv: the kernel is larger than the padded input: output size {size}")
        return tuple((store.dtype, (x[0], channels, *spatial)) for store in self.stores)

    def _output_size(self, i: int, size: Dim, kernel: Dim) -> Dim:
        begin, end = self.pads[i]
        extent = (kernel - 1) * self.dilations[i] + 1
        if self.transposed:
            extra = self.output_padding[i] if self.output_padding else 0
            return (size - 1) * self.strides[i] + extent + extra - begin - end
        return floordiv(size + begin + end - extent, self.strides[i]) + 1

    @property
    def is_pointwise(self) -> bool:
        """Whether strides, padding and dilation are those of a 1×1 convolution (the kernel size is the weight's)."""
        return all(s == 1 for s in self.strides) and not any(b or e for b, e in self.pads)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        x, w = inputs[0], inputs[1]
        if self.transposed:
            return 2 * x.elements * prod(w.shape[1:]) + outputs[0].elements * ex.flops(*self.stores)
        return outputs[0].elements * (2 * prod(w.shape[1:]) + ex.flops(*self.stores))

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        total = super().bytes(inputs, outputs)
        if self.transposed:
            return total
        x, w = inputs[0], inputs[1]
        read = prod(
            self._touched(i, size, kernel, out)
            for i, (size, kernel, out) in enumerate(zip(x.shape[2:], w.shape[2:], outputs[0].shape[2:], strict=True))
        )
        return total - x.nbytes + x.nbytes * read // max(1, prod(x.shape[2:]))

    def _touched(self, i: int, size: int, kernel: int, out: int) -> int:
        """How many positions of spatial axis `i` some tap reads: all, unless stride or dilation leave gaps."""
        if self.dilations[i] == 1 and kernel >= self.strides[i]:
            return size
        begin = self.pads[i][0]
        read = {o * self.strides[i] + t * self.dilations[i] - begin for o in range(out) for t in range(kernel)}
        return sum(0 <= position < size for position in read)


@dataclass(frozen=True)
class ConvMean(Op):
    """A convolution that computes the mean of its first result over all spatial axes, too: one more result
    [n, o, 1, …]. `mean` is that result as an expression over `Acc()`, the mean in fp32, alone. What is averaged may be
    the first result before it is rounded to its type.
    """

    conv: Conv
    mean: ex.Expr
    arity: ClassVar[int] = 2

    @property
    def stores(self) -> tuple[ex.Expr, ...]:
        """One expression per result: those of the convolution, and `mean` over its own `Acc()`."""
        return (*self.conv.stores, self.mean)

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        results = self.conv.infer(inputs)
        _, (images, channels, *spatial) = results[0]
        return (*results, (self.mean.dtype, (images, channels, *(1 for _ in spatial))))

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        averaged = outputs[0].elements + outputs[-1].elements * ex.flops(self.mean)
        return self.conv.flops(inputs, outputs) + averaged

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return self.conv.bytes(inputs, outputs)


@dataclass(frozen=True)
class ConvMax(Op):
    """A convolution and the maximum of its sums over each window of `pool`, a maximum: [n, o, *windows]. The stores are
    those of the convolution, over `Acc()`, that maximum, and further inputs that broadcast against the result. What
    lies in the pool's padding does not count.
    """

    conv: Conv
    pool: Pool
    arity: ClassVar[int] = 2

    @property
    def stores(self) -> tuple[ex.Expr, ...]:
        """The convolution's, one."""
        return self.conv.stores

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        sums = self.conv.infer(inputs)
        windows = self.pool.infer([_Typed(*result) for result in sums])
        return tuple((dtype, shape) for (dtype, _), (_, shape) in zip(sums, windows, strict=True))

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        """A comparison counts as one, as in a pool."""
        ((_, sums),) = self.conv.infer(inputs)
        taps = prod(inputs[1].shape[1:])
        compared = outputs[0].elements * (prod(self.pool.kernel) + ex.flops(*self.stores))
        return 2 * taps * prod(cast(tuple[int, ...], sums)) + compared


@dataclass(frozen=True)
class ConvBlock(Op):
    """A 1×1 convolution, a depthwise one of its result, and a 1×1 convolution of that: an inverted residual (Sandler et
    al. 2018). `x[n, c, h, w]`, `w1[e, c, 1, 1]`, `w2[e, 1, *kernel]`, `w3[o, e, 1, 1]` → [n, o, h', w'].

    Each convolution has one store, whose arguments are numbered as the inputs of the whole.
    """

    expand: Conv
    depthwise: Conv
    project: Conv
    arity: ClassVar[int] = 4

    @property
    def stores(self) -> tuple[ex.Expr, ...]:
        """Those of the last convolution, one."""
        return self.project.stores

    def results(self, inputs: OperandTypes) -> tuple[ResultTypes, ...]:
        """What each of the convolutions gives."""
        found, image = list[ResultTypes](), inputs[0]
        for conv, w in zip((self.expand, self.depthwise, self.project), inputs[1:4], strict=True):
            found.append(conv.infer([image, w]))
            image = _Typed(*found[-1][0])
        return tuple(found)

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        return self.results(inputs)[-1]

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        total = 0
        for conv, w, ((_, shape),) in zip(
            (self.expand, self.depthwise, self.project), inputs[1:4], self.results(inputs), strict=True
        ):
            total += prod(cast(tuple[int, ...], shape)) * (2 * prod(w.shape[1:]) + ex.flops(*conv.stores))
        return total


@dataclass(frozen=True)
class Excitation(Op):
    """Two layers on the channels of single pixels, as squeeze-and-excite has them on pooled ones (Hu et al. 2018):
    `x[n, c, 1, …]`, `w1[s, c, 1, …]`, `w2[o, s, 1, …]` → [n, o, 1, …].

    `hidden` is the first layer over `Acc()` = x · w1ᵀ and further inputs [s, 1, …], in fp32; the stores are over
    `Acc()` = hidden · w2ᵀ.
    """

    hidden: ex.Expr
    stores: tuple[ex.Expr, ...]
    arity: ClassVar[int] = 3

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        x, w1, w2 = (t.shape for t in inputs[:3])
        if not len(x) == len(w1) == len(w2) or x[1] != w1[1] or w1[0] != w2[1]:
            raise ShapeError(f"Excitation: {', '.join(str(list(shape)) for shape in (x, w1, w2))} do not fit")
        if any(size != 1 for shape in (x, w1, w2) for size in shape[2:]):
            raise ShapeError("Excitation: images and filters have one pixel")
        return tuple((store.dtype, (x[0], w2[0], *x[2:])) for store in self.stores)

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        images, (hidden, channels) = inputs[0].shape[0], inputs[1].shape[:2]
        first = images * hidden * (2 * channels + ex.flops(self.hidden))
        return first + outputs[0].elements * (2 * hidden + ex.flops(*self.stores))


@dataclass(frozen=True)
class ConvExcitation(Op):
    """A convolution and the squeeze-and-excite layers on the mean of its first result: the results of `conv_mean`, but
    for its mean those of `excitation` on it, which need not be rounded. The first `given` inputs are those of
    `conv_mean`, the others those of `excitation` from its second one on; each has its expressions over its own.
    """

    conv_mean: ConvMean
    excitation: Excitation
    given: int
    arity: ClassVar[int] = 2

    @property
    def stores(self) -> tuple[ex.Expr, ...]:
        """One expression per result, over the node's inputs and the `Acc()` of its own operator."""
        return (*self.conv_mean.conv.stores, *map(self._over_all, self.excitation.stores))

    @property
    def hidden(self) -> ex.Expr:
        """That of the excitation, over the node's inputs."""
        return self._over_all(self.excitation.hidden)

    def _over_all(self, e: ex.Expr) -> ex.Expr:
        return ex.renumber(e, {i: self.given + i - 1 for i in ex.arguments(e)})

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        *results, mean = self.conv_mean.infer(inputs[: self.given])
        return (*results, *self.excitation.infer((_Typed(*mean), *inputs[self.given :])))

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        result, weights = outputs[0], inputs[self.given : self.given + 2]
        images, (hidden, channels) = result.shape[0], weights[0].shape[:2]
        layers = images * hidden * (2 * channels + ex.flops(self.excitation.hidden))
        layers += outputs[-1].elements * (2 * hidden + ex.flops(*self.excitation.stores))
        averaged = result.elements + images * channels * ex.flops(self.conv_mean.mean)
        return self.conv_mean.conv.flops(inputs[: self.given], outputs) + averaged + layers

    def bytes(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        return self.conv_mean.conv.bytes(inputs, outputs)


@dataclass(frozen=True)
class _Typed:
    dtype: DType
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Attention(Op):
    """Softmax(scale · q kᵀ + bias) v for `q[…, heads, sq, d]`, `k[…, kv_heads, sk, d]`, `v[…, kv_heads, sk, dv]`.

    Rank is 4 ([batch, heads, s, d]) or 3 ([batch, s, d], one head each). heads is a multiple of kv_heads (grouped
    queries). A fourth operand, where `has_bias`, is added to the scaled scores and broadcasts against
    [batch, heads, sq, sk]. `causal` masks keys after the query (aligned at the first position), `window` those that lie
    as many positions from it or more, before it or after it. Rows in which every
    score is −inf give NaN as the softmax does, or 0 with `masked_rows_zero`. Never materialises the scores
    (running maximum and sum: Milakov & Gimelshein 2018; Rabe & Staats 2021).

    With `packed`, sequences of different lengths lie one after the other along the axis s of q, k and v, which are of
    rank 4 and batch 1, as many tokens each. The last fixed operand `starts`, int32 [sequences + 1], begins with 0 and
    never falls: sequence i is the tokens from starts[i] up to starts[i + 1], and its queries see its own keys only,
    `causal` counted from its first. Tokens from the last start on (their number is rounded up to a bucket's) give 0.
    There is no bias and no window.
    """

    scale: float
    causal: bool = False
    has_bias: bool = False
    masked_rows_zero: bool = False
    stores: tuple[ex.Expr, ...] = IDENTITY
    packed: bool = False
    window: int | None = None

    def _seen(self, query: int, keys: int) -> int:
        """How many keys a query sees."""
        begin = 0 if self.window is None else max(0, query + 1 - self.window)
        end = query + 1 if self.causal else keys if self.window is None else query + self.window
        return max(0, min(keys, end) - begin)

    @property
    def operands(self) -> int:
        """Number of fixed operands: q, k, v and, where `has_bias`, the bias, or, where `packed`, the starts."""
        return 3 + self.has_bias + self.packed

    def infer(self, inputs: OperandTypes) -> ResultTypes:
        q, k, v = (t.shape for t in inputs[:3])
        if not len(q) == len(k) == len(v) or len(q) not in (3, 4):
            raise ShapeError(f"Attention: ranks {len(q)}, {len(k)}, {len(v)}; all must be 3 or all 4")
        if isinstance(q[-1], int) and isinstance(k[-1], int) and q[-1] != k[-1]:
            raise ShapeError(f"Attention: q has {q[-1]} features a head, k {k[-1]}")
        if self.window is not None and self.window < 1:
            raise ShapeError(f"Attention: a window of {self.window} positions; a query sees its own at least")
        if self.packed:
            self._check_packed(inputs)
        batch = broadcast_shapes("Attention", q[:1], k[:1], v[:1])
        shape = (*batch, *q[1:-1], v[-1])
        return tuple((store.dtype, shape) for store in self.stores)

    def _check_packed(self, inputs: OperandTypes) -> None:
        if self.has_bias or self.window is not None:
            raise ShapeError("Attention: packed sequences have no bias and no window")
        q, k, v, starts = (t.shape for t in inputs[:4])
        if len(q) != 4 or any(t[0] != 1 for t in (q, k, v)) or not q[-2] == k[-2] == v[-2]:
            shapes = ", ".join(str(list(t)) for t in (q, k, v))
            raise ShapeError(
                f"Attention: packed q, k and v are [1, heads, tokens, features] of as many tokens: {shapes}"
            )
        if len(starts) != 1 or starts[0] == 0 or inputs[3].dtype is not DType.I32:
            given = f"{inputs[3].dtype.value} {list(starts)}"
            raise ShapeError(f"Attention: the starts of packed sequences are i32 [sequences + 1], not {given}")

    def flops(self, inputs: Sequence[ConcreteShape], outputs: Sequence[ConcreteShape]) -> int:
        """Packed sequences count as equally long: how long they are only the device knows."""
        q, k, v = (t.shape for t in inputs[:3])
        keys = ceil(k[-2] / max(1, inputs[3].shape[0] - 1)) if self.packed else k[-2]
        scores = prod(outputs[0].shape[:-1]) * keys
        if self.causal or self.window is not None:
            queries = keys if self.packed else q[-2]
            scores = scores * sum(self._seen(i, keys) for i in range(queries)) // max(1, queries * keys)
        # Per score: 2·d for q kᵀ, 2·dv for p v, and scale, maximum, subtract, exp, sum.
        return scores * (2 * q[-1] + 2 * v[-1] + 5) + outputs[0].elements * ex.flops(*self.stores)
