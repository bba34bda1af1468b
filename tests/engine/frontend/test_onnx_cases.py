"""ONNX's own test case of every operator, read by the frontend and computed by the IR interpreter.

A case whose second and later inputs decide shapes (as exporters write them: constants) gets them as initializers. What
cannot be read is listed below with the reason, and must be refused with an error of the engine.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase

from engine.errors import ModelError, UnsupportedOp
from engine.frontend import read
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from tests.engine.ir_interpreter import run

UNSUPPORTED = {
    "element types that the IR does not have: 2- and 4-bit integers, 4-bit floats, 8-bit floats but e4m3fn": (
        r".*(E4M3FNUZ|E5M2|E8M0|FLOAT4|FLOAT6|INT4|INT2|float8e5|float4e|float6e|int4|int2|e8m0|e5m2|e4m3fnuz).*",
    ),
    "the result's shape depends on the data": (
        r"test_(compress|nonmaxsuppression|nonzero|unique)_.*",
        r"test_(strnormalizer|string_split)_.*",
    ),
    "training": (
        r"test_batchnorm_.*_training_mode",
        r"test_training_dropout_(default|default_mask|mask)",
        r"test_training_dropout",
        r"test_(adagrad|adam|momentum|nesterov_momentum)(_multiple)?",
    ),
    "random numbers": (r"test_bernoulli.*",),
    "sequences and optionals as inputs or outputs of the model": (
        r"test_(sequence_map|sequence_insert|identity_sequence|identity_opt|if_seq|if_opt|loop13|loop16).*",
        r"test_optional_(get_element_(optional|sequence)|has_element_(optional_input|tensor_input|empty_optional)).*",
        r"test_split_to_sequence_.*",
    ),
    "opsets before 9": (
        r"test_(and|or|xor)(2d|3d|4d|_bcast.*)",
        r"test_not_[234]d",
        r"test_scan_sum",
    ),
    "what indices mean where the output's shape is given: ONNX's reference and ONNX Runtime disagree": (
        r"test_maxunpool_export_with_output_shape",
    ),
    "convolution with data-dependent sampling": (r"test_(basic_)?deform_conv_.*",),
    "decoding of image files": (r"test_image_decoder_.*",),
    "the diagonal in an Einsum term": (r"test_einsum_batch_diagonal",),
}

# Inputs that decide shapes or counts and come first, where other operators have their data.
FIRST_INPUT_IS_CONSTANT = re.compile(r"test_(range|loop|.*window|melweightmatrix)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    CASES: list[TestCase] = sorted(collect_testcases(None), key=lambda case: case.name)


def reason(name: str) -> str | None:
    """Why the case cannot be read, None where it must be."""
    for why, patterns in UNSUPPORTED.items():
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            return why
    return None


def array(content: Any) -> Any:
    if isinstance(content, onnx.TensorProto):
        return onnx.numpy_helper.to_array(content)
    return content if isinstance(content, list) else np.asarray(content)


def data_sets(case: TestCase) -> list[tuple[list[Any], list[Any]]]:
    return [([*map(array, inputs)], [*map(array, outputs)]) for inputs, outputs in case.data_sets or ()]


def read_case(case: TestCase, inputs: list[Any]) -> tuple[onnx.ModelProto, Graph]:
    """The model and its graph; where an input decides a shape, with the small inputs as constants."""
    model = case.model
    assert model is not None
    try:
        return model, read(model.SerializeToString())
    except UnsupportedOp as error:
        if "data" not in str(error) and "constant" not in str(error):
            raise
    frozen = onnx.ModelProto.FromString(model.SerializeToString())
    first = 0 if FIRST_INPUT_IS_CONSTANT.match(case.name) or len(inputs) == 1 else 1
    for info, content in list(zip(frozen.graph.input, inputs, strict=True))[first:]:
        if not isinstance(content, list) and content.ndim <= 1:
            frozen.graph.initializer.append(onnx.numpy_helper.from_array(content, info.name))
    return frozen, read(frozen.SerializeToString())


def check(got: Any, want: Any, case: TestCase) -> None:
    assert got.shape == want.shape
    if want.dtype.kind in "OUS":
        assert (got == want).all()
        return
    assert got.dtype == want.dtype
    if want.dtype == DType.F8E4M3.numpy:
        assert np.array_equal(got.astype(np.float32), want.astype(np.float32), equal_nan=True)
        return
    is_half = want.dtype.itemsize == 2 and want.dtype.kind not in "iu"
    if is_half:
        got, want = got.astype(np.float64), want.astype(np.float64)
    # Halves are stored with 8 or 11 bits, and ONNX's expected values computed in them; the rest as ONNX asks.
    rtol, atol = (2e-2, 1e-2) if is_half else (max(case.rtol, 1e-4), max(case.atol, 1e-5))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if reason(c.name) is None])
def test_case_is_read_and_computed(case: TestCase) -> None:
    for inputs, outputs in data_sets(case):
        model, graph = read_case(case, inputs)
        graph.validate()
        feeds = dict(zip([info.name for info in model.graph.input], inputs, strict=True))
        results = run(graph, {value.name: feeds[value.name] for value in graph.inputs})
        for info, want in zip(model.graph.output, outputs, strict=True):
            check(results[info.name], want, case)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if reason(c.name) is not None])
def test_what_cannot_be_read_is_refused(case: TestCase) -> None:
    inputs, _ = data_sets(case)[0]
    with pytest.raises(ModelError):
        read_case(case, inputs)


ON_HOST = {
    "on strings": {"Equal", "StringConcat", "RegexFullMatch"},
    "of ai.onnx.ml": {"ArrayFeatureExtractor", "Binarizer", "LabelEncoder", "TreeEnsemble"},
    "rare": {"BitCast", "Det", "TfIdfVectorizer"},
    "in variants only": {"GRU", "LSTM", "RNN", "Resize"},
}
"""The operators that `onnx.reference` computes; docs/kernels.md names the variants."""


def test_the_host_computes_rare_operators_only() -> None:
    found: dict[str, str] = {}
    for case in CASES:
        if reason(case.name) is None:
            _, graph = read_case(case, data_sets(case)[0][0])
            found |= {node.op.op_type: case.name for node in graph.nodes if isinstance(node.op, ops.Opaque)}
    assert found.keys() == set().union(*ON_HOST.values()), found
