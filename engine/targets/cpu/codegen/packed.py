"""Attention over sequences of different lengths that lie one after the other: which blocks a task computes.

The blocks are those of `flash.py`. What is where is known only when the kernel runs, from `starts`, so tasks are cut by
what the host does know: a task is one head and the tiles of queries that begin in a window of WINDOW tokens. It finds
the sequence of its first token by bisection and goes on from sequence to sequence. Tiles are counted from the start of
their sequence, so many short sequences fill one task, a long one is spread over many, and every tile belongs to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.targets.cpu.codegen.emit import Int, Value
from engine.targets.cpu.codegen.flash import AttentionSpec, Block, Place
from engine.targets.cpu.kernel import KernelBuilder, KernelSpec

WINDOW = 64  # tokens: the widest tile, and enough that finding the first sequence does not count
_START = 4  # bytes


@dataclass(frozen=True)
class PackedAttentionSpec(KernelSpec):
    """`blocks`: how a block of queries is computed; it has no bias."""

    blocks: AttentionSpec
    family: ClassVar[str] = "attention"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("heads", "tokens", "sequences", "starts", "starts.stride", *self.blocks.block_parameters)

    def emit(self, kernel: KernelBuilder) -> None:
        _Window(self.blocks, kernel).emit()


class _Window:
    """Writes the code for one task."""

    def __init__(self, spec: AttentionSpec, kernel: KernelBuilder) -> None:
        self.spec, self.b = spec, kernel
        self.width = spec.max_vectors * spec.isa.lanes

    def emit(self) -> None:
        b = self.b
        self.tokens, self.sequences, heads = b.integer("tokens"), b.integer("sequences"), b.integer("heads")
        self.starts, self.stride = b.pointer("starts"), b.integer("starts.stride")
        self.head = b.rem(b.task, heads)
        self.first = b.mul(b.div(b.task, heads), WINDOW)
        self.stop = b.smin(b.add(self.first, WINDOW), self.tokens)
        b.branch(b.compare("sgt", self.sequences, 0), lambda: _none(b.repeat(self._sequence, [self._bisect()])))
        self._rest()

    def _start(self, sequence: Int) -> Int:
        """Where a sequence starts; what makes no sense is cut to the tokens there are."""
        b = self.b
        narrow = b.load("i32", b.offset(self.starts, b.mul(sequence, self.stride)), _START)
        return b.smax(b.smin(b.convert("sext", narrow, "i64"), self.tokens), 0)

    def _bisect(self) -> Value:
        """The last sequence that starts no later than the window."""
        b = self.b

        def halve(limits: list[Value]) -> tuple[Value, list[Value]]:
            low, high = limits
            middle = b.i64(b.div(b.add(low, high), 2))
            before = b.compare("sle", self._start(middle), self.first)
            low, high = b.select(before, middle, low), b.select(before, high, middle)
            return b.compare("sgt", b.sub(high, low), 1), [low, high]

        return b.repeat(halve, [b.i64(0), self.sequences])[0]

    def _sequence(self, carried: list[Value]) -> tuple[Value, list[Value]]:
        """The tiles of one sequence that begin in the window; whether another one does, too."""
        b, (sequence,) = self.b, carried
        following = b.i64(b.add(sequence, 1))
        origin, end = self._start(sequence), self._start(following)
        length = b.smax(b.sub(end, origin), 0)
        begin, stop = (self._whole_tiles(b.sub(limit, origin)) for limit in (self.first, self.stop))
        stop = b.smin(stop, length)

        def block(at: list[Value]) -> tuple[Value, list[Value]]:
            after = b.add(at[0], self._block(origin, at[0], length, b.sub(stop, at[0])))
            return b.compare("slt", after, stop), [b.i64(after)]

        b.branch(b.compare("slt", begin, stop), lambda: _none(b.repeat(block, [b.i64(begin)])))
        inside = b.compare("slt", self._start(following), self.stop)
        return b.binary("and", b.compare("slt", following, self.sequences), inside), [following]

    def _whole_tiles(self, distance: Int) -> Int:
        """The first place, counted from the start of a sequence, that begins a tile `distance` tokens on or later."""
        b = self.b
        return b.mul(b.div(b.add(b.smax(distance, 0), self.width - 1), self.width), self.width)

    def _block(self, origin: Int, first: Int, length: Int, left: Int) -> Value:
        """The next block of at most `left` queries, as wide as it can be without an empty vector; its width."""
        b, spec = self.b, self.spec
        place = Place(0, self.head, origin, first, length, length)

        def variant(vectors: int) -> list[Value]:
            def emit() -> list[Value]:
                Block(spec, b, vectors, place).emit()
                return [b.i64(vectors * spec.isa.lanes)]

            if vectors == 1:
                return emit()
            fills = b.compare("sgt", left, (vectors - 1) * spec.isa.lanes)
            return b.branch(fills, emit, lambda: variant(vectors // 2))

        return variant(spec.max_vectors)[0]

    def _rest(self) -> None:
        """0 for the window's tokens that belong to no sequence."""
        b = self.b
        first = b.smax(self._start(self.sequences), self.first)

        def zeros(at: Value) -> None:
            Block(self.spec, b, 1, Place(0, self.head, 0, at, self.stop, 0)).emit_zeros()

        b.loop(first, self.stop, self.spec.isa.lanes, lambda at, _: zeros(at))


def _none(_: list[Value]) -> None:
    return None
