"""Charts as SVG: lines over a numeric axis, and stacked bars. Text in, text out; no library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 40, 48
_COLOURS = ("#0b5f78", "#a3420c", "#6b4fb3", "#2f7a3a", "#7a6a12")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#13212a}.soft{fill:#4d606c}"
    ".grid{stroke:#c9d3d8;stroke-width:.5}.line{fill:none;stroke-width:2}"
)


@dataclass(frozen=True)
class Line:
    """A named line through (x, y); a point may have a label."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Mark:
    """A vertical line at x with words beside it."""

    x: float
    text: str


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        along = math.log(value / self.low) / math.log(self.high / self.low) if self.log else (
            (value - self.low) / (self.high - self.low)
        )  # fmt: skip
        return self.start + along * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(round(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
            found = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        else:
            step = _nice((self.high - self.low) / 5)
            found = [self.low + i * step for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]
        return [tick for tick in found if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]


def line_chart(title: str, x: str, y: str, lines: Sequence[Line], log_y: bool = False, mark: Mark | None = None) -> str:
    """Lines over an x axis from 0; the y axis from 0, or logarithmic."""
    points = [point for line in lines for point in line.points]
    high_x = max(px for px, _ in points) * 1.05
    highs = [py for _, py in points if py > 0] or [1.0]
    across = _Scale(0.0, high_x, _LEFT, _WIDTH - _RIGHT, log=False)
    low = _below(min(highs)) if log_y else 0.0
    high = max(_above(max(highs)), 2 * low) if log_y else max(highs) * 1.08  # all values may be the same
    up = _Scale(low, high, _HEIGHT - _BOTTOM, _TOP, log_y)
    parts = _frame(title, x, y, up)
    parts += [_text(across(tick), _HEIGHT - _BOTTOM + 16, _number(tick), "middle", "soft") for tick in across.ticks()]
    if mark is not None:
        at = across(mark.x)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#13212a" '
                     'stroke-dasharray="4 4"/>')  # fmt: skip
        parts.append(_text(at - 6, _TOP + 12, mark.text, "end"))
    for line, colour in zip(lines, _COLOURS, strict=False):
        places = [(across(px), up(max(py, low) if log_y else py)) for px, py in line.points]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
        parts.append(f'<polyline class="line" stroke="{colour}" points="{path}"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>' for px, py in places]
        parts += [_text(px + 5, py + 14, label) for (px, py), label in zip(places, line.labels, strict=False)]
    parts += _legend([line.name for line in lines])
    return _svg(title, parts)


def stacked_bars(title: str, y: str, bars: Sequence[tuple[str, Sequence[float]]], names: Sequence[str]) -> str:
    """A bar for each (label, a value for each name), the first at the bottom."""
    high = max((sum(values) for _, values in bars), default=0.0) or 1.0
    up = _Scale(0.0, high * 1.08, _HEIGHT - _BOTTOM, _TOP, log=False)
    parts = _frame(title, "users", y, up)
    room = (_WIDTH - _LEFT - _RIGHT) / max(len(bars), 1)
    for i, (label, values) in enumerate(bars):
        left, below = _LEFT + (i + 0.2) * room, 0.0
        for value, colour in zip(values, _COLOURS, strict=False):
            top, bottom = up(below + value), up(below)
            parts.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{room * 0.6:.1f}" height="{bottom - top:.1f}" '
                         f'fill="{colour}"/>')  # fmt: skip
            below += value
        parts.append(_text(left + room * 0.3, _HEIGHT - _BOTTOM + 16, label, "middle", "soft"))
    parts += _legend(names)
    return _svg(title, parts)


def _frame(title: str, x: str, y: str, up: _Scale) -> list[str]:
    """Ground, title, names of the axes, and the horizontal lines."""
    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>', _text(_LEFT, 18, title)]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x, "middle", "soft"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="soft" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">{escape(y)}</text>'
    )
    for tick in up.ticks():
        at = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(_LEFT - 6, at + 4, _number(tick), "end", "soft"))
    return parts


def _legend(names: Sequence[str]) -> list[str]:
    parts, at = [], float(_WIDTH - _RIGHT)
    for name, colour in reversed(list(zip(names, _COLOURS, strict=False))):
        at -= 7.0 * len(name) + 26
        parts += [f'<rect x="{at:.1f}" y="9" width="10" height="10" fill="{colour}"/>', _text(at + 15, 18, name)]
    return parts


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">'
    return f"{head}<title>{escape(title)}</title><style>{_STYLE}</style>{''.join(parts)}</svg>\n"


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least `step`."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _bound(value: float, holds: Callable[[float, float], bool], steps: Sequence[int]) -> float:
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in steps if holds(step * power, value))


def _below(value: float) -> float:
    return _bound(value, lambda bound, of: bound <= of * (1 + 1e-9), (5, 2, 1))


def _above(value: float) -> float:
    return _bound(value, lambda bound, of: bound >= of * (1 - 1e-9), (1, 2, 5, 10))


def _number(value: float) -> str:
    return f"{value:,.10g}" if value >= 1000 else f"{value:.4g}"
