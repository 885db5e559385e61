"""The figures of the analysis phase: which there are, what stands below them, the tables that they alone need, and
their files.

Every figure is a PNG and a vector file (PDF or SVG) under `analysis/`, its pages NAME.png, NAME-2.png, … The files
hold no date, so that the same inputs give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import cross_dataset
import visualizations
from figures.style import Page, all_pages
from group_calibration import RELIABILITY_COLUMNS, reliability
from joint_bootstrap import TestSet
from result_rows import main_settings, with_labels
from store import Store, write_bytes

FIGURE_DPI = 200
CAPTIONS = {
    "accuracy_heatmap": "Accuracy of every model at every setting.",
    "fairness_heatmap": "What quantization changed for the worst group, and for the gap between groups, against FP32.",
    "per_group_performance": "Accuracy of each group, FP32 against the main setting of each method and width.",
    "group_flip_rates": "How many of each group's images get another prediction than FP32's.",
    "mitigation_comparison": "Each strategy against plain quantization of the same model and width.",
    "cost_benefit": "Seconds and bytes of each method against the worst-group accuracy that it gains over plain "
    "quantization of the same bits.",
    "hypothesis_validation": "Each hypothesis: effect, interval, threshold and verdict.",
    "pareto_frontier": "The settings that no other one beats in all the chosen dimensions.",
    "fairness_vs_bits": "Equalized-odds difference at each width (it is biased upward, the more the fewer the images).",
    "probability_calibration": "Whether probabilities are honest: accuracy against confidence in each group.",
    "cross_dataset": cross_dataset.CAPTION,
    "layer_sensitivity": "What the output loses when one layer alone goes to so many bits, and the width that mixed "
    "precision chose for it.",
}
# beside the seconds of a study no two runs of which are alike: everything else is the same bytes after another run
TIMED = ("cost_benefit",)
METADATA = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Date": None, "Creator": None},
}
# fonts as TrueType, which printers and publishers take; ids that do not change from run to run; text as text
SAVING = {
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "figures", "figure.autolayout": False,
    "figure.constrained_layout.use": False, "savefig.bbox": None,
}  # fmt: skip


def study_figures(
    rows: pd.DataFrame,
    groups: pd.DataFrame,
    verdicts: pd.DataFrame,
    significance: pd.DataFrame,
    costs: pd.DataFrame,
    probabilities: pd.DataFrame,
    dimensions: Sequence[str],
    level: float,
    flips: pd.DataFrame | None = None,
    transfer: pd.DataFrame | None = None,
    sensitivity: pd.DataFrame | None = None,
) -> Iterator[tuple[str, Page]]:
    """(name, page) of every figure, in the order of the report; one at a time, since each is large in memory.

    `rows` are the planned cells that ended, `groups` the group rows to show, the others as in the figures' functions;
    `level` is that of their intervals.
    """
    v = visualizations
    of_level = {"level": level}
    draws: dict[str, tuple] = {  # the function, what it draws, how
        "accuracy_heatmap": (v.accuracy_heatmap, [rows], {}),
        "fairness_heatmap": (v.fairness_heatmap, [rows, significance], of_level),
        "per_group_performance": (v.per_group_performance, [groups], of_level),
        "mitigation_comparison": (v.mitigation_comparison, [rows], of_level),
        "cost_benefit": (v.cost_benefit, [costs], of_level),
        "hypothesis_validation": (v.hypothesis_validation, [verdicts], {}),
        "pareto_frontier": (v.pareto_frontier, [rows, dimensions], of_level),
        "fairness_vs_bits": (v.fairness_vs_bits, [rows], of_level),
        "probability_calibration": (v.probability_calibration, [probabilities, rows], of_level),
    }
    if flips is not None:
        draws["group_flip_rates"] = (v.group_flip_rates, [flips], of_level)
    if transfer is not None and len(transfer):
        draws["cross_dataset"] = (cross_dataset.cross_dataset, [transfer], {})
    if sensitivity is not None and sensitivity["cell"].isin(rows.loc[rows["status"] == "done", "cell"]).any():
        draws["layer_sensitivity"] = (v.layer_sensitivity, [sensitivity, rows], {})
    for name in CAPTIONS:
        if name in draws:
            draw, tables, options = draws[name]
            for page in all_pages(draw, *tables, **options):
                yield name, page


def save_figures(
    store: Store, drawn: Iterator[tuple[str, Page]], vector: str
) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """Write each page as PNG and as `vector` and remove the pages of an earlier analysis that there are no longer.

    Returns [(file name of the PNG, caption), …] and the PNG bytes by file name.
    """
    captions, images, written = [], {}, set()
    for name, figure in drawn:
        page, n_pages = getattr(figure, "page", 1), getattr(figure, "n_pages", 1)
        stem = name if page == 1 else f"{name}-{page}"
        files = rendered(figure, ("png", vector))
        for suffix, data in files.items():
            write_bytes(store.analysis / f"{stem}.{suffix}", data)
            written.add(f"{stem}.{suffix}")
        of = f" Page {page} of {n_pages}." if n_pages > 1 else ""
        captions.append((f"{stem}.png", CAPTIONS[name] + of))
        images[f"{stem}.png"] = files["png"]
    ours = re.compile(rf"({'|'.join(CAPTIONS)})(-\d+)?\.({'|'.join(METADATA)})")
    for path in store.analysis.iterdir():
        if ours.fullmatch(path.name) and path.name not in written:
            path.unlink()
    return captions, images


def rendered(figure: Figure, formats: Sequence[str] = ("png",), dpi: float | None = None) -> dict[str, bytes]:
    """The figure's bytes in each format, without metadata that would change. The figure is laid out once for all."""
    with matplotlib.rc_context(SAVING):
        if figure.get_layout_engine() is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine(None)
        files = {}
        for suffix in formats:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=dpi or FIGURE_DPI, metadata=METADATA[suffix])
            files[suffix] = buffer.getvalue()
    return files


# --------------------------------------------------------------------------------------- tables that only figures need


def probability_table(store: Store, done: pd.DataFrame, test_sets: Mapping[str, TestSet], level: float) -> pd.DataFrame:
    """Reliability of each group's probabilities, of FP32 and the main setting of each width: `RELIABILITY_COLUMNS` with
    the cell. A model whose logits are not finite has no probabilities and no rows."""
    rows = with_labels(done)
    rows = rows[rows["setting"].isin(main_settings(rows))]
    tables = []
    for row in rows.itertuples():
        test_set, logits_NK = test_sets[row.dataset], store.predictions(row.cell).logits
        if np.isfinite(logits_NK).all():
            table = reliability(logits_NK, test_set.label_N, test_set.group_N, test_set.group_names, level=level)
            tables.append(table.assign(cell=row.cell))
    columns = ["cell", *RELIABILITY_COLUMNS]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def shown_groups(done: pd.DataFrame, groups: pd.DataFrame, attributes: Mapping[str, Any]) -> pd.DataFrame:
    """The group rows of the finished cells over each data set's attribute {data set: attribute}, with their options."""
    groups = groups[groups["cell"].isin(done["cell"])].merge(done[["cell", "options"]], on="cell", how="left")
    parts = [groups[(groups["dataset"] == name) & (groups["attribute"] == value)] for name, value in attributes.items()]
    return pd.concat(parts).assign(attribute=" / ".join(dict.fromkeys(attributes.values())))
