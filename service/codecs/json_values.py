"""The `data` of a JSON tensor → an array, exactly: nesting, kinds and ranges must fit, and what does not is named by
its place and value.

Called by `tensors.py`; `shown` also by other codecs. The way through good data is whole-list calls only; places are
looked for once something is known to be wrong. Data of a long body comes as text and is read in pieces.
"""

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.codecs.body import NotJson, parse_elements
from service.codecs.finite import count_non_finite
from service.codecs.long_json import LongArray, NotInJson, Uneven
from service.errors import InvalidRequest
from service.record import record

_MAX_SHOWN = 40
_FLOATS = {"FP32": "f", "FP64": "d"}  # those that JSON data can have, and the array module's name of each


@record
class JsonTensor:
    """What is due: the input's name, the protocol's datatype and the dtype behind it, the shape that was claimed."""

    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def array(self, data: Any) -> NDArray[Any]:
        """`data`, flat and row-major or nested like the shape, as an array. Raises InvalidRequest."""
        if type(data) is not list:
            if type(data) is LongArray:
                return self._read(data)
            raise self._error(f"'data' is {shown(data)}; send a list")
        types = set(map(type, data))
        nested = list in types
        flat = data
        if nested:
            flat = self._flat(data)
            types = set(map(type, flat))
        self._check_count(len(flat))
        return self._values(flat, types, nested).reshape(self.shape)

    def _check_count(self, count: int) -> None:
        if count != math.prod(self.shape):
            wanted = f"its shape {list(self.shape)} holds {math.prod(self.shape)}"
            raise self._error(f"'data' has {count} elements; {wanted}")

    def _values(self, flat: list[Any], types: set[type], nested: bool, first: int = 0) -> NDArray[Any]:
        """Elements of these types, which lie one after the other from the one at `first`, as a flat array."""
        proper = _proper(self.datatype, self.dtype)
        if not types <= proper.kinds:
            raise self._wrong(flat, nested, first, lambda value: type(value) not in proper.kinds, proper.words)
        if self.datatype == "BYTES":
            return np.array(flat, object)
        if self.dtype.kind in "iu" and (min(flat) < proper.low or max(flat) > proper.high):
            raise self._wrong(flat, nested, first, lambda value: not proper.low <= value <= proper.high, proper.words)
        code = _FLOATS.get(self.datatype)
        if code is None:
            return np.array(flat, self.dtype)
        values = np.frombuffer(array(code, flat), self.dtype)  # what is out of range becomes infinite without a word
        if count_non_finite(values):
            raise self._wrong(flat, nested, first, lambda value: not abs(value) <= proper.high, proper.words)
        return values

    def _read(self, data: LongArray) -> NDArray[Any]:
        """The same of what is still text."""
        nested = data.depth > 1
        if nested and data.depth != len(self.shape):
            raise self._error(f"'data' is nested {data.depth} levels deep, but the shape is {list(self.shape)}")
        self._check_count(data.count)
        out, first = np.empty(data.count, self.dtype), 0
        try:
            for text, count in data.pieces(self.shape if nested else (data.count,)):
                elements = parse_elements(text)
                if len(elements) != count:
                    raise NotInJson("an element is missing")
                out[first : first + count] = self._values(elements, set(map(type, elements)), nested, first)
                first += count
        except NotInJson as error:
            raise InvalidRequest(
                f"the body is not JSON: {error}, at element {first} of input '{self.name}' or soon after it"
            ) from None
        except Uneven as error:
            place = self._place(error.index, nested) if error.index < data.count else "its end"
            raise self._error(f"'data' is not nested like the shape {list(self.shape)} at {place}") from None
        return out.reshape(self.shape)

    def _flat(self, data: list[Any]) -> list[Any]:
        """The elements of data that is nested, which must be nested like the shape all the way down."""
        level = [data]
        for extent in self.shape:
            if set(map(type, level)) != {list} or set(map(len, level)) != {extent}:
                raise self._error(_unevenness(data, self.shape, 0, "data"))
            level = list(chain.from_iterable(level))
        if list in set(map(type, level)):
            raise self._error(_unevenness(data, self.shape, 0, "data"))
        return level

    def _wrong(
        self, flat: list[Any], nested: bool, first: int, is_wrong: Callable[[Any], bool], expected: str
    ) -> InvalidRequest:
        """The error for the first element that is wrong."""
        index = next(i for i, value in enumerate(flat) if is_wrong(value))
        place = self._place(first + index, nested)
        return self._error(f"{place} is {shown(flat[index])}; {self.datatype} takes {expected}")

    def _place(self, index: int, nested: bool) -> str:
        return "data" + ("".join(f"[{i}]" for i in np.unravel_index(index, self.shape)) if nested else f"[{index}]")

    def _error(self, text: str) -> InvalidRequest:
        return InvalidRequest(f"input '{self.name}': {text}")


@dataclass(frozen=True, slots=True)
class _Proper:
    """What a datatype takes: the Python types that JSON makes of it, its range, all of it in words."""

    kinds: frozenset[type]
    words: str
    low: float = 0
    high: float = 0


@cache
def _proper(datatype: str, dtype: np.dtype[Any]) -> _Proper:
    if datatype == "BOOL":
        return _Proper(frozenset({bool}), "true or false")
    if datatype == "BYTES":
        return _Proper(frozenset({str}), "strings")
    if dtype.kind == "f":
        most = float(np.finfo(dtype).max)
        words = f"numbers from {-most:.3g} to {most:.3g} (NaN and infinity come as binary data only)"
        return _Proper(frozenset({int, float}), words, -most, most)
    limits = np.iinfo(dtype)
    words = f"integers from {limits.min} to {limits.max}"
    return _Proper(frozenset({int}), words, int(limits.min), int(limits.max))


def _unevenness(data: Any, shape: tuple[int, ...], axis: int, place: str) -> str:
    """Where nested data first differs from a shape, in words; empty if nowhere."""
    if axis == len(shape):
        return f"{place} is a list, but the shape {list(shape)} has no more axes" if type(data) is list else ""
    due = f"the shape {list(shape)} has {shape[axis]} there"
    if type(data) is not list:
        return f"{place} is {shown(data)}, but {due}: nest all of the data like the shape, or none of it"
    if len(data) != shape[axis]:
        return f"{place} has {len(data)} entries, but {due}"
    return next(filter(None, (_unevenness(item, shape, axis + 1, f"{place}[{i}]") for i, item in enumerate(data))), "")


def shown(value: Any) -> str:
    """A JSON value in an error message."""
    if isinstance(value, NotJson):
        return _cut(value.text)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = _cut(repr(value))
    return f"the string {text}" if isinstance(value, str) else text


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"
