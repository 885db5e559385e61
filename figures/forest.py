"""The hypotheses as a forest plot: effect, interval, threshold and verdict."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import pandas as pd

from figures.style import (
    FONT,
    GREY,
    MAX_HEIGHT,
    MOST_PAGES,
    WIDTH,
    Page,
    check_page,
    clean,
    draw_intervals,
    nothing,
    page_note,
    paged,
    plain,
    short,
)

VERDICT_COLOURS = {
    "supported": "#0072B2",
    "contradicted": "#B34700",
    "inconclusive": "#666666",
    "not tested": "#8A8A8A",
}
MOST_PARTS = 12
CORRECTED = ("p_holm", "p_corrected", "p_adjusted")


def hypothesis_validation(hypotheses: pd.DataFrame, page: int = 1) -> Page:
    """Forest plot: effect and interval of each hypothesis (its parts in grey), its threshold, and the verdict.

    `hypotheses` has the columns of `hypotheses.COLUMNS`. Each hypothesis has a scale of its own. As many are on a page
    as fit.
    """
    if hypotheses.empty:
        return nothing("no hypotheses")
    rows = hypotheses.to_dict("records")
    heights = [_height(row) for row in rows]
    pages = paged(list(zip(rows, heights, strict=True)), heights, MAX_HEIGHT - 0.4)
    n_pages = min(len(pages), MOST_PAGES)
    check_page(page, n_pages)
    here = pages[page - 1]
    total = sum(height for _, height in here) + 0.4
    figure = Page(WIDTH, total, page, n_pages, layout="none")
    top = total - 0.36
    for row, height in here:
        _draw_row(figure, row, top, height, total)
        top -= height
    heading = "Hypotheses: effect, interval and decision threshold (dashed). Each row has its own scale."
    left_out = sum(map(len, pages[MOST_PAGES:]))
    heading += f" {left_out} more: hypotheses.json." if left_out else ""
    figure.text(0.015, 1 - 0.08 / total, heading + page_note(figure), fontsize=FONT + 0.5, va="top", color="#222222")
    return figure


def _parts(row: dict) -> list[dict]:
    parts = row.get("parts")
    return list(parts)[:MOST_PARTS] if isinstance(parts, (list, tuple)) else []


def _statement(row: dict) -> list[str]:
    return textwrap.wrap(str(row["statement"]), 84)[:2] or [""]


def _height(row: dict) -> float:
    lines = 0.13 * (len(_statement(row)) - 1)
    if not _is_finite(row.get("effect")):
        return 0.5 + lines
    told = 0.98 + (0.1 if _corrected(row) else 0.0)
    return max(told, 0.88 + 0.13 * len(_parts(row))) + lines


def _draw_row(figure: Page, row: dict, top: float, height: float, total: float) -> None:
    colour = VERDICT_COLOURS.get(row["verdict"], GREY)
    statement = _statement(row)
    lines = 0.13 * (len(statement) - 1)
    text_y = top / total
    figure.text(
        0.015, text_y, plain("\n".join(statement)), fontsize=FONT + 0.5, fontweight="bold", va="top", linespacing=1.15
    )
    figure.text(0.8, text_y, plain(row["verdict"]), fontsize=FONT + 1, fontweight="bold", color=colour, va="top")
    if not _is_finite(row.get("effect")):
        reason = textwrap.shorten(plain(str(row.get("reason", ""))), 130, placeholder=" …")
        figure.text(0.015, text_y - (0.17 + lines) / total, reason, fontsize=6.5, color=GREY, va="top")
        return
    part = _parts(row)
    axes = figure.add_axes((0.3, (top - height + 0.42) / total, 0.47, (height - 0.64 - lines) / total))
    figure.text(0.8, text_y - 0.19 / total, _numbers(row), fontsize=6.5, va="top", linespacing=1.25)
    low, high = row["threshold_low"], row["threshold_high"]
    if _is_finite(low) and _is_finite(high) and high > low:
        axes.axvspan(low, high, color="#0072B2", alpha=0.09, linewidth=0)
    for edge in {low, high}:
        if _is_finite(edge):
            axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
    draw_intervals(axes, [row["ci_low"]], [row["ci_high"]], [0], colour, width=2.6)
    axes.plot(row["effect"], 0, "D", color=colour, markersize=5.5, markeredgecolor="w", markeredgewidth=0.7)
    if part:
        y = np.arange(1, 1 + len(part))
        ends = [[_number(item.get(name)) for item in part] for name in ("ci_low", "ci_high", "effect")]
        draw_intervals(axes, ends[0], ends[1], y, "#999999", width=1)
        axes.plot(ends[2], y, "o", color="#777777", markersize=2.8, linestyle="")
    # parts of a slope are losses of each model or group, in another unit than the slope
    pooled = "slope" if " per " in str(row["unit"]) else "all"
    names = [short(item["label"], 36) for item in part]
    more = len(row["parts"]) - len(part) if isinstance(row.get("parts"), (list, tuple)) else 0
    if more:
        names[-1] += f"  (+ {more})"
    axes.set_yticks(range(1 + len(part)), [pooled, *names], fontsize=6.2)
    axes.set_ylim(len(part) + 0.6, -0.7)
    unit = str(row["unit"]) + ("; grey: points of loss" if pooled == "slope" and part else "")
    axes.set_xlabel(short(unit, 84), fontsize=6.5, labelpad=1)
    clean(axes, "x")
    axes.tick_params(axis="x", labelsize=6.2, pad=1.5)


def _numbers(row: dict) -> str:
    level = f"{100 * row['ci_level']:.3g} %" if _is_finite(row.get("ci_level")) else "95 %"
    told = f"{row['effect']:+.2f}"
    if _is_finite(row["ci_low"]) and _is_finite(row["ci_high"]):
        told += f"\n{level}: {row['ci_low']:+.2f} to {row['ci_high']:+.2f}"
    told += _p("p", row.get("p"))
    corrected = _corrected(row)
    return told + (_p("corrected p", row[corrected]) if corrected else "")


def _corrected(row: dict) -> str | None:
    return next((name for name in CORRECTED if _is_finite(row.get(name))), None)


def _p(name: str, value) -> str:
    if not _is_finite(value):
        return ""
    return f"\n{name} < 0.001" if value < 0.001 else f"\n{name} = {value:.3f}"


def _number(value) -> float:
    return float(value) if _is_finite(value) else math.nan


def _is_finite(value) -> bool:
    return isinstance(value, (int, float, np.number)) and bool(np.isfinite(value))
