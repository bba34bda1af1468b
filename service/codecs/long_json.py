"""Long JSON bodies: bounded before anything of them becomes a Python object, and read in pieces.

A parser makes eight to fifty bytes of objects of each byte of JSON, and holds the interpreter until it is done: 64 MiB
would take a gigabyte, and stop the server for seconds, whatever thread it is on. But nearly all of a long body is the
numbers of a tensor. `outline` finds them without parsing: what is left is bounded and parsed as any body; the numbers
stay text, a `LongArray`, until `json_values.py` knows what they are to be, and become an array of that, a piece of
64 KiB at a time.

Called by `body.py`; on the preprocessing threads only. Nothing here holds the interpreter for more than a few
milliseconds.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import InvalidRequest, TooLarge

MOST_VALUES = 1 << 20
"""Keys and values of a body, without the numbers of long tensors; strings count twice. As many as the token ids of
2,048 rows of 512. orjson makes them in 40 ms, of 60 MB at most."""

LARGEST_OUTLINE = 16 << 20
"""Bytes that are parsed at once; orjson reads as many of a string in 20 ms."""

_PIECE = 64 << 10
_WINDOW = 1 << 20  # bytes that are searched at a time, which takes half a millisecond
_LONG = 4 << 10  # bytes; shorter arrays are no trouble
_NEAR = 64  # bytes between a key and its array
_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*\[')
_OPENING = re.compile(rb"\[[ \t\r\n\[]*")
_SEPARATORS = (b",", b":", b"[", b"{")  # each value and each key has one before it, but the first
_BACKSLASH = ord("\\")

Bytes = bytes | bytearray
Document = dict[str, Any]


class NotInJson(Exception):
    """A piece of an array that is no JSON."""


class Uneven(Exception):
    """An array is not nested like its shape, from about the element at `index` (row-major)."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


# ---- the numbers


@dataclass(frozen=True)
class LongArray:
    """An array of a JSON text: bytes `start` to `end`, brackets included. It has neither strings nor objects in it;
    what is wrong with it otherwise comes out as it is read."""

    text: Bytes
    start: int
    end: int

    @cached_property
    def count(self) -> int:
        """Elements, of all levels together."""
        return _count(self.text, b",", self.start, self.end) + 1

    @cached_property
    def depth(self) -> int:
        """Levels of nesting."""
        opening = _OPENING.match(self.text, self.start, min(self.start + _WINDOW, self.end))
        return opening.group().count(b"[") if opening is not None else 0

    def pieces(self, shape: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """The elements without brackets, row-major, as JSON that has commas between them, and how many those are.
        `shape` is that of the nesting, (count,) where there is none. Raises Uneven, NotInJson."""
        nesting = _Nesting(shape)
        for begin, end in self._cuts():
            last = end == self.end
            piece = bytes(self.text[begin : end + (not last)])
            if len(shape) == 1 and self.start < begin and not last and b"[" not in piece and b"]" not in piece:
                count = nesting.pass_over(piece.count(b","))
            else:
                count = nesting.follow(np.frombuffer(piece, np.uint8), last)
            yield piece[: end - begin].translate(_WITHOUT_BRACKETS), count

    def _cuts(self) -> Iterator[tuple[int, int]]:
        begin = self.start
        while begin < self.end:
            end = self.end
            if end - begin > _PIECE:
                end = self.text.rfind(b",", begin, begin + _PIECE)
                if end < 0:
                    raise NotInJson(f"there are {_PIECE} bytes without a comma")
            yield begin, end
            begin = end + 1


_WITHOUT_BRACKETS = bytes.maketrans(b"[]", b"  ")
_NUMBER, _BLANK, _COMMA, _OPEN, _CLOSE = range(5)
_KINDS = np.full(256, _NUMBER, np.uint8)
_KINDS[list(b" \t\r\n")] = _BLANK
_KINDS[ord(",")], _KINDS[ord("[")], _KINDS[ord("]")] = _COMMA, _OPEN, _CLOSE
_STEPS = np.array([0, 0, 0, 1, -1], np.int8)  # of the depth, by kind


class _Nesting:
    """Whether brackets are where those of an array with this shape are: elements lie at the last level, and between two
    of them the comma lies as many levels higher as rows end there, with no other brackets about."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = shape
        self._rows = tuple(accumulate(shape[:0:-1], lambda size, extent: size * extent))
        self._depth = self._seen = 0
        self._brackets = len(shape)  # that are due and have not come

    def pass_over(self, count: int) -> int:
        """So many elements of one level, which is right."""
        self._seen += count
        return count

    def follow(self, codes: NDArray[np.uint8], last: bool) -> int:
        """The elements in the next piece, which ends with a comma unless it is the last one. Raises Uneven."""
        rank = len(self._shape)
        kinds = _KINDS[codes]
        depth = self._depth + np.cumsum(_STEPS[kinds], dtype=np.int32)
        (commas,) = np.nonzero(kinds == _COMMA)
        following = self._seen + 1 + np.arange(len(commas))  # the element after each
        ends = np.zeros(len(commas), np.int64)
        for row in self._rows:
            ends += following % row == 0
        wrong = (kinds == _NUMBER) & (depth != rank)
        wrong[commas] = depth[commas] != rank - ends
        self._brackets += int(ends.sum()) - int((kinds == _OPEN).sum())
        if wrong.any():
            raise Uneven(self._seen + int(np.searchsorted(commas, np.argmax(wrong))))
        self._depth = int(depth[-1])
        self._seen += len(commas)
        if last and (self._depth or self._brackets):
            raise Uneven(self._seen)
        return len(commas) + last


# ---- the rest


def outline(text: Bytes) -> tuple[bytes, Callable[[Document], Document]]:
    """The text with names in the places of long arrays under the key `data`, and the function that puts them into the
    inputs of what is parsed of it. Raises TooLarge where the rest is too much to be parsed."""
    found = _Outline(text)
    found.read()
    return b"".join(found.parts), found.put_back


class _Outline:
    def __init__(self, text: Bytes) -> None:
        self._text = text
        self._values = self._size = 0
        self._kept = 0  # up to where the text is in `parts`
        self._name = secrets.token_hex(16)  # nobody knows, so nobody writes it into a body
        self._arrays: dict[str, LongArray] = {}
        self.parts: list[bytes] = []

    def read(self) -> None:
        """From string to string."""
        text, at, key = self._text, 0, -1
        while True:
            quote = text.find(b'"', at)
            end = quote if quote >= 0 else len(text)
            gap = end - at
            if gap > _LONG:
                self._read_gap(at, end, key)
            else:
                self._values += gap if gap < len(_SEPARATORS) else self._separators(at, end)
            if self._values > MOST_VALUES:
                raise _too_many()
            if quote < 0:
                self._keep_to(end)
                return
            at = text.find(b'"', quote + 1) + 1
            if not at or text[at - 2] == _BACKSLASH:
                at = self._end_of_string(quote)
            self._values += 1
            key = quote

    def _read_gap(self, at: int, end: int, key: int) -> None:
        """What is between two strings, and long: an array perhaps that the key at `key` has."""
        opening = _DATA.match(self._text, key, min(key + _NEAR, end)) if key >= 0 else None
        if opening is not None:
            brace = self._text.find(b"}", at, end)
            start, stop = opening.end() - 1, self._text.rfind(b"]", at, end if brace < 0 else brace) + 1
            if stop - start > _LONG:
                name = f"{self._name}{len(self._arrays)}"
                self._arrays[name] = LongArray(self._text, start, stop)
                self._keep_to(start)
                self._keep(f'"{name}"'.encode())
                self._kept = at = stop
        self._keep_to(at)
        for begin in range(at, end, _PIECE):
            stop = min(begin + _PIECE, end)
            self._values += self._separators(begin, stop)
            if self._values > MOST_VALUES:
                raise _too_many()
            self._keep(_squeezed(bytes(self._text[begin:stop])))
        self._kept = end

    def _separators(self, begin: int, end: int) -> int:
        return sum(self._text.count(separator, begin, end) for separator in _SEPARATORS)

    def _keep_to(self, end: int) -> None:
        """The text as it is."""
        self._check_size(end - self._kept)
        self._keep(bytes(self._text[self._kept : end]))
        self._kept = end

    def _keep(self, part: bytes) -> None:
        self._check_size(len(part))
        self._size += len(part)
        self.parts.append(part)

    def _check_size(self, more: int) -> None:
        if self._size + more > LARGEST_OUTLINE:
            raise TooLarge(
                f"the body has more than {LARGEST_OUTLINE} bytes of JSON beside the numbers of its tensors; "
                "send strings as binary data, or in parts"
            )

    def _end_of_string(self, quote: int) -> int:
        """Where what follows the string begins that begins at `quote`."""
        text, at = self._text, quote
        while (at := text.find(b'"', at + 1)) >= 0:
            if text[at - 1] != _BACKSLASH or not self._is_escaped(at):
                return at + 1
            self._values += 1  # so that many of them are no way to make this take long
            if self._values > MOST_VALUES:
                raise _too_many()
        return len(text)

    def _is_escaped(self, at: int) -> bool:
        """Whether an odd number of backslashes is before `at`."""
        end = at
        while True:
            tail = self._text[max(end - _LONG, 0) : end]
            kept = tail.rstrip(b"\\")
            end -= len(tail) - len(kept)
            if kept or not tail:
                return (at - end) % 2 == 1

    def put_back(self, document: Document) -> Document:
        """The arrays into the inputs. Those that are elsewhere mean nothing, but have to be JSON."""
        others = dict(self._arrays)
        inputs = document.get("inputs")
        for tensor in inputs if isinstance(inputs, list) else ():
            data = tensor.get("data") if isinstance(tensor, dict) else None
            if isinstance(data, str) and data in others:
                tensor["data"] = others.pop(data)
        for array in others.values():
            self._values += array.count
            if self._values > MOST_VALUES:
                raise _too_many()
            try:
                orjson.loads(bytes(self._text[array.start : array.end]))
            except orjson.JSONDecodeError as error:
                raise InvalidRequest(f"the body is not JSON: {error.msg} in an array under a key 'data'") from None
        return document


def _too_many() -> TooLarge:
    return TooLarge(
        f"the body has more than {MOST_VALUES} JSON values beside the numbers of its tensors (strings count twice); "
        "send it in parts, or tensors as binary data"
    )


def _squeezed(text: bytes) -> bytes:
    """The same JSON, with one blank in the place of many."""
    if b"\x0b" in text or b"\x0c" in text:  # blanks to Python, not to JSON
        return text
    first, last = text[:1].isspace(), text[-1:].isspace()
    return b" " * first + b" ".join(text.split()) + b" " * last


def _count(text: Bytes, sought: bytes, start: int, end: int) -> int:
    return sum(text.count(sought, at, min(at + _WINDOW, end)) for at in range(start, end, _WINDOW))
