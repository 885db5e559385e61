"""A number for every model at every setting: accuracy, what changed for the groups; and the layers' sensitivity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation

from analysis.result_rows import METHOD_LABELS, model_label, strategy_label
from figures.style import (
    FONT,
    GREY,
    MAX_HEIGHT,
    MOST_PAGES,
    WIDTH,
    Page,
    check_page,
    finished,
    is_done,
    labelled,
    nothing,
    of_dataset,
    paged,
    plain,
    seeds_note,
    short,
    title,
    title_height,
)

# inches
ROW_HEIGHT, NAME_HEIGHT, HEAD_HEIGHT, TITLE_HEIGHT, BAR_WIDTH = 0.19, 0.2, 0.22, 0.55, 0.55
LABEL_SPACE, LABEL_LETTER, LONGEST_COLUMN = 0.14, 0.048, 36  # of the names below the columns
COLUMNS_A_BLOCK = 20  # settings side by side before the heatmap goes on below
ROWS_A_BLOCK = 24  # models below each other
METRIC_NAMES = {
    "accuracy": "accuracy",
    "worst_group_accuracy": "worst-group accuracy",
    "accuracy_gap": "accuracy gap between groups",
    "equalized_odds_difference": "equalized-odds difference",
    "demographic_parity_difference": "demographic-parity difference",
}
HIGHER_IS_BETTER = ("accuracy", "balanced_accuracy", "worst_group_accuracy", "disparate_impact")


@dataclass(frozen=True)
class Panel:
    """One heatmap before it is cut into blocks: a value for each (row, column), NaN where there is none."""

    name: str
    values_RC: np.ndarray  # as written
    colours_RC: np.ndarray  # as coloured
    failed_RC: np.ndarray  # a cell that was tried and failed: crossed
    bold_RC: np.ndarray
    row_labels: Sequence[str]
    sign: str = ""  # of the format: "+" for changes


@dataclass(frozen=True)
class Scale:
    """What colours say, in all panels of a figure."""

    norm: Normalize
    colours: str
    label: str
    ticks: dict[float, str] | None = None


@dataclass(frozen=True)
class Block:
    """What of a panel is drawn in one piece. Panels of the same columns share the names above and below."""

    panel: Panel
    rows: range
    columns: range
    is_headed: bool
    is_footed: bool


def accuracy_heatmap(rows: pd.DataFrame, page: int = 1) -> Page:
    """Accuracy in % of each model (a row) at each setting (a column), FP32 first, mean over seeds.

    A cell that failed is hatched and crossed, one that is not there is hatched. With more settings than six pages hold
    the options of a method are averaged.
    """
    rows = labelled(rows)
    if rows.empty:
        return nothing("no result rows")
    return _pages_of_panels(
        rows, lambda rows: [_accuracy_panel(rows)], _accuracy_scale, "Accuracy on the test set (%)", page
    )


def fairness_heatmap(
    rows: pd.DataFrame,
    differences: pd.DataFrame | None = None,
    metrics: Sequence[str] = ("worst_group_accuracy", "accuracy_gap"),
    level: float = 0.95,
    page: int = 1,
) -> Page:
    """Change of the metrics against FP32 in points, of each model at each setting; blue is better, red is worse.

    Colours are linear within one point and logarithmic beyond. `differences` are rows of significance.csv: where the
    permutation test, Holm-corrected, says in every seed that quantization treated the groups unequally (p_holm at most
    1 - `level`) the number is bold. Not where an interval excludes 0: the interval of a gap near ties does so by
    itself. The FP32 value, in %, stands behind the model's name.
    """
    rows = labelled(rows)
    quantized = rows[rows["weight_bits"].notna() | rows["strategy"].notna()] if len(rows) else rows
    if quantized.empty or not (is_done(quantized).any()):
        return nothing("no finished quantized cell to compare with FP32")
    sure = _sure(differences)
    fp32 = finished(rows)
    fp32 = fp32[(fp32["method"] == "none") & fp32["strategy"].isna()]
    told = "Change against FP32 in points (behind the models: FP32's value in %)"
    if sure:
        told += "; bold: groups were treated unequally (flips permuted over groups, Holm-corrected "
        told += f"p ≤ {1 - level:.2g}{' in every seed' if rows['seed'].nunique() > 1 else ''})"
    return _pages_of_panels(
        quantized,
        lambda rows: [_change_panel(rows, fp32, metric, sure, 1 - level) for metric in metrics],
        _change_scale,
        told,
        page,
    )


def _accuracy_panel(rows: pd.DataFrame) -> Panel:
    names, values = _grid(rows, 100 * rows["accuracy"].astype(float))
    bold = np.zeros(values.shape, dtype=bool)
    return Panel("", values, values, _failed(rows, names), bold, _row_labels(rows, names))


def _accuracy_scale(panels: list[Panel]) -> Scale:
    finite = panels[0].values_RC[np.isfinite(panels[0].values_RC)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 100.0)
    return Scale(Normalize(low - 0.5, high + 0.5), "cividis", "accuracy (%)")


def _change_panel(rows: pd.DataFrame, fp32: pd.DataFrame, metric: str, sure: dict[tuple, float], alpha: float) -> Panel:
    column = f"delta_{metric}"
    change = 100 * rows[column].astype(float) if column in rows else pd.Series(np.nan, rows.index)
    names, values = _grid(rows, change)
    bold = np.zeros(values.shape, dtype=bool)
    column_of = {name: i for i, name in enumerate(_settings(rows))}
    where = {name: i for i, name in enumerate(names)}
    if sure:
        done = rows[is_done(rows)]
        largest = pd.Series([sure.get((cell, metric), np.nan) for cell in done["cell"]], done.index, dtype=float)
        keys = [done["dataset"], done["model"], done["setting"]]
        for (dataset, model, setting), p in largest.fillna(1.0).groupby(keys, sort=False).max().items():
            bold[where[dataset, model], column_of[setting]] = p <= alpha + 1e-12
    before = 100 * fp32.groupby(["dataset", "model"], sort=False)[metric].mean()
    labels = [
        f"{label} ({before[name]:.1f})" if name in before.index and np.isfinite(before[name]) else label
        for label, name in zip(_row_labels(rows, names), names, strict=True)
    ]
    better = values if metric in HIGHER_IS_BETTER else -values
    name = METRIC_NAMES.get(metric, metric.replace("_", " "))
    return Panel(name, values, better, _failed(rows, names), bold, labels, "+")


def _change_scale(panels: list[Panel]) -> Scale:
    """Diverging about 0, blue for better: linear within one point, logarithmic beyond."""
    sizes = np.abs(np.concatenate([panel.values_RC.ravel() for panel in panels]))
    largest = max(2.0, float(np.nanmax(sizes)) if np.isfinite(sizes).any() else 2.0)
    steps = [step for step in (1, 3, 10, 30, 100) if step <= largest]
    ticks = {0.0: "0"} | {float(side * step): str(step) for step in steps for side in (-1, 1)}
    return Scale(SymLogNorm(1.0, linscale=1.0, vmin=-largest, vmax=largest), "RdBu", "points worse | better", ticks)


def _sure(differences: pd.DataFrame | None) -> dict[tuple, float]:
    """(cell, metric) -> the corrected p of its difference from FP32 over all images."""
    if differences is None or not len(differences):
        return {}
    block = differences[(differences["comparison"] == "fp32") & (differences["group"] == "all")]
    keys = zip(block["cell"], block["metric"], strict=True)
    return dict(zip(keys, block["p_holm"], strict=True))


# ------------------------------------------------------------------------------------------------- from rows to a grid


def _settings(rows: pd.DataFrame) -> list[str]:
    return list(rows.sort_values("setting_order", kind="stable")["setting"].unique())


def _grid(rows: pd.DataFrame, values: pd.Series) -> tuple[list[tuple[str, str]], np.ndarray]:
    """((data set, model) of each row, (R, C) mean over the finished cells of a place)."""
    settings = _settings(rows)
    names = list(dict.fromkeys(zip(rows["dataset"], rows["model"], strict=True)))
    grid = np.full((len(names), len(settings)), np.nan)
    where, column = {name: i for i, name in enumerate(names)}, {name: i for i, name in enumerate(settings)}
    means = values[is_done(rows)].groupby([rows["dataset"], rows["model"], rows["setting"]], sort=False).mean()
    for (dataset, model, setting), mean in means.items():
        grid[where[dataset, model], column[setting]] = mean
    return names, grid


def _failed(rows: pd.DataFrame, names: list[tuple[str, str]]) -> np.ndarray:
    """Where a cell failed (and, the grid's value being NaN there, no other seed of it is finished)."""
    column = {name: i for i, name in enumerate(_settings(rows))}
    where = {name: i for i, name in enumerate(names)}
    failed = np.zeros((len(names), len(column)), dtype=bool)
    for row in rows[~is_done(rows)].itertuples():
        failed[where[row.dataset, row.model], column[row.setting]] = True
    return failed


def _row_labels(rows: pd.DataFrame, names: list[tuple[str, str]]) -> list[str]:
    return [short(model_label(model)) + of_dataset(rows, dataset) for dataset, model in names]


def _by_method(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with settings that name width, method and strategy and leave the options out."""
    rows = rows.copy()
    labels, keys = [], []
    methods = list(METHOD_LABELS)
    for row in rows.itertuples():
        method = METHOD_LABELS.get(row.method, str(row.method).replace("_", " "))
        strategy = strategy_label(row.strategy) if isinstance(row.strategy, str) else ""
        label = " ".join(part for part in (row.width, method) if part) + (f" + {strategy}" if strategy else "")
        labels.append(label)
        keys.append((bool(strategy), methods.index(row.method) if row.method in methods else 99, label))
    widths = dict(rows.groupby("width")["setting_order"].min())
    order = {label: (widths[width], *key) for label, width, key in zip(labels, rows["width"], keys, strict=True)}
    rank = {label: position for position, label in enumerate(sorted(order, key=order.get))}
    rows["setting"], rows["setting_order"] = labels, [rank[label] for label in labels]
    return rows


# ------------------------------------------------------------------------------------------------------------- drawing


def _pages_of_panels(rows: pd.DataFrame, panels_of, scale_of, told: str, page: int) -> Page:
    """The panels of the rows, cut into blocks and those into pages; what had to be merged or left out is told.

    Places are given in inches from the top, so that cells are of one size and text fits.
    """
    panels = panels_of(rows)
    pages = _cut(rows, panels)
    if len(pages) > MOST_PAGES:
        rows = _by_method(rows)
        panels = panels_of(rows)
        pages = _cut(rows, panels)
        told += "; the options of a method averaged"
    if len(pages) > MOST_PAGES:
        shown = sum(len(block.rows) * len(block.columns) for blocks in pages[:MOST_PAGES] for block in blocks)
        every = sum(panel.values_RC.size for panel in panels)
        told += f"; the first {shown:,} of {every:,} places, all are in tables/results.csv"
    n_pages = min(len(pages), MOST_PAGES)
    check_page(page, n_pages)
    blocks = pages[page - 1]
    places = [(block.panel, np.ix_(block.rows, block.columns)) for block in blocks]
    if any(np.isnan(panel.values_RC[at]).any() for panel, at in places):
        told += "; hatched: no result"
        told += ", × failed" if any(panel.failed_RC[at].any() for panel, at in places) else ""
    told += seeds_note(rows[is_done(rows)])
    settings = _settings(rows)
    heights = [_block_height(settings, block) for block in blocks]
    title_inches = title_height(told)
    height = title_inches + sum(heights)
    figure = Page(WIDTH, height, page, n_pages, layout="none")
    scale = scale_of(panels)
    left = _label_width(panels)
    widest = max(len(block.columns) for block in blocks)
    cell = min(0.42, (WIDTH - left - BAR_WIDTH) / widest)
    top = title_inches
    image = None
    for block, block_height in zip(blocks, heights, strict=True):
        above = (NAME_HEIGHT if block.panel.name else 0.0) + (HEAD_HEIGHT if block.is_headed else 0.0)
        body = ROW_HEIGHT * len(block.rows)
        place = (
            left / WIDTH, 1 - (top + above + body) / height, cell * len(block.columns) / WIDTH, body / height
        )  # fmt: skip
        axes = figure.add_axes(place)
        image = _draw_block(axes, settings, block, scale)
        if block.panel.name:
            at = 1 - (top + NAME_HEIGHT - 0.04) / height
            figure.text(left / WIDTH, at, block.panel.name, fontsize=FONT, fontweight="bold", va="bottom")
        top += block_height
    right = left + cell * widest + 0.12
    longest = min(2.4, sum(heights) - 0.3)
    bar_top = title_inches + (NAME_HEIGHT if blocks[0].panel.name else 0.0) + HEAD_HEIGHT
    longest = max(0.4, min(longest, height - bar_top - 0.05))
    bar_axes = figure.add_axes((right / WIDTH, 1 - (bar_top + longest) / height, 0.09 / WIDTH, longest / height))
    _colour_bar(figure, image, bar_axes, scale)
    title(figure, told)
    return figure


def _cut(rows: pd.DataFrame, panels: list[Panel]) -> list[list[Block]]:
    settings = _settings(rows)
    n_rows = len(panels[0].values_RC)
    a_block = _columns_a_block(_label_width(panels))
    a_block = _evenly(len(settings), a_block)
    room = MAX_HEIGHT - TITLE_HEIGHT - HEAD_HEIGHT - LABEL_SPACE - LABEL_LETTER * LONGEST_COLUMN
    a_stack = int((room - len(panels) * (NAME_HEIGHT + 0.08)) / (ROW_HEIGHT * len(panels)))
    a_stack = _evenly(n_rows, min(a_stack, ROWS_A_BLOCK))
    blocks = [
        [
            Block(
                panel, range(first, min(first + a_stack, n_rows)), range(at, min(at + a_block, len(settings))),
                is_headed=panel is panels[0], is_footed=panel is panels[-1],
            )
            for panel in panels
        ]
        for first in range(0, n_rows, a_stack)
        for at in range(0, len(settings), a_block)
    ]  # fmt: skip
    heights = [sum(_block_height(settings, block) for block in stack) for stack in blocks]
    stacks = paged(blocks, heights, MAX_HEIGHT - TITLE_HEIGHT)
    return [[block for stack in page for block in stack] for page in stacks]


def _evenly(n: int, most: int) -> int:
    """How many of n a block takes, so that blocks of at most `most` are about the same size."""
    return math.ceil(n / math.ceil(n / most))


def _label_width(panels: list[Panel]) -> float:
    return 0.12 + 0.056 * max(len(label) for panel in panels for label in panel.row_labels)


def _columns_a_block(left: float) -> int:
    """As many as leave each cell room for its number."""
    return max(4, min(COLUMNS_A_BLOCK, int((WIDTH - left - BAR_WIDTH) / 0.27)))


def _block_height(settings: list[str], block: Block) -> float:
    height = ROW_HEIGHT * len(block.rows) + 0.08 + (NAME_HEIGHT if block.panel.name else 0.0)
    height += HEAD_HEIGHT if block.is_headed else 0.0
    if block.is_footed:
        height += LABEL_SPACE + LABEL_LETTER * max(len(_column_name(settings[j])) for j in block.columns)
    return height


def _draw_block(axes, settings: list[str], block: Block, scale: Scale):
    panel, rows, columns = block.panel, block.rows, block.columns
    at = np.ix_(rows, columns)
    shown, colours = panel.values_RC[at], panel.colours_RC[at]
    failed, bold = panel.failed_RC[at], panel.bold_RC[at]
    image = axes.imshow(np.ma.masked_invalid(colours), cmap=scale.colours, norm=scale.norm, aspect="auto")
    hatched = []
    for i, j in np.ndindex(shown.shape):
        if np.isfinite(shown[i, j]):
            red, green, blue, _ = image.cmap(scale.norm(colours[i, j]))
            is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(
                j, i, _cell_text(shown[i, j], panel.sign), ha="center", va="center", fontsize=6.0,
                color="w" if is_dark else "k", fontweight="bold" if bold[i, j] else "normal",
            )  # fmt: skip
        else:
            hatched.append(Rectangle((j - 0.5, i - 0.5), 1, 1))
            if failed[i, j]:
                axes.text(j, i, "×", ha="center", va="center", fontsize=8, color="#B00000")
    if hatched:
        axes.add_collection(
            PatchCollection(hatched, hatch="/////", facecolor="none", edgecolor="#BBBBBB", linewidth=0, gid="hatched")
        )
    names = [_column_name(settings[j]) for j in columns] if block.is_footed else [""] * len(columns)
    axes.set_xticks(range(len(columns)), names, rotation=90, fontsize=6.2)
    axes.set_yticks(range(len(rows)), [panel.row_labels[i] for i in rows], fontsize=FONT - 0.7)
    axes.tick_params(length=0, pad=2)
    axes.vlines(np.arange(0.5, len(columns) - 1), -0.5, len(rows) - 0.5, color="w", linewidth=1)
    axes.hlines(np.arange(0.5, len(rows) - 1), -0.5, len(columns) - 0.5, color="w", linewidth=1)
    for side in axes.spines.values():
        side.set_visible(False)
    if block.is_headed:  # the width over its columns
        above = axes.transData + ScaledTranslation(0, 3 / 72, axes.figure.dpi_scale_trans)
        for text, members in itertools.groupby(columns, key=lambda j: settings[j].split()[0]):
            over = [j - columns[0] for j in members]
            axes.plot(
                [over[0] - 0.4, over[-1] + 0.4], [-0.5] * 2, color=GREY, linewidth=0.8, clip_on=False, transform=above
            )
            axes.annotate(
                text, (np.mean(over), -0.5), xytext=(0, 4.5), textcoords="offset points", ha="center", va="bottom",
                fontsize=6.5, annotation_clip=False,
            )  # fmt: skip
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
    return image


def _cell_text(value: float, sign: str) -> str:
    text = f"{value:{sign}.{0 if sign and abs(value) >= 9.95 else 1}f}"
    return "0.0" if sign and float(text) == 0 else text.replace("-", "−")


def _colour_bar(figure: Page, image, axes, scale: Scale) -> None:
    bar = figure.colorbar(image, cax=axes)
    bar.set_label(scale.label, fontsize=FONT - 0.7)
    if scale.ticks is not None:
        bar.set_ticks(list(scale.ticks), labels=list(scale.ticks.values()))
        bar.minorticks_off()
    bar.ax.tick_params(labelsize=6.2, length=2)
    bar.outline.set_visible(False)


def _column_name(setting: str) -> str:
    """A setting without its width, which stands over the columns: 'static (mse)', '+ balanced calibration (mse)'."""
    before, _, strategy = setting.partition(" + ")
    method = before.partition(" ")[2].removeprefix("static ") if strategy else before.partition(" ")[2]
    if strategy and method == "static":
        method = ""
    return short(f"+ {strategy} {method}".rstrip() if strategy else method, LONGEST_COLUMN)


# --------------------------------------------------------------------------------------------------- layer sensitivity


def layer_sensitivity(table: pd.DataFrame, rows: pd.DataFrame, page: int = 1) -> Page:
    """Sensitivity of each layer (a column, in the order of the network) to each width (a row), and the width that mixed
    precision chose; a panel for each model, its first mixed-precision cell. `table` is layer_sensitivity.csv."""
    rows = rows[is_done(rows)] if len(rows) else rows
    cells = rows[rows["cell"].isin(table["cell"])].drop_duplicates(["dataset", "model"]) if len(table) else rows[:0]
    if cells.empty:
        return nothing("no finished cell of mixed precision")
    pages = paged(list(cells.itertuples()), [1.2] * len(cells), MAX_HEIGHT - 0.75)
    n_pages = min(len(pages), MOST_PAGES)
    check_page(page, n_pages)
    here = pages[page - 1]
    figure = Page(WIDTH, 0.75 + 1.2 * len(here), page, n_pages)
    grid = figure.subplots(len(here), 1, squeeze=False)[:, 0]
    shown = table[table["cell"].isin(cells["cell"])]
    positive = shown["sensitivity"][shown["sensitivity"] > 0]
    top = math.log10(positive.max()) if len(positive) else 0.0
    norm = Normalize(max(top - 6, math.log10(positive.min()) if len(positive) else -1.0), top)
    for axes, row in zip(grid, here, strict=True):
        block = table[table["cell"] == row.cell]
        layers, widths = list(dict.fromkeys(block["layer"])), sorted(block["bits"].unique())
        values_LW = block.pivot(index="layer", columns="bits", values="sensitivity").loc[layers, widths].to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            image = axes.imshow(
                np.where(values_LW > 0, np.log10(values_LW), np.where(np.isnan(values_LW), np.nan, norm.vmin)).T,
                aspect="auto", cmap="cividis", norm=norm,
            )  # fmt: skip
        chosen = block.drop_duplicates("layer").set_index("layer").loc[layers, "chosen_bits"]
        places = [widths.index(bits) if bits in widths else np.nan for bits in chosen]
        axes.plot(range(len(layers)), places, "o", markersize=2.6, color="white", markeredgecolor="black", mew=0.5)
        axes.set_yticks(range(len(widths)), [f"{bits} bits" for bits in widths], fontsize=6)
        step = max(1, len(layers) // 12)
        axes.set_xticks(
            range(0, len(layers), step), [_layer_name(name) for name in layers[::step]], fontsize=5.5, rotation=25,
            ha="right", rotation_mode="anchor",
        )  # fmt: skip
        axes.tick_params(length=2)
        axes.set_title(
            f"{short(model_label(row.model))}{of_dataset(rows, row.dataset)}, {len(layers)} layers",
            fontsize=FONT, loc="left", pad=3,
        )  # fmt: skip
    bar = figure.colorbar(image, ax=list(grid), shrink=min(1.0, 3 / len(here)), pad=0.01)
    ticks = range(math.ceil(norm.vmin), math.floor(norm.vmax) + 1)
    bar.set_ticks(list(ticks), labels=[f"$10^{{{tick}}}$" for tick in ticks])
    bar.ax.tick_params(labelsize=6)
    bar.set_label("sensitivity", fontsize=FONT - 1)
    left_out = sum(map(len, pages[MOST_PAGES:]))
    more = f"; {left_out} more models: layer_sensitivity.csv" if left_out else ""
    title(
        figure,
        f"What FP32's output loses when one layer alone goes to so many bits; circles: the width that was chosen{more}",
    )
    return figure


def _layer_name(name: str) -> str:
    """The end of a layer's name, which tells it from the others."""
    name = str(name)
    return plain(name if len(name) <= 20 else "…" + name[-19:])
