"""Pictures of results as SVG, by hand: the machines that measure have no plotting library."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Ours first, and apart from the rest; the others are told apart without relying on red against green.
_COLOURS = ["#d1495b", "#7f8c8d", "#b08968", "#00798c", "#edae49", "#5b5f97", "#66a182", "#2e4057"]
_STYLE = (
    "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#2b2b2b}"
    ".title{font-size:17px;font-weight:600}.small{font-size:11px;fill:#666}.head{font-size:13px;font-weight:600}"
    ".axis{font-size:11px;fill:#555}.value{font-size:11px;fill:#fff}.grid{stroke:#e6e6e6}.limit{stroke:#2b2b2b;stroke-dasharray:5 4;fill:none}"
)
_SMALL, _AXIS = 5.8, 6.0  # about the width of a letter
_PANEL = (330, 250)
_MARGIN = (52, 40, 14, 34)  # left, top, right, bottom of a panel


@dataclass(frozen=True)
class Scale:
    """A vertical axis, from its first tick to its last."""

    ticks: Sequence[float]
    unit: str = ""
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far up a value lies, from 0 to 1."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Panel:
    """Lines over the same few points; None where there is no value. The limits are a line of their own, dashed."""

    title: str
    points: Sequence[str]
    lines: Mapping[str, Sequence[float | None]]
    limits: Sequence[float | None] = ()
    marks: Sequence[float] = ()
    """Values that are dashed all across, and named at the right."""
    scale: Scale | None = None
    """Default: seconds, logarithmic, the same for all panels."""


@dataclass(frozen=True)
class Bar:
    label: str
    values: tuple[float | None, ...]
    note: str = ""


def lines(title: str, subtitle: str, panels: Sequence[Panel], columns: int) -> str:
    """Panels in rows of ``columns``."""
    names = list(panels[0].lines)
    values = [
        v for panel in panels for line in [*panel.lines.values(), panel.limits] for v in line if v is not None
    ]
    seconds = _seconds(values)
    rows = math.ceil(len(panels) / columns)
    width = 30 + columns * _PANEL[0]
    told = textwrap.wrap(subtitle, int((width - 40) / _SMALL))
    beside = max(1, int((width - 40) / (44 + _AXIS * max(map(len, names)))))  # names in a row of the legend
    legend = 58 + 14 * len(told)
    top = legend - 6 + 18 * math.ceil(len(names) / beside)
    parts = [_text(20, 30, title, "title")]
    parts += [_text(20, 48 + 14 * i, line, "small") for i, line in enumerate(told)]
    for i, name in enumerate(names):
        x, y = 20 + (i % beside) * (width - 40) / beside, legend + 18 * (i // beside)
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="{y - 4}" y2="{y - 4}" {_stroke(i)}/>')
        parts.append(_text(x + 24, y, name, "axis"))
    for i, panel in enumerate(panels):
        parts.append(
            f'<g transform="translate({10 + i % columns * _PANEL[0]},{top + i // columns * _PANEL[1]})">'
            f"{_panel(panel, panel.scale or seconds)}</g>"
        )
    return _svg(width, top + rows * _PANEL[1] + 8, parts)


def bars(
    title: str, subtitle: str, kinds: Sequence[str], rows: Sequence[Bar], limits: Sequence[float]
) -> str:
    """Horizontal bars, one column for each kind, each with the limit it runs into."""
    left, column, height = 190, 330, 26
    parts = [_text(20, 30, title, "title"), _text(20, 48, subtitle, "small")]
    end = 104 + height * len(rows)
    for k, kind in enumerate(kinds):
        x0 = left + k * (column + 40)
        most = max([limits[k], *(row.values[k] or 0 for row in rows)])
        limit = x0 + column * 0.86 * limits[k] / most
        parts.append(_text(x0, 80, kind, "head"))
        parts.append(f'<path class="limit" d="M{limit:.1f} 88V{end}"/>')
        parts.append(_text(limit, end + 14, f"{limits[k]:.3g}", "axis", "middle"))
        for i, row in enumerate(rows):
            y, value = 96 + i * height, row.values[k]
            if k == 0:
                parts.append(_text(left - 10, y + 13, row.label, "axis", "end"))
            if value is None:
                parts.append(_text(x0 + 4, y + 13, row.note, "small"))
                continue
            length = column * 0.86 * value / most
            parts.append(
                f'<rect x="{x0}" y="{y}" width="{length:.1f}" height="{height - 8}" rx="2" fill="{_COLOURS[0 if i == 0 else 3]}"/>'
            )
            inside = length > 50
            at = (x0 + length - 6, "value", "end") if inside else (x0 + length + 5, "axis", "start")
            parts.append(_text(at[0], y + 13, f"{value:.3g}", at[1], at[2]))
    return _svg(left + len(kinds) * (column + 40) + 10, end + 26, parts)


def _panel(panel: Panel, scale: Scale) -> str:
    left, top, right, bottom = _MARGIN
    width, height = _PANEL[0] - left - right, _PANEL[1] - top - bottom

    def at(i: int, value: float) -> tuple[float, float]:
        return left + width * (i + 0.5) / len(panel.points), top + height * (1 - scale.share(value))

    parts = [_text(left, top - 12, panel.title, "head")]
    for tick in scale.ticks:
        y = at(0, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{tick:g}{scale.unit}", "axis", "end"))
    for mark in panel.marks:
        y = at(0, mark)[1]
        parts.append(f'<path class="limit" d="M{left} {y:.1f}H{left + width}"/>')
        parts.append(_text(left + width + 4, y + 4, f"{mark:g}", "axis"))
    for i, point in enumerate(panel.points):
        parts.append(_text(at(i, scale.ticks[0])[0], top + height + 16, point, "axis", "middle"))
    # The first line is drawn last: over the others.
    for k, line in reversed(list(enumerate(panel.lines.values()))):
        dots = [at(i, value) for i, value in enumerate(line) if value is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline fill="none" points="{path}" {_stroke(k)}/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3.6 if k == 0 else 2.8}" fill="{_COLOURS[k % len(_COLOURS)]}"/>'
            for x, y in dots
        ]
    if panel.limits:
        dots = [at(i, value) for i, value in enumerate(panel.limits) if value is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline class="limit" points="{path}"/>')
    return "".join(parts)


def _seconds(values: Sequence[float]) -> Scale:
    low, high = -1, 0
    if values:
        low = math.floor(math.log10(min(values)))
        high = max(low + 1, math.ceil(math.log10(max(values))))
    return Scale([10.0**power for power in range(low, high + 1)], " s", logarithmic=True)


def _stroke(index: int) -> str:
    return f'stroke="{_COLOURS[index % len(_COLOURS)]}" stroke-width="{3 if index == 0 else 1.8}"'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )
