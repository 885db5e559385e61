"""summary.md and report.html: the study told to a reader, in text and as a page.

Everything is made from DataFrames and holds no date and no time of day, so that the same results give the same bytes.
Both tell the same from the same functions: `Study` is what they are given, the sections below are what they have in
common, `summary_markdown` is the text; the page is made by the package report_page from what `page_parts` collects.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

import report_page
from analysis.configurations import configurations
from analysis.recommendation import RULE, Bounds, recommendation_sentences
from analysis.result_rows import model_label
from analysis.study_tables import RESULTS_NOTE, bold_note, bold_results, data_table, result_table, result_values
from analysis.tables import LONG, Places, TableSection, markdown_escape, one_line, to_markdown
from analysis.tables import MISSING as MISSING
from analysis.tables import number as number
from analysis.winners import COLUMNS as TEST_COLUMNS
from analysis.wording import count

QUESTION = "What does quantizing a vision model do to each demographic group, and what repairs it at the least cost?"
REPRODUCE = "config.yaml is the resolved configuration saved beside the results:"
REPRODUCE_COMMAND = "python main.py --phase all --config config.yaml --results-dir NEW_FOLDER"
P_VALUES = {"p_holm": " (Holm-corrected over the hypotheses)", "p": " (not corrected)"}
NAMED = 100  # cells that summary.md names of each kind (failed, missing, left over); the page names all


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
    significance: pd.DataFrame | None = None  # significance.csv
    best_tests: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(TEST_COLUMNS)))
    bounds: Bounds = field(default_factory=Bounds)  # of the recommendation

    @property
    def failed(self) -> pd.DataFrame:
        return self.rows[self.rows["status"] == "failed"]

    @property
    def done(self) -> pd.DataFrame:
        return self.rows[self.rows["status"] == "done"]

    @property
    def configurations(self) -> pd.DataFrame:
        return configurations(self.rows, self.changes)


# ---------------------------------------------------------------------------------------------------- what both tell


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


def evidence(hypothesis: Mapping[str, Any]) -> str:
    """The p-values and the numbers of a hypothesis, beside its verdict; empty where it was not tested."""
    if hypothesis.get("verdict") == "not tested":
        return ""
    told = [
        f"p {_p_text(hypothesis[name])}{note}" for name, note in P_VALUES.items() if _is_number(hypothesis.get(name))
    ]
    nouns = {"n_comparisons": "comparison", "n_models": "model", "n_seeds": "seed", "n_images": "test image"}
    told += [count(int(hypothesis[name]), noun) for name, noun in nouns.items() if _is_number(hypothesis.get(name))]
    return f"{', '.join(told)}." if told else ""


def _p_text(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _is_number(value: Any) -> bool:
    return value is not None and not pd.isna(value)


def interval_note(study: Study) -> str:
    return (
        f"Intervals are paired bootstrap intervals over test images ({study.replicates} replicates), given the trained "
        "models and the groups. “Inconclusive” means that these data do not decide, not that there is no effect."
    )


def results_section(study: Study) -> TableSection:
    """The table of all cells."""
    return TableSection(
        "results",
        "All results",
        f"{RESULTS_NOTE} {bold_note(study.level)}",
        result_table(study.rows, study.significance),
        bold_results(study.rows, study.best_tests),
    )


# ----------------------------------------------------------------------------------------------------------- summary.md


def summary_markdown(study: Study) -> str:
    """The study in a page of Markdown: what report.html tells, without what only a page can do."""
    escape = markdown_escape
    lines = ["# What quantization did to each group", "", QUESTION, "", "## Data", ""]
    for dataset, block in study.data.groupby("dataset", sort=False):
        target = f", predicting {escape(study.targets[dataset])}" if dataset in study.targets else ""
        n = _images(block)
        lines += [f"**{escape(dataset)}**{target}: {n} test images.", "", to_markdown(data_table(block)), ""]
    lines += ["## What was run", "", *[f"- {escape(sentence)}" for sentence in run_sentences(study)], ""]
    lines += ["## Findings", "", *[f"- {escape(sentence)}" for sentence in study.findings], ""]
    lines += ["## Recommended configuration", ""]
    lines += [f"- {escape(text)}" for text in recommendation_sentences(study.configurations, study.bounds)]
    lines += ["", escape(f"{RULE} The page report.html answers for other bounds."), ""]
    lines += ["## Hypotheses", ""]
    for row in study.hypotheses.itertuples():
        told = " ".join(text for text in (row.sentence, evidence(row._asdict())) if text)
        lines.append(f"- **{escape(row.statement)}: {escape(row.verdict)}.** {escape(told)}")
    lines += ["", escape(interval_note(study)), ""]
    for section in study.sections:
        lines += [f"## {escape(section.title)}", "", escape(section.note), ""]
        lines += [to_markdown(section.table.iloc[:LONG], section.bold)]
        more = len(section.table) - LONG
        lines += [f"And {more} more rows, in tables/{section.id}.md.", ""] if more > 0 else []
    lines += ["## Figures", ""]
    lines += [f"- [{escape(name)}]({name}): {escape(caption)}" for name, caption in study.figures] + [""]
    if len(study.failed):
        named = [f"- {escape(row.cell)}: {escape(_error(row.error))}" for row in study.failed.itertuples()]
        lines += ["## Failed cells", "", *_first(named), ""]
    if study.missing:
        named = [f"- {escape(cell)} (python main.py --phase {phase})" for phase, cell in study.missing]
        lines += ["## Planned cells without a result", "", *_first(named), ""]
    if study.unusable:
        named = [f"- {escape(cell)}: {escape(why)}" for _, cell, why in study.unusable]
        lines += ["## Finished cells whose predictions cannot be used, left out", "", *_first(named), ""]
    if study.leftovers:
        named = [f"- {escape(cell)}" for cell in study.leftovers]
        lines += ["## In the folder, not planned by this config, left out", "", *_first(named), ""]
    lines += ["## Environment", "", *[f"- {escape(f'{name}: {value}')}" for name, value in _flat(study.environment)]]
    lines += ["", "## Again", "", REPRODUCE, "", "```", REPRODUCE_COMMAND, "```", ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- report.html


def report_html(study: Study, images: Mapping[str, bytes]) -> str:
    """The study as one page that needs no other file and no network. `images`: the PNG of each figure, by file name."""
    return report_page.render(page_parts(study, images), report_page.page_data(study.configurations, study.bounds))


def page_parts(study: Study, images: Mapping[str, bytes]) -> dict[str, Any]:
    """What the template shows, by the names that it uses."""
    results = results_section(study)
    return {
        "question": QUESTION,
        "datasets": [
            {
                "name": dataset,
                "target": study.targets.get(dataset),
                "n": _images(block),
                "groups": block.drop_duplicates(["attribute", "group"])["attribute"].value_counts(sort=False).to_dict(),
                "table": _table(data_table(block), label=f"Groups of {dataset}"),
            }
            for dataset, block in study.data.groupby("dataset", sort=False)
        ],
        "run": run_sentences(study),
        "findings": study.findings,
        "recommended": recommendation_sentences(study.configurations, study.bounds),
        "rule": RULE,
        "configurations": len(study.configurations),
        "hypotheses": [row | {"evidence": evidence(row)} for row in study.hypotheses.to_dict("records")],
        "interval_note": interval_note(study),
        "sections": [_section(section) for section in study.sections],
        "results": {**_section(results, result_values(study.rows)), "choose": ("data set", "model", "seed", "status")}
        if len(study.rows)
        else None,
        "figures": [
            {"name": name, "caption": caption, **_picture(images[name])}
            for name, caption in study.figures
            if name in images
        ],
        "failed": [{"cell": row.cell, "error": _error(row.error)} for row in study.failed.itertuples()],
        "missing": study.missing,
        "unusable": study.unusable,
        "leftovers": study.leftovers,
        "environment": _flat(study.environment),
        "reproduce": REPRODUCE,
        "command": REPRODUCE_COMMAND,
    }


# -------------------------------------------------------------------------------------------------------------- helpers


def _images(block: pd.DataFrame) -> int:
    """Test images of a data set: its first attribute's groups, each once however many classes it has rows for."""
    first = block[block["attribute"] == block["attribute"].iloc[0]]
    return int(first.drop_duplicates("group")["n"].sum())


def _section(section: TableSection, values: Mapping[str, list[float]] | None = None) -> dict:
    table = _table(section.table, section.bold, section.title, values)
    return {"id": section.id, "title": section.title, "note": section.note, "table": table}


def _table(
    table: pd.DataFrame, bold: Places = (), label: str = "", values: Mapping[str, list[float]] | None = None
) -> dict:
    return report_page.table_parts(table, bold, label, values or {})


def _picture(png: bytes) -> dict:
    """The image as text, and its size in pixels where it is a PNG, so that the page does not jump as it loads."""
    size = {}
    if png[12:16] == b"IHDR":
        size = {name: int.from_bytes(png[at : at + 4], "big") for name, at in (("width", 16), ("height", 20))}
    return {"data": base64.b64encode(png).decode("ascii"), "width": None, "height": None, **size}


def _first(lines: list[str]) -> list[str]:
    more = len(lines) - NAMED
    return lines if more <= 0 else [*lines[:NAMED], f"- and {more} more; report.html names all"]


def _error(error: Any) -> str:
    return "no message" if pd.isna(error) else one_line(error)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name} ")
        elif value is not None:
            flat.append((f"{prefix}{name}", str(value)))
    return flat
