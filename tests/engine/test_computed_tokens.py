"""`Model.computed_tokens` says what `run` computes: the plans that ran tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import engine
from engine.targets.cpu.target import CpuTarget

MOST = 5


@pytest.fixture(scope="module")
def model(all_minilm_l6_v2: Path) -> Iterator[engine.Model]:
    """A model on a target whose attention takes so many packed sequences at most."""
    traits = CpuTarget.traits
    assert traits.packed is not None
    CpuTarget.traits = replace(traits, packed=replace(traits.packed, sequences=MOST))
    try:
        with engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cpu") as model:
            yield model
    finally:
        CpuTarget.traits = traits


@pytest.mark.parametrize(
    ("lengths", "width", "computed"),
    [
        ([1], 1, 1),  # nothing to leave out
        ([3], 5, 5),  # rounded up it would be more
        ([3], 16, 8),
        ([31, 31], 32, 64),
        ([5, 30, 1], 32, 40),
        ([100, 7, 3, 40], 128, 152),
        ([9] * MOST, 64, 48),
        ([9] * (MOST + 1), 64, 384),  # too many for the kernel
    ],
)
def test_computed_tokens_are_those_of_the_plan_that_runs(
    model: engine.Model, lengths: list[int], width: int, computed: int
) -> None:
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    model.run({"input_ids": mask * 2000, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)})
    sizes = model.plan_profiles()[-1].sizes
    assert sizes.get("tokens", len(lengths) * width) == computed
    assert model.computed_tokens(len(lengths), width, sum(lengths)) == computed


def test_a_model_that_runs_padded_computes_all(all_minilm_l6_v2: Path) -> None:
    with engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cpu", packed=False) as model:
        assert model.packed_mask is None
        assert model.computed_tokens(4, 128, 4) == 512
