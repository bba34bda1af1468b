"""The committed lists: unique names, and parts that add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cases
from benchmarks.__main__ import main
from benchmarks.cases import part_of, select
from benchmarks.cases.gemm import RANDOM_CASES
from benchmarks.cases.models import MINILM, ModelCase
from benchmarks.cpu.measure import measure_case
from benchmarks.models import ARCHITECTURES
from benchmarks.results import Ceilings


@pytest.mark.parametrize("device", [cases.GPU, cases.CPU], ids=["gpu", "cpu"])
def test_names_are_unique_and_suites_are_those_of_the_lists(device: Mapping[str, Sequence[cases.Case]]) -> None:
    for suite, listed in device.items():
        assert listed
        assert {case.suite for case in listed} == {suite}
        assert len({case.name for case in listed}) == len(listed)


def test_the_models_are_measured_at_these_sizes() -> None:
    images = ("resnet50", "vgg16", "mobilenet_v2", "efficientnet_b0", "vit_b_16")
    assert {case.name for case in cases.GPU_MODELS} == {
        *(f"{model} batch={batch}" for model in images for batch in (1, 32, 128)),
        *(f"bert_base batch={batch} sequence={length}" for length in (128, 384) for batch in (1, 32, 128)),
        *(f"gpt2 batch={batch} sequence=256" for batch in (1, 32, 128)),
        *(f"efficientnet-lite0 batch={batch}" for batch in (1, 7, 32, 128)),
        *(
            f"all-minilm-l6-v2 batch={batch} sequence={sequence}"
            for batch, sequence in (
                (1, 16),
                (1, 64),
                (32, 64),
                (128, 64),
                (1, 128),
                (7, 33),
                (32, 128),
                (128, 128),
                (4, 256),
            )
        ),
    }


def test_the_architectures_are_those_that_can_be_built() -> None:
    assert set(cases.models.ARCHITECTURES) == set(ARCHITECTURES)
    assert {case.model for case in cases.ACCURACY} == {*cases.models.DEFAULTS, *ARCHITECTURES}


def test_random_products_are_the_same_everywhere_ragged_in_a_third_and_none_of_the_fitted_ones() -> None:
    shapes = [(case.m, case.n, case.k) for case in RANDOM_CASES]
    assert shapes[:3] == [(3626, 9, 369), (656, 2720, 32), (9320, 248, 2920)]
    assert len(shapes) == 48
    assert sum(n % 8 > 0 or k % 8 > 0 for _, n, k in shapes) == 16
    assert not {case.name for case in RANDOM_CASES} & {case.name for case in cases.KERNELS["gemm"]}
    assert sum(2 * m * n * k for m, n, k in shapes) < 1e12, "they are to take no more than a few ms together"
    assert all(2 * (m * k + k * n + m * n) < 1 << 28 for m, n, k in shapes)


@pytest.mark.parametrize("parts", [1, 2, 3, 50])
def test_parts_add_up(parts: int) -> None:
    every = cases.KERNELS["conv"]
    found = [case for part in range(1, parts + 1) for case in select(every, [], (part, parts))]
    assert len(found) == len(every)
    assert set(found) == set(every)


def test_a_substring_selects() -> None:
    assert {case.name for case in select(cases.KERNELS["gemm"], ["4096x4096x4096"])} == {
        "4096x4096x4096", "4096x4096x4096 bias", "4096x4096x4096 bias gelu"
    }  # fmt: skip


def test_one_of_several_substrings_selects() -> None:
    found = select(cases.GPU_MODELS, ["resnet50", "gpt2"])
    assert [case.name for case in found] == [
        *(f"resnet50 batch={batch}" for batch in (1, 32, 128)),
        *(f"gpt2 batch={batch} sequence=256" for batch in (1, 32, 128)),
    ]
    assert select(found, ["batch=32"]) == [found[1], found[4]]


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_part_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        part_of(text)
    with pytest.raises(SystemExit):
        main(["cpu", "--part", text])
    assert "1/3" in capsys.readouterr().err


def test_token_inputs_are_ragged_and_the_same_whenever_asked() -> None:
    case = ModelCase(MINILM, 32, 128)
    feeds = case.feeds()
    lengths = feeds["attention_mask"].sum(1)
    assert len(set(lengths)) > 8
    assert 64 <= lengths.min() <= lengths.max() <= 128
    assert not (feeds["token_type_ids"] & ~feeds["attention_mask"]).any()
    assert all(np.array_equal(array, case.feeds()[name]) for name, array in feeds.items())


def test_photos_differ_from_row_to_row_and_are_the_same_whenever_asked() -> None:
    case = ModelCase("resnet50", 10)
    (images,) = case.feeds().values()
    assert images.shape == (10, 3, 224, 224)
    assert images.dtype == np.float32
    assert np.array_equal(images, case.feeds()["input"])
    difference = images[8] - images[0]  # one photo
    assert 0.1 < difference.std() < 0.2
    assert np.corrcoef(images[0].ravel(), images[8].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("case", [cases.CPU_LAYERS[8], cases.CPU_LAYERS[19]], ids=lambda case: case.name)
def test_layers_run_beside_onnxruntime(case: cases.cpu.LayerCase) -> None:
    found, floor_us = measure_case(case, Path(), 1, 1, Ceilings(1e15, 1e15))
    assert found.failure == ""
    assert found.rel_err is not None
    assert found.rel_err <= 1e-5
    assert found.ours_us is not None
    assert found.ours_us > floor_us > 0
    assert found.ratio is not None


def test_models_that_are_not_built_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="python -m models"):
        main(["cpu", "--models", str(tmp_path), "--results", str(tmp_path)])
