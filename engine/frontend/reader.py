"""File or bytes → a checked ModelProto. Called by `engine.frontend.read`.

Everything that can be wrong with a file before its operators are looked at is found here: not protobuf, truncated, no
graph, versions out of range, impossible tensors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from engine.errors import ModelError
from engine.frontend.tensors import Source, check_tensor

OLDEST_OPSET = 9
_LARGEST_FILE = 2**31 - 1  # protobuf's own limit


@dataclass(frozen=True)
class ModelInfo:
    """What a model file says about itself. `opsets` maps domain to version; "" is ONNX itself."""

    name: str
    producer: str
    producer_version: str
    ir_version: int
    opsets: dict[str, int]
    doc: str = ""
    metadata: dict[str, str] = field(default_factory=dict)


def load(source: str | os.PathLike[str] | bytes) -> tuple[onnx.ModelProto, Source]:
    """The model and where it comes from. Raises ModelError for whatever is not a sound ONNX file."""
    data, origin = _contents(source)
    if not data:
        raise ModelError(f"{origin.label}: the file is empty")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise ModelError(f"{origin.label}: not an ONNX file, or truncated{_remedy(data)}") from error
    _check_model(model, origin.label)
    return model, origin


def _remedy(data: bytes) -> str:
    if data.startswith(b"version https://git-lfs"):
        return ": it is a Git LFS pointer; fetch the file itself with git lfs pull"
    if data.lstrip()[:1] == b"<":
        return ": it is a web page; download the file itself"
    return "; copy or export the model again"


def describe(model: onnx.ModelProto) -> ModelInfo:
    return ModelInfo(
        name=model.graph.name,
        producer=model.producer_name,
        producer_version=model.producer_version,
        ir_version=model.ir_version,
        opsets=opset_versions(model.opset_import),
        doc=model.doc_string or model.graph.doc_string,
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def opset_versions(imports: object) -> dict[str, int]:
    """domain → version of an `opset_import` field; "ai.onnx" is the long name of ""."""
    return {("" if entry.domain == "ai.onnx" else entry.domain): entry.version for entry in imports}  # type: ignore[attr-defined]


def _contents(source: str | os.PathLike[str] | bytes) -> tuple[bytes, Source]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source), Source("model")
    path = Path(source)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ModelError(f"{path}: not a file; give the path of an .onnx file")
        if size > _LARGEST_FILE:
            raise ModelError(f"{path}: {size} bytes, above protobuf's 2 GiB; save the weights as external data")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    # A link (as in a download cache) may keep its data file beside the link or beside the real file.
    folders = dict.fromkeys((path.parent.resolve(), path.resolve().parent))
    return data, Source(str(path), tuple(folders))


def _check_model(model: onnx.ModelProto, label: str) -> None:
    if not model.HasField("graph") or not model.ir_version:
        raise ModelError(f"{label}: not an ONNX model, or truncated: it has no graph")
    _check_texts(model, label)
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{label}: IR version {model.ir_version} is newer than the installed onnx knows ({onnx.IR_VERSION}); "
            "update onnx, or export for an older version"
        )
    check_opsets(opset_versions(model.opset_import), label)
    if not model.graph.output:
        raise ModelError(f"{label}: the graph has no outputs; the file is truncated or damaged")
    for tensor in model.graph.initializer:
        check_tensor(tensor, f"{label}: initializer {tensor.name!r}")


def _check_texts(message: Message, label: str) -> None:
    """Raises ModelError for a name or another text that is not UTF-8, which protobuf hands out as bytes. Looks at no
    field of another kind: to ask for a weight's bytes copies them."""
    for about in message.DESCRIPTOR.fields:
        if about.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            continue
        if not about.is_repeated and not message.HasField(about.name):
            continue
        value = getattr(message, about.name)
        for item in value if about.is_repeated else (value,):
            if isinstance(item, Message):
                _check_texts(item, label)
            elif not isinstance(item, str):
                raise ModelError(
                    f"{label}: what a field '{about.name}' holds is not UTF-8: {item!r:.80}; the file is damaged, or "
                    "export the model again with names that are"
                )


def check_opsets(opsets: dict[str, int], label: str) -> None:
    """Raises ModelError for an ONNX opset that is missing, too old or newer than the installed onnx package."""
    newest = onnx.defs.onnx_opset_version()
    if not opsets:
        raise ModelError(f"{label}: no opset given; the file is truncated or damaged")
    if "" not in opsets:
        return  # no operator of ONNX itself
    if opsets[""] > newest:
        raise ModelError(
            f"{label}: opset {opsets['']} is newer than the installed onnx knows ({newest}); "
            f"update onnx, or export with opset_version={newest} or older"
        )
    if opsets[""] < OLDEST_OPSET:
        raise ModelError(
            f"{label}: opset {opsets['']} is older than {OLDEST_OPSET}; convert the model with "
            "onnx.version_converter.convert_version, or export it again"
        )
