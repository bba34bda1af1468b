"""The file that keeps the tiles which the tuner (tuner.py) has timed on a device: those of products (choices.py) and of
convolutions (conv_choices.py). Read by `target.py`. Needs no GPU."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from engine.targets.cuda import conv_halo, conv_halo_deep, conv_wgmma
from engine.targets.cuda.gemm_rows import CLUSTER_ROWS_TILES, ROWS_TILES, SHORT_ROWS_TILES
from engine.targets.cuda.joined_tiles import JOINED_PAIRS, JOINED_PRODUCTS
from engine.targets.cuda.kernel import Choice
from engine.targets.cuda.source import expand
from engine.targets.cuda.tiles import (
    BATCHED_TILES,
    CLUSTER_TILES,
    MMA_TILES,
    PRODUCT_TILES,
    SHORT_TILES,
    STAGED_TILES,
)

log = logging.getLogger(__name__)

_KERNELS = (
    "conv_cluster.cuh", "conv_cluster_staged.cuh", "gemm_ragged.cuh", "gemm_joined.cuh",
    "gemm_wgmma.cuh", "gemm_staged.cuh", "gemm_cluster.cuh", "gemm_cluster_staged.cuh", "gemm_batch.cuh",
    "gemm_mma.cuh", "gemm_stream.cuh", "gemm_rows.cuh", "gemm_rows_joined.cuh", "row_factors.cuh", "align_rows.cuh",
    "split_rows.cuh",
    "conv_wgmma.cuh", "conv_staged.cuh", "conv_joined.cuh", "conv_halo.cuh", "conv_halo_deep.cuh", "conv_mma.cuh",
    "conv_stem.cuh", "depthwise_mma.cuh", "depthwise_rows.cuh", "depthwise_bands.cuh",
    "excitation.cuh",
)  # fmt: skip
_TILES = (
    PRODUCT_TILES, STAGED_TILES, SHORT_TILES, CLUSTER_TILES, BATCHED_TILES, MMA_TILES, ROWS_TILES, SHORT_ROWS_TILES,
    CLUSTER_ROWS_TILES, conv_wgmma.TILES, conv_wgmma.STAGED, JOINED_PRODUCTS, JOINED_PAIRS, conv_wgmma.PAIRS,
    conv_halo.TILES, conv_halo_deep.SHAPES,
)  # fmt: skip


class ChoiceFile:
    """The choices for one device with one driver and the kernels as they are. `folder` None: nothing is kept."""

    def __init__(self, folder: Path | None, device: str, driver: str) -> None:
        sources = expand("".join(f'#include "{name}"\n' for name in _KERNELS))
        digest = hashlib.sha256("\0".join([sources, repr(_TILES), driver]).encode()).hexdigest()[:16]
        name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.path = folder and folder / f"{name}-{digest}.json"

    def read(self) -> dict[str, Choice]:
        """What is there; nothing where there is no such file, or a damaged one."""
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(content, dict):
            return {}
        return {key: choice for key, choice in content.items() if isinstance(choice, dict)}

    def add(self, found: Mapping[str, Choice]) -> None:
        """Keep more choices. A folder that cannot be written is said in the log."""
        if self.path is None:
            return
        text = json.dumps({**self.read(), **found}, indent=1, sort_keys=True)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Written beside, then renamed: who reads meanwhile finds the old file or the new one.
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self.path.parent, delete=False) as file:
                beside = Path(file.name)
                try:
                    file.write(text)
                    file.flush()
                    os.replace(beside, self.path)
                except OSError:
                    beside.unlink(missing_ok=True)
                    raise
        except OSError as error:
            log.warning("the tuner's choices are not kept: %s", error)
