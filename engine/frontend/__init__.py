"""The frontend: an .onnx file becomes a `Graph`. `engine.load` and tests call `read`; no other part knows ONNX.

reader.py      file → checked ModelProto        operators/   one function per ONNX operator
tensors.py     TensorProto → array              foreign.py   operators without one: ONNX's definition, or Opaque
translate.py   ModelProto → Graph               content.py   sizes and small constants, known while reading
builder.py     adds IR nodes                   grid.py      tensors that follow from their positions
registry.py    operator name → function        elements.py, bounds.py   arithmetic on sizes, and what is certain of it
onnx_node.py   what operator functions get     unify.py     which symbols are one size
formula.py     point-wise formulas
"""

from __future__ import annotations

import os

from engine.frontend.reader import ModelInfo, describe, load
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
    renames: dict[str, str] = {}
    for _ in range(_ROUNDS):
        translator = Translator(model, origin, renames)
        graph = translator.run()
        settled = unify(graph.inputs, translator.builder.equal_symbols, renames)
        if settled == renames:
            break
        renames = settled
    return graph, describe(model)
