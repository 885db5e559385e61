"""The settings that no other one beats: the non-dominated set and its figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from analysis.result_rows import model_label
from figures.style import (
    COLOURS,
    FONT,
    GREY,
    MOST_PAGES,
    WIDTH,
    Page,
    check_page,
    clean,
    draw_intervals,
    finished,
    nothing,
    percent,
    plain,
    short,
    title,
    title_height,
)

DIMENSIONS = {  # column -> (whether more is better, label, factor for print)
    "accuracy": (True, "accuracy (%)", 100),
    "worst_group_accuracy": (True, "worst-group accuracy (%)", 100),
    "accuracy_gap": (False, "accuracy gap (points)", 100),
    "equalized_odds_difference": (False, "equalized-odds diff. (points)", 100),
    "demographic_parity_difference": (False, "dem.-parity diff. (points)", 100),
    "size_mb": (False, "size on disk (MB)", 1),
    "latency_ms_b1": (False, "latency, 1 image (ms)", 1),
    "latency_ms_b32": (False, "latency, 32 images (ms)", 1),
}
LATENCIES = ("latency_ms_b1", "latency_ms_b32")
COSTS = ("size_mb", *LATENCIES)
DEFAULT_DIMENSIONS = ("accuracy", "accuracy_gap", "size_mb")
KINDS = {"FP32": "*", "static": "o", "dynamic": "s", "with mitigation": "^", "other": "D"}
MOST_NUMBERED = 24


def pareto_mask(values: np.ndarray, maximize: Sequence[bool]) -> np.ndarray:
    """Which of the (N, D) points no other point dominates: as good in every column and better in one.

    `maximize` says for each column whether more is better. Equal points are all kept or all left out; a point with a
    NaN is left out and dominates nothing.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(maximize):
        raise ValueError(f"values must have shape (N, {len(maximize)}), not {values.shape}")
    costs = np.where(np.asarray(maximize, dtype=bool), -values, values)
    mask = np.zeros(len(costs), dtype=bool)
    complete = np.flatnonzero(~np.isnan(costs).any(axis=1))
    if not len(complete):
        return mask
    # In lexicographic order a point is dominated by an earlier one or by none; and what a dominated point dominates,
    # a point of the front dominates too: so each is compared with the front so far only.
    distinct, inverse = np.unique(costs[complete], axis=0, return_inverse=True)
    front = np.empty_like(distinct)
    size = 0
    keep = np.zeros(len(distinct), dtype=bool)
    for i, point in enumerate(distinct):
        if not (front[:size] <= point).all(axis=1).any():
            front[size], keep[i] = point, True
            size += 1
    mask[complete] = keep[inverse.ravel()]
    return mask


def pareto_points(rows: pd.DataFrame, dimensions: Sequence[str] = DEFAULT_DIMENSIONS) -> pd.DataFrame:
    """One row a (data set, model, setting), mean over seeds, with flags for the non-dominated sets of its data set.

    on_front_accuracy: small size, high accuracy; on_front_worst_group: small size, high worst-group accuracy;
    on_front_all: all of `dimensions` (keys of `DIMENSIONS`). A setting without a value in one of them (an undefined
    gap, a latency that was not measured) is on no front that needs it.
    """
    unknown = [name for name in dimensions if name not in DIMENSIONS]
    if unknown:
        raise ValueError(f"unknown dimension {', '.join(unknown)}; choose from {', '.join(DIMENSIONS)}")
    # latencies differ from run to run: they are there where they decide
    means = [name for name in DIMENSIONS if name not in LATENCIES or name in dimensions]
    ends = [f"{name}_ci_{end}" for name in means if name not in COSTS for end in ("low", "high")]
    columns = ["dataset", "model", "setting", "kind", "n_seeds", *means, *ends]
    flags = {
        "on_front_accuracy": ["size_mb", "accuracy"],
        "on_front_worst_group": ["size_mb", "worst_group_accuracy"],
        "on_front_all": list(dimensions),
    }
    rows = finished(rows)
    rows = rows[rows["size_mb"].notna() & rows["accuracy"].notna()] if len(rows) else rows
    if rows.empty:
        return pd.DataFrame(columns=[*columns, *flags])
    keys = ["dataset", "model", "setting"]
    absent = pd.DataFrame(np.nan, rows.index, [name for name in (*means, *ends) if name not in rows])
    values = pd.concat([rows[[name for name in (*means, *ends) if name in rows]], absent], axis=1)
    values = values.apply(pd.to_numeric, errors="coerce").astype(float)
    blocks = values.groupby([rows[key] for key in keys], sort=False)
    # of all its seeds, or of none; of intervals the mean, see mean_ends
    points = blocks.mean().where(blocks.count().eq(blocks.size(), axis=0))
    kind = rows["method"].map({"none": "FP32", "ptq_static": "static", "ptq_dynamic": "dynamic"}).fillna("other")
    kind = kind.where(rows["strategy"].isna(), "with mitigation")
    points["kind"] = kind.groupby([rows[key] for key in keys], sort=False).first()
    points["n_seeds"] = blocks.size()
    points = points.reset_index()[columns]
    for flag, names in flags.items():
        points[flag] = False
        for _, block in points.groupby("dataset", sort=False):
            better = [DIMENSIONS[name][0] for name in names]
            points.loc[block.index, flag] = pareto_mask(block[names].to_numpy(), better)
    return points


def pareto_frontier(
    rows: pd.DataFrame, dimensions: Sequence[str] = DEFAULT_DIMENSIONS, level: float = 0.95, page: int = 1
) -> Page:
    """The settings that no other one beats in all the chosen dimensions, ringed and numbered, with intervals.

    A page of panels a data set; a panel shows one quality against one cost (without a cost: the first two qualities).
    A point is a (model, setting), mean over seeds; colour is the model, shape what was done; with more models than
    colours, colour is what was done too. The grey line is what is non-dominated in the two dimensions of its panel.
    """
    points = pareto_points(rows, dimensions)
    if points.empty:
        return nothing("no finished cell with a size and an accuracy")
    names = " × ".join(DIMENSIONS[name][1].partition(" (")[0] for name in dimensions)
    if not points[list(dimensions)].notna().all(axis=1).any():
        return nothing(f"no finished cell was measured in all of {names}")
    datasets = list(points["dataset"].unique())
    n_pages = min(len(datasets), MOST_PAGES)
    check_page(page, n_pages)
    dataset = datasets[page - 1]
    models = list(points["model"].unique())
    by_model = len(models) <= len(COLOURS)
    keys = models if by_model else list(KINDS)
    colour_of = {key: COLOURS[i % len(COLOURS)] for i, key in enumerate(keys)}
    block = points[points["dataset"] == dataset]
    front = block[block["on_front_all"]].sort_values(list(dimensions), ascending=False, kind="stable")
    costs = [name for name in dimensions if name in COSTS]
    qualities = [name for name in dimensions if name not in COSTS]
    order = costs[0] if costs else qualities[0]
    front = front.sort_values(order, kind="stable")
    pairs = [(cost, quality) for cost in costs for quality in qualities] or [tuple(qualities[:2])]
    if not qualities:
        pairs = [tuple(costs[:2])]
    numbers = {index: number for number, index in enumerate(_apart(front, *pairs[0]), start=1)}
    n_columns = min(2, len(pairs))
    n_rows = math.ceil(len(pairs) / n_columns)

    seeds = int(points["n_seeds"].max())
    every = "both" if len(dimensions) == 2 else f"all {len(dimensions)}"
    told = f"{plain(dataset)}: {names}" if len(datasets) > 1 else names.capitalize()
    told += f"; ringed: no other setting is as good in {every} and better in one"
    told += f"; bars: {percent(level)} intervals" if len(front) <= MOST_NUMBERED and qualities else ""
    told += f" (mean over {seeds} seeds)" if seeds > 1 else ""
    handles = [
        Line2D([], [], color=colour_of[key], marker="o", linestyle="", markersize=4, label=short(model_label(key)))
        for key in models
        if by_model
    ]
    handles += [
        Line2D(
            [], [], color=GREY if by_model else colour_of[kind], marker=marker, linestyle="", markersize=5, label=kind
        )
        for kind, marker in KINDS.items()
        if (points["kind"] == kind).any()
    ]
    handles.append(
        Line2D([], [], color="none", marker="o", markeredgecolor="k", markersize=7, label="not dominated", linestyle="")
    )
    key_rows = math.ceil(len(numbers) / 2) + (1 if len(front) > len(numbers) else 0)
    legend_height = 0.17 * math.ceil(len(handles) / 5)
    told_height = title_height(told)
    top = told_height + 0.08 + legend_height
    panel_height = 2.3
    height = top + n_rows * (panel_height + 0.5) + 0.115 * key_rows + 0.12
    figure = Page(WIDTH, height, page, n_pages, layout="none")
    for i, (x, y) in enumerate(pairs):
        r, c = divmod(i, n_columns)
        bottom = height - top - (r + 1) * panel_height - r * 0.5
        axes = figure.add_axes(
            (0.075 + 0.495 * c, bottom / height, 0.41 if n_columns > 1 else 0.9, (panel_height - 0.08) / height)
        )
        _draw_panel(axes, block, front, numbers, x, y, colour_of, by_model)
    entries = [
        f"{number}  {short(model_label(block.loc[index, 'model']))}, {short(block.loc[index, 'setting'], 44)}"
        for index, number in numbers.items()
    ]
    split = math.ceil(len(entries) / 2)
    below = top + n_rows * (panel_height + 0.5) - 0.08
    for column, part in enumerate((entries[:split], entries[split:])):
        figure.text(
            0.03 + 0.495 * column, 1 - below / height, "\n".join(part), fontsize=6.2, va="top", linespacing=1.25
        )
    if len(front) > len(numbers):
        more = f"{len(numbers)} of {len(front)} are numbered, one where they are close; all are in pareto.csv"
        figure.text(0.03, 0.06 / height, more, fontsize=6.2, va="bottom", color=GREY)
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.02, 1 - (told_height - 0.01) / height),
        ncols=min(len(handles), 5), fontsize=6.5, frameon=False, handletextpad=0.2, columnspacing=1.2,
        borderaxespad=0.0,
    )  # fmt: skip
    title(figure, told)
    return figure


def _apart(front: pd.DataFrame, x: str, y: str) -> list:
    """Up to `MOST_NUMBERED` of the front, no two closer in a panel than a number is wide."""
    places = []
    for name, size in ((x, 200.0), (y, 160.0)):  # of a panel, in typographic points
        values = front[name].to_numpy(dtype=float)
        values = np.log(values) if name in COSTS and (values > 0).all() else values
        places.append(size * (values - values.min()) / max(np.ptp(values), 1e-12) if len(values) else values)
    chosen: list[int] = []
    for i, place in enumerate(np.column_stack(places)):
        near = [math.dist(place, (places[0][j], places[1][j])) < 8 for j in chosen]
        if not any(near) or len(front) <= 8:
            chosen.append(i)
    return list(front.index[chosen[:MOST_NUMBERED]])


def _draw_panel(axes, block, front, numbers, x: str, y: str, colour_of: dict, by_model: bool) -> None:
    x_factor, y_factor = DIMENSIONS[x][2], DIMENSIONS[y][2]
    flat = block[pareto_mask(block[[x, y]].to_numpy(), [DIMENSIONS[x][0], DIMENSIONS[y][0]])]
    flat = flat.sort_values(x, kind="stable")
    where = "pre" if DIMENSIONS[x][0] else "post"
    axes.step(x_factor * flat[x], y_factor * flat[y], where=where, color="#BBBBBB", linewidth=1, zorder=1)
    many = len(block) > 400
    for (key, kind), part in block.groupby(["model" if by_model else "kind", "kind"], sort=False):
        axes.plot(
            x_factor * part[x], y_factor * part[y], KINDS[kind], color=colour_of[key], linestyle="",
            markersize=(6 if kind == "FP32" else 4) * (0.6 if many else 1), alpha=0.5 if many else 0.85,
            markeredgewidth=0, zorder=2, rasterized=many,
        )  # fmt: skip
    low, high = f"{y}_ci_low", f"{y}_ci_high"
    if y not in COSTS and len(front) <= MOST_NUMBERED:
        draw_intervals(
            axes, y_factor * front[low], y_factor * front[high], x_factor * front[x], "#444444", vertical=True,
            width=0.7, zorder=2.5, alpha=0.7,
        )  # fmt: skip
    axes.plot(
        x_factor * front[x], y_factor * front[y], "o", markersize=8 if not many else 5, markerfacecolor="none",
        markeredgecolor="k", markeredgewidth=0.9 if not many else 0.6, zorder=3, gid="front", linestyle="",
    )  # fmt: skip
    if x in COSTS and (block[x] > 0).any():
        _log_axis(axes, block.loc[block[x] > 0, x])
    axes.set_xlabel(DIMENSIONS[x][1], fontsize=FONT, labelpad=2)
    axes.set_ylabel(DIMENSIONS[y][1] + (" ↓" if not DIMENSIONS[y][0] else ""), fontsize=FONT, labelpad=2)
    clean(axes, "both")
    numbered = front.loc[list(numbers)]
    _write_numbers(axes, x_factor * numbered[x], y_factor * numbered[y], list(numbers.values()))


def _write_numbers(axes, x: pd.Series, y: pd.Series, numbers: list[int]) -> None:
    """Each number beside its point, on the side where points and numbers written before are farthest."""
    axes.set_xlim(axes.get_xlim())  # what follows is placed on the final scale
    axes.set_ylim(axes.get_ylim())
    to_points = 72 / axes.figure.dpi
    at_P2 = axes.transData.transform(np.column_stack([x, y])) * to_points
    sides = [(8 * math.cos(angle), 8 * math.sin(angle)) for angle in np.arange(0.25, 2, 0.25) * math.pi]
    written: list[np.ndarray] = []
    for number, place, value in zip(numbers, at_P2, zip(x, y, strict=True), strict=True):
        others = np.array([p for p in at_P2 if not np.allclose(p, place)] + written + [place + 1000.0])
        room = [np.hypot(*(others - place - side).T).min() for side in sides]
        side = sides[int(np.argmax(np.round(room, 3)))]
        written.append(place + side)
        axes.annotate(
            str(number), value, textcoords="offset points", xytext=side, fontsize=6, ha="center", va="center", zorder=4
        )


def _log_axis(axes, values: pd.Series) -> None:
    """Logarithmic, ticks at 1, 2 and 5 written as plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = values.min(), values.max()
    every = (step * 10.0**exponent for exponent, step in itertools.product(range(-4, 7), (1, 2, 5)))
    ticks = [tick for tick in every if low / 1.3 <= tick <= high * 1.3]
    if ticks:
        axes.set_xticks(ticks[:: max(1, math.ceil(len(ticks) / 7))])
    axes.set_xlim(low / 1.35, high * 1.35)
