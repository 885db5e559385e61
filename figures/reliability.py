"""How honest the probabilities are in each group: reliability diagrams in small multiples."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from analysis.group_calibration import calibration_errors
from analysis.result_rows import main_settings, model_label
from figures.style import (
    FONT,
    MAX_HEIGHT,
    MOST_PAGES,
    WIDTH,
    Page,
    check_page,
    clean,
    draw_intervals,
    inch_grid,
    labelled,
    legend,
    legend_height,
    nothing,
    of_dataset,
    percent,
    short,
    styles,
    title,
    title_height,
)
from group_counts import wilson_interval

MOST_WIDTHS = 6
MOST_GROUPS = 15
MOST_COLUMNS = 5  # groups side by side


def probability_calibration(table: pd.DataFrame, rows: pd.DataFrame, level: float = 0.95, page: int = 1) -> Page:
    """Reliability of each group's probabilities: accuracy against confidence, FP32 and the main setting of each width.

    `table` is that of `group_calibration.reliability` for several cells (column `cell`), `rows` name them. A bin's
    interval is Wilson's; bins of several seeds are pooled and their interval is that of one seed's images. The numbers
    are expected calibration errors in points, in brackets what a perfectly calibrated model would show by chance.
    """
    names = ["cell", "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits", "options"]
    if not len(table):
        return nothing("no probabilities of finished cells")
    rows = labelled(rows[rows["cell"].isin(table["cell"])][[name for name in names if name in rows]])
    settings = main_settings(rows) if len(rows) else []
    rows = rows[rows["setting"].isin(settings)] if len(rows) else rows
    if rows.empty:
        return nothing("no probabilities of FP32 or a main setting")
    table = table.merge(rows[["cell", "dataset", "model", "setting", "setting_order", "seed"]], on="cell")
    told = ""
    if len(settings) > 1 + MOST_WIDTHS:
        told = f"; {len(settings) - 1 - MOST_WIDTHS} further widths left out"
        settings = settings[: 1 + MOST_WIDTHS]
    models = list(dict.fromkeys(zip(table["dataset"], table["model"], strict=True)))
    groups_of = {dataset: _largest(block, MOST_GROUPS) for dataset, block in table.groupby("dataset", sort=False)}
    if any(is_cut for _, is_cut in groups_of.values()):
        told += f"; the {MOST_GROUPS} largest groups"
    most = max(len(groups) for groups, _ in groups_of.values())
    n_columns = math.ceil(most / math.ceil(most / MOST_COLUMNS))
    strips = []  # a row of panels: (model's name, data set, model, groups)
    for dataset, model in models:
        groups, _ = groups_of[dataset]
        name = short(model_label(model)) + of_dataset(table, dataset)
        strips += [(name, dataset, model, groups[i : i + n_columns]) for i in range(0, len(groups), n_columns)]
    pooled = f", {table['seed'].nunique()} seeds pooled" if table["seed"].nunique() > 1 else ""
    told = (
        f"Accuracy against confidence by group (n), {percent(level)} Wilson intervals{pooled}. Numbers: expected "
        f"calibration error in points (in brackets: by chance alone){told}"
    )
    body = min(1.35, (WIDTH - 0.5) / n_columns - 0.15)
    above, below = 0.2, 0.42 + legend_height([short(name, 40) for name in settings])
    a_page = max(1, int((MAX_HEIGHT - title_height(told) - 0.15 - below) / (body + above + 0.18)))
    n_pages = min(math.ceil(len(strips) / a_page), MOST_PAGES)
    check_page(page, n_pages)
    if len(strips) > a_page * MOST_PAGES:
        told += f"; the first {a_page * MOST_PAGES} of {len(strips)} rows, all are in calibration.csv"
    here = strips[(page - 1) * a_page : page * a_page]
    lowest = max(0.0, float(table["bin_low"].min()))
    figure, grid = inch_grid(
        len(here), n_columns, body, left=0.42, between=0.12, above=above, apart=0.18, below=below, page=page,
        n_pages=n_pages, sharey=True, told=told,
    )  # fmt: skip
    style = styles(settings)
    shown = table[[key in {strip[1:3] for strip in here} for key in zip(table["dataset"], table["model"], strict=True)]]
    keys = ["dataset", "model", "group", "setting"]
    bins = dict(list(_pooled(shown, keys, level).groupby(keys, sort=False)))
    errors = calibration_errors(shown).merge(rows[["cell", "dataset", "model", "setting"]], on="cell")
    errors = errors.groupby(keys)[["n", "expected_calibration_error", "by_chance"]].mean()
    for r, (name, dataset, model, groups) in enumerate(here):
        for c in range(n_columns):
            axes = grid[r][c]
            if c >= len(groups):
                axes.set_visible(False)
                continue
            group = groups[c]
            axes.plot([lowest, 1], [lowest, 1], color="#AAAAAA", linewidth=0.8, linestyle=(0, (4, 2)), zorder=0)
            there = [setting for setting in settings if (dataset, model, group, setting) in bins]
            for i, setting in enumerate(there):
                key, (colour, marker) = (dataset, model, group, setting), style[setting]
                block = bins[key]
                at = block["confidence"]
                draw_intervals(axes, block["low"], block["high"], at, colour, vertical=True, width=0.6, alpha=0.5)
                axes.plot(at, block["accuracy"], color=colour, linewidth=0.8, marker=marker, markersize=2.4)
                error, chance = 100 * errors.loc[key, ["expected_calibration_error", "by_chance"]]
                axes.text(
                    0.985, 0.02 + 0.088 * (len(there) - 1 - i) / body, f"{error:.1f} ({chance:.1f})", color=colour,
                    transform=axes.transAxes, fontsize=5.8, ha="right", va="bottom", zorder=5,
                )  # fmt: skip
            n = max(int(errors.loc[(dataset, model, group, setting), "n"]) for setting in there) if there else 0
            prefix = f"{name}: " if c == 0 and len(models) > 1 else ""
            axes.set_title(f"{prefix}{short(group, 18)} ({n})", fontsize=FONT - 1, loc="left", pad=3)
            clean(axes, "both")
            axes.set_xlim(lowest - 0.02, 1.02)
            axes.set_ylim(-0.02, 1.02)
            if c == 0:
                axes.set_ylabel("accuracy", fontsize=FONT - 1, labelpad=2)
            is_last = r + 1 == len(here) or c >= len(here[r + 1][3])
            axes.tick_params(labelbottom=is_last, labelleft=c == 0)
            if is_last:
                axes.set_xlabel("confidence", fontsize=FONT - 1, labelpad=2)
    handles = [
        Line2D([], [], color=style[name][0], marker=style[name][1], markersize=3.5, linewidth=1, label=short(name, 40))
        for name in settings
    ]
    legend(figure, handles)
    title(figure, told)
    return figure


def _largest(table: pd.DataFrame, most: int) -> tuple[list[str], bool]:
    """The groups in order, or the largest ones of too many; and whether any was left out."""
    n = table.groupby("group", sort=False)["n"].sum()
    if len(n) <= most:
        return list(n.index), False
    return list(n.sort_values(ascending=False, kind="stable").index[:most]), True


def _pooled(table: pd.DataFrame, keys: list[str], level: float) -> pd.DataFrame:
    """The bins of each `keys` over its cells: mean confidence, accuracy, and the interval of one seed's images."""
    filled = table[table["n"] > 0]
    cells = table.groupby(keys)["cell"].nunique()
    sums = filled.assign(hits=filled["accuracy"] * filled["n"], total=filled["confidence"] * filled["n"])
    sums = sums.groupby([*keys, "bin"])[["n", "hits", "total"]].sum().reset_index()
    seeds = cells.reindex(pd.MultiIndex.from_frame(sums[keys])).to_numpy()
    low, high = wilson_interval(np.minimum(sums["hits"], sums["n"]) / seeds, sums["n"] / seeds, level)
    return sums.assign(confidence=sums["total"] / sums["n"], accuracy=sums["hits"] / sums["n"], low=low, high=high)
