"""Figures of the study: a DataFrame in, a `matplotlib.figure.Figure` out. The caller saves it.

No pyplot state is used. Colours are those of Okabe and Ito, which people with any colour vision tell apart, and shapes
repeat what colours say. Sizes are inches in print: 3.4 is one column, 7 is two. Intervals are drawn where rows have
them. A missing value is hatched or left out, never drawn as 0; a figure with nothing to show says so.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from group_counts import wilson_interval
from result_rows import main_settings, model_label, plain_counterparts, strategy_label, with_labels

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
VERDICT_COLOURS = {
    "supported": "#0072B2",
    "contradicted": "#D55E00",
    "inconclusive": "#666666",
    "not tested": "#AAAAAA",
}
GREY = "#666666"
WIDTH = 7.0
FONT = 7.5
COLUMNS_A_BLOCK = 20  # settings side by side in a heatmap before it goes on below
LONGEST_NAME = 26
MOST_PAIRS = 60  # rows of the mitigation figure before models are averaged


# ------------------------------------------------------------------------------------------------ figures of the study


def accuracy_heatmap(rows: pd.DataFrame) -> Figure:
    """Accuracy in % of each model (a row) at each setting (a column), FP32 first, mean over seeds.

    A cell that failed is hatched and crossed, one that is not there is hatched.
    """
    rows = _labelled(rows)
    if rows.empty:
        return _nothing("no result rows")
    done = rows[_is_done(rows) & rows["accuracy"].notna()]
    settings = list(rows.sort_values("setting_order", kind="stable")["setting"].unique())
    names = list(dict.fromkeys(zip(rows["dataset"], rows["model"], strict=True)))
    values = np.full((len(names), len(settings)), np.nan)
    for (dataset, model, setting), block in done.groupby(["dataset", "model", "setting"], sort=False):
        values[names.index((dataset, model)), settings.index(setting)] = 100 * block["accuracy"].astype(float).mean()
    failed = set(zip(*(rows[~_is_done(rows)][name] for name in ("dataset", "model", "setting")), strict=True))
    labels = [_name(model_label(model)) + _of_dataset(rows, dataset) for dataset, model in names]

    blocks = [
        range(start, min(start + COLUMNS_A_BLOCK, len(settings))) for start in range(0, len(settings), COLUMNS_A_BLOCK)
    ]
    columns = [_column_name(setting) for setting in settings]
    widths = [setting.split()[0] for setting in settings]
    longest = max(map(len, columns))
    block_height = 0.24 * len(names) + 0.055 * longest + 0.5
    figure = _figure(WIDTH, 0.65 + block_height * len(blocks))
    grid = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 100.0)
    norm = Normalize(low - 0.5, high + 0.5)
    for axes, block in zip(grid, blocks, strict=True):
        shown = values[:, block]
        width = min(COLUMNS_A_BLOCK, len(settings))
        image = axes.imshow(np.ma.masked_invalid(shown), cmap="cividis", norm=norm, aspect="auto")
        for i, j in np.ndindex(shown.shape):
            if np.isfinite(shown[i, j]):
                dark = norm(shown[i, j]) < 0.55
                axes.text(
                    j, i, f"{shown[i, j]:.1f}", ha="center", va="center", fontsize=6.2, color="w" if dark else "k"
                )
            else:
                axes.add_patch(
                    Rectangle((j - 0.5, i - 0.5), 1, 1, hatch="/////", fill=False, edgecolor="#BBBBBB", linewidth=0)
                )
                if (*names[i], settings[block[j]]) in failed:
                    axes.text(j, i, "×", ha="center", va="center", fontsize=8, color="#B00000")
        axes.set_xlim(-0.5, width - 0.5)  # blocks line up
        axes.set_xticks(range(len(block)), [columns[j] for j in block], rotation=90, fontsize=6.5)
        axes.set_yticks(range(len(names)), labels, fontsize=FONT)
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(-0.5, len(block)), minor=True)
        axes.set_yticks(np.arange(-0.5, len(names)), minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="minor", length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        for text, members in itertools.groupby(block, key=lambda j: widths[j]):  # a heading over the columns of a width
            members = [j - block[0] for j in members]
            axes.plot([members[0] - 0.4, members[-1] + 0.4], [-0.62] * 2, color=GREY, linewidth=0.8, clip_on=False)
            axes.text(np.mean(members), -0.75, text, ha="center", va="bottom", fontsize=6.5)
    bar = figure.colorbar(image, ax=list(grid), fraction=0.025, pad=0.015, aspect=18)
    bar.set_label("accuracy (%)", fontsize=FONT)
    bar.ax.tick_params(labelsize=6.5)
    bar.outline.set_visible(False)
    _title(
        figure,
        "Accuracy on the test set (%)" + _seeds(done) + ("; hatched: no result" if np.isnan(values).any() else ""),
    )
    return figure


def per_group_performance(groups: pd.DataFrame, attribute: str | None = None) -> Figure:
    """Accuracy of each group, one panel a model: FP32 against the main setting of each width, with Wilson intervals.

    `groups` are rows of group_results.csv (with the column `options` of their result rows, where there are several
    observers). `attribute`: whose groups are shown; by default the first in the table.
    """
    if groups.empty:
        return _nothing("no group rows")
    attribute = attribute or groups["attribute"].iloc[0]
    groups = groups[(groups["attribute"] == attribute) & (groups["n"] > 0)]
    groups = groups.drop_duplicates(["cell", "group"])  # with several classes accuracy repeats
    groups = _labelled(groups)
    settings = main_settings(groups) if len(groups) else []
    groups = groups[groups["setting"].isin(settings)]
    if groups.empty:
        return _nothing(f"no group rows of {attribute}")
    panels = list(dict.fromkeys(zip(groups["dataset"], groups["model"], strict=True)))
    most = max(groups[groups["dataset"] == dataset]["group"].nunique() for dataset, _ in panels)
    n_columns = min(3, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    step = max(0.13, min(0.4, 0.085 * len(settings)))
    figure = _figure(WIDTH, 0.9 + n_rows * (0.62 + most * step))
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True)
    offsets = np.linspace(-0.32, 0.32, len(settings)) if len(settings) > 1 else [0.0]
    for position, axes in enumerate(grid.ravel()):
        if position >= len(panels):
            axes.set_visible(False)
            continue
        dataset, model = panels[position]
        panel = groups[(groups["dataset"] == dataset) & (groups["model"] == model)]
        of_dataset = groups[groups["dataset"] == dataset].drop_duplicates("group")
        names = list(of_dataset["group"])
        for setting, offset, colour, marker in zip(settings, offsets, _cycle(COLOURS), _cycle(MARKERS)):  # noqa: B905
            block = panel[panel["setting"] == setting]
            for group, cells in block.groupby("group", sort=False):
                y, n = names.index(group) + offset, float(cells["n"].iloc[0])
                mean = cells["accuracy"].astype(float).mean()
                if not np.isfinite(mean):
                    continue
                low, high = wilson_interval(min(mean * n, n), n)
                axes.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=1.1, solid_capstyle="butt")
                small = bool(cells["too_small"].iloc[0])
                axes.plot(100 * mean, y, marker, color=colour, markersize=3.6, markerfacecolor="w" if small else colour)
                if len(cells) > 1:  # each seed
                    axes.plot(100 * cells["accuracy"], [y] * len(cells), "|", color=colour, markersize=3, alpha=0.8)
        labels = [
            f"{_name(name, 22)} ({n})" + ("*" if small else "")
            for name, n, small in zip(names, of_dataset["n"], of_dataset["too_small"], strict=True)
        ]
        first_of_dataset = position % n_columns == 0 or panels[position - 1][0] != dataset
        axes.set_yticks(range(len(names)), labels if first_of_dataset else [""] * len(names), fontsize=6.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(_name(model_label(model)) + _of_dataset(groups, dataset), fontsize=FONT + 0.5, loc="left")
        _clean(axes, "x")
        for y in np.arange(0.5, len(names) - 1):
            axes.axhline(y, color="#EEEEEE", linewidth=0.6, zorder=0)
        if position + n_columns >= len(panels):
            axes.set_xlabel("accuracy (%)", fontsize=FONT)
            axes.tick_params(labelbottom=True)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.1, label=_name(setting, 40))
        for setting, colour, marker in zip(settings, _cycle(COLOURS), _cycle(MARKERS))  # noqa: B905
    ]
    _legend(figure, handles)
    small = "; * and open: below the minimum group size" if groups["too_small"].astype(bool).any() else ""
    _title(figure, f"Accuracy by {attribute} (n), 95 % Wilson intervals{_seeds(groups, 'ticks: each seed')}{small}")
    return figure


def mitigation_comparison(rows: pd.DataFrame) -> Figure:
    """Each strategy against the plain cell of the same model and widths: accuracy, worst group, equalized odds.

    One line a (model, widths), the plain value and the strategies' on it, mean over seeds; intervals of the rows where
    there is one seed. With very many pairs the models are averaged.
    """
    rows = _labelled(rows)
    rows = rows[_is_done(rows)] if len(rows) else rows
    pairs = plain_counterparts(rows) if len(rows) else {}
    if not pairs:
        return _nothing("no mitigated cell with a plain counterpart")
    by_cell = rows.set_index("cell", drop=False)
    # (data set, model, width, plain setting) -> strategy ("": plain) -> its cells, one a seed
    lines: dict[tuple, dict[str, list[str]]] = {}
    for cell, reference in pairs.items():
        row, plain = by_cell.loc[cell], by_cell.loc[reference]
        line = lines.setdefault((row["dataset"], row["model"], row["width"], plain["setting_order"]), {"": []})
        line.setdefault(row["strategy"], []).append(cell)
        if reference not in line[""]:
            line[""].append(reference)
    models = list(dict.fromkeys(key[:2] for key in lines))
    lines = {key: lines[key] for key in sorted(lines, key=lambda key: (models.index(key[:2]), key[3]))}
    if len(lines) > MOST_PAIRS:
        pooled: dict[tuple, dict[str, list[str]]] = {}
        for (dataset, _, width, order), members in sorted(lines.items(), key=lambda item: item[0][3]):
            for strategy, cells in members.items():
                pooled.setdefault((dataset, "all models", width, order), {}).setdefault(strategy, []).extend(cells)
        lines = pooled
    over = ", mean over models" if any(key[1] == "all models" for key in lines) else ""
    keys = list(lines)
    options = {order: _options(setting) for setting, order in zip(rows["setting"], rows["setting_order"], strict=True)}
    several = len({key[:3] for key in keys}) < len(keys)  # plain settings at one width: say which
    strategies = list(dict.fromkeys(strategy for members in lines.values() for strategy in members if strategy))
    metrics = {
        "accuracy": "accuracy (%)",
        "worst_group_accuracy": "worst-group accuracy (%)",
        "equalized_odds_difference": "equalized-odds diff. (points)",
    }
    figure = _figure(WIDTH, 1.05 + 0.19 * len(keys) * max(1.0, len(strategies) / 4))
    grid = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    spread = np.linspace(-0.2, 0.2, 1 + len(strategies))
    style = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(["", *strategies])}
    for axes, (metric, title) in zip(grid, metrics.items(), strict=True):
        for y, key in enumerate(keys):
            means = {}
            for offset, name in zip(spread, ["", *strategies], strict=True):
                cells = lines[key].get(name, [])
                values = 100 * by_cell.loc[cells, metric].astype(float) if cells else pd.Series(dtype=float)
                if not values.notna().any():
                    continue
                colour, marker = style[name]
                means[name] = (values.mean(), y + offset)
                ends = [f"{metric}_ci_{end}" for end in ("low", "high")]
                if len(cells) == 1 and set(ends) <= set(by_cell.columns):
                    low, high = 100 * by_cell.loc[cells[0], ends].astype(float)
                    axes.plot([low, high], [y + offset] * 2, color=colour, linewidth=0.9, alpha=0.55)
                axes.plot(values.mean(), y + offset, marker, color=colour, markersize=3.8)
            if "" in means:
                joins = [[means[""], means[name]] for name in means if name]
                axes.add_collection(LineCollection(joins, colors=GREY, linewidths=0.6, zorder=1))
        axes.set_xlabel(title, fontsize=FONT)
        _clean(axes, "x")
        for y in range(1, len(keys)):
            if keys[y][:2] != keys[y - 1][:2]:
                axes.axhline(y - 0.5, color="#CCCCCC", linewidth=0.7)
    grid[0].set_yticks(
        range(len(keys)),
        [
            f"{_name(model_label(model))}{_of_dataset(rows, dataset)}  "
            f"{width}{_plain(options[order]) if several else ''}"
            for dataset, model, width, order in keys
        ],
        fontsize=6.5,
    )
    grid[0].set_ylim(len(keys) - 0.5, -0.5)
    for axes in grid[1:]:
        axes.tick_params(labelleft=False)
    handles = [
        Line2D(
            [],
            [],
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=0.9,
            label=_plain(strategy_label(name) if name else "plain"),
        )
        for name, (colour, marker) in style.items()
    ]
    _legend(figure, handles)
    has_bars = any(len(cells) == 1 for members in lines.values() for cells in members.values())
    bars = "; bars: 95 % intervals of each value (not of the differences)" if has_bars else ""
    _title(figure, f"Mitigation against plain quantization, pairs joined{over}{_seeds(rows)}{bars}")
    return figure


def hypothesis_validation(hypotheses: pd.DataFrame) -> Figure:
    """Forest plot: effect and interval of each hypothesis (its parts in grey), its threshold, and the verdict.

    `hypotheses` has the columns of `hypotheses.COLUMNS`. Each hypothesis has a scale of its own.
    """
    if hypotheses.empty:
        return _nothing("no hypotheses")
    parts = [
        list(part) if isinstance(part, (list, tuple)) else []
        for part in hypotheses.get("parts", [[]] * len(hypotheses))
    ]
    shown = [part[:12] for part in parts]
    heights = [
        0.88 + 0.13 * len(part) if np.isfinite(effect) else 0.5
        for part, effect in zip(shown, hypotheses["effect"], strict=True)
    ]
    total = sum(heights) + 0.4
    figure = Figure(figsize=(WIDTH, total))
    top = total - 0.36
    for (_, row), part, height in zip(hypotheses.iterrows(), shown, heights, strict=True):
        colour = VERDICT_COLOURS.get(row["verdict"], GREY)
        text_y = top / total
        figure.text(0.015, text_y, _name(row["statement"], 95), fontsize=FONT + 0.5, fontweight="bold", va="top")
        figure.text(0.8, text_y, str(row["verdict"]), fontsize=FONT + 1, fontweight="bold", color=colour, va="top")
        if not np.isfinite(row["effect"]):
            reason = textwrap.shorten(_plain(str(row.get("reason", ""))), 130, placeholder=" …")
            figure.text(0.015, text_y - 0.19 / total, reason, fontsize=6.5, color=GREY, va="top")
            top -= height
            continue
        axes = figure.add_axes((0.3, (top - height + 0.42) / total, 0.47, (height - 0.64) / total))
        level = f"{100 * row['ci_level']:.3g} %" if np.isfinite(row.get("ci_level", np.nan)) else "95 %"
        told = f"{row['effect']:+.2f}\n{level}: {row['ci_low']:+.2f} to {row['ci_high']:+.2f}"
        if np.isfinite(row.get("p", np.nan)):
            told += "\np < 0.001" if row["p"] < 0.001 else f"\np = {row['p']:.3f}"
        figure.text(0.8, text_y - 0.19 / total, told, fontsize=6.5, va="top", linespacing=1.25)
        low, high = row["threshold_low"], row["threshold_high"]
        if high > low:
            axes.axvspan(low, high, color="#0072B2", alpha=0.09, linewidth=0)
        for edge in {low, high}:
            axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=(0, (4, 2)))
        axes.plot([row["ci_low"], row["ci_high"]], [0, 0], color=colour, linewidth=2.6, solid_capstyle="butt")
        axes.plot(row["effect"], 0, "D", color=colour, markersize=5.5, markeredgecolor="w", markeredgewidth=0.7)
        for y, item in enumerate(part, start=1):
            axes.plot([item["ci_low"], item["ci_high"]], [y, y], color="#999999", linewidth=1)
            axes.plot(item["effect"], y, "o", color="#777777", markersize=2.8)
        pooled = "slope" if str(row["unit"]).startswith("points of loss per") else "all"
        axes.set_yticks(range(1 + len(part)), [pooled, *(_name(item["label"], 36) for item in part)], fontsize=6.2)
        axes.set_ylim(len(part) + 0.6, -0.7)
        unit = str(row["unit"]) + ("; grey: points of loss" if pooled == "slope" and part else "")
        axes.set_xlabel(_plain(unit), fontsize=6.5, labelpad=1)
        _clean(axes, "x")
        axes.tick_params(axis="x", labelsize=6.2, pad=1.5)
        top -= height
    heading = "Hypotheses: effect, interval and decision threshold (dashed). Each row has its own scale."
    figure.text(0.015, 1 - 0.08 / total, heading, fontsize=FONT + 0.5, va="top", color="#222222")
    return figure


def pareto_frontier(rows: pd.DataFrame) -> Figure:
    """Size on disk against accuracy, and against worst-group accuracy; the non-dominated settings ringed and numbered.

    One row of panels a data set; a point is a (model, setting), mean over seeds; colour is the model, shape what was
    done.
    """
    points = pareto_points(rows)
    if points.empty:
        return _nothing("no finished cell with a size and an accuracy")
    datasets = list(points["dataset"].unique())
    kinds = {"FP32": "*", "static": "o", "dynamic": "s", "with mitigation": "^", "other": "D"}
    models = list(points["model"].unique())
    colour_of = {model: COLOURS[i % len(COLOURS)] for i, model in enumerate(models)}
    panels = [
        ("accuracy", "accuracy (%)", "on_front_accuracy"),
        ("worst_group_accuracy", "worst-group accuracy (%)", "on_front_worst_group"),
    ]
    fronts = {}
    for dataset in datasets:
        block = points[points["dataset"] == dataset]
        on_any = block[block["on_front_accuracy"] | block["on_front_worst_group"]].sort_values("size_mb", kind="stable")
        fronts[dataset] = {index: number for number, index in enumerate(on_any.index, start=1)}
    most = max(len(front) for front in fronts.values())
    key_rows = math.ceil(min(most, 24) / 2)
    legend_height = 0.16 * math.ceil((len(models) + points["kind"].nunique()) / 5)
    panel_height = 2.75 + 0.12 * key_rows + (0.2 if len(datasets) > 1 else 0)
    height = legend_height + 0.45 + panel_height * len(datasets)
    figure = Figure(figsize=(WIDTH, height))
    for d, dataset in enumerate(datasets):
        block = points[points["dataset"] == dataset]
        bottom = height - 0.45 - legend_height - d * panel_height - 2.2
        for p, (metric, label, flag) in enumerate(panels):
            axes = figure.add_axes((0.075 + 0.495 * p, bottom / height, 0.41, 2.2 / height))
            front = block[block[flag]].sort_values(["size_mb", metric], kind="stable")
            axes.step(front["size_mb"], 100 * front[metric], where="post", color="#BBBBBB", linewidth=1, zorder=1)
            for row in block.itertuples():
                axes.plot(
                    row.size_mb,
                    100 * getattr(row, metric),
                    kinds[row.kind],
                    color=colour_of[row.model],
                    markersize=6 if row.kind == "FP32" else 4,
                    alpha=0.85,
                    markeredgewidth=0,
                    zorder=2,
                )
            axes.plot(
                front["size_mb"],
                100 * front[metric],
                "o",
                markersize=8,
                markerfacecolor="none",
                markeredgecolor="k",
                markeredgewidth=0.9,
                zorder=3,
                gid="front",
            )
            for i, (index, row) in enumerate(front.iterrows()):
                # numbers alternate above and below the line, so that neighbours do not cover each other
                axes.annotate(
                    str(fronts[dataset][index]),
                    (row["size_mb"], 100 * row[metric]),
                    textcoords="offset points",
                    xytext=(-1, 6) if i % 2 == 0 else (5, -9),
                    fontsize=6,
                    ha="right" if i % 2 == 0 else "left",
                )
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            low, high = block["size_mb"].min(), block["size_mb"].max()
            ticks = [t for t in (m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5)) if low / 1.3 <= t <= high * 1.3]
            if ticks:
                axes.set_xticks(ticks[:: max(1, math.ceil(len(ticks) / 7))])
            axes.set_xlim(low / 1.35, high * 1.35)
            axes.set_xlabel("size on disk (MB)", fontsize=FONT)
            axes.set_ylabel(label, fontsize=FONT)
            _clean(axes, "both")
            if p == 0 and len(datasets) > 1:
                axes.set_title(_plain(dataset), fontsize=FONT + 0.5, loc="left")
        entries = [
            f"{number}  {_name(model_label(block.loc[index, 'model']))}, {_name(block.loc[index, 'setting'], 44)}"
            for index, number in list(fronts[dataset].items())[:24]
        ]
        if len(fronts[dataset]) > 24:
            entries[-1] = f"24 …  {len(fronts[dataset])} in all: see pareto.csv"
        split = math.ceil(len(entries) / 2)
        for column, part in enumerate((entries[:split], entries[split:])):
            figure.text(
                0.03 + 0.495 * column,
                (bottom - 0.45) / height,
                "\n".join(part),
                fontsize=6.2,
                va="top",
                linespacing=1.25,
            )
    handles = [
        Line2D([], [], color=colour_of[model], marker="o", linestyle="", markersize=4, label=_name(model_label(model)))
        for model in models
    ]
    handles += [
        Line2D([], [], color=GREY, marker=marker, linestyle="", markersize=5, label=kind)
        for kind, marker in kinds.items()
        if (points["kind"] == kind).any()
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.03, 1 - 0.24 / height),
        ncols=min(len(handles), 5),
        fontsize=6.5,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    many = points["n_seeds"].max() > 1
    figure.text(
        0.015,
        1 - 0.08 / height,
        "Size against accuracy; ringed and numbered: no other setting is both smaller and better"
        + (" (means over seeds)" if many else ""),
        fontsize=FONT + 0.5,
        va="top",
        color="#222222",
    )
    return figure


def fairness_vs_bits(rows: pd.DataFrame, metric: str = "equalized_odds_difference") -> Figure:
    """A fairness metric at FP32 and at the main setting of each width, a line a model, mean over seeds."""
    rows = _labelled(rows)
    rows = rows[_is_done(rows) & rows[metric].notna()] if len(rows) else rows
    settings = main_settings(rows) if len(rows) else []
    if not settings:
        return _nothing(f"no finished cell with {metric.replace('_', ' ')}")
    datasets = list(rows["dataset"].unique())
    figure = _figure(3.4 if len(datasets) == 1 else WIDTH, 2.9)
    grid = figure.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
    models = list(rows["model"].unique())
    for axes, dataset in zip(grid, datasets, strict=True):
        for i, model in enumerate(models):
            xs, ys = [], []
            for x, setting in enumerate(settings):
                block = rows[(rows["dataset"] == dataset) & (rows["model"] == model) & (rows["setting"] == setting)]
                if block.empty:
                    continue
                xs.append(x + 0.06 * (i - (len(models) - 1) / 2))
                ys.append(100 * block[metric].astype(float).mean())
                ends = [f"{metric}_ci_{end}" for end in ("low", "high")]
                if len(block) == 1 and set(ends) <= set(block.columns):
                    low, high = 100 * block.iloc[0][ends].astype(float)
                    axes.plot([xs[-1]] * 2, [low, high], color=COLOURS[i % len(COLOURS)], linewidth=0.7, alpha=0.6)
            axes.plot(
                xs,
                ys,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=3.5,
                linewidth=1,
                label=_name(model_label(model)),
            )
        axes.set_xticks(range(len(settings)), [setting.split()[0] for setting in settings], fontsize=6.5)
        axes.set_title(_plain(dataset) if len(datasets) > 1 else "", fontsize=FONT, loc="left")
        _clean(axes, "y")
    grid[0].set_ylabel(metric.replace("_", " ") + " (points)", fontsize=FONT)
    handles, _ = grid[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=6.2, frameon=False)
    return figure


def layer_sensitivity(table: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Sensitivity of each layer (a column, in the order of the network) to each width (a row), and the width that mixed
    precision chose; a panel for each model, its first mixed-precision cell. `table` is layer_sensitivity.csv."""
    rows = rows[_is_done(rows)] if len(rows) else rows
    cells = rows[rows["cell"].isin(table["cell"])].drop_duplicates(["dataset", "model"]) if len(table) else rows[:0]
    if cells.empty:
        return _nothing("no finished cell of mixed precision")
    figure = _figure(WIDTH, 0.75 + 1.2 * len(cells))
    grid = figure.subplots(len(cells), 1, squeeze=False)[:, 0]
    shown = table[table["cell"].isin(cells["cell"])]
    positive = shown["sensitivity"][shown["sensitivity"] > 0]
    top = math.log10(positive.max()) if len(positive) else 0.0
    norm = Normalize(max(top - 6, math.log10(positive.min()) if len(positive) else -1.0), top)
    for axes, row in zip(grid, cells.itertuples(), strict=True):
        block = table[table["cell"] == row.cell]
        layers, widths = list(dict.fromkeys(block["layer"])), sorted(block["bits"].unique())
        values_LW = block.pivot(index="layer", columns="bits", values="sensitivity").loc[layers, widths].to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            image = axes.imshow(
                np.where(values_LW > 0, np.log10(values_LW), -np.inf).T, aspect="auto", cmap="cividis", norm=norm
            )
        chosen = block.drop_duplicates("layer").set_index("layer").loc[layers, "chosen_bits"]
        places = [widths.index(bits) for bits in chosen]
        axes.plot(range(len(layers)), places, "o", markersize=2.6, color="white", markeredgecolor="black", mew=0.5)
        axes.set_yticks(range(len(widths)), [f"{bits} bits" for bits in widths], fontsize=6)
        step = max(1, len(layers) // 12)
        axes.set_xticks(
            range(0, len(layers), step), [_name(name, 20) for name in layers[::step]], fontsize=5, rotation=20
        )
        axes.tick_params(length=2)
        axes.set_title(
            f"{_name(model_label(row.model))}{_of_dataset(rows, row.dataset)}, {len(layers)} layers",
            fontsize=FONT, loc="left", pad=3,
        )  # fmt: skip
    bar = figure.colorbar(image, ax=list(grid), shrink=min(1.0, 3 / len(cells)), pad=0.01)
    ticks = range(math.ceil(norm.vmin), math.floor(norm.vmax) + 1)
    bar.set_ticks(list(ticks), labels=[f"$10^{{{tick}}}$" for tick in ticks])
    bar.ax.tick_params(labelsize=6)
    bar.set_label("sensitivity", fontsize=FONT - 1)
    _title(
        figure, "What FP32's output loses when one layer alone goes to so many bits; circles: the width that was chosen"
    )
    return figure


# ------------------------------------------------------------------------------------------------------ the Pareto set


def method_comparison(table: pd.DataFrame) -> Figure:
    """What `compare_quantization_methods` measured: a panel a metric, a row a method, a mark a sensitive attribute."""
    if table.empty:
        return _nothing("no method was compared")
    import seaborn  # takes a second; only this figure draws with it

    panels = {
        "accuracy": "Accuracy",
        "worst_group_accuracy": "Worst-group accuracy",
        "equalized_odds_difference": "Equalized odds difference",
        "model_size_mb": "Size (MB)",
    }
    methods = list(dict.fromkeys(table["method"]))
    attributes = list(dict.fromkeys(table["sensitive_attribute"]))
    figure = _figure(WIDTH, 0.9 + 0.26 * len(methods))
    shown = table.assign(
        sensitive_attribute=table["sensitive_attribute"].map(_plain), method=table["method"].map(_plain)
    )
    for axes, (column, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        seaborn.stripplot(
            data=shown,
            x=column,
            y="method",
            hue="sensitive_attribute",
            order=[_plain(method) for method in methods],
            palette=list(itertools.islice(_cycle(COLOURS), len(attributes))),
            dodge=len(attributes) > 1,
            jitter=False,
            size=5,
            legend=False,
            ax=axes,
        )
        axes.set(xlabel=title, ylabel="")
        axes.xaxis.label.set_size(FONT)
        _clean(axes, "both")
    marks = zip(attributes, _cycle(COLOURS), strict=False)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=_plain(attribute)) for attribute, colour in marks
    ]
    _title(figure, f"{len(methods)} methods, {table['n'].iloc[0]} test images; groups of each sensitive attribute")
    _legend(figure, handles)
    return figure


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
    distinct, inverse = np.unique(costs[complete], axis=0, return_inverse=True)
    keep = np.array(
        [not ((distinct <= point).all(axis=1) & (distinct < point).any(axis=1)).any() for point in distinct]
    )
    mask[complete] = keep[inverse.ravel()]
    return mask


def pareto_points(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a (data set, model, setting), mean over seeds, with flags for the non-dominated sets of its data set.

    on_front_accuracy: small size, high accuracy; on_front_worst_group: small size, high worst-group accuracy;
    on_front_all: small size, high accuracy, small equalized-odds difference.
    """
    means = ["size_mb", "accuracy", "worst_group_accuracy", "accuracy_gap", "equalized_odds_difference"]
    columns = ["dataset", "model", "setting", "kind", "n_seeds", *means]
    flags = ["on_front_accuracy", "on_front_worst_group", "on_front_all"]
    rows = _labelled(rows)
    rows = rows[_is_done(rows) & rows["size_mb"].notna() & rows["accuracy"].notna()] if len(rows) else rows
    if rows.empty:
        return pd.DataFrame(columns=[*columns, *flags])
    points = []
    for (dataset, model, setting), block in rows.groupby(["dataset", "model", "setting"], sort=False):
        first = block.iloc[0]
        kind = {"none": "FP32", "ptq_static": "static", "ptq_dynamic": "dynamic"}.get(first["method"], "other")
        kind = "with mitigation" if isinstance(first["strategy"], str) else kind
        mean = {name: block[name].astype(float).mean() for name in means}
        points.append(
            {"dataset": dataset, "model": model, "setting": setting, "kind": kind, "n_seeds": len(block), **mean}
        )
    points = pd.DataFrame(points, columns=columns)
    objectives = {
        "on_front_accuracy": (["size_mb", "accuracy"], [False, True]),
        "on_front_worst_group": (["size_mb", "worst_group_accuracy"], [False, True]),
        "on_front_all": (["size_mb", "accuracy", "equalized_odds_difference"], [False, True, False]),
    }
    for flag, (names, maximize) in objectives.items():
        points[flag] = False
        for _, block in points.groupby("dataset", sort=False):
            points.loc[block.index, flag] = pareto_mask(block[names].to_numpy(), maximize)
    return points


# -------------------------------------------------------------------------------------------------------------- helpers


def _labelled(rows: pd.DataFrame) -> pd.DataFrame:
    return with_labels(rows) if len(rows) else rows


def _is_done(rows: pd.DataFrame) -> pd.Series:
    return rows["status"] == "done" if "status" in rows else pd.Series(True, index=rows.index)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _nothing(why: str) -> Figure:
    figure = _figure(WIDTH, 1.2)
    figure.text(0.5, 0.5, f"Nothing to show: {_plain(why)}", ha="center", va="center", color=GREY, fontsize=FONT + 1)
    return figure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(textwrap.fill(_plain(text), 118), fontsize=FONT + 0.5, x=0.01, ha="left", color="#222222")


def _legend(figure: Figure, handles: list[Line2D | Patch]) -> None:
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(105 / (longest + 7))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=FONT - 0.5, frameon=False)


def _clean(axes, grid: str) -> None:
    axes.grid(axis=grid, color="#E4E4E4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=6.5, length=2)
    if grid in ("x", "both") and axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")


def _seeds(rows: pd.DataFrame, drawn: str = "") -> str:
    n = rows["seed"].nunique() if "seed" in rows and len(rows) else 0
    return f", mean over {n} seeds" + (f" ({drawn})" if drawn else "") if n > 1 else ""


def _of_dataset(rows: pd.DataFrame, dataset: str) -> str:
    return f" · {_plain(dataset)}" if rows["dataset"].nunique() > 1 else ""


def _name(text: str, longest: int = LONGEST_NAME) -> str:
    text = str(text)
    return _plain(text if len(text) <= longest else text[: longest - 1] + "…")


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return str(text).replace("$", r"\$")


def _options(setting: str) -> str:
    """What stands in brackets: ' (mse)' of 'W8A8 static (mse)'."""
    return f" ({setting.partition('(')[2].partition(')')[0]})" if "(" in setting else ""


def _column_name(setting: str) -> str:
    """A setting without its width, which stands over the columns: 'static (mse)', '+ balanced calibration (mse)'."""
    plain, _, strategy = setting.partition(" + ")
    method = plain.partition(" ")[2].removeprefix("static ") if strategy else plain.partition(" ")[2]
    return _name(f"+ {strategy} {method}".rstrip() if strategy else method, 40)


def _cycle(values: Sequence[str]):
    while True:
        yield from values


# ---------------------------------------------------------------------------------------------------------- diagnostics


def group_diagnostics(groups: pd.DataFrame, clipping: pd.DataFrame, exemplars: pd.DataFrame) -> Figure:
    """Why groups suffer: margin, gradient norm, Hessian eigenvalue, clipped activations and exemplars of each group (a
    place on the axis), FP32 against quantized. The tables are those of `diagnostics.diagnose`.

    Hollow: a gradient norm no larger than chance alone would make it, an eigenvalue that had not converged.
    """
    shown = list(dict.fromkeys(groups.loc[groups["n"] > 0, "group"])) if len(groups) else []
    if not shown:
        return _nothing("no group with images")
    sizes = groups.drop_duplicates("group").set_index("group")["n"]
    models = [model for model in ("fp32", "quantized") if (groups["model"] == model).any()]
    style = {model: (COLOURS[i], MARKERS[i]) for i, model in enumerate(("fp32", "quantized"))}
    place = {group: x for x, group in enumerate(shown)}
    offset = {"fp32": -0.14, "quantized": 0.14} if len(models) > 1 else dict.fromkeys(models, 0.0)
    panels = ["margin", "gradient_norm", "hessian_eigenvalue"]
    panels += ["clipping"] if len(clipping) else []
    panels += ["exemplars"] if len(exemplars) else []
    labels = [f"{_name(group)} ({sizes[group]})" for group in shown]
    width = 3.4 if len(shown) <= 12 else WIDTH
    figure = _figure(width, 0.75 + 0.95 * len(panels) + 0.05 * max(map(len, labels)))
    grid = dict(zip(panels, figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], strict=True))
    is_vague = {
        "gradient_norm": groups["gradient_norm"] <= groups["gradient_noise"],
        "hessian_eigenvalue": ~groups["hessian_converged"].astype(bool) & groups["hessian_eigenvalue"].notna(),
    }

    def mark(axes, x: float, y: float, model: str, is_hollow: bool = False) -> None:
        colour, marker = style[model]
        axes.plot(x, y, marker, color=colour, markersize=4, markerfacecolor="w" if is_hollow else colour)

    for axes in grid.values():
        axes.margins(y=0.12)
    for column in panels[:3]:
        vague = is_vague.get(column, pd.Series(False, index=groups.index))
        for row, is_hollow in zip(groups.to_dict("records"), vague, strict=True):
            if row["group"] in place and np.isfinite(row[column]):
                x = place[row["group"]] + offset[row["model"]]
                mark(grid[column], x, row[column], row["model"], bool(is_hollow))
                if column == "margin":
                    ends = [row["margin_p10"], row["margin"]]
                    grid[column].plot([x, x], ends, color=style[row["model"]][0], linewidth=1, zorder=1)
        if column != "margin":
            grid[column].set_ylim(bottom=min(0.0, grid[column].get_ylim()[0]))
    for group, rates in clipping.groupby("group", sort=False) if len(clipping) else ():
        rates = 100 * rates["clipping_rate"].dropna()
        if group in place and len(rates):
            grid["clipping"].plot(
                [place[group]] * len(rates), rates, "_", color=style["quantized"][0], markersize=7, alpha=0.35, mew=0.7
            )
            mark(grid["clipping"], place[group], rates.mean(), "quantized")
    for row in exemplars.to_dict("records"):
        if row["group"] in place and np.isfinite(row["share"]):
            x, ends = place[row["group"]], [100 * row["share_ci_low"], 100 * row["share_ci_high"]]
            grid["exemplars"].plot([x, x], ends, color=style["quantized"][0], linewidth=1, zorder=1)
            mark(grid["exemplars"], x, 100 * row["share"], "quantized")
    if len(exemplars):
        mean = 100 * exemplars["disagreements"].sum() / max(1, exemplars["n"].sum())
        grid["exemplars"].axhline(mean, color=GREY, linewidth=0.7, linestyle=":", zorder=0)

    titles = {
        "margin": "margin of the logits (line: to the 10th percentile)",
        "gradient_norm": "gradient norm of the loss (per relative change)",
        "hessian_eigenvalue": "largest Hessian eigenvalue (likewise)",
        "clipping": "activations clipped (%; dashes: each quantizer)",
        "exemplars": "predictions changed (%, 95 % interval; dots: all)",
    }
    for column, axes in grid.items():
        axes.set_title(titles[column], fontsize=FONT - 0.5, loc="left", pad=2)
        _clean(axes, "y")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_xlim(-0.5, len(shown) - 0.5)
        for x in np.arange(0.5, len(shown) - 1):
            axes.axvline(x, color="#EEEEEE", linewidth=0.6, zorder=0)
    grid["margin"].axhline(0, color=GREY, linewidth=0.7, zorder=0)
    for column in ("clipping", "exemplars"):
        if column in grid:
            grid[column].set_ylim(bottom=0)
    is_long = len(shown) * max(map(len, labels)) > 16 * width
    grid[panels[-1]].set_xticks(
        range(len(shown)), labels, fontsize=6.5, rotation=40 if is_long else 0, ha="right" if is_long else "center",
        rotation_mode="anchor" if is_long else "default",
    )  # fmt: skip
    names = {"fp32": "FP32", "quantized": "quantized"}
    handles = [
        Line2D([], [], color=style[model][0], marker=style[model][1], markersize=4, linewidth=1, label=names[model])
        for model in models
    ]
    if any(bool(vague[groups["n"] > 0].any()) for vague in is_vague.values()):
        handles.append(
            Line2D([], [], color=GREY, marker="o", markerfacecolor="w", markersize=4, linestyle="", label="uncertain")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=6.5, frameon=False)
    return figure


__all__ = [
    "accuracy_heatmap",
    "fairness_vs_bits",
    "group_diagnostics",
    "hypothesis_validation",
    "layer_sensitivity",
    "method_comparison",
    "mitigation_comparison",
    "pareto_frontier",
    "pareto_mask",
    "pareto_points",
    "per_group_performance",
]
