"""The ways in which the convolutions of the suite could run, as ``python -m benchmarks tiles`` times them."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from benchmarks import cases
from benchmarks.cases.conv import ConvCase
from benchmarks.gpu.steps import context, kernel_sources, step_of, zeros
from engine.targets.cuda.conv_variants import variants
from engine.targets.cuda.source import expand

H100 = context("sm_90a", 132)


def kernels_of(case: ConvCase) -> dict[str, int]:
    """The kernel files among a case's variants, and how many variants each has."""
    present, *others = variants(step_of(case, zeros), H100, 6)
    assert [expand(launch.kernel.source.text) for launch in present.launches] == kernel_sources(case, H100)
    assert len({other.name for other in others}) == len(others)
    assert all(other.cycles is not None and other.cycles > 0 for other in others)
    bodies = [other.launches[-1].kernel.source.text.rstrip().rpartition('"')[0].rpartition('"')[2] for other in others]
    return {body: bodies.count(body) for body in bodies}


@pytest.mark.parametrize("case", cases.conv.CASES[::9], ids=lambda case: case.name)
def test_every_case_starts_with_the_present_way(case: ConvCase) -> None:
    kernels_of(case)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("b32 144->144@56 3x3/1 depthwise relu6", {"depthwise_mma.cuh": 1, "depthwise_rows.cuh": 6}),
        (
            "b32 128->128@28 3x3/1 relu",
            {"conv_wgmma.cuh": 6, "conv_staged.cuh": 6, "conv_joined.cuh": 6, "conv_halo_deep.cuh": 6},
        ),
        (
            "b32 64->64@56 3x3/1 relu",
            {
                "conv_wgmma.cuh": 6,
                "conv_staged.cuh": 6,
                "conv_joined.cuh": 6,
                "conv_halo.cuh": 6,
                "conv_halo_deep.cuh": 6,
            },
        ),
        ("b32 128->128@56 3x3/2 relu", {"conv_wgmma.cuh": 6, "conv_staged.cuh": 6, "conv_joined.cuh": 6}),
        ("b32 3->32@224 3x3/2 relu6", {}),
    ],
)
def test_each_kernel_that_could_run_it_has_its_share(name: str, expected: dict[str, int]) -> None:
    (case,) = (case for case in cases.conv.CASES if case.name == name)
    assert kernels_of(case) == expected
