"""Pictures of page maps: which weights have memory behind them, over time.

A page map is a string with one character a page, as :meth:`forebay.Attachment.page_map` gives it: ``R`` resident, ``S``
streamed (backed for the time of a use), ``.`` absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_COLOURS = {"R": "#1b6ca8", "S": "#f2a541", ".": "#e8ecef"}
_NAMES = {"R": "resident", "S": "streamed", ".": "absent"}
_ANSI = {"R": "\x1b[34m█\x1b[0m", "S": "\x1b[33m▓\x1b[0m", ".": "\x1b[2m·\x1b[0m"}
_PLAIN = {"R": "█", "S": "▒", ".": "·"}
_GROUND, _INK = "#ffffff", "#24292f"


def text(page_map: str, *, colour: bool = False, width: int = 80) -> str:
    """A page map as lines of at most ``width`` blocks, with a legend that counts.

    Args:
        page_map: One character a page.
        colour: Use terminal colours.
        width: Blocks a line.

    Returns:
        Several lines without a final newline.
    """
    blocks = _ANSI if colour else _PLAIN
    lines = [page_map[i : i + width] for i in range(0, len(page_map), width)]
    drawn = ["".join(blocks[page] for page in line) for line in lines]
    legend = "   ".join(f"{blocks[page]} {name} {page_map.count(page)}" for page, name in _NAMES.items())
    return "\n".join([*drawn, legend])


def svg(moments: Sequence[tuple[str, str]], *, title: str, note: str = "") -> str:
    """A picture of page maps over time: pages from left to right, moments from top to bottom.

    Args:
        moments: (label, page map) pairs, oldest first; maps of equal length. Equal labels in a row are shown once.
        title: The picture's title.
        note: A line below the pages.

    Returns:
        An SVG document.

    Raises:
        ValueError: Where there are no moments, or the maps' lengths differ.
    """
    lengths = {len(page_map) for _, page_map in moments}
    if len(lengths) != 1:
        raise ValueError(
            f"page maps have one length, at least one page, and there is at least one: {sorted(lengths)}"
        )
    pages = lengths.pop()
    cell = max(3.0, min(16.0, 760 / max(pages, 1)))
    row = max(3.0, min(12.0, 560 / len(moments)))
    left, top = 90, 70
    width, height = left + max(pages * cell, 460) + 20, top + len(moments) * row + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}" shape-rendering="crispEdges">',
        f'<rect width="100%" height="100%" fill="{_GROUND}"/>',
        f'<text x="{left}" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    x = float(left)
    for page, name in _NAMES.items():
        parts.append(f'<rect x="{x:.0f}" y="38" width="12" height="12" fill="{_COLOURS[page]}"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="48">{name}</text>')
        x += 90
    previous = None
    for number, (label, page_map) in enumerate(moments):
        y = top + number * row
        if label != previous:
            parts.append(f'<text x="{left - 8}" y="{y + 10:.1f}" text-anchor="end">{escape(label)}</text>')
            if number:
                parts.append(f'<path d="M{left - 84} {y:.1f}H{left}" stroke="{_INK}" stroke-opacity="0.3"/>')
            previous = label
        parts.extend(_runs(page_map, left, y, cell, row))
    parts.append(
        f'<text x="{left}" y="{height - 14:.0f}">pages, by address →{escape("   " + note if note else "")}</text>'
    )
    parts.append("</svg>")
    return "\n".join(parts)


def _runs(page_map: str, left: float, y: float, cell: float, row: float) -> list[str]:
    """One row, a rectangle for each run of pages alike."""
    parts = []
    start = 0
    for end in range(1, len(page_map) + 1):
        if end == len(page_map) or page_map[end] != page_map[start]:
            x, width, colour = left + start * cell, (end - start) * cell, _COLOURS[page_map[start]]
            parts.append(
                f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{row:.2f}" fill="{colour}"/>'
            )
            start = end
    return parts
