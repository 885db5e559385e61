"""What the figures share: colours, sizes, pages, names, and marks with intervals.

Colours are those of Okabe and Ito, which people with any colour vision tell apart; shapes repeat what colours say.
Sizes are inches in print: 3.4 is one column, 7 is two, and no page is higher than 9. Marks of one kind are one artist
however many they are, so that ten thousand cells are drawn in seconds.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.result_rows import with_labels

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SLIGHT = {"P": 1.15, "X": 1.15, "*": 1.5}  # these look smaller than they are
FP32_COLOUR = "#000000"
GREY = "#666666"
WIDTH = 7.0
COLUMN_WIDTH = 3.4
MAX_HEIGHT = 9.0
MOST_PAGES = 6  # of one figure; what is left out is said
FONT = 7.5
LONGEST_NAME = 26
LINE = 118  # letters of a title at full width


# ---------------------------------------------------------------------------------------------------------------- pages


class Page(Figure):
    """A figure that is one of `n_pages`; most have one."""

    def __init__(self, width: float, height: float, page: int = 1, n_pages: int = 1, layout: str = "constrained"):
        super().__init__(figsize=(width, height), layout=layout)
        self.page, self.n_pages = page, n_pages


def all_pages(draw: Callable[..., Page], *arguments, **keywords) -> Iterator[Page]:
    """Every page of a figure: `draw(*arguments, page=1)`, and so on."""
    first = draw(*arguments, **keywords)
    yield first
    for page in range(2, getattr(first, "n_pages", 1) + 1):
        yield draw(*arguments, **keywords, page=page)


def paged(items: Sequence[Any], heights: Sequence[float], room: float) -> list[list[Any]]:
    """The items in order, as many on a page as `room` holds and at least one."""
    pages: list[list[Any]] = []
    left = 0.0
    for item, height in zip(items, heights, strict=True):
        if not pages or height > left:
            pages.append([])
            left = room
        pages[-1].append(item)
        left -= height
    return pages


def check_page(page: int, n_pages: int) -> None:
    if not 1 <= page <= n_pages:
        raise ValueError(f"page {page}: this figure has pages 1 to {n_pages}")


def nothing(why: str) -> Page:
    figure = Page(WIDTH, 1.2)
    figure.text(0.5, 0.5, f"Nothing to show: {plain(why)}", ha="center", va="center", color=GREY, fontsize=FONT + 1)
    return figure


def title(figure: Page, text: str) -> None:
    """What the figure shows, in lines over it."""
    characters = int(LINE * figure.get_figwidth() / WIDTH)
    is_laid_out = figure.get_layout_engine() is None
    place = {"y": 1 - 0.06 / figure.get_figheight(), "va": "top"} if is_laid_out else {}
    figure.suptitle(
        textwrap.fill(plain(text + page_note(figure)), characters), fontsize=FONT + 0.5, x=0.01, ha="left",
        color="#222222", **place,
    )  # fmt: skip


def title_height(text: str) -> float:
    """Inches that `title` takes at full width, with the number of a page."""
    return 0.1 + 0.145 * len(textwrap.wrap(plain(text) + " (page\u00a01\u00a0of\u00a06)", LINE))


def page_note(figure: Page) -> str:
    """With spaces that a line does not break at."""
    return f" (page\u00a0{figure.page}\u00a0of\u00a0{figure.n_pages})" if figure.n_pages > 1 else ""


def inch_grid(
    n_rows: int, n_columns: int, body: float, *, left: float, between: float, above: float, apart: float, below: float,
    page: int, n_pages: int, told: str, sharey: bool = False,
) -> tuple[Page, list[list]]:  # fmt: skip
    """A page with a grid of axes whose places are given in inches: quicker than a layout engine by far.

    `body` is the height of the axes, `above` the room over each row for titles, `apart` between rows, `below` under the
    last one, `left` before the first column and `between` the columns; `told` will be the title. The x axes share their
    scale.
    """
    top = title_height(told)
    height = top + n_rows * (above + body) + (n_rows - 1) * apart + below
    figure = Page(WIDTH, height, page, n_pages, layout="none")
    wide = min(2.6, (WIDTH - left - (n_columns - 1) * between - 0.1) / n_columns)
    grid: list[list] = []
    for r in range(n_rows):
        bottom = height - top - r * (above + body + apart) - above - body
        grid.append([])
        for c in range(n_columns):
            place = (left + c * (wide + between), bottom, wide, body)
            first = grid[0][0] if r or c else None
            axes = figure.add_axes(
                tuple(inches / (WIDTH if i % 2 == 0 else height) for i, inches in enumerate(place)), sharex=first,
                sharey=first if sharey else None,
            )  # fmt: skip
            grid[r].append(axes)
    return figure, grid


def legend(figure: Figure, handles: list[Line2D | Patch], fontsize: float = FONT - 0.5) -> None:
    longest = max(len(handle.get_label()) for handle in handles)
    room = 105 * figure.get_figwidth() / WIDTH
    columns = max(1, min(len(handles), int(room / (longest + 7))))
    where = "lower center" if figure.get_layout_engine() is None else "outside lower center"
    figure.legend(
        handles=handles, loc=where, ncols=columns, fontsize=fontsize, frameon=False, borderaxespad=0.2, borderpad=0.2
    )


def legend_height(labels: Sequence[str]) -> float:
    """Inches that `legend` takes at full width."""
    columns = max(1, int(105 / (max(map(len, labels), default=1) + 7)))
    return 0.15 * math.ceil(len(labels) / columns)


def clean(axes, grid: str) -> None:
    axes.grid(axis=grid, color="#E4E4E4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=6.5, length=2)
    if grid in ("x", "both") and axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")


# ---------------------------------------------------------------------------------------------------------------- marks


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """name -> (colour, marker), 42 different ones; those of "FP32" and "" (what others are compared with) are black and
    round."""
    pairs = [(COLOURS[i % 6], MARKERS[1 + i % 7]) for i in range(42)]  # no black, no circle; 6 and 7 are coprime
    others = itertools.cycle(pairs)
    return {name: (FP32_COLOUR, "o") if name in ("FP32", "") else next(others) for name in names}


def draw_intervals(axes, low, high, at, colour, *, vertical: bool = False, width: float = 1.0, **keywords) -> None:
    """A line from low to high at each place, all in one collection. An interval with an undefined end is not drawn."""
    low, high, at = (np.asarray(values, dtype=float) for values in (low, high, at))
    known = np.isfinite(low) & np.isfinite(high) & np.isfinite(at)
    if not known.any():
        return
    ends = np.stack([low[known], high[known]], axis=1)  # (N, 2)
    places = np.repeat(at[known][:, None], 2, axis=1)
    segments = np.stack([places, ends] if vertical else [ends, places], axis=-1)
    lines = LineCollection(list(segments), colors=colour, linewidths=width, capstyle="butt", **keywords)
    lines.set_gid("intervals")
    axes.add_collection(lines)


def draw_marks(axes, x, y, colour, marker, size: float = 3.6, hollow=False, **keywords) -> None:
    """A mark at each place that is defined, hollow ones as one artist and filled ones as another."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    size = size * SLIGHT.get(marker, 1.0)
    known = np.isfinite(x) & np.isfinite(y)
    is_hollow = np.broadcast_to(np.asarray(hollow, dtype=bool), x.shape)
    for chosen, face in ((known & ~is_hollow, colour), (known & is_hollow, "w")):
        if chosen.any():
            axes.plot(
                x[chosen], y[chosen], marker, color=colour, markersize=size, markerfacecolor=face, linestyle="",
                **keywords,
            )  # fmt: skip


def mean_ends(block: pd.DataFrame, low: str, high: str) -> tuple[float, float]:
    """The interval of a mean over seeds: the mean of the seeds' ends.

    The seeds are measured on the same images, and a mean of values varies no more than its values do on average; so it
    is no narrower than the interval of the mean, whatever the seeds have in common. NaN where a seed has none.
    """
    if low not in block or high not in block or not len(block):
        return math.nan, math.nan
    ends = block[[low, high]].astype(float).to_numpy()
    return (math.nan, math.nan) if np.isnan(ends).any() else tuple(float(end) for end in ends.mean(axis=0))


# ---------------------------------------------------------------------------------------------------------------- names


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    return with_labels(rows) if len(rows) else rows


def is_done(rows: pd.DataFrame) -> pd.Series:
    return rows["status"] == "done" if "status" in rows else pd.Series(True, index=rows.index)


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """The finished rows, with labels."""
    rows = labelled(rows)
    return rows[is_done(rows)] if len(rows) else rows


def seeds_note(rows: pd.DataFrame, drawn: str = "") -> str:
    n = rows["seed"].nunique() if "seed" in rows and len(rows) else 0
    return f", mean over {n} seeds" + (f" ({drawn})" if drawn else "") if n > 1 else ""


def percent(level: float) -> str:
    """0.95 -> '95 %'."""
    return f"{100 * level:.4g} %"


def of_dataset(rows: pd.DataFrame, dataset: str) -> str:
    return f" · {plain(dataset)}" if rows["dataset"].nunique() > 1 else ""


def short(text: str, longest: int = LONGEST_NAME) -> str:
    text = str(text)
    return plain(text if len(text) <= longest else text[: longest - 1] + "…")


def plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return str(text).replace("$", r"\$")


def cycle(values: Sequence[str]):
    while True:
        yield from values
