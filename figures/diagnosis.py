"""Why groups suffer: the diagnostics of a quantized model, group by group."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from figures.style import COLOURS, COLUMN_WIDTH, FONT, GREY, MARKERS, WIDTH, Page, clean, nothing, short


def group_diagnostics(groups: pd.DataFrame, clipping: pd.DataFrame, exemplars: pd.DataFrame) -> Page:
    """Why groups suffer: margin, gradient norm, Hessian eigenvalue, clipped activations and exemplars of each group (a
    place on the axis), FP32 against quantized. The tables are those of `diagnostics.diagnose`.

    Hollow: a gradient norm no larger than chance alone would make it, an eigenvalue that had not converged.
    """
    shown = list(dict.fromkeys(groups.loc[groups["n"] > 0, "group"])) if len(groups) else []
    if not shown:
        return nothing("no group with images")
    sizes = groups.drop_duplicates("group").set_index("group")["n"]
    models = [model for model in ("fp32", "quantized") if (groups["model"] == model).any()]
    style = {model: (COLOURS[i], MARKERS[i]) for i, model in enumerate(("fp32", "quantized"))}
    place = {group: x for x, group in enumerate(shown)}
    offset = {"fp32": -0.14, "quantized": 0.14} if len(models) > 1 else dict.fromkeys(models, 0.0)
    panels = ["margin", "gradient_norm", "hessian_eigenvalue"]
    panels += ["clipping"] if len(clipping) else []
    panels += ["exemplars"] if len(exemplars) else []
    labels = [f"{short(group)} ({sizes[group]})" for group in shown]
    width = COLUMN_WIDTH if len(shown) <= 12 else WIDTH
    figure = Page(width, 0.75 + 0.95 * len(panels) + 0.05 * max(map(len, labels)))
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
        clean(axes, "y")
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
