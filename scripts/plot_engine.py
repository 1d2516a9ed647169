"""Draw docs/figures/*.svg from the figures that scripts/bench_scale.py and scripts/bench_peers.py wrote there.

Plain SVG, so that nothing has to be installed; its colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

from scripts.measuring import ROOT, number

FIGURES = ROOT / "docs" / "figures"

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 } .soft { fill: #57606a } .end { text-anchor: end } .middle { text-anchor: middle }
.own { fill: #0969da } .other { fill: #afb8c1 } .line { stroke: #d0d7de } .within { fill: #dafbe1 }
.s0 { stroke: #0969da } .s1 { stroke: #8250df } .s2 { stroke: #bc4c00 } .s3 { stroke: #1a7f37 }
.s4 { stroke: #bf3989 } .s5 { stroke: #6e7781 } .series { fill: none; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .soft { fill: #9198a1 }
  .own { fill: #4493f8 } .other { fill: #656c76 } .line { stroke: #3d444d } .within { fill: #12261e }
  .s0 { stroke: #4493f8 } .s1 { stroke: #ab7df8 } .s2 { stroke: #db6d28 } .s3 { stroke: #3fb950 }
  .s4 { stroke: #db61a2 } .s5 { stroke: #9198a1 }
}
"""


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure of all engines. `more_is_better`: else a shorter bar is."""

    title: str
    key: str
    unit: str
    more_is_better: bool


PANELS = [
    Panel("create", "create_per_second", "/s", more_is_better=True),
    Panel("run of three steps, 64 callers", "runs_per_second", "/s", more_is_better=True),
    Panel("added by a step", "step_ms", " ms", more_is_better=False),
    Panel("event to next step", "wake_p50_ms", " ms", more_is_better=False),
]

# Name, key, where it stands in the figures, whether it is a rate.
SERIES = [
    ("create", "create_per_second", "growth", True),
    ("runs, concurrent", "runs_per_second", "growth", True),
    ("run, alone", "alone_ms", "growth", False),
    ("step", "step_ms", "growth", False),
    ("wake-up", "wake_ms", "growth", False),
    ("recovery", "recovered_ms", "recovery", False),
]


def document(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """Return an SVG document."""
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(label)}">'
    )
    return "\n".join([opening, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def text(x: float, y: float, content: str, style: str = "") -> str:
    """Return a text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(content)}</text>'


def log_scale(least: float, most: float, width: float) -> Callable[[float], float]:
    """Return what maps values to lengths up to `width`, the least to a tenth of it, logarithmically."""
    span = math.log(most / least) or 1
    return lambda value: width * (0.1 + 0.9 * math.log(value / least) / span)


def peers(figures: dict[str, dict[str, Any]]) -> str:
    """Return bars of each engine, a panel a figure; lengths are logarithmic."""
    there = [found for found in figures.values() if "missing" not in found]
    row, width, left = 22, 380, 150
    height = row * (len(there) + 2)
    parts = []
    for place, panel in enumerate(PANELS):
        x, y = (width + 20) * (place % 2), height * (place // 2)
        hint = "longer is better" if panel.more_is_better else "shorter is better"
        parts += [text(x, y + 15, panel.title, "title"), text(x + width, y + 15, hint, "soft end")]
        values = [found[panel.key] for found in there]
        length = log_scale(min(values), max(values), width - left - 65)
        for line, (found, value) in enumerate(zip(there, values, strict=True)):
            top = y + row * (line + 1) + 4
            name = found["name"] if found["where"].startswith("its") else f"{found['name']}, {found['where']}"
            style = "own" if found["name"] == "dynflow" else "other"
            parts += [
                text(x + left - 8, top + 13, name, "end"),
                f'<rect x="{x + left}" y="{top}" width="{length(value):.1f}" height="16" rx="2" class="{style}"/>',
                text(x + left + length(value) + 5, top + 13, number(value) + panel.unit, "soft"),
            ]
    return document(
        2 * width + 20, 2 * height, "Durable engines with the same workload on one machine", parts
    )


def times_slower(figures: dict[str, Any], series: tuple[str, str, str, bool]) -> list[float]:
    """Return how many times slower each size is than the first."""
    _, key, part, is_rate = series
    values = [each[key] for _, each in sorted(figures[part].items(), key=lambda item: int(item[0]))]
    return [values[0] / value if is_rate else value / values[0] for value in values]


def growth(figures: dict[str, Any]) -> str:
    """Return a line for each figure: how many times slower it is with more instances stored."""
    sizes = sorted(int(size) for size in figures["growth"])
    lines = [times_slower(figures, series) for series in SERIES]
    left, top, width, height = 50, 40, 480, 260
    most = max(2.0, *(value for line in lines for value in line))

    def x(size: int) -> float:
        return left + width * math.log(size / sizes[0]) / (math.log(sizes[-1] / sizes[0]) or 1)

    def y(value: float) -> float:
        return top + height * (1 - value / most)

    parts = [
        text(left, 18, "Times slower than with 1,000 instances stored; the band is the bar, 1.5", "title"),
        f'<rect x="{left}" y="{y(1.5):.1f}" width="{width}" height="{y(0) - y(1.5):.1f}" class="within"/>',
    ]
    for tick in (0.5 * count for count in range(int(most / 0.5) + 1)):
        parts.append(f'<path d="M{left} {y(tick):.1f}h{width}" class="line"/>')
        parts.append(text(left - 8, y(tick) + 4, f"{tick:g}", "soft end"))
    parts += [text(x(size), top + height + 18, f"{size:,}", "soft middle") for size in sizes]
    labels = spread([y(line[-1]) for line in lines], 15)
    for index, (line, label) in enumerate(zip(lines, labels, strict=True)):
        points = " ".join(f"{x(size):.1f},{y(value):.1f}" for size, value in zip(sizes, line, strict=True))
        parts.append(f'<polyline points="{points}" class="series s{index}"/>')
        parts.append(
            f'<path d="M{left + width + 4} {y(line[-1]):.1f}L{left + width + 16} {label:.1f}" class="s{index}"/>'
        )
        parts.append(text(left + width + 20, label + 4, f"{SERIES[index][0]} {line[-1]:.2f}"))
    return document(
        left + width + 170, top + height + 30, "Figures of the engine as stored instances grow", parts
    )


def spread(wanted: list[float], apart: float) -> list[float]:
    """Return places that are so far apart, in the order of those wanted and near to them."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    found = list(wanted)
    for before, after in itertools.pairwise(order):
        found[after] = max(found[after], found[before] + apart)
    return found


def main() -> None:
    """Draw what there are figures of."""
    for name, draw in (("peers", peers), ("scale", growth)):
        source = FIGURES / f"{name}.json"
        if source.exists():
            (FIGURES / f"{name}.svg").write_text(draw(json.loads(source.read_text())))


if __name__ == "__main__":
    main()
