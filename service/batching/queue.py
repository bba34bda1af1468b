"""The waiting requests of one model: bounded by cost, ordered by priority then arrival, grouped by what may share a
batch.

Owned by the scheduler, which holds its lock around every call; no thread of its own. A request with rows of several
groups waits as one `Piece` per group; a piece may be taken in parts.
"""

import heapq
import math
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from service.batching.policy import BatchAxes, Shape, bucket_of, capacity, prefix_lengths, width_of
from service.record import record
from service.workers.messages import BatchingMode, BatchingOptions, Infer

Group = tuple[int, tuple[Shape, ...]]

PlanShape = tuple[int, int, int, tuple[Shape, ...]]
"""Rows, width, computed tokens and the shapes of a row of each input: see `Batch`."""


@dataclass(slots=True)
class Entry:
    """A request on the engine side, from its arrival to its last row.

    `lengths` is how far each row reaches, empty for models without a sequence; `tokens` are what of it counts: all, but
    of `packed` rows only what no mask hides. `width` is the longest row, 0 without a sequence; `even` says that all
    rows have that length. Both are found once: a request of many rows is looked at once per batch that holds a part of
    it. `cost_left` is of rows that are in no batch yet, `rows_done` have their results.
    """

    request: Infer
    arrays: dict[str, NDArray[Any]]
    rows: int
    lengths: tuple[int, ...]
    tokens: tuple[int, ...]
    cost: int
    packed: bool = False
    width: int = 0
    even: bool = True
    rows_done: int = 0
    started: float | None = None
    compute_seconds: float = 0.0
    outputs: dict[str, NDArray[Any]] = field(default_factory=dict)
    closed: bool = False
    cost_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.cost_left = self.cost


@dataclass(slots=True)
class Piece:
    """Rows of one entry that belong to one group; `first` of them have been taken already."""

    entry: Entry
    rows: list[int]
    first: int = 0


@record
class Taken:
    """Rows of one entry inside a batch."""

    entry: Entry
    rows: list[int]


@record
class Batch:
    """What one run of the engine computes. `width` is the common length in which rows are handed over; of all its
    `computed` tokens, `tokens` are the rows' own (all three 0 without a sequence). `shapes` are those of a row of each
    input, the sequence left out."""

    parts: tuple[Taken, ...]
    rows: int
    width: int
    tokens: int
    computed: int
    shapes: tuple[Shape, ...]

    @property
    def shape(self) -> PlanShape:
        """What decides which plan of the engine runs it."""
        return self.rows, self.width, self.computed, self.shapes


def make_entry(request: Infer, axes: BatchAxes) -> Entry:
    """Wrap a request; its cost is tokens for sequence models, else rows. Never batched: the whole request is one
    row. Where the model runs packed, a request does not if its mask is of another kind than the engine takes."""
    arrays = {name: handle.view() for name, handle in request.inputs}
    if axes.mode is BatchingMode.NONE:
        return Entry(request, arrays, 1, (), (), 1)
    first = next(iter(arrays.values()))
    rows = int(first.shape[0])
    if axes.sequence is None:
        return Entry(request, arrays, rows, (), (), rows)
    lengths = request.lengths or (int(first.shape[1]),) * rows
    tokens = request.lengths or None
    if axes.mask is not None and not request.lengths:
        tokens = prefix_lengths(arrays[axes.mask])
    packed = axes.mask is not None and tokens is not None
    cost, width = sum(tokens or lengths), max(lengths)
    return Entry(request, arrays, rows, lengths, tokens or lengths, cost, packed, width, min(lengths) == width)


class ModelQueue:
    """The queue of one model."""

    def __init__(self, options: BatchingOptions, axes: BatchAxes) -> None:
        self.options = options
        self.axes = axes
        self.capacity = capacity(options, axes)
        self.cost = 0
        self.earliest_deadline = math.inf
        self.entries: dict[int, Entry] = {}
        self._groups: dict[Group, list[tuple[int, int, Piece]]] = {}
        self._sequence = 0
        self._waits_for_company = options.max_delay_s > 0 and axes.mode is not BatchingMode.NONE
        self._unbatched_axes = 0 if axes.mode is BatchingMode.NONE else 1

    def push(self, entry: Entry) -> None:
        """Add an entry whose cost the scheduler has accepted."""
        self.entries[entry.request.id] = entry
        self.cost += entry.cost
        if entry.request.deadline < self.earliest_deadline:
            self.earliest_deadline = entry.request.deadline
        for group, rows in self._grouped(entry):
            self._sequence += 1
            item = (entry.request.priority, self._sequence, Piece(entry, rows))
            heapq.heappush(self._groups.setdefault(group, []), item)

    def _grouped(self, entry: Entry) -> list[tuple[Group, list[int]]]:
        if not entry.lengths:
            shapes = tuple([array.shape[self._unbatched_axes :] for array in entry.arrays.values()])
            return [((0, shapes), list(range(entry.rows)))]
        shapes = tuple([array.shape[2:] for array in entry.arrays.values()])
        if entry.packed:
            return [((0, shapes), list(range(entry.rows)))]
        grouped: dict[int, list[int]] = {}
        for row, length in enumerate(entry.lengths):
            even = self.axes.mode is BatchingMode.ROWS
            grouped.setdefault(length if even else bucket_of(length, self.options.buckets), []).append(row)
        return [((width, shapes), rows) for width, rows in grouped.items()]

    def remove(self, request_id: int) -> Entry | None:
        """Forget an entry (cancelled, expired, failed); rows in a running batch are dropped when it ends."""
        entry = self.entries.pop(request_id, None)
        if entry is not None:
            entry.closed = True
            self.cost -= entry.cost_left
        return entry

    def expired(self, now: float) -> list[Entry]:
        """Entries past their deadline that have not started; sets `earliest_deadline` to that of the others."""
        waiting = [entry for entry in self.entries.values() if entry.started is None]
        left = (entry.request.deadline for entry in waiting if entry.request.deadline > now)
        self.earliest_deadline = min(left, default=math.inf)
        return [entry for entry in waiting if entry.request.deadline <= now]

    def due(self, now: float) -> float | None:
        """When a batch may start: `now` or earlier if one may at once, None if nothing waits. What waits may have been
        closed, which `take` finds out."""
        if not self._groups or not self._waits_for_company:
            return now if self._groups else None
        return min((self._group_due(group, now) for group in self._waiting()), default=None)

    def _group_due(self, group: Group, now: float) -> float:
        """When a batch of a group may start: at once where it is full, else when its oldest request has waited."""
        pieces = [piece for _, _, piece in self._groups[group] if not piece.entry.closed]
        rows = sum(len(piece.rows) - piece.first for piece in pieces)
        tokens = rows * group[0]
        if pieces[0].entry.packed:  # then a request is one piece
            tokens = sum(piece.entry.cost_left for piece in pieces)
        if rows >= self.options.max_batch or tokens >= self.options.max_tokens:
            return now
        return min(piece.entry.request.arrival for piece in pieces) + self.options.max_delay_s

    def _waiting(self) -> list[Group]:
        """The groups that have something to run; closed pieces in front and empty groups go on the way."""
        for group, heap in list(self._groups.items()):
            while heap and heap[0][2].entry.closed:
                heapq.heappop(heap)
            if not heap:
                del self._groups[group]
        return list(self._groups)

    def _next(self, now: float) -> Group | None:
        """The group whose first piece is the most urgent, of those that are due if any is."""
        groups = self._waiting()
        if len(groups) == 1:
            return groups[0]
        if self._waits_for_company:
            groups = [group for group in groups if self._group_due(group, now) <= now] or groups
        return min(groups, key=lambda group: self._groups[group][0][:2], default=None)

    def take(self, now: float) -> Batch | None:
        """The next batch: the most urgent piece and what fits beside it in its group; None if nothing waits."""
        group = self._next(now)
        if group is None:
            return None
        heap = self._groups[group]
        parts: list[Taken] = []
        room = _Room(self.options, self.axes, heap[0][2].entry.packed)
        while heap:
            piece = heap[0][2]
            entry = piece.entry
            if entry.closed:
                heapq.heappop(heap)
                continue
            before = room.tokens
            taken = room.take(piece)
            if not taken:
                break
            if entry.started is None:
                entry.started = now
            parts.append(Taken(entry, taken))
            cost = room.tokens - before if entry.lengths else len(taken)
            self.cost -= cost
            entry.cost_left -= cost
            piece.first += len(taken)
            if piece.first == len(piece.rows):
                heapq.heappop(heap)
            if self.axes.mode is BatchingMode.NONE:
                break
        computed = self.axes.computed(room.packed, room.rows, room.width, room.tokens)
        return Batch(tuple(parts), room.rows, room.width, room.tokens, computed, group[1])


class _Room:
    """What a batch has so far, and what fits beside it. `longest` is the longest row; rows of a group are all packed,
    or none."""

    __slots__ = ("_axes", "_options", "longest", "packed", "rows", "tokens", "width")

    def __init__(self, options: BatchingOptions, axes: BatchAxes, packed: bool) -> None:
        self._options, self._axes, self.packed = options, axes, packed
        self.rows = self.tokens = self.longest = 0
        self.width = width_of(packed, 0, options, axes)

    def take(self, piece: Piece) -> list[int]:
        """As many rows of `piece`, from its first one, as there is room for."""
        entry = piece.entry
        if not entry.lengths:
            room = max(self._options.max_batch - self.rows, 0 if self.rows else 1)
            taken = piece.rows[piece.first : piece.first + room]
            self.rows += len(taken)
            return taken
        first = end = piece.first
        while end < len(piece.rows):
            row = piece.rows[end]
            if not self._has_taken(entry.lengths[row], entry.tokens[row]):
                break
            end += 1
        return piece.rows[first:end]

    def _has_taken(self, length: int, tokens: int) -> bool:
        """Whether there was room for a row; the first one always has it."""
        rows, longest, width = self.rows + 1, self.longest, self.width
        tokens += self.tokens
        if length > longest:
            longest, width = length, width_of(self.packed, length, self._options, self._axes)
        if rows > 1:
            if rows > self._options.max_batch:
                return False
            most = self._options.max_tokens
            # No run computes more than what it is handed over.
            if rows * width > most and self._axes.computed(self.packed, rows, width, tokens) > most:
                return False
        self.rows, self.longest, self.width, self.tokens = rows, longest, width, tokens
        return True
