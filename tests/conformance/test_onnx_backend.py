"""ONNX's own test case of every operator through `engine.onnx_backend`, on the kernels of the CPU target.

The frontend's tests put the same cases through the IR interpreter; here the numbers are those that users get. A case
that is listed as unsupported has to be refused with an error of the engine: never wrong numbers, never a crash.
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

from engine import onnx_backend
from engine.errors import EngineError
from engine.ir.dtype import DType

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
        r"test_training_dropout(_default|_default_mask|_mask)?",
        r"test_(adagrad|adam|momentum|nesterov_momentum)(_multiple)?",
    ),
    "random numbers": (r"test_bernoulli.*",),
    "sequences and optionals as inputs or outputs of the model": (
        r"test_(sequence_map|sequence_insert|identity_sequence|identity_opt|if_seq|if_opt|loop13|loop16).*",
        r"test_optional_(get_element_(optional_)?sequence|has_element_empty_optional.*)",
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

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    CASES: list[TestCase] = sorted(collect_testcases(None), key=lambda case: case.name)


def is_supported(case: TestCase) -> bool:
    return not any(re.fullmatch(pattern, case.name) for group in UNSUPPORTED.values() for pattern in group)


def array(content: Any) -> Any:
    if isinstance(content, onnx.TensorProto):
        return onnx.numpy_helper.to_array(content)
    return content if isinstance(content, list) or content is None else np.asarray(content)


def run(case: TestCase) -> None:
    assert case.model is not None
    prepared = onnx_backend.prepare(case.model)
    for inputs, outputs in case.data_sets or ():
        results = prepared.run([array(content) for content in inputs])
        for got, want in zip(results, map(array, outputs), strict=True):
            check(got, want, case)


def check(got: np.ndarray, want: np.ndarray, case: TestCase) -> None:
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


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if is_supported(case)])
def test_case_is_computed(case: TestCase) -> None:
    run(case)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if not is_supported(case)])
def test_unsupported_case_is_refused(case: TestCase) -> None:
    with pytest.raises(EngineError):
        run(case)
