"""The frontend: an .onnx file becomes a `Graph`. `engine.load` and tests call `read`; no other part knows ONNX.

reader.py      file → checked ModelProto       operators/    one function per ONNX operator
tensors.py     TensorProto → array             foreign.py    operators without one: ONNX's definition, or Opaque
translate.py   ModelProto → Graph              content.py    sizes and small constants, known while reading
builder.py     adds IR nodes                   grid.py       tensors whose elements follow from their positions
registry.py    operator name → function        elements.py   arithmetic on sizes
onnx_node.py   what operator functions get     bounds.py     what is certain about sizes
formula.py     point-wise formulas             unify.py      which symbols are one size
"""

from __future__ import annotations

import os

import onnx

from engine.errors import EngineError, ModelError
from engine.frontend.reader import ModelInfo, describe, load
from engine.frontend.tensors import Source
from engine.frontend.translate import Translator
from engine.frontend.unify import unify
from engine.ir.graph import Graph

__all__ = ["ModelInfo", "read", "read_model"]

_ROUNDS = 4  # readings until the symbols settle; two are usual


def read(source: str | os.PathLike[str] | bytes) -> Graph:
    """The graph of an ONNX model, given as a path or as the file's bytes (then without external data).

    Raises ModelError for files that are damaged or outside the limits, UnsupportedOp for what the engine cannot run.
    """
    return read_model(source)[0]


def read_model(source: str | os.PathLike[str] | bytes) -> tuple[Graph, ModelInfo]:
    """The graph of an ONNX model, and what the file says about itself."""
    model, origin = load(source)
    try:
        return _translated(model, origin), describe(model)
    except EngineError:
        raise
    except Exception as error:  # what no check foresaw, such as a name that is not text
        raise ModelError(f"{origin.label}: cannot be read, the file is damaged: {error}") from error


def _translated(model: onnx.ModelProto, origin: Source) -> Graph:
    renames: dict[str, str] = {}
    for _ in range(_ROUNDS):
        translator = Translator(model, origin, renames)
        graph = translator.run()
        settled = unify(graph.inputs, translator.builder.equal_symbols, renames)
        if settled == renames:
            break
        renames = settled
    return graph
