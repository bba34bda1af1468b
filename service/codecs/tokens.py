"""Texts or token ids → model inputs, and per-token outputs → one vector per sentence.

Called by the tokens and the embeddings routes (long texts on the preprocessing threads). Texts are cut to `max_length`
tokens; ids that the client counted itself are never cut but refused when they are too many.
"""

import math
import os
from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.codecs.json_values import shown
from service.errors import InvalidRequest, TooLarge
from service.model_config import Pooling, TokensConfig
from service.record import record
from service.workers.messages import LocalTensor, NamedTensors, TensorInfo

# The service has threads of its own; a second pool inside the tokenizer would fight them for the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

_DEFAULT_MAX_LENGTH = 512
_LEAST_NORM = 1e-12
_LARGEST_KEPT, _MOST_KEPT = 512, 2048  # elements of an array of ones or zeros that is made once; such arrays
_MAX_ID = (1 << 31) - 1


class _Role(Enum):
    """What an input is for; the value has the names that such inputs are called."""

    IDS = ("input_ids", "ids", "tokens")
    MASK = ("attention_mask", "input_mask", "mask")
    TYPES = ("token_type_ids", "segment_ids")
    POSITIONS = ("position_ids",)


@record
class TokenBatch:
    """Token inputs of one request: tensors of (rows, longest row), and the tokens of each row."""

    inputs: NamedTensors
    lengths: tuple[int, ...]


class TokenCodec:
    """Tokenizer and input names of one model."""

    def __init__(self, inputs: Sequence[TensorInfo], config: TokensConfig, tokenizer: Path | None) -> None:
        """Raises ValueError if the inputs are not those of a token model or the tokenizer file cannot be read."""
        problem = not_tokens(inputs)
        if problem:
            raise ValueError(problem)
        roles = [(spec, _role(spec.name, len(inputs))) for spec in inputs]
        self._inputs = [(spec.name, role, spec.dtype) for spec, role in roles if role is not None]
        self._masks = {name for name, role, _ in self._inputs if role is _Role.MASK}
        self._tokenizer = _read_tokenizer(tokenizer) if tokenizer is not None else None
        self.max_length = config.max_length or self._cut_of_tokenizer() or _DEFAULT_MAX_LENGTH
        for spec in inputs:
            fixed = spec.shape[1]
            if isinstance(fixed, int):
                self.max_length = min(self.max_length, fixed)
        self.fixed_length = next((dim for spec in inputs for dim in spec.shape[1:] if isinstance(dim, int)), None)
        self._vocabulary: int | None = None
        if self._tokenizer is not None:
            self._vocabulary = self._tokenizer.get_vocab_size(with_added_tokens=True)
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.max_length)

    def _cut_of_tokenizer(self) -> int | None:
        cut = self._tokenizer.truncation if self._tokenizer is not None else None
        return int(cut["max_length"]) if cut else None

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to `max_length`. Raises InvalidRequest."""
        if self._tokenizer is None:
            raise InvalidRequest("this model has no tokenizer.json; send token ids")
        try:
            rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        except Exception as error:  # the tokenizers library raises bare Exception
            raise InvalidRequest(f"the text cannot be tokenized: {str(error)[:200]}") from None
        for position, row in enumerate(rows):
            if not row:
                raise InvalidRequest(f"text {position} has no tokens")
        return rows

    def batch(self, rows: Sequence[Sequence[int]]) -> TokenBatch:
        """Tensors for checked rows of ids. Raises InvalidRequest naming an id that is out of range."""
        lengths = tuple(map(len, rows))
        longest = max(lengths)
        if longest > self.max_length:
            position, length = next((i, length) for i, length in enumerate(lengths) if length > self.max_length)
            raise InvalidRequest(f"row {position} has {length} tokens; the model takes at most {self.max_length}")
        if self._vocabulary is not None and max(map(max, rows)) >= self._vocabulary:
            raise _beyond(self._vocabulary, rows)
        padding = _Padding(lengths, longest if self.fixed_length is None else self.fixed_length)
        tensors = [(name, LocalTensor(padding.values(role, rows, dtype))) for name, role, dtype in self._inputs]
        return TokenBatch(tuple(tensors), lengths)

    def check_masks(self, tensors: Sequence[tuple[str, NDArray[Any]]]) -> None:
        """Inputs that a client made itself: a mask has ones and zeros. Raises InvalidRequest."""
        for name, values in tensors:
            if name not in self._masks or values.dtype.kind == "b":
                continue
            wrong = (values != 0) & (values != 1)
            if wrong.any():
                place = tuple(np.argwhere(wrong)[0].tolist())
                raise InvalidRequest(
                    f"input '{name}': the element at {list(place)} is {values[place]}; "
                    "this mask has 1 for each token and 0 for padding"
                )


@record
class _Padding:
    """Rows of these lengths in the width that all get."""

    lengths: tuple[int, ...]
    width: int

    def values(self, role: _Role, rows: Sequence[Sequence[int]], dtype: np.dtype[Any]) -> NDArray[Any]:
        """(rows, width): the input with this role. Most requests are one row, which nothing is added to."""
        shape = len(rows), self.width
        if role is _Role.TYPES:
            return _constant(np.zeros, shape, dtype)
        is_even = min(self.lengths) == self.width
        if role is _Role.IDS:
            return (np.array(rows, np.int64) if is_even else self._padded(rows)).astype(dtype, copy=False)
        if role is _Role.MASK and is_even:
            return _constant(np.ones, shape, dtype)
        places = np.arange(self.width)
        mask = places < np.array(self.lengths)[:, None]
        return (mask if role is _Role.MASK else places * mask).astype(dtype)

    def _padded(self, rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        ids = np.zeros((len(rows), self.width), np.int64)
        for position, row in enumerate(rows):
            ids[position, : len(row)] = row
        return ids


def _constant(make: Callable[..., NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array that nobody writes to, of ones or zeros."""
    return _kept(make, shape, dtype) if math.prod(shape) <= _LARGEST_KEPT else make(shape, dtype)


@lru_cache(_MOST_KEPT)
def _kept(make: Callable[..., NDArray[Any]], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    values = make(shape, dtype)
    values.flags.writeable = False
    return values


def _beyond(vocabulary: int, rows: Sequence[Sequence[int]]) -> InvalidRequest:
    """The error for the first id that the vocabulary does not have."""
    for position, row in enumerate(rows):
        for column, found in enumerate(row):
            if found >= vocabulary:
                return InvalidRequest(
                    f"token id {found} at position {column} of row {position} is out of range; "
                    f"the vocabulary has {vocabulary} tokens, 0 to {vocabulary - 1}"
                )
    raise ValueError("every id is in the vocabulary")


def not_tokens(inputs: Sequence[TensorInfo]) -> str:
    """Why the service cannot make the inputs of a model from token ids; empty where it can."""
    for spec in inputs:
        shape = ", ".join(map(str, spec.shape))
        if len(spec.shape) != 2 or spec.dtype.kind not in "iufb":
            return f"input '{spec.name}' is {_kind(spec)} [{shape}], but tokens are numbers [batch, sequence]"
        if _role(spec.name, len(inputs)) is None:
            known = ", ".join(name for role in _Role for name in role.value)
            return f"nothing is known to put into input '{spec.name}'; the inputs of token models are called {known}"
    if not any(_role(spec.name, len(inputs)) is _Role.IDS for spec in inputs):
        return f"no input is for the token ids; it is called {' or '.join(_Role.IDS.value)}"
    return ""


def _kind(spec: TensorInfo) -> str:
    return "strings" if spec.dtype == object else str(spec.dtype)


def _role(name: str, inputs: int) -> _Role | None:
    for role in _Role:
        if name in role.value:
            return role
    return _Role.IDS if inputs == 1 else None


def _read_tokenizer(path: Path) -> Any:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(f"{path.name}: cannot be read: {str(error)[:200]}; copy the model's own file") from None


def check_texts(value: Any, name: str, max_inputs: int, max_bytes: int) -> list[str]:
    """A list of non-empty strings within the limits. Raises InvalidRequest, TooLarge."""
    texts = _check_list(value, name, max_inputs)
    size = 0
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequest(f"{name}[{position}] is {shown(text)}; send a string")
        if not text:
            raise InvalidRequest(f"{name}[{position}] is empty; send some text")
        size += len(text)
    # Only where the characters do not tell are the bytes counted: UTF-8 has one to four for each.
    if 4 * size > max_bytes and sum(len(text.encode("utf-8", "replace")) for text in texts) > max_bytes:
        raise TooLarge(f"the text is larger than {max_bytes} bytes; send it in parts")
    return texts


def check_ids(value: Any, name: str, max_inputs: int) -> list[list[int]]:
    """A list of non-empty lists of integers from 0 to 2^31 - 1, of any lengths. Raises InvalidRequest."""
    rows = _check_list(value, name, max_inputs)
    for position, row in enumerate(rows):
        if not isinstance(row, list):
            raise InvalidRequest(f"{name}[{position}] is {shown(row)}; send a list of token ids")
        if not row:
            raise InvalidRequest(f"{name}[{position}] is empty; send at least one token id")
        if set(map(type, row)) != {int} or min(row) < 0 or max(row) > _MAX_ID:
            column, token = next((i, token) for i, token in enumerate(row) if not _is_id(token))
            what = f"{name}[{position}][{column}] is {shown(token)}"
            raise InvalidRequest(f"{what}; token ids are integers from 0 to {_MAX_ID}")
    return rows


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_ID


def _check_list(value: Any, name: str, max_inputs: int) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRequest(f"'{name}' is {shown(value)}; send a list")
    if not value:
        raise InvalidRequest(f"'{name}' is empty; send at least one entry")
    if len(value) > max_inputs:
        raise TooLarge(f"'{name}' has {len(value)} entries; the limit is {max_inputs}")
    return value


def pool(vectors: NDArray[Any], lengths: Sequence[int], pooling: Pooling, normalize: bool) -> NDArray[np.float32]:
    """Sentence vectors (rows, hidden) from per-token ones (rows, tokens, hidden), or from (rows, hidden) as they are.

    `lengths` are the tokens of each row; what lies beyond them does not count. `normalize` scales each vector to length
    1 (a zero vector stays zero).
    """
    values: NDArray[Any] = vectors.astype(np.float32, copy=False)
    if values.ndim == 3:
        values = _means(values, lengths) if pooling is Pooling.MEAN else values[:, 0]
    if normalize:
        values = _of_length_1(values)
    return np.ascontiguousarray(values, np.float32)


def _means(values: NDArray[np.float32], lengths: Sequence[int]) -> NDArray[np.float32]:
    rows, width = values.shape[:2]
    if min(lengths) >= width:
        weights = _constant(np.ones, (rows, 1, width), np.dtype(np.float32))
    else:
        weights = (np.arange(width) < np.array(lengths)[:, None]).astype(np.float32)[:, None]
    sums: NDArray[np.float32] = np.matmul(weights, values)[:, 0]
    counts: NDArray[np.float32] | np.float32 = np.float32(lengths[0])
    if rows > 1:
        counts = np.array(lengths, np.float32)[:, None]
    means: NDArray[np.float32] = sums / counts
    return means


def _of_length_1(values: NDArray[np.float32]) -> NDArray[np.float32]:
    squares: NDArray[np.float32] = np.add.reduce(values * values, axis=1, keepdims=True)
    square = float(squares[0, 0])
    unit: NDArray[np.float32]
    if len(values) == 1 and 0 < square < math.inf:  # most requests are one row
        unit = values / np.float32(max(math.sqrt(square), _LEAST_NORM))
        return unit
    with np.errstate(invalid="ignore"):  # of values that are not finite; the routes look for what comes of them
        norms: NDArray[np.float32] = np.maximum(np.sqrt(squares), np.float32(_LEAST_NORM))
        unit = values / norms
    return unit
