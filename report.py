"""Result tables (CSV, Markdown, LaTeX, HTML), summary.md and report.html.

Everything is written from DataFrames and holds no date and no time of day, so that the same results give the same
bytes. Strings from data and configs are escaped for the format they go into.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from result_rows import main_settings, model_label, plain_counterparts, with_labels
from store import INTERSECTION

MISSING = "–"  # how a missing value is shown
PERCENT_COLUMNS = {
    "accuracy": "accuracy %",
    "worst_group_accuracy": "worst group %",
    "accuracy_gap": "accuracy gap",
    "equalized_odds_difference": "equalized odds diff.",
    "demographic_parity_difference": "dem. parity diff.",
}
LATEX_SPECIALS = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
    "−": r"$-$",
    "×": r"$\times$",
}
# What Markdown (GitHub's) would take for markup; an underscore inside a word is none.
MARKDOWN_SPECIALS = re.compile(r"([\\`*|<$]|\](?=[(\[:])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|~(?=~)|&(?=#?\w+;)|^[#>])")


@dataclass(frozen=True)
class TableSection:
    """A table of the report with a heading of its own; its values are as a reader shall see them."""

    id: str  # of the heading's anchor and of the files tables/<id>.csv, .tex
    title: str
    note: str
    table: pd.DataFrame  # not empty


@dataclass
class Study:
    """What the report tells, as plain data; `phases.analysis` fills it from the saved artifacts."""

    rows: pd.DataFrame  # the planned cells that ended, all phases, done and failed
    data: pd.DataFrame  # dataset, attribute, group, n, base_rate, too_small: the test set
    changes: pd.DataFrame  # hypotheses.accuracy_changes
    hypotheses: pd.DataFrame  # hypotheses.evaluate
    findings: list[str]
    planned: Mapping[str, int]  # phase -> planned cells
    missing: list[tuple[str, str]] = field(default_factory=list)  # (phase, cell) planned and not there
    unusable: Sequence[tuple[str, str, str]] = ()  # (phase, cell, why): finished, but its predictions cannot be used
    leftovers: list[str] = field(default_factory=list)  # cells in the folder that the config does not plan
    replicates: int = 0
    level: float = 0.95
    seeds: Sequence[int] = ()
    targets: Mapping[str, str] = field(default_factory=dict)  # data set -> what is predicted
    figures: Sequence[tuple[str, str]] = ()  # (file name, caption)
    sections: Sequence[TableSection] = ()  # between the hypotheses and the figures, in this order
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> pd.DataFrame:
        return self.rows[self.rows["status"] == "failed"]

    @property
    def done(self) -> pd.DataFrame:
        return self.rows[self.rows["status"] == "done"]


# --------------------------------------------------------------------------------------------------------------- tables


def result_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows as a reader wants them: names spelt out, shares in %, two kinds of missing value (failed, not measured) "
    "told."""
    rows = with_labels(rows)
    severals = [name for name in ("dataset", "seed") if rows[name].nunique() > 1]
    table = pd.DataFrame({name.replace("dataset", "data set"): rows[name].astype(str) for name in severals})
    table["model"] = [model_label(name) for name in rows["model"]]
    table["setting"] = rows["setting"].to_numpy()
    for name, heading in PERCENT_COLUMNS.items():
        table[heading] = [number(100 * value, 1) for value in _floats(rows, name)]
    table.insert(
        table.columns.get_loc("accuracy %") + 1,
        "change",
        [number(100 * value, 1, sign=True) for value in _floats(rows, "delta_accuracy")],
    )
    table["worst group"] = [MISSING if pd.isna(name) else str(name) for name in rows["worst_group"]]
    table["MB"] = [number(value, 3, significant=True) for value in _floats(rows, "size_mb")]
    table["status"] = rows["status"].astype(str).to_numpy()
    return table.reset_index(drop=True)


def best_settings(changes: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The most accurate setting of each (data set, model, width) in `hypotheses.accuracy_changes`.

    It is chosen on the test images that it is measured on, so its accuracy is a little optimistic.
    """
    means = ["worst_group_accuracy", "accuracy_gap", "equalized_odds_difference", "size_mb"]
    if changes.empty:
        return pd.DataFrame(columns=[*changes.columns, *means, "n_settings"])
    done = with_labels(rows)
    done = done[done["status"] == "done"]
    keys = ["dataset", "model", "setting"]
    averages = done.assign(**{name: _floats(done, name) for name in means}).groupby(keys, sort=False)[means].mean()
    orders = changes.groupby(["dataset", "model", "width"], sort=False)
    best = changes.loc[orders["accuracy"].idxmax()].assign(n_settings=orders.size().to_numpy())
    ranks = changes.groupby("width")["setting_order"].min()
    models = {key: i for i, key in enumerate(dict.fromkeys(zip(changes["dataset"], changes["model"], strict=True)))}
    best["_model"] = [models[key] for key in zip(best["dataset"], best["model"], strict=True)]
    best["_width"] = best["width"].map(ranks)
    best = best.sort_values(["_model", "_width"], kind="stable").drop(columns=["_model", "_width"])
    return best.join(averages, on=keys).reset_index(drop=True)


def best_table(best: pd.DataFrame, level: float) -> pd.DataFrame:
    """`best_settings` for print."""
    table = pd.DataFrame()
    if best["dataset"].nunique() > 1:
        table["data set"] = best["dataset"].astype(str)
    table["model"] = [model_label(name) for name in best["model"]]
    table["width"] = best["width"]
    table["best setting"] = best["setting"]
    table["accuracy %"] = [number(100 * value, 1) for value in best["accuracy"]]
    table[f"change [{level * 100:.4g} % CI]"] = [
        f"{number(row.change, 1, sign=True)} [{number(row.ci_low, 1, sign=True)}, {number(row.ci_high, 1, sign=True)}]"
        for row in best.itertuples()
    ]
    table["worst group %"] = [number(100 * value, 1) for value in best["worst_group_accuracy"]]
    table["accuracy gap"] = [number(100 * value, 1) for value in best["accuracy_gap"]]
    table["equalized odds diff."] = [number(100 * value, 1) for value in best["equalized_odds_difference"]]
    table["MB"] = [number(value, 3, significant=True) for value in best["size_mb"]]
    return table


DEPLOYED_NOTE = (
    "Each file run by its engine on the whole test split. Agreement is the share of images on which the engine "
    "predicts the simulation's class; faster and smaller are against the FP32 model in the same engine."
)


SAME_BYTES = 1.02  # a file that is so many times as large counts as one of the same size: ONNX beside packed tensors
REPAIR_NOTE = (
    "Repairs beside plain quantization of the same bits, and beside the best plain post-training quantization whose "
    "file is no larger: change of the worst group's accuracy in points."
)


def deployment_table(rows: pd.DataFrame, deployment: pd.DataFrame) -> pd.DataFrame:
    """What engines made of the models (deployment_results.csv), beside the simulation; empty where none has run."""
    rows = with_labels(rows[rows["status"] == "done"])
    found = deployment[deployment["status"] == "done"].merge(
        rows[["cell", "model", "dataset", "seed", "setting", "baseline_cell", "accuracy", "worst_group_accuracy"]],
        on="cell",
    )
    if found.empty:
        return pd.DataFrame()
    fp32 = found[found["baseline_cell"].isna()].set_index(["cell", "engine"])
    reference = fp32.reindex(pd.MultiIndex.from_arrays([found["baseline_cell"], found["engine"]]))
    severals = [name for name in ("dataset", "seed") if found[name].nunique() > 1]
    table = pd.DataFrame({name.replace("dataset", "data set"): found[name].astype(str) for name in severals})
    table["model"] = [model_label(name) for name in found["model"]]
    table["setting"] = found["setting"].to_numpy()
    table["engine"] = found["engine"].to_numpy()
    table["MB"] = [number(value, 3, significant=True) for value in found["size_mb"]]
    table["times smaller"] = [number(value, 1) for value in reference["size_mb"].to_numpy() / found["size_mb"]]
    for column, heading in (("latency_ms_b1", "1 image"), ("latency_ms_b32", "32 images")):
        times = found[column].astype(float) if column in found else pd.Series(np.nan, found.index)
        before = reference[column].astype(float).to_numpy() if column in found else np.nan
        table[f"ms, {heading}"] = [number(value, 3, significant=True) for value in times]
        table[f"times faster, {heading}"] = [number(value, 1) for value in before / times]
    table["agreement %"] = [number(100 * value, 1) for value in found["agreement"]]
    for column, heading in (("accuracy", "accuracy %"), ("worst_group_accuracy", "worst group %")):
        table[f"{heading}, simulated"] = [number(100 * value, 1) for value in found[column]]
        table[f"{heading}, deployed"] = [number(100 * value, 1) for value in found[f"deployed_{column}"]]
    return table.reset_index(drop=True)


def repair_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Each repair beside plain quantization: at the same bits, and the best of those whose file is no larger (to 2 %),
    by worst-group accuracy; empty where there is no repair. The best plain one is chosen on the same test images, which
    favours it. Changes are of worst-group accuracy, in points."""
    rows = with_labels(rows[rows["status"] == "done"])
    repaired = rows[rows["strategy"].notna()].sort_values(["dataset", "model", "seed", "setting_order"], kind="stable")
    plain = rows[rows["strategy"].isna() & ~rows["method"].isin(["none", "qat"])]
    if repaired.empty:
        return pd.DataFrame()
    pairs = plain_counterparts(rows)
    by_cell = rows.set_index("cell")
    lines = []
    for row in repaired.to_dict("records"):
        is_of_it = (
            (plain["dataset"] == row["dataset"]) & (plain["model"] == row["model"]) & (plain["seed"] == row["seed"])
        )
        among = plain[is_of_it]
        same_bits = among[(among["width"] == row["width"]) & (among["method"] == "ptq_static")].head(1)
        bits = (
            by_cell.loc[pairs[row["cell"]]] if row["cell"] in pairs else same_bits.iloc[0] if len(same_bits) else None
        )
        small = among[among["size_mb"] <= SAME_BYTES * row["size_mb"]].dropna(subset=["worst_group_accuracy"])
        best = small.loc[small["worst_group_accuracy"].idxmax()] if len(small) else None
        worst = row["worst_group_accuracy"]
        line = {name: str(row[name]) for name in ("dataset", "seed") if rows[name].nunique() > 1}
        line |= {"model": model_label(row["model"]), "setting": row["setting"]}
        line |= {"MB": number(row["size_mb"], 3, significant=True), "accuracy %": number(100 * row["accuracy"], 1)}
        line["worst group %"] = number(100 * worst, 1)
        for reference, heading in ((bits, "same bits"), (best, "same bytes")):
            change = np.nan if reference is None else 100 * (worst - reference["worst_group_accuracy"])
            line[f"against {heading}"] = number(change, 1)
        line["best plain of the same bytes"] = "" if best is None else best["setting"]
        line["calibration s"] = number(row.get("calibration_seconds"), 1)
        line["training s"] = number(row.get("training_seconds"), 1)
        lines.append(line)
    return pd.DataFrame(lines)


def group_accuracy(rows: pd.DataFrame, groups: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """(data set, model) -> accuracy in % of all images and of each group of each attribute, a column a setting.

    The columns are FP32, the main plain setting of each width, and what strategies make of it; the mean over seeds. A
    group without an image has no accuracy. `groups` are the rows of group_results.csv.
    """
    rows = with_labels(rows[rows["status"] == "done"])
    tables = {}
    for key, block in rows.groupby(["dataset", "model"], sort=False):
        main = main_settings(block)
        shown = block[block["setting"].isin(main) | block["strategy"].notna()].sort_values(
            "setting_order", kind="stable"
        )
        of_model = groups[groups["cell"].isin(shown["cell"])].merge(shown[["cell", "setting"]], on="cell")
        columns: dict[str, dict[tuple[str, str], float]] = {}
        counts: dict[tuple[str, str], int] = {("all", ""): int(shown["n_test"].iloc[0])}
        for setting in dict.fromkeys(shown["setting"]):
            cells = of_model[of_model["setting"] == setting].drop_duplicates(["cell", "attribute", "group"])
            accuracy = cells.groupby(["attribute", "group"], sort=False)["accuracy"].mean()
            columns[setting] = {("all", ""): shown.loc[shown["setting"] == setting, "accuracy"].mean(), **accuracy}
            counts |= cells.groupby(["attribute", "group"], sort=False)["n"].first().astype(int).to_dict()
        places = [place for place in counts if place[0] != INTERSECTION]
        table = pd.DataFrame({"attribute": [a for a, _ in places], "group": [g for _, g in places]})
        table["n"] = [counts[place] for place in places]
        for setting, values in columns.items():
            table[_short_setting(setting)] = [number(100 * values.get(place, math.nan), 1) for place in places]
        tables[key] = table
    return tables


def _short_setting(setting: str) -> str:
    """'W8A8 static (mse) + balanced calibration' -> 'W8A8 + balanced calibration'."""
    plain, plus, strategy = setting.partition(" + ")
    return plain.partition(" ")[0] + plus + strategy


def number(value: float, digits: int, sign: bool = False, significant: bool = False) -> str:
    """A number for print; a missing one is a dash, and -0.0 is 0.0."""
    if value is None or pd.isna(value):
        return MISSING
    if significant:
        return f"{value:#.{digits}g}".rstrip(".") if abs(value) < 10**digits else f"{value:.0f}"
    value = round(float(value), digits) + 0.0
    return f"{value:+.{digits}f}" if sign and value else f"{value:.{digits}f}"


def to_csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False)


def to_markdown(table: pd.DataFrame) -> str:
    """A pipe table, escaped; columns of numbers to the right."""
    lines = ["| " + " | ".join(markdown_escape(name) for name in table.columns) + " |"]
    lines.append("|" + "|".join("---:" if is_numeric else "---" for is_numeric in _numeric_columns(table)) + "|")
    for values in table.itertuples(index=False):
        lines.append("| " + " | ".join(markdown_escape(value) for value in values) + " |")
    return "\n".join(lines) + "\n"


def to_latex(table: pd.DataFrame, caption: str = "", label: str = "") -> str:
    """A booktabs table (longtable from 40 rows on), every string escaped. Needs packages booktabs and longtable."""
    columns = "".join("r" if is_numeric else "l" for is_numeric in _numeric_columns(table))
    head = " & ".join(latex_escape(name) for name in table.columns) + r" \\"
    body = [" & ".join(latex_escape(value) for value in values) + r" \\" for values in table.itertuples(index=False)]
    title = [rf"\caption{{{latex_escape(caption)}}}"] if caption else []
    title += [rf"\label{{{re.sub(r'[^A-Za-z0-9:.-]', '-', label)}}}"] if label else []
    if len(table) >= 40:
        opening = [rf"\begin{{longtable}}{{{columns}}}", *([*title, r"\\"] if title else [])]
        lines = [*opening, r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot", *body]
        lines.append(r"\end{longtable}")
    else:
        lines = [
            r"\begin{table}",
            r"\centering",
            *title,
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            head,
            r"\midrule",
        ]
        lines += [*body, r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def to_html(table: pd.DataFrame) -> str:
    """An HTML table, every string escaped."""
    return _environment().from_string(TABLE).render(columns=_columns(table), rows=table.values.tolist())


def latex_escape(text: Any) -> str:
    return "".join(LATEX_SPECIALS.get(character, character) for character in _one_line(text))


def markdown_escape(text: Any) -> str:
    return MARKDOWN_SPECIALS.sub(r"\\\1", _one_line(text))


# ----------------------------------------------------------------------------------------------------------- summary.md


def summary_markdown(study: Study) -> str:
    """The study in a page of Markdown: question, data, cells, findings, hypotheses, table, figures, how to repeat "
    "it."""
    escape = markdown_escape
    lines = ["# What quantization did to each group", "", QUESTION, "", "## Data", ""]
    for dataset, block in study.data.groupby("dataset", sort=False):
        target = f", predicting {escape(study.targets[dataset])}" if dataset in study.targets else ""
        n = _images(block)
        lines += [f"**{escape(dataset)}**{target}: {n} test images.", "", to_markdown(data_table(block)), ""]
    lines += ["## What was run", "", *[f"- {escape(sentence)}" for sentence in run_sentences(study)], ""]
    lines += ["## Findings", "", *[f"- {escape(sentence)}" for sentence in study.findings], ""]
    lines += ["## Hypotheses", ""]
    for row in study.hypotheses.itertuples():
        lines.append(f"- **{escape(row.statement)}: {row.verdict}.** {escape(row.sentence)}")
    lines += ["", escape(interval_note(study)), ""]
    for section in study.sections:
        lines += [f"## {escape(section.title)}", "", escape(section.note), "", to_markdown(section.table)]
    if len(study.failed):
        lines += ["## Failed cells", ""]
        lines += [f"- {escape(row.cell)}: {escape(_error(row.error))}" for row in study.failed.itertuples()] + [""]
    if study.missing:
        lines += ["## Planned cells without a result", ""]
        lines += [f"- {escape(cell)} (python main.py --phase {phase})" for phase, cell in study.missing] + [""]
    if study.unusable:
        lines += ["## Finished cells whose predictions cannot be used, left out", ""]
        lines += [f"- {escape(cell)}: {escape(why)}" for _, cell, why in study.unusable] + [""]
    if study.leftovers:
        lines += ["## In the folder, not planned by this config, left out", ""]
        lines += [f"- {escape(cell)}" for cell in study.leftovers] + [""]
    lines += ["## Figures", ""]
    lines += [f"- [{escape(name)}]({name}): {escape(caption)}" for name, caption in study.figures]
    lines += ["", "## Again", "", REPRODUCE, "", "```", REPRODUCE_COMMAND, "```", ""]
    return "\n".join(lines)


def data_table(block: pd.DataFrame) -> pd.DataFrame:
    """Groups of the test set for print. With several classes the base rate is that of each class."""
    classes = block["class"].nunique() > 1
    return pd.DataFrame(
        {
            "attribute": block["attribute"],
            "group": block["group"],
            **({"class": block["class"]} if classes else {}),
            "n": [f"{int(n)}" for n in block["n"]],
            "base rate %": [number(100 * rate, 1) for rate in block["base_rate"]],
            "note": ["below the minimum size: left out of gaps" if small else "" for small in block["too_small"]],
        }
    )


def run_sentences(study: Study) -> list[str]:
    """What was planned, done, failed and missing, in sentences."""
    done, failed = len(study.done), len(study.failed)
    planned = sum(study.planned.values())
    phases = ", ".join(f"{count} {phase}" for phase, count in study.planned.items())
    sentences = [
        f"{planned} cells planned ({phases}): {done} done, {failed} failed, {len(study.missing)} without a result"
        + (f", {len(study.unusable)} with predictions that cannot be used." if study.unusable else ".")
    ]
    if not study.done["weight_bits"].notna().any():
        sentences.append("No finished quantized cell.")
    models = list(dict.fromkeys(model_label(name) for name in study.rows["model"]))
    sentences.append(f"Models: {', '.join(models)}. Seeds: {', '.join(str(seed) for seed in study.seeds)}.")
    if len(study.seeds) == 1:
        sentences.append("One seed only: nothing here says how much other training seeds would differ.")
    elif 1 < len(study.seeds) < 6:
        sentences.append(
            f"{len(study.seeds)} seeds: too few for statistics between seeds; intervals are over images, given these "
            "seeds."
        )
    if study.leftovers:
        sentences.append(f"{len(study.leftovers)} cells in the folder are not planned by this config and are left out.")
    return sentences


def interval_note(study: Study) -> str:
    return (
        f"Intervals are paired bootstrap intervals over test images ({study.replicates} replicates), given the trained "
        "models "
        "and the groups. “Inconclusive” means that these data do not decide, not that there is no effect."
    )


QUESTION = "What does quantizing a vision model do to each demographic group, and what repairs it at the least cost?"
BEST_NOTE = (
    "The most accurate finished setting of each model and width. It is chosen on the same test images, so its accuracy "
    "is a "
    "little optimistic. Change: accuracy minus that of FP32, in points."
)
REPRODUCE = "config.yaml is the resolved configuration saved beside the results:"
REPRODUCE_COMMAND = "python main.py --phase all --config config.yaml --results-dir NEW_FOLDER"


# ---------------------------------------------------------------------------------------------------------- report.html


def report_html(study: Study, images: Mapping[str, bytes]) -> str:
    """The study as one page that needs no other file and no network. `images`: the PNG of each figure, by file name."""
    hypotheses = study.hypotheses.to_dict("records")
    return (
        _environment()
        .from_string(PAGE)
        .render(
            question=QUESTION,
            datasets=[
                {
                    "name": dataset,
                    "target": study.targets.get(dataset),
                    "n": _images(block),
                    "table": _table(data_table(block)),
                }
                for dataset, block in study.data.groupby("dataset", sort=False)
            ],
            run=run_sentences(study),
            findings=study.findings,
            hypotheses=hypotheses,
            interval_note=interval_note(study),
            sections=[
                {"id": section.id, "title": section.title, "note": section.note, "table": _table(section.table)}
                for section in study.sections
            ],
            results=_table(result_table(study.rows)) if len(study.rows) else None,
            figures=[
                {"name": name, "caption": caption, "data": base64.b64encode(images[name]).decode("ascii")}
                for name, caption in study.figures
                if name in images
            ],
            failed=[{"cell": row.cell, "error": _error(row.error)} for row in study.failed.itertuples()],
            missing=study.missing,
            unusable=study.unusable,
            leftovers=study.leftovers,
            environment=_flat(study.environment),
            reproduce=REPRODUCE,
            command=REPRODUCE_COMMAND,
        )
    )


TABLE = """{% macro show(table) %}<div class="scroll" tabindex="0"><table><thead><tr>
{%- for name, numeric in table.columns %}<th{% if numeric %} class="n"{% endif %} scope="col">{{ name }}</th>
{%- endfor -%}
</tr></thead><tbody>
{%- for row in table.rows %}
<tr>{% for value in row -%}
<td{% if table.columns[loop.index0][1] %} class="n"{% endif %}>{{ value }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody></table></div>{% endmacro -%}
{% if columns is defined %}{{ show({"columns": columns, "rows": rows}) }}{% endif %}"""

PAGE = (
    TABLE
    + """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>What quantization did to each group</title>
<style>
:root { --text: #1c1c1e; --soft: #5b5b60; --line: #dcdce0; --back: #ffffff; --panel: #f5f6f8; --link: #0058a3;
  --supported: #0060a0; --contradicted: #b34700; --inconclusive: #5b5b60; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8ea; --soft: #a5a5ad; --line: #3a3a40; --back: #161618;
  --panel: #212125; --link: #7cbcff; --supported: #66b8f0; --contradicted: #f09050; --inconclusive: #a5a5ad; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main, header, nav { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .5rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.3rem 0 .3rem; }
.lead { font-size: 1.1rem; color: var(--soft); margin: 0; }
nav { margin-top: 1rem; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; font-size: .92rem; }
a { color: var(--link); }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .92rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
.tall .scroll { max-height: 34rem; overflow: auto; border: 1px solid var(--line); }
.tall thead th { position: sticky; top: 0; background: var(--panel); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .7rem .28rem .4rem; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
.n { text-align: right; }
.card { background: var(--panel); border-left: 4px solid var(--inconclusive); padding: .65rem 1rem; margin: .7rem 0;
  border-radius: 0 6px 6px 0; }
.card p { margin: .25rem 0; }
.card.supported { border-color: var(--supported); } .card.contradicted { border-color: var(--contradicted); }
.verdict { font-weight: 600; color: var(--inconclusive); }
.supported .verdict { color: var(--supported); } .contradicted .verdict { color: var(--contradicted); }
figure { margin: 1.2rem 0 2rem; }
figure img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .3rem; }
pre { background: var(--panel); padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; }
code { font-family: ui-monospace, Consolas, monospace; font-size: .9em; overflow-wrap: anywhere; }
footer { height: 4rem; }
</style>
</head>
<body>
<header>
<h1>What quantization did to each group</h1>
<p class="lead">{{ question }}</p>
</header>
<nav aria-label="Sections"><a href="#findings">Findings</a><a href="#hypotheses">Hypotheses</a>
{% for section in sections %}<a href="#{{ section.id }}">{{ section.title }}</a>
{% endfor %}<a href="#figures">Figures</a><a href="#results">All results</a>
<a href="#data">Data</a><a href="#run">What was run</a>
{%- if failed or missing or unusable or leftovers %}<a href="#absent">Failed and missing</a>{% endif -%}
<a href="#environment">Environment</a></nav>
<main>
<h2 id="findings">Findings</h2>
<ul>{% for sentence in findings %}<li>{{ sentence }}</li>{% endfor %}</ul>

<h2 id="hypotheses">Hypotheses</h2>
{% for h in hypotheses -%}
<div class="card {{ h.verdict | replace(' ', '-') }}">
<p><strong>{{ h.statement }}</strong>: <span class="verdict">{{ h.verdict }}</span></p>
<p>{{ h.sentence }}</p>
<p class="soft">Rule: {{ h.rule }}.</p>
</div>
{% endfor -%}
<p class="soft">{{ interval_note }}</p>

{% for section in sections -%}
<h2 id="{{ section.id }}">{{ section.title }}</h2>
<p class="soft">{{ section.note }}</p>
{{ show(section.table) }}
{% endfor %}
<h2 id="figures">Figures</h2>
{% for figure in figures -%}
<figure><img alt="{{ figure.caption }}" src="data:image/png;base64,{{ figure.data }}">
<figcaption>{{ figure.caption }} <code>{{ figure.name }}</code></figcaption></figure>
{% endfor -%}

<h2 id="results">All results</h2>
{% if results %}<div class="tall">{{ show(results) }}</div>{% else %}<p>No result.</p>{% endif %}

<h2 id="data">Data</h2>
{% for set in datasets -%}
<h3>{{ set.name }}{% if set.target %}, predicting {{ set.target }}{% endif %}</h3>
<p>{{ set.n }} test images.</p>
{{ show(set.table) }}
{% endfor -%}

<h2 id="run">What was run</h2>
<ul>{% for sentence in run %}<li>{{ sentence }}</li>{% endfor %}</ul>

{% if failed or missing or unusable or leftovers -%}
<h2 id="absent">Failed and missing</h2>
{% if failed %}<h3>Failed cells</h3><ul>{% for cell in failed %}<li><code>{{ cell.cell }}</code>: {{ cell.error }}</li>
{%- endfor %}</ul>{% endif %}
{% if missing %}<h3>Planned cells without a result</h3><ul>{% for phase, cell in missing %}<li><code>{{ cell }}</code>
(<code>python main.py --phase {{ phase }}</code>)</li>{% endfor %}</ul>{% endif %}
{% if unusable %}<h3>Finished cells whose predictions cannot be used, left out</h3><ul>
{%- for _, cell, why in unusable %}<li><code>{{ cell }}</code>: {{ why }}</li>{% endfor %}</ul>{% endif %}
{% if leftovers %}<h3>In the folder, not planned by this config, left out</h3><ul>{% for cell in leftovers %}<li><code>
{{- cell }}</code></li>{% endfor %}</ul>{% endif %}
{%- endif %}

<h2 id="environment">Environment</h2>
<div class="scroll" tabindex="0"><table><tbody>
{%- for name, value in environment %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{%- endfor %}</tbody></table></div>
<h3>Again</h3>
<p>{{ reproduce }}</p>
<pre><code>{{ command }}</code></pre>
</main>
<footer></footer>
</body>
</html>
"""
)


# -------------------------------------------------------------------------------------------------------------- helpers


def _environment() -> jinja2.Environment:
    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


def _images(block: pd.DataFrame) -> int:
    """Test images of a data set: its first attribute's groups, each once however many classes it has rows for."""
    first = block[block["attribute"] == block["attribute"].iloc[0]]
    return int(first.drop_duplicates("group")["n"].sum())


def _table(table: pd.DataFrame) -> dict:
    return {"columns": _columns(table), "rows": table.values.tolist()}


def _columns(table: pd.DataFrame) -> list[tuple[str, bool]]:
    return list(zip(map(str, table.columns), _numeric_columns(table), strict=True))


def _numeric_columns(table: pd.DataFrame) -> list[bool]:
    """Which columns hold numbers for print (the change with its interval included)."""
    numeric = re.compile(r"[-+]?\d[\d.,]*( \[.*\])?")
    return [
        any(str(value) not in (MISSING, "") for value in table[name])
        and all(str(value) in (MISSING, "") or numeric.fullmatch(str(value)) is not None for value in table[name])
        for name in table.columns
    ]


def _floats(rows: pd.DataFrame, name: str) -> list[float]:
    if name not in rows:
        return [math.nan] * len(rows)
    return pd.to_numeric(rows[name], errors="coerce").astype(float).tolist()


def _error(error: Any) -> str:
    return "no message" if pd.isna(error) else _one_line(error)


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name} ")
        elif value is not None:
            flat.append((f"{prefix}{name}", str(value)))
    return flat
