"""Methods beside each other: repairs against plain quantization, fairness over widths, what methods cost and buy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from analysis.result_rows import METHOD_LABELS, main_settings, model_label, plain_counterparts, strategy_label
from figures.style import (
    COLOURS,
    COLUMN_WIDTH,
    FONT,
    GREY,
    MARKERS,
    MAX_HEIGHT,
    MOST_PAGES,
    WIDTH,
    Page,
    check_page,
    clean,
    cycle,
    draw_intervals,
    draw_marks,
    finished,
    legend,
    legend_height,
    mean_ends,
    nothing,
    of_dataset,
    paged,
    percent,
    plain,
    seeds_note,
    short,
    styles,
    title,
)

REPAIR_METRICS = {
    "accuracy": "accuracy (%)",
    "worst_group_accuracy": "worst-group accuracy (%)",
    "equalized_odds_difference": "equalized-odds diff. (points)",
}
MOST_LINES = 8  # models as lines of their own
EVERY_MODEL = "all models"


def mitigation_comparison(rows: pd.DataFrame, level: float = 0.95, page: int = 1) -> Page:
    """Each strategy against the plain cell of the same model and widths: accuracy, worst group, equalized odds.

    One line a (model, widths), the plain value and the strategies' below it, mean over seeds and options, with the
    rows' intervals (of several cells the mean of them). What needs more than six pages is averaged over models.
    """
    rows = finished(rows)
    pairs = plain_counterparts(rows) if len(rows) else {}
    if not pairs:
        return nothing("no mitigated cell with a plain counterpart")
    by_cell = rows.set_index("cell", drop=False)
    lines = _lines_of_pairs(by_cell, pairs)
    strategies = list(dict.fromkeys(strategy for members in lines.values() for strategy in members if strategy))
    labels = [plain(strategy_label(name)) if name else "plain" for name in ("", *strategies)]
    line_height = 0.19 * max(1.2, (1 + len(strategies)) / 3)
    room = MAX_HEIGHT - 1.05 - legend_height(labels)
    pages = paged(list(lines), [line_height] * len(lines), room)
    over = ""
    if len(pages) > MOST_PAGES:
        lines = _averaged_over_models(lines)
        pages = paged(list(lines), [line_height] * len(lines), room)
        over = ", mean over models"
    if len(pages) > MOST_PAGES:
        over += f"; the first {sum(map(len, pages[:MOST_PAGES]))} of {len(lines)} lines"
    n_pages = min(len(pages), MOST_PAGES)
    check_page(page, n_pages)
    keys = pages[page - 1]
    names = dict(zip(rows["setting_order"], rows["setting"], strict=True))
    several = len({key[:3] for key in lines}) < len(lines)  # plain settings at one width: say which

    figure = Page(WIDTH, 1.05 + legend_height(labels) + line_height * len(keys), page, n_pages)
    grid = figure.subplots(1, len(REPAIR_METRICS), sharey=True, squeeze=False)[0]
    reach = 0.36 if len(strategies) > 2 else 0.22
    spread = np.linspace(-reach, reach, 1 + len(strategies))
    style = styles(["", *strategies])
    for axes, (metric, label) in zip(grid, REPAIR_METRICS.items(), strict=True):
        means: dict[tuple, tuple[float, float]] = {}
        for offset, name in zip(spread, ["", *strategies], strict=True):
            found = []
            for y, key in enumerate(keys):
                cells = lines[key].get(name, [])
                if not cells:
                    continue
                block = by_cell.loc[cells]
                value = 100 * block[metric].astype(float).mean()
                low, high = mean_ends(block, f"{metric}_ci_low", f"{metric}_ci_high")
                found.append((value, y + offset, 100 * low, 100 * high))
                means[y, name] = (value, y + offset)
            if found:
                x, y, low, high = np.array(found).T
                draw_intervals(axes, low, high, y, style[name][0], width=0.9, alpha=0.6)
                draw_marks(axes, x, y, *style[name], size=3.6)
        plain_values = [  # a line from the plain value down to the last strategy's place
            [means[y, ""], (means[y, ""][0], max(means[key][1] for key in means if key[0] == y))]
            for y in range(len(keys))
            if (y, "") in means and np.isfinite(means[y, ""][0])
        ]
        axes.add_collection(
            LineCollection(plain_values, colors="k", linewidths=0.7, linestyles=":", zorder=1, gid="plain")
        )
        axes.set_xlabel(label, fontsize=FONT)
        clean(axes, "x")
        for y in range(1, len(keys)):
            is_model = keys[y][:2] != keys[y - 1][:2]
            axes.axhline(y - 0.5, color="#BBBBBB" if is_model else "#EEEEEE", linewidth=0.7, zorder=0)
    grid[0].set_yticks(
        range(len(keys)),
        [
            f"{short(model_label(model), 18)}{of_dataset(rows, dataset)}  "
            f"{short(names[order], 28) if several else width}"
            for dataset, model, width, order in keys
        ],
        fontsize=6.5,
    )
    grid[0].set_ylim(len(keys) - 0.5, -0.5)
    for axes in grid[1:]:
        axes.tick_params(labelleft=False)
    handles = [
        Line2D([], [], color=style[name][0], marker=style[name][1], markersize=4, linewidth=0.9, label=label)
        for name, label in zip(("", *strategies), labels, strict=True)
    ]
    legend(figure, handles)
    bars = f"bars: {percent(level)} intervals of each value (not of the differences)"
    title(figure, f"Mitigation against plain quantization (dotted){over}{seeds_note(rows)}; {bars}")
    return figure


def _lines_of_pairs(by_cell: pd.DataFrame, pairs: dict[str, str]) -> dict[tuple, dict[str, list[str]]]:
    """(data set, model, width, plain setting's order) -> strategy ("": plain) -> its cells, models in order."""
    columns = ["dataset", "model", "width", "setting_order", "strategy"]
    facts = dict(zip(by_cell["cell"], by_cell[columns].itertuples(index=False, name=None), strict=True))
    lines: dict[tuple, dict[str, list[str]]] = {}
    for cell, reference in pairs.items():
        dataset, model, width, _, strategy = facts[cell]
        line = lines.setdefault((dataset, model, width, facts[reference][3]), {"": []})
        line.setdefault(strategy, []).append(cell)
        if reference not in line[""]:
            line[""].append(reference)
    models = list(dict.fromkeys(key[:2] for key in lines))
    return {key: lines[key] for key in sorted(lines, key=lambda key: (models.index(key[:2]), key[3]))}


def _averaged_over_models(lines: dict[tuple, dict[str, list[str]]]) -> dict[tuple, dict[str, list[str]]]:
    pooled: dict[tuple, dict[str, list[str]]] = {}
    for (dataset, _, width, order), members in sorted(lines.items(), key=lambda item: (item[0][0], item[0][3])):
        for strategy, cells in members.items():
            pooled.setdefault((dataset, EVERY_MODEL, width, order), {}).setdefault(strategy, []).extend(cells)
    return pooled


# ------------------------------------------------------------------------------------------------- fairness over widths


def fairness_vs_bits(rows: pd.DataFrame, metric: str = "equalized_odds_difference", level: float = 0.95) -> Page:
    """A fairness metric at FP32 and at the main setting of each width, a line a model, mean over seeds, with intervals.

    With more than eight models each is a thin line and their median a thick one, with the middle half shaded.
    """
    rows = finished(rows)
    rows = rows[rows[metric].notna()] if len(rows) else rows
    settings = main_settings(rows) if len(rows) else []
    if not settings:
        return nothing(f"no finished cell with {metric.replace('_', ' ')}")
    datasets = list(rows["dataset"].unique())
    models = list(rows["model"].unique())
    width = COLUMN_WIDTH if len(datasets) == 1 else WIDTH
    n_columns = min(len(datasets), 3)
    n_rows = math.ceil(len(datasets) / n_columns)
    figure = Page(width, 0.7 + 2.2 * n_rows)
    grid = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False).ravel()
    xs = np.arange(len(settings))
    style = dict(zip(models, zip(cycle(COLOURS), cycle(MARKERS), strict=False), strict=False))
    for axes, dataset in zip(grid, datasets, strict=False):
        of_set = rows[(rows["dataset"] == dataset) & rows["setting"].isin(settings)]
        blocks = dict(list(of_set.groupby(["model", "setting"], sort=False)))
        values = np.array(
            [
                [100 * blocks[m, s][metric].astype(float).mean() if (m, s) in blocks else np.nan for s in settings]
                for m in models
            ]
        )
        if len(models) > MOST_LINES:
            axes.add_collection(
                LineCollection(
                    [np.column_stack([xs, line])[np.isfinite(line)] for line in values if np.isfinite(line).any()],
                    colors="#999999", linewidths=0.4, alpha=0.5, gid="models",
                )
            )  # fmt: skip
            known = np.isfinite(values).any(axis=0)
            low, middle, high = np.nanquantile(values[:, known], [0.25, 0.5, 0.75], axis=0)
            axes.fill_between(xs[known], low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
            axes.plot(xs[known], middle, color=COLOURS[0], marker="o", markersize=3.5, linewidth=1.4, label="median")
            axes.set_ylim(*_with_margin(values))
        else:
            for i, model in enumerate(models):
                at = xs + 0.07 * (i - (len(models) - 1) / 2)
                colour, marker = style[model]
                ends = np.array(
                    [
                        mean_ends(blocks[model, s], f"{metric}_ci_low", f"{metric}_ci_high")
                        if (model, s) in blocks
                        else (np.nan, np.nan)
                        for s in settings
                    ]
                )
                draw_intervals(axes, *(100 * ends.T), at, colour, vertical=True, width=0.8, alpha=0.6)
                known = np.isfinite(values[i])
                axes.plot(
                    at[known], values[i, known], color=colour, marker=marker, markersize=3.5, linewidth=1,
                    label=short(model_label(model)),
                )  # fmt: skip
        axes.set_xticks(
            xs, [setting.split()[0] for setting in settings], fontsize=6.5, rotation=90 if len(xs) > 6 else 0
        )
        axes.set_title(plain(dataset) if len(datasets) > 1 else "", fontsize=FONT, loc="left")
        clean(axes, "y")
    for axes in grid[len(datasets) :]:
        axes.set_visible(False)
    for axes in grid[::n_columns]:
        axes.set_ylabel("points", fontsize=FONT)
    if len(models) > MOST_LINES:
        handles = [
            Line2D([], [], color=COLOURS[0], marker="o", markersize=3.5, linewidth=1.4, label="median, middle half"),
            Line2D([], [], color="#999999", linewidth=0.5, label=f"each of {len(models)} models"),
        ]
    else:
        handles = [
            Line2D(
                [], [], color=style[m][0], marker=style[m][1], markersize=3.5, linewidth=1, label=short(model_label(m))
            )
            for m in models
        ]
    legend(figure, handles, 6.2)
    bars = f", bars: {percent(level)} intervals{seeds_note(rows)}" if len(models) <= MOST_LINES else seeds_note(rows)
    title(figure, f"{metric.replace('_', ' ').capitalize()} at each width{bars}")
    return figure


def _with_margin(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanmin(values), np.nanmax(values)
    return low - 0.05 * (high - low) - 0.5, high + 0.05 * (high - low) + 0.5


# ------------------------------------------------------------------------------------------------------- cost and gain


def cost_benefit(table: pd.DataFrame, level: float = 0.95, page: int = 1) -> Page:
    """Worst-group accuracy gained over plain quantization of the same bits against seconds and bytes, a row a width.

    `table` is that of `cost_benefit.cost_benefit_table`. Small marks: each model and setting. Large ones: their mean
    for each method or strategy, with the mean of their intervals. A method whose cost was not measured is not drawn.
    """
    table = table[table["gain"].notna()] if len(table) else table
    if not len(table):
        return nothing("no finished cell beside plain quantization of the same bits")
    kind = [
        strategy_label(row.strategy) if isinstance(row.strategy, str) else _method_kind(row)
        for row in table.itertuples()
    ]
    table = table.assign(kind=kind, bytes=100 * (table["size_mb"] / table["reference_size_mb"] - 1))
    kinds = list(dict.fromkeys(table.sort_values("setting_order", kind="stable")["kind"]))
    widths = list(dict.fromkeys(table.sort_values("setting_order", kind="stable")["width"]))
    style = styles(kinds)
    row_height = 1.6
    overhead = 0.7 + legend_height(kinds)
    a_page = int((MAX_HEIGHT - overhead) / row_height)
    n_pages = min(math.ceil(len(widths) / a_page), MOST_PAGES)
    check_page(page, n_pages)
    here = widths[(page - 1) * a_page : page * a_page]
    figure = Page(WIDTH, overhead + row_height * len(here), page, n_pages)
    grid = figure.subplots(len(here), 2, squeeze=False, sharex="col")
    limits = {cost: _cost_limits(table, cost) for cost in ("seconds", "bytes")}
    apart = min(1.8, 24 / len(kinds))  # typographic points
    for r, width in enumerate(here):
        block = table[table["width"] == width]
        for axes, cost in zip(grid[r], ("seconds", "bytes"), strict=True):
            if cost == "seconds":
                _log_seconds(axes)
            axes.set_xlim(*limits[cost])
            axes.set_ylim(*_gain_limits(block))
            known = block[block[cost].notna() & ((block[cost] > 0) if cost == "seconds" else True)]
            axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
            for i, name in enumerate(kinds):
                part = known[known["kind"] == name]
                if part.empty:
                    continue
                colour, marker = style[name]
                # marks of one cost stand beside each other
                aside = ScaledTranslation(apart * (i - (len(kinds) - 1) / 2) / 72, 0, figure.dpi_scale_trans)
                moved = {"transform": axes.transData + aside}
                if len(part) > 1:
                    draw_marks(axes, part[cost], part["gain"], colour, marker, 2.2, alpha=0.45, mew=0, **moved)
                at = _mean_cost(part[cost], cost)
                low, high = mean_ends(part, "ci_low", "ci_high")
                draw_intervals(axes, [low], [high], [at], colour, vertical=True, width=0.9, **moved)
                mean = part["gain"].mean()
                draw_marks(axes, [at], [mean], colour, marker, 4.4, markeredgecolor="w", mew=0.3, **moved)
            plain_cost = _mean_cost(block["reference_seconds"], cost) if cost == "seconds" else 0.0
            if np.isfinite(plain_cost):
                axes.axvline(plain_cost, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=0, gid="plain")
            if known.empty:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY, fontsize=FONT)
            clean(axes, "both")
        n = block["model"].nunique()
        heading = f"{plain(width)}, {n} {'model' if n == 1 else 'models'}"
        grid[r, 0].set_title(heading, fontsize=FONT, loc="left", pad=3)
        grid[r, 0].set_ylabel("worst group: points\ngained over plain", fontsize=FONT - 0.5)
    grid[-1, 0].set_xlabel("calibration + training (s)", fontsize=FONT)
    grid[-1, 1].set_xlabel("bytes beyond plain (%)", fontsize=FONT)
    handles = [
        Line2D([], [], color=style[name][0], marker=style[name][1], markersize=4.5, linewidth=1.1, label=plain(name))
        for name in kinds
    ]
    legend(figure, handles)
    seeds = int(table["n_seeds"].max())
    more = f"; {len(widths) - a_page * MOST_PAGES} further widths left out" if len(widths) > a_page * MOST_PAGES else ""
    title(
        figure,
        "What methods cost and buy; dashed: plain static quantization of the same bits. Small: each model and setting; "
        f"large: their mean and {percent(level)} intervals{f', {seeds} seeds' if seeds > 1 else ''}; set slightly "
        f"apart{more}",
    )
    return figure


def _mean_cost(values: pd.Series, cost: str) -> float:
    """Seconds are averaged as they are drawn, on a logarithmic scale."""
    values = values.dropna()
    if cost != "seconds":
        return float(values.mean())
    values = values[values > 0]
    return float(np.exp(np.log(values).mean())) if len(values) else math.nan


def _cost_limits(table: pd.DataFrame, cost: str) -> tuple[float, float]:
    if cost == "bytes":  # at least 3 %, so that a few bytes are not stretched over the page
        values = table["bytes"].dropna()
        low, high = min(-3.0, values.min()) if len(values) else -3.0, max(3.0, values.max()) if len(values) else 3.0
        return low - 0.06 * (high - low), high + 0.06 * (high - low)
    values = pd.concat([table["seconds"], table["reference_seconds"]])
    values = values[values > 0]
    return (values.min() / 1.6, values.max() * 1.6) if len(values) else (1.0, 10.0)


def _gain_limits(block: pd.DataFrame) -> tuple[float, float]:
    """At least half a point either way, so that a tenth does not fill the page."""
    values = block[["gain", "ci_low", "ci_high"]].to_numpy(dtype=float)
    low, high = min(-0.5, np.nanmin(values)), max(0.5, np.nanmax(values))
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _log_seconds(axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _method_kind(row) -> str:
    label = METHOD_LABELS.get(row.method, str(row.method).replace("_", " "))
    return "static, other options" if row.method == "ptq_static" else label


# --------------------------------------------------------------------------------------------------------- the notebook


def method_comparison(table: pd.DataFrame) -> Page:
    """What `compare_quantization_methods` measured: a panel a metric, a row a method, a mark a sensitive attribute."""
    if table.empty:
        return nothing("no method was compared")
    import seaborn  # takes a second; only this figure draws with it

    panels = {
        "accuracy": "Accuracy",
        "worst_group_accuracy": "Worst-group accuracy",
        "equalized_odds_difference": "Equalized odds difference",
        "model_size_mb": "Size (MB)",
    }
    methods = list(dict.fromkeys(table["method"]))
    attributes = list(dict.fromkeys(table["sensitive_attribute"]))
    figure = Page(WIDTH, 0.9 + 0.26 * len(methods))
    shown = table.assign(sensitive_attribute=table["sensitive_attribute"].map(plain), method=table["method"].map(plain))
    for axes, (column, label) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        seaborn.stripplot(
            data=shown,
            x=column,
            y="method",
            hue="sensitive_attribute",
            order=[plain(method) for method in methods],
            palette=list(itertools.islice(cycle(COLOURS), len(attributes))),
            dodge=len(attributes) > 1,
            jitter=False,
            size=5,
            legend=False,
            ax=axes,
        )
        axes.set(xlabel=label, ylabel="")
        axes.xaxis.label.set_size(FONT)
        clean(axes, "both")
    marks = zip(attributes, cycle(COLOURS), strict=False)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=plain(attribute)) for attribute, colour in marks
    ]
    title(figure, f"{len(methods)} methods, {table['n'].iloc[0]} test images; groups of each sensitive attribute")
    legend(figure, handles)
    return figure
