"""What is said of the rows of convolutions beyond their times: beside cuDNN's best, PyTorch operator by operator, and
the roofline; by kind and batch. `tables.py` writes it down.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.cases.conv import BATCHES, CASES, Group
from benchmarks.results import Row, geometric_mean

LEVEL = 0.97  # of cuDNN's time: what is less is no noise any more
NEAR_FLOOR = 0.9

_CASES = {case.name: case for case in CASES}


def eager_ratio(row: Row) -> float | None:
    """PyTorch's time for the whole expression, operator by operator, over ours."""
    return _over(row.peers.get("eager"), row.ours_us)


def cudnn_ratio(row: Row) -> float | None:
    """The time of cuDNN's best over ours: of its fused call where there is one that is right (or of PyTorch's calls one
    after the other, should these be faster), else of the convolution alone, which is less work than ours does."""
    fused, eager = row.peers.get("cuDNN fused"), row.peers.get("eager")
    if fused is None:
        return _over(row.parts.get("cuDNN alone"), row.ours_us)
    return _over(fused if eager is None else min(fused, eager), row.ours_us)


def floor_share(row: Row) -> float | None:
    """The floor over our time."""
    return _over(row.floor_us, row.ours_us)


def is_behind(row: Row) -> bool:
    """Slower than cuDNN although the floor is not near."""
    ratio = cudnn_ratio(row)
    return ratio is not None and ratio < LEVEL and (floor_share(row) or 0.0) < NEAR_FLOOR


@dataclass(frozen=True)
class Summary:
    """Rows of one kind at one batch, at all where `batch` is None: geometric means, the least ratio to cuDNN, and how
    many are behind. None where no row has the figure."""

    group: str
    batch: int | None
    rows: int
    cudnn: float | None
    least: float | None
    eager: float | None
    floor: float | None
    behind: int


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """By group and batch, then all of each batch, then all, but for those with a pool, whose convolutions are among the
    others; those without rows are left out."""
    measured = [row for row in rows if row.ours_us]
    found = [
        _summary(group.value, batch, [row for row in measured if _is_of(row, group, batch)])
        for group in Group
        for batch in BATCHES
    ]
    every = [row for row in measured if _CASES[row.case].group is not Group.POOLED]
    found += [_summary("all", batch, [row for row in every if _CASES[row.case].batch == batch]) for batch in BATCHES]
    return [one for one in (*found, _summary("all", None, every)) if one.rows]


def _is_of(row: Row, group: Group, batch: int) -> bool:
    case = _CASES[row.case]
    return case.batch == batch and case.group is group


def _summary(group: str, batch: int | None, rows: Sequence[Row]) -> Summary:
    ratios = _known(map(cudnn_ratio, rows))
    return Summary(
        group, batch, len(rows), _mean(ratios), min(ratios, default=None), _mean(_known(map(eager_ratio, rows))),
        _mean(_known(map(floor_share, rows))), sum(map(is_behind, rows)),
    )  # fmt: skip


def _over(us: float | None, ours_us: float | None) -> float | None:
    return None if us is None or not ours_us else us / ours_us


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value]


def _mean(values: Sequence[float]) -> float | None:
    return geometric_mean(values) if values else None
