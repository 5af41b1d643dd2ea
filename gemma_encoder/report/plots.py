"""Plots of a report as inline SVG: lines over steps, bars of differences. No script; colours that colour-blind readers tell apart."""

import html
import math
from collections.abc import Mapping, Sequence

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#888888",
)  # Okabe and Ito's, black left out: pages may be dark
DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "4 4", "1 4")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 240, 58, 12, 28, 40

Points = Sequence[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in at most some six characters, e.g. 0.975 or 2e-4."""
    text = f"{value:g}"
    if len(text.lstrip("-")) <= 5:
        return text
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def line_plot(
    title: str, series: Mapping[str, Points], y_label: str, colors: Mapping[str, int]
) -> str:
    """Lines over steps; a single point is drawn as a dot.

    Args:
        title: above the plot.
        series: (step, value) points by name, in the order of steps.
        y_label: of the vertical axis.
        colours: the place of each name in the palette, the same in every plot of a page.
    """
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if not points:
        return ""
    x_low, x_high = 0.0, max(x for x, _ in points) or 1.0
    y_low, y_high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.06 * (y_high - y_low) or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - margin, y_high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<text x="{LEFT}" y="16" class="title">{html.escape(title)}</text>']
    for value in ticks(y_low, y_high):
        _, y = place(0, value)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick end">{short(value)}</text>')
    for value in ticks(x_low, x_high):
        x, _ = place(value, y_low)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" class="tick middle">{value:g}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" class="tick middle">step</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="12" y="{middle:.0f}" class="tick middle" transform="rotate(-90 12 {middle:.0f})">{html.escape(y_label)}</text>'
    )
    for name, line in series.items():
        number = colors[name] % len(COLORS)
        drawn = [place(x, y) for x, y in line if math.isfinite(y)]
        style = f'stroke="{COLORS[number]}"' + (
            f' stroke-dasharray="{DASHES[number]}"' if DASHES[number] else ""
        )
        if len(drawn) > 1:
            parts.append(
                f'<polyline fill="none" stroke-width="1.8" {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)}"/>'
            )
        if len(drawn) < 12:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{COLORS[number]}"/>'
                for x, y in drawn
            ]
    return _figure(parts, WIDTH, HEIGHT, title)


def legend(colors: Mapping[str, int]) -> str:
    """The names with the lines that stand for them."""
    parts = []
    for name, place in colors.items():
        number = place % len(COLORS)
        dash = f' stroke-dasharray="{DASHES[number]}"' if DASHES[number] else ""
        line = f'<svg width="34" height="10" aria-hidden="true"><line x1="0" x2="34" y1="5" y2="5" stroke-width="2.4" stroke="{COLORS[number]}"{dash}/></svg>'
        parts.append(f'<span class="key">{line} {html.escape(name)}</span>')
    return f'<p class="legend">{"".join(parts)}</p>'


def difference_plot(title: str, values: Sequence[float], label: str) -> str:
    """One bar per query, sorted, up where it is better and down where it is worse."""
    if not values:
        return ""
    ordered = sorted(values, reverse=True)
    largest = max(abs(value) for value in ordered) or 1.0
    middle, wide = (TOP + HEIGHT - BOTTOM) / 2, (WIDTH - LEFT - RIGHT) / len(ordered)
    half = (HEIGHT - TOP - BOTTOM) / 2
    parts = [f'<text x="{LEFT}" y="16" class="title">{html.escape(title)}</text>']
    for value in (largest, 0.0, -largest):
        y = middle - value / largest * half
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="tick end">{value:+.2g}</text>')
    for number, value in enumerate(ordered):
        size = abs(value) / largest * half
        top = middle - size if value > 0 else middle
        color = COLORS[0] if value > 0 else COLORS[1]
        parts.append(
            f'<rect x="{LEFT + number * wide:.2f}" y="{top:.1f}" width="{max(wide * 0.9, 0.3):.2f}" height="{size:.1f}" fill="{color}"/>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" class="tick middle">{html.escape(label)}</text>'
    )
    return _figure(parts, WIDTH, HEIGHT, title)


def _figure(parts: Sequence[str], width: int, height: int, title: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" class="plot" role="img" aria-label="{html.escape(title, quote=True)}">{"".join(parts)}</svg>'
