"""Plots of the report as inline SVG without scripts: lines over steps, bars of differences.

The colors can be distinguished by color-blind readers.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from gemma_encoder.evaluation.calibration import Bin
from gemma_encoder.inputs.untrusted import html_text

# The palette of Okabe and Ito without black, since the page may be dark.
COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#888888",
)
DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "4 4", "1 4")

# Size and margins of a plot, in pixels.
_WIDTH = 460
_HEIGHT = 240
_LEFT = 58
_RIGHT = 12
_TOP = 28
_BOTTOM = 40
_MIDDLE_X = f"{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}"

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers from `low` to `high`."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(multiple * step, 12) for multiple in range(first, last + 1)]


def short(value: float) -> str:
    """Formats a number in about six characters, e.g. 0.975 or 2e-4."""
    text = f"{value:g}"
    if len(text.lstrip("-")) <= 5:
        return text
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def line_plot(
    title: str,
    series: Mapping[str, Points],
    y_label: str,
    colors: Mapping[str, int],
    x_label: str = "step",
) -> str:
    """Plots lines over steps; lines of few points also show each point as a dot.

    Args:
        title: text above the plot.
        series: (step, value) points by name, in the order of steps.
        y_label: label of the vertical axis.
        colors: palette index of each name, the same in every plot of a page.
        x_label: label of the horizontal axis, which begins at 0.
    """
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return ""
    x_low = 0.0
    x_high = max(x for x, _ in points) or 1.0
    y_low, y_high = _with_margin([y for _, y in points])

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_title(title)]
    for value in ticks(y_low, y_high):
        _, y = to_pixels(0, value)
        parts += _grid_line(y, short(value))
    for value in ticks(x_low, x_high):
        x, _ = to_pixels(value, y_low)
        parts.append(_text(f"{x:.1f}", _HEIGHT - _BOTTOM + 16, "tick middle", f"{value:g}"))
    parts += _axis_labels(x_label, y_label)
    for name, line in series.items():
        parts += _line(line, colors[name] % len(COLORS), to_pixels)
    return _figure(parts, _WIDTH, _HEIGHT, title)


def _axis_labels(x_label: str, y_label: str) -> list[str]:
    middle = f"{(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}"
    rotation = f' transform="rotate(-90 12 {middle})"'
    return [
        _text(_MIDDLE_X, _HEIGHT - 6, "tick middle", html_text(x_label)),
        _text(12, middle, "tick middle", html_text(y_label), rotation),
    ]


def reliability_plot(title: str, bins: Sequence[Bin], x_label: str, y_label: str) -> str:
    """Plots the frequency of events over their probability, with the diagonal of calibration.

    A dot per bin, with an area in proportion to its events; the shaded bars are the central 95 % of
    frequencies if the probabilities are right. The columns at the bottom are the numbers of events.
    """
    width = _WIDTH - _LEFT - _RIGHT
    height = _HEIGHT - _TOP - _BOTTOM
    largest = max(item.count for item in bins)

    def x_of(value: float) -> float:
        return _LEFT + value * width

    def y_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - value * height

    parts = [_title(title)]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += _grid_line(y_of(value), f"{value:g}")
        parts.append(
            _text(f"{x_of(value):.1f}", _HEIGHT - _BOTTOM + 16, "tick middle", f"{value:g}")
        )
    for item in bins:
        column = 0.2 * height * item.count / largest
        left = x_of(item.low) + 1
        bar = x_of(item.high) - 1 - left
        low, high = map(y_of, item.expected)
        parts += [
            _rectangle(left, y_of(0) - column, bar, column, "currentColor", 0.25),
            _rectangle(left, high, bar, max(low - high, 1.5), COLORS[0], 0.3),
        ]
    parts.append(
        f'<line x1="{x_of(0)}" y1="{y_of(0)}" x2="{x_of(1)}" y2="{y_of(1)}" '
        'stroke="currentColor" stroke-opacity=".6" stroke-dasharray="5 4"/>'
    )
    for item in bins:
        radius = 2.5 + 4 * math.sqrt(item.count / largest)
        parts.append(
            f'<circle cx="{x_of(item.probability):.1f}" cy="{y_of(item.frequency):.1f}" '
            f'r="{radius:.1f}" fill="{COLORS[1]}"><title>{item.count} events</title></circle>'
        )
    return _figure([*parts, *_axis_labels(x_label, y_label)], _WIDTH, _HEIGHT, title)


def _rectangle(
    left: float, top: float, width: float, height: float, color: str, opacity: float
) -> str:
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{color}" fill-opacity="{opacity}"/>'
    )


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    """Returns the range of some values, widened by 6 % on both sides."""
    low = min(values)
    high = max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _line(
    points: Points, index: int, to_pixels: Callable[[float, float], tuple[float, float]]
) -> list[str]:
    """Returns a polyline for several points, and dots if there are few."""
    pixels = [to_pixels(x, y) for x, y in points if math.isfinite(y)]
    parts = []
    if len(pixels) > 1:
        coordinates = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        parts.append(
            f'<polyline fill="none" stroke-width="1.8" {_stroke(index)} points="{coordinates}"/>'
        )
    if len(pixels) < 12:
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{COLORS[index]}"/>' for x, y in pixels
        ]
    return parts


def legend(colors: Mapping[str, int]) -> str:
    """Returns the names beside samples of their lines."""
    parts = []
    for name, index in colors.items():
        stroke = _stroke(index % len(COLORS))
        line = f'<line x1="0" x2="34" y1="5" y2="5" stroke-width="2.4" {stroke}/>'
        sample = f'<svg width="34" height="10" aria-hidden="true">{line}</svg>'
        parts.append(f'<span class="key">{sample} {html_text(name)}</span>')
    return f'<p class="legend">{"".join(parts)}</p>'


def difference_plot(title: str, values: Sequence[float], label: str) -> str:
    """Plots a bar for each query, sorted: up for an improvement, down for a loss."""
    if not values:
        return ""
    ordered = sorted(values, reverse=True)
    largest = max(abs(value) for value in ordered) or 1.0
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    half = (_HEIGHT - _TOP - _BOTTOM) / 2
    spacing = (_WIDTH - _LEFT - _RIGHT) / len(ordered)
    width = max(spacing * 0.9, 0.3)
    parts = [_title(title)]
    for value in (largest, 0.0, -largest):
        parts += _grid_line(middle - value / largest * half, f"{value:+.2g}")
    for index, value in enumerate(ordered):
        left = _LEFT + index * spacing
        height = abs(value) / largest * half
        top = middle - height if value > 0 else middle
        color = COLORS[0] if value > 0 else COLORS[1]
        parts.append(
            f'<rect x="{left:.2f}" y="{top:.1f}" width="{width:.2f}" height="{height:.1f}" '
            f'fill="{color}"/>'
        )
    parts.append(_text(_MIDDLE_X, _HEIGHT - 12, "tick middle", html_text(label)))
    return _figure(parts, _WIDTH, _HEIGHT, title)


def _text(x: int | str, y: int | str, css_class: str, content: str, attributes: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{css_class}"{attributes}>{content}</text>'


def _title(title: str) -> str:
    return _text(_LEFT, 16, "title", html_text(title))


def _grid_line(y: float, label: str) -> list[str]:
    """Returns a horizontal line across the plot and its label on the left."""
    return [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>',
        _text(_LEFT - 6, f"{y + 4:.1f}", "tick end", label),
    ]


def _stroke(index: int) -> str:
    """Returns the attributes for color and dashes of a palette index."""
    dashes = f' stroke-dasharray="{DASHES[index]}"' if DASHES[index] else ""
    return f'stroke="{COLORS[index]}"{dashes}'


def _figure(parts: Sequence[str], width: int, height: int, title: str) -> str:
    label = html_text(title)
    return (
        f'<svg viewBox="0 0 {width} {height}" class="plot" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )
