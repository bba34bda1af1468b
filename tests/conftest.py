"""Fixtures every test may use: the default models, built once, real photos, and the marks' meaning."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import hypothesis
import pytest

from models import build

# Examples are judged by their result: how long one takes says more about the machine's other work than about ours.
hypothesis.settings.register_profile("tilewave", deadline=None)
hypothesis.settings.load_profile("tilewave")

ROOT = Path(__file__).parent.parent
MODEL_REPOSITORY = ROOT / "models"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be there
def pytest_xdist_auto_num_workers() -> int | None:
    """What ``-n auto`` means where pytest-xdist's own variable does not say: three workers for two processors, because
    many tests wait for a server or a clock."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    from engine.targets.cpu.runtime import available_cores

    return max(1, 3 * available_cores() // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


def pytest_collection_finish() -> None:
    # Loading a model ends with a collection of garbage, which would walk through ten thousand collected tests.
    _freeze()


@pytest.hookimpl(trylast=True)  # once its fixtures are gone
def pytest_runtest_teardown() -> None:
    # Nor through what thousands of tests leave alive: reports, caches, the fixtures of a module.
    _freeze()


def _freeze() -> None:
    gc.collect()
    gc.freeze()


def _has_gpu() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    try:
        return bool(cupy.cuda.runtime.getDeviceCount() > 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        return False


def _report(line: str) -> None:
    print(line, file=sys.stderr)


@pytest.fixture(scope="session")
def model_repository() -> Path:
    """The repository's own ``models/`` folder with every default model built in it."""
    for name in ("efficientnet-lite0", "all-minilm-l6-v2"):
        build(name, MODEL_REPOSITORY, _report)
    return MODEL_REPOSITORY


@pytest.fixture(scope="session")
def efficientnet_lite0() -> Path:
    """The folder of EfficientNet-Lite0."""
    return build("efficientnet-lite0", MODEL_REPOSITORY, _report)


@pytest.fixture(scope="session")
def all_minilm_l6_v2() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return build("all-minilm-l6-v2", MODEL_REPOSITORY, _report)


@pytest.fixture(scope="session")
def photos() -> Mapping[str, Path]:
    """Real photos by name, from the scikit-image package: chelsea (a cat), coffee, camera, motorcycle."""
    import skimage

    data = Path(skimage.__file__).parent / "data"
    files = {"chelsea": "chelsea.png", "coffee": "coffee.png", "camera": "camera.png"}
    return {name: data / file for name, file in {**files, "motorcycle": "motorcycle_left.png"}.items()}
