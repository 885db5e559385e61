"""The analysis phase: statistics, figures, tables and the report, from saved predictions and rows alone.

No model is loaded and torch is not imported. It covers the cells that the current config plans; cells that failed,
cells that are planned and not there, and cells in the folder that are not planned are named. The same inputs give the
same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

import report
from analysis import cross_dataset, hypotheses, literature, rankings, study_tables, tables, winners
from analysis.configurations import accuracy_intervals, configurations
from analysis.cost_benefit import cost_benefit_table
from analysis.group_calibration import calibration_errors
from analysis.paired_tests import flip_table, intersection_significance, paired_significance, seed_effects
from analysis.recommendation import Bounds
from analysis.result_rows import main_settings, model_label, with_labels
from analysis.usable import NoUsablePredictions, usable_predictions
from analysis.wording import count
from config import Config
from figures.pareto import pareto_points
from group_counts import intersect
from phases.drawing import probability_table, save_figures, shown_groups, study_figures
from plan import plan
from significance.joint_bootstrap import COLLAPSED, TestSet
from store import (
    INTERSECTION,
    ROW_COLUMNS,
    MissingArtifactError,
    Store,
    StoreError,
    write_json,
    write_text,
)

Progress = Callable[[int, int, str], None]  # (steps done, steps in all, what is being done)


def run(config: Config, store: Store, progress: Progress | None = None) -> pd.DataFrame:
    """Write everything under `analysis/` and return the hypotheses (columns of `hypotheses.COLUMNS`)."""
    planned = {phase: [cell.id for cell in cells] for phase, cells in plan(config).items()}
    return analyse(config, store, planned, progress)


def analyse(
    config: Config, store: Store, planned: Mapping[str, Sequence[str]], progress: Progress | None = None
) -> pd.DataFrame:
    """As `run`, for the planned cells {phase: [cell, …]} given."""
    steps = iter(range(100))
    total = 6

    def tell(what: str) -> None:
        if progress is not None:
            progress(next(steps), total, what)

    tell("reading results")
    rows, missing, leftovers = planned_rows(store, planned)
    done = rows[rows["status"] == "done"]
    if done.empty:
        raise MissingArtifactError(
            f"{store.root}: no finished cell among the {len(rows) + len(missing)} planned; "
            "make them with python main.py --phase baseline"
        )
    groups = store.read_group_table()
    test_sets, unusable = load_test_sets(config, store, done, groups)
    rows, done = (frame[~frame["cell"].isin(unusable)].reset_index(drop=True) for frame in (rows, done))
    transfer, elsewhere = cross_dataset.measure_transfer(done, test_sets, config, store)
    absent = pd.concat([absences(rows, missing, unusable, planned), elsewhere], ignore_index=True)
    write_text(store.analysis / "missing.csv", absent.to_csv(index=False))
    replicates, level = config.analysis.bootstrap_replicates, config.analysis.confidence

    tell("paired differences")
    margin = config.analysis.equivalence_margin / 100
    significance = paired_significance(done, test_sets, replicates, level, margin)
    flips = flip_table(done, test_sets, level)
    crossed = intersection_significance(done, test_sets, replicates, level, margin)
    for name, table in (
        ("significance", significance),
        ("significance_intersections", crossed),
        ("flips", flips),
        ("seed_effects", seed_effects(done)),
    ):
        write_text(store.analysis / f"{name}.csv", table.to_csv(index=False))

    tell("hypotheses")
    changes = hypotheses.accuracy_changes(done, test_sets, replicates, level)
    verdicts = hypotheses.evaluate(done, test_sets, config.analysis.hypotheses, replicates, level)
    write_json(store.analysis / "hypotheses.json", verdicts.to_dict("records"))
    costs = hypotheses.costs(done, test_sets, config.analysis.hypotheses)
    write_text(store.analysis / "costs.csv", costs.to_csv(index=False))
    resilience, retention = rankings.measure(done, test_sets, replicates, level)
    write_text(store.analysis / "resilience.csv", resilience.to_csv(index=False))
    write_text(store.analysis / "fairness_retention.csv", retention.to_csv(index=False))

    tell("figures")
    benefits = cost_benefit_table(done, test_sets, replicates, level)
    write_text(store.analysis / "cost_benefit.csv", benefits.to_csv(index=False))
    probabilities = probability_table(store, done, test_sets, level)
    write_text(store.analysis / "calibration.csv", probabilities.to_csv(index=False))
    write_text(store.analysis / "calibration_error.csv", calibration_errors(probabilities).to_csv(index=False))
    attributes = {name: config.group_attribute(name) for name in test_sets}
    drawn = study_figures(
        rows, shown_groups(done, groups, attributes), verdicts, significance, benefits, probabilities,
        dimensions=config.analysis.pareto, level=level, flips=flips, transfer=transfer,
        sensitivity=store.read_extra_table("layer_sensitivity"),
    )  # fmt: skip
    if len(transfer):
        write_text(store.analysis / "cross_dataset.csv", transfer.to_csv(index=False))
    figures, images = save_figures(store, drawn, config.analysis.vector_format)

    tell("tables")
    points = pareto_points(rows, config.analysis.pareto)
    write_text(store.analysis / "pareto.csv", points.to_csv(index=False))
    tests = winners.best_tests(done, test_sets, 1 - level)
    write_text(store.analysis / "best_tests.csv", tests.to_csv(index=False))
    best = study_tables.best_settings(changes, done)
    configs, intervals = configurations(done, changes), accuracy_intervals(done, test_sets, replicates, level)
    deployment = store.read_extra_table("deployment_results")
    deployed = pd.DataFrame() if deployment is None else study_tables.deployment_table(done, deployment)
    repairs = study_tables.repair_table(done)
    timeless = repairs.drop(columns=["calibration s", "training s"], errors="ignore")  # the same bytes another time
    bold_note = study_tables.bold_note(level)
    sections = [
        tables.TableSection(
            "best",
            "Best setting at each width",
            f"{study_tables.BEST_NOTE} {bold_note}",
            study_tables.best_table(best, level, intervals),
            study_tables.bold_configurations(best, tests),
        ),
        tables.TableSection(
            "means",
            "Means over seeds",
            f"{study_tables.MEANS_NOTE} {bold_note}",
            study_tables.means_table(configs, intervals, done, level),
            study_tables.bold_configurations(configs, tests),
        ),
        tables.TableSection("repairs", "Repairs", study_tables.REPAIR_NOTE, timeless),
        tables.TableSection("deployed", "Deployed", study_tables.DEPLOYED_NOTE, deployed),
        tables.TableSection(
            "resilience",
            "Resilience of the architectures",
            rankings.RESILIENCE_NOTE,
            rankings.resilience_table(resilience, level),
        ),
        tables.TableSection(
            "retention",
            "Fairness kept for the bytes",
            rankings.RETENTION_NOTE,
            rankings.retention_table(retention, level),
        ),
        tables.TableSection("literature", literature.TITLE, literature.NOTE, literature.literature_table(verdicts)),
    ]
    if config.evaluation.also_on:
        note = cross_dataset.NOTE + (
            f" {len(elsewhere)} finished cells are not in it: see missing.csv." if len(elsewhere) else ""
        )
        of_both = cross_dataset.transfer_table(transfer, level)
        sections.append(tables.TableSection("cross-dataset", "On another data set", note, of_both))
    sections = [section for section in sections if len(section.table)]

    study = report.Study(
        rows=rows,
        data=_data(done, groups),
        changes=changes,
        sections=sections,
        hypotheses=verdicts,
        findings=findings(done, test_sets, changes, significance, points, config)
        + cross_dataset.transfer_sentences(transfer, level),
        planned={phase: len(cells) for phase, cells in planned.items()},
        missing=missing,
        unusable=list(absent.loc[absent["status"] == "unusable", ["phase", "cell", "why"]].itertuples(index=False)),
        leftovers=leftovers,
        replicates=replicates,
        level=level,
        seeds=sorted(int(seed) for seed in done["seed"].unique()),
        targets={name: config.dataset(name).target for name in test_sets},
        figures=figures,
        environment=_environment(store),
        significance=significance,
        best_tests=tests,
        bounds=Bounds(**config.analysis.bounds.model_dump()),
    )
    by_group = study_tables.group_accuracy(rows, groups)
    printed = [report.results_section(study), *sections]
    printed += [
        tables.TableSection(
            "hypotheses", "Hypotheses and what the data say about them", "", _hypotheses_table(verdicts)
        )
    ]
    printed += [
        tables.TableSection(
            f"groups-{dataset}-{model}", f"{dataset}, {model_label(model)}", study_tables.GROUPS_NOTE, table
        )
        for (dataset, model), table in by_group.items()
    ]
    if len(repairs):  # with the times, which the report leaves out
        printed = [section for section in printed if section.id != "repairs"]
        printed.append(tables.TableSection("repairs", "Repairs", study_tables.REPAIR_NOTE, repairs))
    for section in printed:
        _write_table(store, section)

    told = [
        f"{dataset}, {model_label(model)}: accuracy in %, group by group\n\n{tables.to_markdown(table)}"
        for (dataset, model), table in by_group.items()
    ]
    if len(repairs):
        told.append(f"repairs\n\n{tables.to_markdown(timeless)}")
    if len(deployed):
        told.append(f"deployed models\n\n{tables.to_markdown(deployed)}")
    write_text(store.analysis / "groups.md", "\n".join(told))

    tell("report")
    write_text(store.analysis / "report.html", report.report_html(study, images))
    write_text(store.analysis / "summary.md", report.summary_markdown(study))
    tell("done")
    return verdicts


# ---------------------------------------------------------------------------------------------------------------- input


def planned_rows(
    store: Store, planned: Mapping[str, Sequence[str]]
) -> tuple[pd.DataFrame, list[tuple[str, str]], list[str]]:
    """The rows of the planned cells in planned order, the planned cells without one, and the cells not planned.

    The baseline and quantization tables must be there where cells of theirs are planned; a mitigation table that is
    missing leaves its cells missing.
    """
    tables = []
    for phase, cells in planned.items():
        if not cells and not store.results_path(phase).exists():
            continue
        if phase == "mitigation" and not store.results_path(phase).exists():
            continue
        tables.append(store.read_table(phase).assign(phase=phase))
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(ROW_COLUMNS))
    rows = rows[rows["status"].isin(["done", "failed"])]  # a file cut off in the middle of a row
    order = {cell: i for i, cell in enumerate(cell for cells in planned.values() for cell in cells)}
    is_planned = rows["cell"].isin(list(order))
    leftovers = sorted(rows.loc[~is_planned, "cell"])
    rows = rows[is_planned]
    rows = rows.iloc[rows["cell"].map(order).argsort(kind="stable").to_numpy()].reset_index(drop=True)
    there = set(rows["cell"])
    missing = [(phase, cell) for phase, cells in planned.items() for cell in cells if cell not in there]
    return rows, missing, leftovers


def load_test_sets(
    config: Config, store: Store, done: pd.DataFrame, groups: pd.DataFrame
) -> tuple[dict[str, TestSet], dict[str, str]]:
    """The test set of each data set, and of each finished cell whose predictions cannot be used the reason.

    StoreError where there is none that can be used.
    """
    test_sets, unusable = {}, {}
    for name, block in done.groupby("dataset"):
        try:
            test_sets[name] = load_test_set(config, store, name, block, groups, unusable)
        except NoUsablePredictions as error:
            unusable |= error.why
    if not test_sets:
        raise NoUsablePredictions(unusable)
    return test_sets, unusable


def absences(
    rows: pd.DataFrame,
    missing: Sequence[tuple[str, str]],
    unusable: Mapping[str, str],
    planned: Mapping[str, Sequence[str]],
) -> pd.DataFrame:
    """missing.csv: each planned cell that the analysis does without, in planned order, and why."""
    why = {cell: ("missing", f"no result; python main.py --phase {phase}") for phase, cell in missing}
    failed = rows[rows["status"] == "failed"]
    why |= {cell: ("failed", error) for cell, error in zip(failed["cell"], failed["error"], strict=True)}
    why |= {cell: ("unusable", reason) for cell, reason in unusable.items()}
    found = [(phase, cell, *why[cell]) for phase, cells in planned.items() for cell in cells if cell in why]
    return pd.DataFrame(found, columns=["phase", "cell", "status", "why"])


def load_test_set(
    config: Config,
    store: Store,
    dataset: str,
    rows: pd.DataFrame,
    groups: pd.DataFrame,
    unusable: dict[str, str] | None = None,
) -> TestSet:
    """The saved predictions of the finished cells of a data set, all of the same images. Why others cannot be used goes
    into `unusable`; NoUsablePredictions where that is all of them."""
    first = usable_predictions(store, list(rows["cell"]))
    if unusable is not None:
        unusable |= first.unusable
    first_cell = first.first
    of_set = groups[groups["dataset"] == dataset]
    names = {}
    for attribute, codes in first.sensitive.items():
        block = of_set[(of_set["attribute"] == attribute) & (of_set["cell"] == first_cell)]
        known = list(block["group"].astype(str).unique())
        names[attribute] = known if len(known) > codes.max() else [str(code) for code in range(int(codes.max()) + 1)]
    attribute = config.group_attribute(dataset)
    if attribute not in first.sensitive:
        raise StoreError(
            f"{store.predictions_path(first_cell)}: holds no attribute {attribute!r} (it has "
            f"{', '.join(first.sensitive)}); "
            "run with --fresh, or change analysis.attribute"
        )
    intersection_N, intersection_names = intersect(first.sensitive, names)
    return TestSet(
        dataset=dataset,
        attribute=attribute,
        label_N=first.y_true,
        group_N=first.sensitive[attribute],
        group_names=names[attribute],
        intersection_N=intersection_N,
        intersection_names=intersection_names,
        n_classes=first.n_classes,
        min_group_size=config.data.min_group_size,
        predictions=first.predictions,
    )


# ------------------------------------------------------------------------------------------------------------- findings


def findings(
    rows: pd.DataFrame,
    test_sets: Mapping[str, TestSet],
    changes: pd.DataFrame,
    significance: pd.DataFrame,
    points: pd.DataFrame,
    config: Config,
) -> list[str]:
    """Sentences made from the measured values; nothing is said that is not in the tables."""
    level, alpha = config.analysis.confidence, 1 - config.analysis.confidence
    rows = with_labels(rows)
    sentences = []
    for dataset, test_set in test_sets.items():
        lead = f"{dataset}: " if len(test_sets) > 1 else ""
        block = rows[rows["dataset"] == dataset]
        fp32 = block[block["method"].eq("none") & block["strategy"].isna()]
        if len(fp32):
            mean = fp32.groupby("model", sort=False)["accuracy"].mean()
            sentences.append(
                f"{lead}At FP32 accuracy is {_range(mean, 100, '%')}; the gap between the best and the worst group of "
                f"{test_set.attribute} is "
                f"{_range(fp32.groupby('model', sort=False)['accuracy_gap'].mean(), 100, 'points')}."
            )
        settings = [name for name in main_settings(block) if name != "FP32"]
        of_set = changes[changes["dataset"] == dataset]
        for setting in settings:
            chosen = of_set[of_set["setting"] == setting]
            if chosen.empty:
                continue
            with_zero = int(((chosen["ci_low"] <= 0) & (chosen["ci_high"] >= 0)).sum())
            ends = [
                f"{row['change']:+.2f} [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}] ({model_label(row['model'])})"
                for row in (chosen.loc[chosen["change"].idxmin()], chosen.loc[chosen["change"].idxmax()])
            ]
            told = ends[0] if len(chosen) == 1 else f"{ends[0]} to {ends[1]}, mean {chosen['change'].mean():+.2f}"
            sentences.append(
                f"{lead}{setting} changes accuracy by {told} (points, {level * 100:.4g} % intervals); the interval "
                "includes "
                f"zero for {with_zero} of {len(chosen)} {'model' if len(chosen) == 1 else 'models'}."
            )
            sentences += _group_sentence(lead, setting, block, significance, alpha)
        sentences += _collapsed(lead, block, test_set)
        front = points[(points["dataset"] == dataset) & points["on_front_accuracy"]].sort_values(
            "size_mb", kind="stable"
        )
        if len(front):
            names = [
                f"{model_label(row.model)} {row.setting} ({row.size_mb:.3g} MB, {100 * row.accuracy:.1f} %)"
                for row in front.itertuples()
            ]
            more = f", and {len(names) - 6} more" if len(names) > 6 else ""
            sentences.append(
                f"{lead}No other setting is both smaller and more accurate than: {', '.join(names[:6])}{more}."
            )
    return sentences


def _group_sentence(lead: str, setting: str, rows: pd.DataFrame, significance: pd.DataFrame, alpha: float) -> list[str]:
    cells = rows.loc[rows["setting"] == setting, "cell"]
    block = significance[
        significance["cell"].isin(cells) & (significance["comparison"] == "fp32") & (significance["group"] != "all")
    ]
    if block.empty:
        return []
    sure = block[block["p_holm"] <= alpha]
    attribute = block["attribute"].iloc[0]
    large = block[~block["too_small"].astype(bool)]  # of a group of one image every loss is of 100 points
    sentence = (
        f"{lead}{setting}, group by group of {attribute}: of {len(block)} differences from FP32, "
        f"{count(int((sure['effect'] < 0).sum()), 'is a loss', 'are losses')} and "
        f"{count(int((sure['effect'] > 0).sum()), 'a gain', 'gains')} at corrected p ≤ {alpha:.2g} (McNemar, Holm)."
    )
    worst = large.loc[large["effect"].idxmin()] if len(large) else None
    if worst is not None and worst["effect"] < 0:
        sentence += (
            f" The largest loss is {100 * worst['effect']:+.1f} [{100 * worst['ci_low']:+.1f}, "
            f"{100 * worst['ci_high']:+.1f}] points "
            f"({worst['group']}, n = {worst['n']}, {model_label(worst['model'])}); being the largest of {len(large)}, "
            "it is "
            "overstated by selection."
        )
    return [sentence]


def _collapsed(lead: str, rows: pd.DataFrame, test_set: TestSet) -> list[str]:
    quantized = rows[rows["weight_bits"].notna()]
    if quantized.empty:
        return []
    is_collapsed = [test_set.is_collapsed(cell) for cell in quantized["cell"]]
    n = int(np.sum(is_collapsed))
    if not n:
        return []
    by_width = quantized[is_collapsed].groupby("width")["cell"].count()
    widths = ", ".join(f"{width}: {count}" for width, count in by_width.items())
    return [
        f"{lead}{n} of {len(quantized)} quantized cells give a single class to at least {COLLAPSED:.0%} of the images "
        f"({widths}): "
        "their small gaps between groups are those of a model that no longer tells the classes apart."
    ]


def _range(values: pd.Series, scale: float, unit: str) -> str:
    values = scale * values.dropna().astype(float)
    if values.empty:
        return "undefined"
    low, high = values.idxmin(), values.idxmax()
    if len(values) == 1:
        return f"{values[low]:.1f} {unit} ({model_label(low)})"
    if round(values[low], 1) == round(values[high], 1):
        return f"{values[low]:.1f} {unit} for each of the {len(values)} models"
    return f"from {values[low]:.1f} ({model_label(low)}) to {values[high]:.1f} {unit} ({model_label(high)})"


# -------------------------------------------------------------------------------------------------------------- helpers


def _data(done: pd.DataFrame, groups: pd.DataFrame) -> pd.DataFrame:
    """Groups of each data set's test images: from its first finished cell, since they are the same for all."""
    firsts = done.drop_duplicates("dataset")["cell"]
    data = groups[groups["cell"].isin(firsts) & (groups["n"] > 0)]
    single = data.groupby("dataset")["attribute"].transform(lambda names: (names.unique() != INTERSECTION).sum() == 1)
    data = data[~(single & (data["attribute"] == INTERSECTION))]  # of one attribute: the same again
    return data[["dataset", "attribute", "group", "class", "n", "base_rate", "too_small"]].reset_index(drop=True)


def _hypotheses_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "hypothesis": verdicts["statement"],
            "effect": [tables.number(value, 2, sign=True) for value in verdicts["effect"]],
            "interval": [
                tables.MISSING
                if pd.isna(row.ci_low)
                else f"{tables.number(row.ci_low, 2, sign=True)} to {tables.number(row.ci_high, 2, sign=True)}"
                for row in verdicts.itertuples()
            ],
            "p": [tables.number(value, 3) for value in verdicts["p"]],
            "p (Holm)": [tables.number(value, 3) for value in verdicts["p_holm"]],
            "unit": verdicts["unit"],
            "n": [str(n) for n in verdicts["n_images"]],
            "verdict": verdicts["verdict"],
        }
    )


def _write_table(store: Store, section: tables.TableSection) -> None:
    """tables/<id>.csv, .md and .tex: the same numbers in each."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", section.id)
    caption = f"{section.title}. {section.note}".strip()
    texts = {
        "csv": tables.to_csv(section.table),
        "md": f"{tables.to_markdown(section.table, section.bold)}\n{tables.markdown_escape(caption)}\n",
        "tex": tables.to_latex(section.table, caption, f"tab:{name}", section.bold),
    }
    for ending, text in texts.items():
        write_text(store.analysis / "tables" / f"{name}.{ending}", text)


def _environment(store: Store) -> dict:
    path = store.root / "environment.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
