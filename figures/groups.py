"""What happened to each group: accuracy and flipped predictions, as dots with intervals in small multiples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from analysis.result_rows import FP32, METHOD_LABELS, main_settings, model_label
from figures.style import (
    FONT,
    MAX_HEIGHT,
    MOST_PAGES,
    Page,
    check_page,
    clean,
    draw_intervals,
    draw_marks,
    inch_grid,
    labelled,
    legend,
    legend_height,
    nothing,
    of_dataset,
    percent,
    seeds_note,
    short,
    styles,
    title,
    title_height,
)
from group_counts import wilson_interval

MOST_WIDTHS = 6  # colours in a panel
MOST_GROUPS = 24  # rows of a panel: the largest groups
PLACE = ["dataset", "model", "panel_method", "series", "group"]


@dataclass(frozen=True)
class Panel:
    """One of the small multiples: the marks of a model, and of a method beside FP32."""

    dataset: str
    model: str
    method: str | None  # None: the panel is of the model alone
    name: str


def per_group_performance(
    groups: pd.DataFrame, attribute: str | None = None, level: float = 0.95, page: int = 1
) -> Page:
    """Accuracy of each group, FP32 against the main setting of each method and width, with Wilson intervals.

    A row of panels is a model and a panel a method; with one method the panels are models. `groups` are rows of
    group_results.csv (with the column `options` of their result rows, where there are several observers). `attribute`:
    whose groups are shown; by default the first in the table.
    """
    if groups.empty:
        return nothing("no group rows")
    attribute = attribute or groups["attribute"].iloc[0]
    groups = groups[(groups["attribute"] == attribute) & (groups["n"] > 0)]
    groups = groups.drop_duplicates(["cell", "group"])  # with several classes accuracy repeats
    groups, told = _main_of_methods(groups)
    if groups.empty:
        return nothing(f"no group rows of {attribute}")
    groups = groups.assign(value=groups["accuracy"].astype(float))
    marks = _means(groups)
    low, high = wilson_interval(np.minimum(marks["value"].fillna(0) * marks["n"], marks["n"]), marks["n"], level)
    marks["low"], marks["high"] = np.where(marks["value"].isna(), np.nan, (low, high))
    is_small = groups["too_small"].astype(bool).any()
    told = (
        f"Accuracy by {attribute} (n), {percent(level)} Wilson intervals{seeds_note(groups, 'ticks: each seed')}"
        f"{'; * and open: below the minimum group size' if is_small else ''}{told}"
    )
    return _dot_panels(groups, marks, "accuracy (%)", told, page)


def group_flip_rates(flips: pd.DataFrame, level: float = 0.95, page: int = 1) -> Page:
    """Share of each group's images that get another prediction than FP32's, of all methods and widths, with intervals.

    `flips`: dataset, model, seed, method, strategy, weight_bits, activation_bits, options, cell, group (one of them
    'all'), n, flip_rate, ci_low, ci_high (of `level`). Of several seeds the interval is the mean of theirs.
    """
    if not len(flips):
        return nothing("no quantized cell beside its FP32 cell")
    flips, told = _main_of_methods(flips[flips["n"] > 0])
    flips = flips[flips["series"] != FP32]
    if flips.empty:
        return nothing("no plain quantized cell beside its FP32 cell")
    flips = flips.assign(value=flips["flip_rate"].astype(float), too_small=False)
    marks = _means(flips)
    ends = flips.assign(is_known=flips[["ci_low", "ci_high"]].notna().all(axis=1)).groupby(PLACE, sort=False)
    ends = ends.agg(low=("ci_low", "mean"), high=("ci_high", "mean"), is_known=("is_known", "all")).reset_index()
    marks["low"], marks["high"] = (ends[end].where(ends["is_known"]).astype(float) for end in ("low", "high"))
    seeds = seeds_note(flips, "ticks: each seed")
    told = f"Predictions that differ from FP32's, by group (n), {percent(level)} intervals{seeds}{told}"
    return _dot_panels(flips, marks, "changed predictions (%)", told, page, from_zero=True)


# ---------------------------------------------------------------------------------------------- panels of dots by group


def _main_of_methods(rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of FP32 and of the plain setting of each (method, width) that most cells have, with columns `series`
    (FP32 or the width) and `panel_method`; and what is said of those left out."""
    if rows.empty:
        return rows.assign(series="", panel_method=""), ""
    cells = labelled(rows.drop_duplicates("cell"))
    cells = cells[cells["strategy"].isna()]
    settings = []
    for method in cells["method"].unique():
        if method != "none":
            settings += [s for s in main_settings(cells[cells["method"] == method]) if s != FP32]
    is_fp32 = cells["method"] == "none"
    cells = cells[cells["setting"].isin(settings) | is_fp32].assign(is_fp32=is_fp32)
    widths = cells[~cells["is_fp32"]].groupby("width", sort=False)
    order = widths["setting_order"].min()
    most = widths["cell"].nunique().sort_values(ascending=False, kind="stable")
    chosen = list(most.index[:MOST_WIDTHS])
    told = f"; {len(most) - len(chosen)} further widths left out" if len(most) > len(chosen) else ""
    chosen.sort(key=lambda width: order[width])
    cells = cells[cells["width"].isin(chosen) | cells["is_fp32"]]
    series = np.where(cells["is_fp32"], FP32, cells["width"])
    names = pd.DataFrame({"cell": cells["cell"], "series": series, "panel_method": cells["method"]})
    return rows.merge(names, on="cell"), told


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """One mark a `PLACE`: value, the mean over the seeds that have one, and n and too_small, which seeds share."""
    marks = rows.groupby(PLACE, sort=False).agg(
        value=("value", "mean"), n=("n", "first"), too_small=("too_small", "first")
    )
    return marks.reset_index()


def _panels(rows: pd.DataFrame) -> tuple[list[Panel | None], int]:
    """A panel for each (model, method), in rows of a model; of one method the models side by side. None: a gap."""
    methods = [name for name in METHOD_LABELS if name != "none" and (rows["panel_method"] == name).any()]
    methods += [name for name in rows["panel_method"].unique() if name not in METHOD_LABELS]
    models = list(dict.fromkeys(zip(rows["dataset"], rows["model"], strict=True)))
    names = [short(model_label(model)) + of_dataset(rows, dataset) for dataset, model in models]
    if len(methods) <= 1:
        panels = [Panel(*key, None, name) for key, name in zip(models, names, strict=True)]
        return panels, min(3, len(panels))
    there = set(zip(rows["dataset"], rows["model"], rows["panel_method"], strict=True))
    panels = []
    for (dataset, model), name in zip(models, names, strict=True):
        heading = name
        for method in methods:
            if (dataset, model, method) not in there:
                panels.append(None)
                continue
            label = METHOD_LABELS.get(method, str(method).replace("_", " "))
            panels.append(Panel(dataset, model, method, f"{heading}\n{label}"))
            heading = ""  # stands over the first panel of the row
    return panels, len(methods)


def _dot_panels(
    rows: pd.DataFrame, marks: pd.DataFrame, xlabel: str, told: str, page: int, from_zero: bool = False
) -> Page:
    """Groups below each other, a mark with its interval for each series; the seeds' own values as ticks."""
    panels, n_columns = _panels(rows)
    series = _series_in_order(marks["series"].unique())
    firsts = marks.drop_duplicates(["dataset", "group"])  # the test images are the same for every cell
    names_of, labels_of = {}, {}
    for dataset, block in firsts.groupby("dataset", sort=False):
        if len(block) > MOST_GROUPS:
            block = block.sort_values("n", ascending=False, kind="stable")[:MOST_GROUPS]
            told += f"; the {MOST_GROUPS} largest groups"
        names_of[dataset] = list(block["group"])
        labels_of[dataset] = [
            f"{short(row.group, 22)} ({int(row.n)})" + ("*" if row.too_small else "") for row in block.itertuples()
        ]
    grid_rows = [panels[i : i + n_columns] for i in range(0, len(panels), n_columns)]
    step = max(0.13, min(0.4, 0.068 * len(series)))
    body = max(map(len, names_of.values())) * step
    above = 0.34 if any(panel is not None and "\n" in panel.name for panel in panels) else 0.22
    below = 0.42 + legend_height(series)
    a_page = max(1, int((MAX_HEIGHT - title_height(told) - 0.15 - below) / (body + above + 0.16)))
    n_pages = min(math.ceil(len(grid_rows) / a_page), MOST_PAGES)
    check_page(page, n_pages)
    if len(grid_rows) > a_page * MOST_PAGES:
        shown = sum(panel is not None for row in grid_rows[: a_page * MOST_PAGES] for panel in row)
        told += f"; the first {shown} of {sum(panel is not None for panel in panels)} panels, all are in the tables"
    here = grid_rows[(page - 1) * a_page : page * a_page]
    several = len(names_of) > 1 and n_columns > 1  # groups of another data set: names of their own in the row
    longest = max(len(label) for labels in labels_of.values() for label in labels)
    left = 0.14 + 0.053 * longest
    figure, grid = inch_grid(
        len(here), n_columns, body, left=left, between=left if several else 0.14, above=above, apart=0.16,
        below=below, page=page, n_pages=n_pages, told=told,
    )  # fmt: skip
    style = styles(series)
    offsets = dict(zip(series, np.linspace(-0.32, 0.32, len(series)) if len(series) > 1 else [0.0], strict=True))
    of_model = dict(list(marks.groupby(["dataset", "model"], sort=False)))
    seeds_of = dict(list(rows.groupby(["dataset", "model"], sort=False))) if rows["seed"].nunique() > 1 else {}
    for r, row in enumerate(here):
        named = None
        for c in range(n_columns):
            axes, panel = grid[r][c], row[c] if c < len(row) else None
            if panel is None:
                axes.set_visible(False)
                continue
            key, names = (panel.dataset, panel.model), names_of[panel.dataset]
            place = {name: y for y, name in enumerate(names)}

            def of_panel(table: pd.DataFrame, panel=panel, names=names) -> pd.DataFrame:
                mine = table["group"].isin(names)
                return table[
                    mine if panel.method is None else mine & table["panel_method"].isin((panel.method, "none"))
                ]

            for name, block in of_panel(of_model[key]).groupby("series", sort=False):
                colour, marker = style[name]
                y = block["group"].map(place) + offsets[name]
                draw_intervals(axes, 100 * block["low"], 100 * block["high"], y, colour, width=1.0)
                draw_marks(axes, 100 * block["value"], y, colour, marker, 2.9, block["too_small"])
            if key in seeds_of:
                for name, block in of_panel(seeds_of[key]).groupby("series", sort=False):
                    y = block["group"].map(place) + offsets[name]
                    draw_marks(axes, 100 * block["value"], y, style[name][0], "|", 2.6, alpha=0.8)
            is_first = named != panel.dataset  # in its row
            named = panel.dataset
            axes.set_yticks(range(len(names)), labels_of[panel.dataset] if is_first else [], fontsize=6.5)
            if not is_first:
                axes.set_yticks([])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(panel.name, fontsize=FONT, loc="left", pad=3)
            clean(axes, "x")
            axes.hlines(
                np.arange(0.5, len(names) - 1), 0, 1, transform=axes.get_yaxis_transform(), color="#EEEEEE",
                linewidth=0.6, zorder=0,
            )  # fmt: skip
            is_last = r + 1 == len(here) or c >= len(here[r + 1]) or here[r + 1][c] is None
            axes.tick_params(labelbottom=is_last)
            if is_last:
                axes.set_xlabel(xlabel, fontsize=FONT, labelpad=2)
    if from_zero:
        high = grid[0][0].get_xlim()[1]
        grid[0][0].set_xlim(-0.03 * high, high)  # room for marks at 0
    handles = [
        Line2D([], [], color=style[name][0], marker=style[name][1], markersize=4, linewidth=1.1, label=short(name, 40))
        for name in series
    ]
    legend(figure, handles)
    title(figure, told)
    return figure


def _series_in_order(names) -> list[str]:
    """FP32, then falling widths."""
    return sorted(names, key=lambda name: (name != FP32, *_falling(name)))


def _falling(width: str) -> tuple[int, int]:
    weights, _, activations = width.removeprefix("W").partition("A")
    return (-int(weights), -int(activations)) if weights.isdigit() and activations.isdigit() else (0, 0)
