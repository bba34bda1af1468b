"""What PyTorch and the vendor's libraries call the same as a kernel case. Needs PyTorch.

Operands arrive as the step's inputs, in the engine's order. Weights are laid out the way the library likes best before
anything is captured: products take them as [n, k], convolutions in channels-last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import AnyAttention, KernelCase
from benchmarks.cases.attention import AttentionCase, DecodeCase, Mask, VarlenCase, WindowCase
from benchmarks.cases.block import BlockCase
from benchmarks.cases.conv import ConvCase, Tail
from benchmarks.cases.gemm import Epilogue, Fp8Case, GemmCase, MatricesCase
from benchmarks.cases.light import Kind, LightCase

Function = Callable[..., torch.Tensor]
LayOut = Callable[..., tuple[torch.Tensor, ...]]


def _as_they_are(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return inputs


@dataclass(frozen=True)
class Peer:
    """`run` takes what `lay_out` makes of the step's inputs. `part`: what it computes, where that is less than the
    case."""

    name: str
    run: Function
    lay_out: LayOut = _as_they_are
    part: Function | None = None


def eager(case: KernelCase) -> Peer:
    """The whole expression as PyTorch runs it operator by operator."""
    return peers(case)[0]


def peers(case: KernelCase) -> list[Peer]:
    """All peers of a case; the first is the one that `eager` names."""
    match case:
        case GemmCase():
            return list(_gemm(case))
        case Fp8Case():
            return list(_fp8(case))
        case MatricesCase():
            return [Peer("cuBLAS", _matrices)]
        case ConvCase():
            return list(_conv(case))
        case BlockCase():
            return list(_block(case))
        case AttentionCase() | WindowCase() | DecodeCase():
            return list(_attention(case))
        case VarlenCase():
            return list(_varlen(case))
        case LightCase():
            return [Peer("eager", _light(case))]


def reference(case: KernelCase) -> Function:
    """The expression on the step's inputs in float64: what results are checked against."""
    match case:
        case GemmCase():
            return _PRODUCTS[case.epilogue]
        case Fp8Case():
            return _scaled_product(case)
        case MatricesCase():
            return _matrices
        case ConvCase():
            return _without_search(_convolution(case))
        case BlockCase():
            return _without_search(_residual(case))
        case AttentionCase() | WindowCase() | DecodeCase():
            return lambda *inputs: exact_attention(case, *inputs)
        case VarlenCase():
            return lambda *inputs: exact_varlen(case, *inputs)
        case LightCase():
            return _light(case)


# Products

_PRODUCTS: dict[Epilogue, Function] = {
    Epilogue.NONE: torch.mm,
    Epilogue.BIAS: lambda a, b, c: torch.addmm(c, a, b),
    Epilogue.BIAS_GELU: lambda a, b, c: F.gelu(torch.addmm(c, a, b)),
    Epilogue.BIAS_RESIDUAL: lambda a, b, c, r: torch.addmm(c, a, b).add_(r),
}


def _k_inner(a: torch.Tensor, b: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (a, b.t().contiguous().t(), *others)


def _matrices(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b)


def _gemm(case: GemmCase) -> Iterator[Peer]:
    if case.epilogue is Epilogue.NONE:
        yield Peer("cuBLAS", torch.mm, _k_inner)
        return
    yield Peer("eager", _PRODUCTS[case.epilogue], _k_inner)
    if case.epilogue is Epilogue.BIAS_GELU:  # GELU by tanh, in cuBLASLt's epilogue
        fused = lambda a, b, c: torch._addmm_activation(c, a, b, use_gelu=True)  # noqa: E731
        yield Peer("addmm_activation", fused, _k_inner)
    alone: Function = lambda a, b, *_: torch.mm(a, b)  # noqa: E731
    yield Peer("cuBLAS alone", alone, _k_inner, part=alone)


def _scaled_product(case: Fp8Case) -> Function:
    """On operands of any float type."""
    if case.epilogue is Epilogue.NONE:
        return lambda a, b: torch.mm(a, b).mul_(case.scale)
    return lambda a, b, c: F.gelu(torch.mm(a, b).mul_(case.scale).add_(c))


def _fp8(case: Fp8Case) -> Iterator[Peer]:
    """cuBLAS adding as fast as it can, as ours do, and with its partial sums promoted to fp32 registers."""

    def laid_out(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scales = (torch.full((), scale, device=inputs[0].device) for scale in (case.scale, 1.0))
        return (*_k_inner(*inputs), *scales)

    def scaled(fast: bool) -> Function:
        def run(a: torch.Tensor, b: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            *bias, scale, one = others
            y = torch._scaled_mm(a, b, scale, one, *bias, out_dtype=torch.float16, use_fast_accum=fast)
            return F.gelu(y) if bias else y

        return run

    plain = case.epilogue is Epilogue.NONE
    yield Peer("cuBLAS" if plain else "eager", scaled(fast=True), laid_out)
    if plain:
        yield Peer("cuBLAS, promoted", scaled(fast=False), laid_out)


# Convolutions

_TAILS: dict[Tail, Function] = {
    Tail.LINEAR: lambda y: y,
    Tail.RELU: lambda y: F.relu_(y),
    Tail.RELU6: lambda y: F.hardtanh_(y, 0.0, 6.0),
    Tail.SILU: lambda y: F.silu(y, inplace=True),
    Tail.SIGMOID: lambda y: y.sigmoid_(),
    Tail.RESIDUAL: lambda y, r: y.add_(r),
    Tail.RESIDUAL_RELU: lambda y, r: F.relu_(y.add_(r)),
}


def _narrow(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """An fp32 image in the type of the weights: part of the work."""
    return x if x.dtype == w.dtype else x.to(w.dtype, memory_format=torch.channels_last)


def _pooled(case: ConvCase, y: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(y, case.pool, 2, case.pool // 3) if case.pool else y


def _convolution(case: ConvCase) -> Function:
    def run(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(_narrow(x, w), w, bias.reshape(-1), case.stride, case.pad, 1, case.groups)
        return _pooled(case, _TAILS[case.tail](y, *others))

    return run


def _channels_last(x: torch.Tensor, w: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (x, w.contiguous(memory_format=torch.channels_last), *others)


def _fp16_image(x: torch.Tensor, w: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _channels_last(x.to(w.dtype, memory_format=torch.channels_last), w, *others)


def _conv(case: ConvCase) -> Iterator[Peer]:
    yield Peer("eager", _convolution(case), _channels_last)
    steps = [case.stride] * 2, [case.pad] * 2, [1, 1], case.groups
    if case.tail is Tail.RELU:
        yield Peer(
            "cuDNN fused",
            lambda x, w, c: _pooled(case, torch.cudnn_convolution_relu(_narrow(x, w), w, c.reshape(-1), *steps)),
            _channels_last,
        )
    if case.tail is Tail.RESIDUAL_RELU:
        yield Peer(
            "cuDNN fused",
            lambda x, w, c, r: torch.cudnn_convolution_add_relu(x, w, r, 1.0, c.reshape(-1), *steps),
            _channels_last,
        )
    if case.pool:
        return
    alone: Function = lambda x, w, *_: F.conv2d(x, w, None, case.stride, case.pad, 1, case.groups)  # noqa: E731
    yield Peer("cuDNN alone", alone, _fp16_image, part=_without_search(alone))
    if case.groups > 1:  # bound by memory: what a plain copy of as many bytes takes
        copy = partial(_copied, case)
        yield Peer("copy", copy, part=copy)


def _residual(case: BlockCase) -> Function:
    def run(
        x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor, *biases: torch.Tensor
    ) -> torch.Tensor:
        first, second, third = (bias.reshape(-1) for bias in biases[:3])
        y = F.conv2d(x, w1, first).clamp_(0, 6)
        y = F.conv2d(y, w2, second, case.stride, case.kernel // 2, 1, case.expanded).clamp_(0, 6)
        y = F.conv2d(y, w3, third)
        return y.add_(x) if case.has_residual else y

    return run


def _block(case: BlockCase) -> Iterator[Peer]:
    def lay_out(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = (w.contiguous(memory_format=torch.channels_last) for w in others[:3])
        return (x, *weights, *others[3:])

    def alone(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, w3: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(F.conv2d(x, w1), w2, None, case.stride, case.kernel // 2, 1, case.expanded)
        return F.conv2d(y, w3)

    yield Peer("eager", _residual(case), lay_out)
    yield Peer("cuDNN alone", alone, lay_out, part=_without_search(alone))


def _copied(case: ConvCase, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """A copy of half as many elements as a convolution reads and writes: of as many bytes, both ways."""
    flat = x.permute(0, 2, 3, 1).reshape(-1)  # as the image lies
    written = case.batch * case.outputs * case.output_size**2
    return flat[: (x.numel() + written) // 2].clone()


def _without_search(function: Function) -> Function:
    """`function` without cuDNN's trying out of algorithms, which costs more than one run in fp32 does."""

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            return function(*inputs)
        finally:
            torch.backends.cudnn.benchmark = search

    return run


# Attention

_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_SCORES = 1 << 28
"""Scores that `exact_attention` holds at once: 2 GiB in float64."""


def _attention(case: AnyAttention) -> Iterator[Peer]:
    causal = isinstance(case, AttentionCase) and case.mask is Mask.CAUSAL
    grouped = isinstance(case, DecodeCase) and case.heads != case.kv_heads

    def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, *mask, is_causal=causal, enable_gqa=grouped)

    def scaled_by(backend: SDPBackend) -> Function:
        def run(*inputs: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled(*inputs)

        return run

    def laid_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if isinstance(case, WindowCase):  # the backends have no other word for it
            seen = _seen(case, q.shape[-2], k.shape[-2], q.device)
            return (q, k, v, torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf")))
        return (q, k, v, *(m.expand(-1, q.shape[1], q.shape[2], -1) for m in mask))

    yield Peer("eager", scaled, laid_out)  # with the backend that PyTorch chooses
    for name, backend in _BACKENDS.items():
        yield Peer(name, scaled_by(backend), laid_out)


def _seen(case: AnyAttention, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """[queries, keys]: which keys a query sees by its position."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if isinstance(case, WindowCase):
        return seen.tril_().triu_(1 - case.window)
    return seen.tril_() if isinstance(case, AttentionCase) and case.mask is Mask.CAUSAL else seen


def exact_attention(
    case: AnyAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention with its scores in memory, a few heads at a time; 0 where every key is masked by −∞."""
    result = torch.empty_like(q)
    queries, keys, sharing = q.shape[-2], k.shape[-2], q.shape[1] // k.shape[1]
    hidden = ~_seen(case, queries, keys, q.device)
    heads = max(1, _SCORES // (queries * keys) // sharing)  # of keys
    for image in range(case.batch):
        for first in range(0, k.shape[1], heads):
            part, asking = slice(first, first + heads), slice(first * sharing, (first + heads) * sharing)
            given, shown = k[image, part].repeat_interleave(sharing, 0), v[image, part].repeat_interleave(sharing, 0)
            scores = (q[image, asking] * case.head**-0.5) @ given.transpose(-1, -2)
            scores.masked_fill_(hidden, float("-inf"))
            if mask is not None:
                scores += mask[image]
            weights = torch.softmax(scores, -1)
            if mask is not None:
                weights.masked_fill_(scores.amax(-1, keepdim=True) == float("-inf"), 0.0)
            result[image, asking] = weights @ shown
    return result


# Packed sequences: q, k and v are [tokens, heads, head], in memory as one projection writes all three, or each dense
# ("apart").


def _varlen(case: VarlenCase) -> Iterator[Peer]:
    longest = int(case.lengths.max())

    def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """What `varlen_attn` calls, which has a launch beside it."""
        arguments = (q, k, v, starts, starts, longest, longest, 0.0, case.causal, False)
        return _as_heads(torch.ops.aten._flash_attention_forward(*arguments)[0])

    def public(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0 if case.causal else -1)
        return _as_heads(varlen_attn(q, k, v, starts, starts, longest, longest, window_size=window))

    def nested(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _as_heads(F.scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2).values())

    def apart(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(part.contiguous() for part in _as_tokens(*inputs))

    def jagged(lay_out: LayOut) -> LayOut:
        """The same as nested tensors, whose longest length is said: looking it up would wait for the device."""

        def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            *parts, starts = lay_out(*inputs)
            limits = {"min_seqlen": int(case.lengths.min()), "max_seqlen": longest}
            offsets = starts.long()
            made = (torch.nested.nested_tensor_from_jagged(part, offsets, **limits) for part in parts)
            return tuple(part.transpose(1, 2) for part in made)

        return run

    yield Peer("varlen_attn", public, _as_tokens)
    yield Peer("flash", flash, _as_tokens)
    yield Peer("flash, apart", flash, apart)
    yield Peer("jagged", nested, jagged(_as_tokens))
    yield Peer("jagged, apart", nested, jagged(apart))


def _as_tokens(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[1, heads, tokens, head] as [tokens, heads, head]; what follows q, k and v as it is."""
    return (*(part[0].transpose(0, 1) for part in inputs[:3]), *inputs[3:])


def _as_heads(result: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head] as [1, heads, tokens, head]."""
    return result.transpose(0, 1)[None]


def exact_varlen(
    case: VarlenCase, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """Each sequence on its own, in float64."""
    result = torch.empty_like(q, dtype=torch.float64)
    for begin, end in pairwise(starts.tolist()):
        given, shown, asking = (part[0, :, begin:end].double() for part in (k, v, q))
        scores = (asking * case.head**-0.5) @ given.transpose(-1, -2)
        if case.causal:
            hidden = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).triu_(1)
            scores.masked_fill_(hidden, float("-inf"))
        result[0, :, begin:end] = torch.softmax(scores, -1) @ shown
    return result


# Light operators


def _light(case: LightCase) -> Function:
    match case.kind:
        case Kind.LAYER_NORM_RESIDUAL:
            return lambda x, scale, shift, r: F.layer_norm(x + r, x.shape[-1:], scale, shift, 1e-12)
        case Kind.RMS_NORM:
            return lambda x, scale: F.rms_norm(x, x.shape[-1:], scale, 1e-6)
        case Kind.SOFTMAX:
            return lambda x: torch.softmax(x, -1)
        case Kind.BIAS_GELU:
            return lambda x, bias: F.gelu(x + bias)
        case Kind.GLOBAL_MEAN:
            return lambda x: x.mean((2, 3))
        case Kind.MAX_POOL:
            return lambda x: F.max_pool2d(x, 3, 2, 1)
