"""The figures of the analysis phase: which there are, what stands below them, the tables that they alone need, and
their files.

Every figure is a PNG and a vector file (PDF or SVG) under `analysis/`, its pages NAME.png, NAME-2.png, … The files
hold no date, so that the same inputs give the same bytes. Drawing keeps Python's lock, so that the figures of a large
study are drawn in two processes.
"""

from __future__ import annotations

import io
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import visualizations
from analysis.group_calibration import RELIABILITY_COLUMNS, reliability
from analysis.result_rows import main_settings, with_labels
from figures.style import Page, all_pages
from significance.joint_bootstrap import TestSet, n_threads
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
    "cross_dataset": "What quantization changes in each group's accuracy: on the data set that a model was trained "
    "on, and on another one. On the diagonal it transfers.",
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
LARGE = 150  # result rows from which on a second process, which takes two seconds to start, saves time
HELPERS = ("probability_calibration", "group_flip_rates", "fairness_heatmap")  # drawn there: about half of the work
HELPER = "import sys; sys.path[:0] = [{root!r}]; from phases.drawing import help_drawing; help_drawing()"
# fonts as TrueType, which printers and publishers take; ids that do not change from run to run; text as text
SAVING = {
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "figures", "figure.autolayout": False,
    "figure.constrained_layout.use": False, "savefig.bbox": None,
}  # fmt: skip


@dataclass(frozen=True)
class StudyFigures:
    """What to draw; iterating draws it: (name, page) of every figure, one at a time, since each is large in memory."""

    plans: Mapping[str, tuple[Callable[..., Page], list, dict]]  # name -> the function, what it draws, how
    are_many: bool

    def __iter__(self) -> Iterator[tuple[str, Page]]:
        for name, (draw, tables, options) in self.plans.items():
            for page in all_pages(draw, *tables, **options):
                yield name, page

    def only(self, names: Sequence[str]) -> StudyFigures:
        return StudyFigures({name: plan for name, plan in self.plans.items() if name in names}, False)


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
) -> StudyFigures:
    """Every figure, in the order of the report.

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
        draws["cross_dataset"] = (visualizations.cross_dataset, [transfer], {})
    if sensitivity is not None and sensitivity["cell"].isin(rows.loc[rows["status"] == "done", "cell"]).any():
        draws["layer_sensitivity"] = (v.layer_sensitivity, [sensitivity, rows], {})
    return StudyFigures({name: draws[name] for name in CAPTIONS if name in draws}, len(rows) >= LARGE)


def save_figures(
    store: Store, drawn: StudyFigures | Iterator[tuple[str, Page]], vector: str
) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """Write each page as PNG and as `vector` and remove the pages of an earlier analysis that there are no longer.

    Returns [(file name of the PNG, caption), …] and the PNG bytes by file name.
    """
    captions, images, written = [], {}, set()
    for name, page, n_pages, files in _in_two_processes(drawn, vector):
        stem = name if page == 1 else f"{name}-{page}"
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


def _in_two_processes(drawn: StudyFigures | Iterator[tuple[str, Page]], vector: str) -> Iterator[tuple]:
    """(name, page, pages, {suffix: bytes}) of each page; those of many figures from two processes, in the same order
    and the same bytes."""
    if not isinstance(drawn, StudyFigures) or not drawn.are_many or n_threads() < 2:
        yield from _files(drawn, vector)
        return
    theirs, answer = drawn.only(HELPERS), []
    command = [sys.executable, "-c", HELPER.format(root=str(Path(__file__).resolve().parent.parent))]
    asked = pickle.dumps((theirs, vector, FIGURE_DPI))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as helper:
        listener = threading.Thread(target=lambda: answer.extend(helper.communicate(asked)))
        listener.start()
        try:
            ours = list(_files(drawn.only([name for name in drawn.plans if name not in HELPERS]), vector))
            listener.join()
        except BaseException:
            helper.kill()
            raise
    if helper.returncode:
        raise RuntimeError(f"drawing {', '.join(theirs.plans)} failed:\n{answer[1].decode(errors='replace')}")
    place = {name: i for i, name in enumerate(drawn.plans)}
    yield from sorted(ours + pickle.loads(answer[0]), key=lambda page: (place[page[0]], page[1]))


def help_drawing() -> None:
    """What the second process does: figures from standard input, their files to standard output."""
    figures, vector, dpi = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(list(_files(figures, vector, dpi))))


def _files(drawn: StudyFigures | Iterator[tuple[str, Page]], vector: str, dpi: float | None = None) -> Iterator[tuple]:
    for name, figure in drawn:
        page, n_pages = getattr(figure, "page", 1), getattr(figure, "n_pages", 1)
        yield name, page, n_pages, rendered(figure, ("png", vector), dpi)


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
