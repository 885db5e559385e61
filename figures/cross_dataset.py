"""Whether what quantization does to each group transfers to another data set: change abroad over change at home."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.cross_dataset import ALL
from analysis.result_rows import model_label
from figures.style import COLOURS, FONT, GREY, MARKERS, WIDTH, nothing, plain

MOST_ROWS = 8
MOST_SETTINGS = 4


def cross_dataset(frame: pd.DataFrame) -> Figure:
    """Change of each group's accuracy against FP32, abroad over home, in points, with intervals: a row of panels for
    each model and pair of data sets, a column for each main setting, each with a scale of its own."""
    shown = frame[frame["is_main"] & frame["change_home"].notna() & frame["change_abroad"].notna()]
    if shown.empty:
        return nothing("no quantized model was measured on another data set together with its FP32 model")
    rows = list(dict.fromkeys(zip(shown["trained_on"], shown["evaluated_on"], shown["model"], strict=True)))
    order = shown.drop_duplicates("setting").sort_values("setting_order", kind="stable")
    settings = list(order["setting"])[:MOST_SETTINGS]
    left_out = len(rows) - MOST_ROWS
    rows = rows[:MOST_ROWS]
    groups = list(dict.fromkeys(shown.loc[shown["group"] != ALL, "group"]))
    style = {group: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, group in enumerate(groups)}
    style = {name: ("#000000" if name == ALL else colour, mark) for name, (colour, mark) in style.items()}
    style[ALL] = ("#000000", "*")
    figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(settings), squeeze=False)
    several = len({row[:2] for row in rows}) > 1
    for i, (trained_on, evaluated_on, model) in enumerate(rows):
        block = shown[
            (shown["trained_on"] == trained_on) & (shown["evaluated_on"] == evaluated_on) & (shown["model"] == model)
        ]
        for j, setting in enumerate(settings):
            axes = grid[i, j]
            points = block[block["setting"] == setting]
            if points.empty:
                axes.set_visible(False)
                continue
            _panel(axes, points, style)
            axes.set_title(plain(setting if i == 0 else setting.split()[0]), fontsize=FONT - 0.5, loc="left")
            if i == len(rows) - 1:
                axes.set_xlabel(
                    f"change on {plain(trained_on)} (points)" if not several else "change at home", fontsize=6
                )
            if j == 0:
                pair = f"\n{plain(trained_on)} → {plain(evaluated_on)}" if several else ""
                axes.set_ylabel(f"{plain(model_label(model))}{pair}\nchange on {plain(evaluated_on)}", fontsize=6)
    handles = [
        Line2D([], [], color=style[group][0], marker=style[group][1], markersize=4, linewidth=1, label=plain(label))
        for group, label in (*((group, group) for group in groups), (ALL, "all images"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(handles)), fontsize=6.5, frameon=False)
    seeds = int(shown["n_seeds"].max())
    title = "Change of accuracy by quantization, at home and on another data set, with intervals; dashed: the same"
    title += f"; mean over {seeds} seeds" if seeds > 1 else ""
    title += "; hollow: below the minimum group size" if shown["too_small"].any() else ""
    title += f"; {left_out} further rows are in cross_dataset.csv" if left_out > 0 else ""
    figure.suptitle(textwrap.fill(title, 118), fontsize=FONT + 0.5, x=0.01, ha="left", color="#222222")
    return figure


def _panel(axes, points: pd.DataFrame, style: Mapping[str, tuple[str, str]]) -> None:
    values = 100 * points[[f"change_{side}{end}" for side in ("home", "abroad") for end in ("", "_low", "_high")]]
    low, high = min(0.0, float(values.min().min())), max(0.0, float(values.max().max()))
    margin = 0.06 * max(high - low, 0.5)
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=GREY, linewidth=0.7, linestyle=(0, (4, 2)), zorder=1)
    for line in (axes.axhline, axes.axvline):
        line(0, color="#CCCCCC", linewidth=0.6, zorder=0)
    for row in points.to_dict("records"):
        colour, marker = style[row["group"]]
        x, y = 100 * row["change_home"], 100 * row["change_abroad"]
        axes.plot([100 * row["change_home_low"], 100 * row["change_home_high"]], [y, y], color=colour, linewidth=0.8)
        axes.plot(
            [x, x], [100 * row["change_abroad_low"], 100 * row["change_abroad_high"]], color=colour, linewidth=0.8
        )
        size = 6 if row["group"] == ALL else 3.8
        axes.plot(x, y, marker, color=colour, markersize=size, markerfacecolor="w" if row["too_small"] else colour)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_box_aspect(1)
    axes.locator_params(nbins=4)
    axes.grid(color="#EEEEEE", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=6, length=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
