"""The analysis phase: statistics, figures, tables and the report, from saved predictions and rows alone.

No model is loaded and torch is not imported. It covers the cells that the current config plans; cells that failed,
cells that are planned and not there, and cells in the folder that are not planned are named. The same inputs give the
same bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import cross_dataset
import hypotheses
import report
import visualizations
from config import Config
from group_counts import METRICS, intersect
from joint_bootstrap import COLLAPSED, TestSet
from phases.plan import plan
from phases.usable import NoUsablePredictions, usable_predictions
from result_rows import main_settings, model_label, plain_counterparts, with_labels
from significance import holm, mcnemar_midp, paired_count_table, paired_difference_intervals
from store import (
    INTERSECTION,
    ROW_COLUMNS,
    MissingArtifactError,
    Store,
    StoreError,
    seed_for,
    write_bytes,
    write_json,
    write_text,
)

FIGURE_DPI = 200
SIGNIFICANCE_COLUMNS = (
    "cell", "reference_cell", "comparison", "dataset", "model", "seed", "method", "strategy", "weight_bits",
    "activation_bits", "options", "attribute", "metric", "group", "n", "effect", "ci_low", "ci_high", "gained", "lost",
    "p_mcnemar", "p_holm",
)  # fmt: skip

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
    significance = paired_significance(done, test_sets, replicates, level)
    write_text(store.analysis / "significance.csv", significance.to_csv(index=False))

    tell("hypotheses")
    changes = hypotheses.accuracy_changes(done, test_sets, replicates, level)
    verdicts = hypotheses.evaluate(done, test_sets, replicates, level)
    write_json(store.analysis / "hypotheses.json", verdicts.to_dict("records"))

    tell("figures")
    all_groups = groups
    groups = groups[groups["cell"].isin(done["cell"])].merge(done[["cell", "options"]], on="cell", how="left")
    shown = [_groups_of(groups, name, config.group_attribute(name)) for name in test_sets]
    figures = {
        "accuracy_heatmap.png": visualizations.accuracy_heatmap(rows),
        "per_group_performance.png": visualizations.per_group_performance(
            pd.concat(shown).assign(attribute=" / ".join(dict.fromkeys(map(config.group_attribute, test_sets))))
        ),
        "mitigation_comparison.png": visualizations.mitigation_comparison(rows),
        "hypothesis_validation.png": visualizations.hypothesis_validation(verdicts),
        "pareto_frontier.png": visualizations.pareto_frontier(rows),
        "fairness_vs_bits.png": visualizations.fairness_vs_bits(rows),
    }
    sensitivity = store.read_extra_table("layer_sensitivity")
    if sensitivity is not None and sensitivity["cell"].isin(done["cell"]).any():
        figures["layer_sensitivity.png"] = visualizations.layer_sensitivity(sensitivity, rows)
    if len(transfer):
        figures["cross_dataset.png"] = cross_dataset.cross_dataset(transfer)
        write_text(store.analysis / "cross_dataset.csv", transfer.to_csv(index=False))
    images = {}
    for name, figure in figures.items():
        images[name] = png(figure)
        write_bytes(store.analysis / name, images[name])

    tell("tables")
    points = visualizations.pareto_points(rows)
    write_text(store.analysis / "pareto.csv", points.to_csv(index=False))
    best = report.best_settings(changes, done)
    deployment = store.read_extra_table("deployment_results")
    deployed = pd.DataFrame() if deployment is None else report.deployment_table(done, deployment)
    repairs = report.repair_table(done)
    timeless = repairs.drop(columns=["calibration s", "training s"], errors="ignore")  # the same bytes another time
    sections = [
        report.TableSection("best", "Best setting at each width", report.BEST_NOTE, report.best_table(best, level)),
        report.TableSection("repairs", "Repairs", report.REPAIR_NOTE, timeless),
        report.TableSection("deployed", "Deployed", report.DEPLOYED_NOTE, deployed),
    ]
    if config.evaluation.also_on:
        note = cross_dataset.NOTE + (
            f" {len(elsewhere)} finished cells are not in it: see missing.csv." if len(elsewhere) else ""
        )
        of_both = cross_dataset.transfer_table(transfer, level)
        sections.append(report.TableSection("cross-dataset", "On another data set", note, of_both))
    sections = [section for section in sections if len(section.table)]
    tables = {
        "results": (report.result_table(rows), "Every finished and failed cell."),
        "hypotheses": (_hypotheses_table(verdicts), "Hypotheses and what the data say about them."),
        **{section.id: (section.table, f"{section.title}. {section.note}") for section in sections},
    }
    if len(repairs):
        tables["repairs"] = (repairs, f"Repairs. {report.REPAIR_NOTE}")
    for name, (table, caption) in tables.items():
        write_text(store.analysis / "tables" / f"{name}.tex", report.to_latex(table, caption, f"tab:{name}"))
        write_text(store.analysis / "tables" / f"{name}.csv", report.to_csv(table))

    by_group = [
        f"{dataset}, {model_label(model)}: accuracy in %, group by group\n\n{report.to_markdown(table)}"
        for (dataset, model), table in report.group_accuracy(rows, all_groups).items()
    ]
    if len(repairs):
        by_group.append(f"repairs\n\n{report.to_markdown(timeless)}")
    if len(deployed):
        by_group.append(f"deployed models\n\n{report.to_markdown(deployed)}")
    write_text(store.analysis / "groups.md", "\n".join(by_group))

    tell("report")
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
        figures=[(name, CAPTIONS[name]) for name in figures],
        environment=_environment(store),
    )
    write_text(store.analysis / "report.html", report.report_html(study, images))
    write_text(store.analysis / "summary.md", report.summary_markdown(study))
    tell("done")
    return verdicts


CAPTIONS = {
    "cross_dataset.png": cross_dataset.CAPTION,
    "accuracy_heatmap.png": "Accuracy of every model at every setting.",
    "per_group_performance.png": "Accuracy of each group, FP32 against the main setting of each width.",
    "mitigation_comparison.png": "Each strategy against plain quantization of the same model and width.",
    "hypothesis_validation.png": "Each hypothesis: effect, interval, threshold and verdict.",
    "pareto_frontier.png": "Size on disk against accuracy; the settings that no other one beats in both.",
    "fairness_vs_bits.png": "Equalized-odds difference at each width (it is biased upward, the more the fewer the "
    "images).",
    "layer_sensitivity.png": "What the output loses when one layer alone goes to so many bits, and the width that "
    "mixed precision chose for it.",
}


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


# ----------------------------------------------------------------------------------------------------------- statistics


def paired_significance(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float
) -> pd.DataFrame:
    """Paired differences of each finished cell from FP32, and of each mitigated cell from its plain counterpart.

    One row a (pair, metric) over all images (group 'all') and one a (pair, group) for accuracy: effect and its
    bootstrap interval as shares; for accuracy also the images gained and lost, McNemar's mid-p (Fagerland et al. 2013),
    and that p corrected by Holm over all pairs of the same comparison (the groups are a family of their own). Read the
    intervals of gaps as spread, see significance.py.
    """
    done = {cell for test_set in test_sets.values() for cell in test_set.predictions}
    rows = rows[rows["cell"].isin(done)]
    counterparts = plain_counterparts(rows)
    found = []
    for comparison in ("fp32", "plain"):
        for row in rows.to_dict("records"):
            reference = row["baseline_cell"] if comparison == "fp32" else counterparts.get(row["cell"])
            if reference not in done or reference == row["cell"]:
                continue
            found += _pair_rows(row, reference, comparison, test_sets[row["dataset"]], replicates, level)
    table = pd.DataFrame(found, columns=list(SIGNIFICANCE_COLUMNS))
    table["p_holm"] = np.nan
    for _, family in table[table["p_mcnemar"].notna()].groupby(["comparison", table["group"] == "all"]):
        table.loc[family.index, "p_holm"] = holm(family["p_mcnemar"].to_numpy())
    return table


def _pair_rows(
    row: dict, reference: str, comparison: str, test_set: TestSet, replicates: int, level: float
) -> list[dict]:
    counts_GLFQ = paired_count_table(
        test_set.group_N,
        test_set.label_N,
        test_set.predictions[reference],
        test_set.predictions[row["cell"]],
        len(test_set.group_names),
        test_set.n_classes,
    )
    generator = np.random.default_rng(seed_for("analysis", "paired", row["cell"], reference))
    paired = paired_difference_intervals(counts_GLFQ, test_set.min_group_size, replicates, level, generator=generator)
    won_N = test_set.correct(row["cell"]) & ~test_set.correct(reference)
    lost_N = test_set.correct(reference) & ~test_set.correct(row["cell"])
    identity = {name: row.get(name) for name in SIGNIFICANCE_COLUMNS if name in ROW_COLUMNS and name != "cell"}
    common = {
        "cell": row["cell"],
        "reference_cell": reference,
        "comparison": comparison,
        **identity,
        "attribute": test_set.attribute,
    }
    found = []
    for metric in METRICS:
        low, high = paired.intervals[metric]
        entry = {**common, "metric": metric, "group": "all", "n": test_set.n, "effect": paired.observed[metric]}
        entry |= {"ci_low": low, "ci_high": high}
        if metric == "accuracy":
            entry |= _mcnemar(int(won_N.sum()), int(lost_N.sum()))
        found.append(entry)
    for g, name in enumerate(test_set.group_names):
        is_member = test_set.group_N == g
        if not is_member.any():
            continue
        low, high = paired.group_accuracy_intervals_G2[g]
        entry = {**common, "metric": "accuracy", "group": name, "n": int(is_member.sum())}
        entry |= {"effect": float(paired.group_accuracy_G[g]), "ci_low": float(low), "ci_high": float(high)}
        found.append(entry | _mcnemar(int(won_N[is_member].sum()), int(lost_N[is_member].sum())))
    return found


def _mcnemar(gained: int, lost: int) -> dict:
    return {"gained": gained, "lost": lost, "p_mcnemar": mcnemar_midp(gained, lost)}


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
    worst = block.loc[block["effect"].idxmin()]
    attribute = worst["attribute"]
    sentence = (
        f"{lead}{setting}, group by group of {attribute}: of {len(block)} differences from FP32, "
        f"{int((sure['effect'] < 0).sum())} are losses and {int((sure['effect'] > 0).sum())} gains at corrected p ≤ "
        f"{alpha:.2g} "
        f"(McNemar, Holm)."
    )
    if worst["effect"] < 0:
        sentence += (
            f" The largest loss is {100 * worst['effect']:+.1f} [{100 * worst['ci_low']:+.1f}, "
            f"{100 * worst['ci_high']:+.1f}] points "
            f"({worst['group']}, n = {worst['n']}, {model_label(worst['model'])}); being the largest of {len(block)}, "
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


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, without the metadata that would change between versions."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=FIGURE_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _groups_of(groups: pd.DataFrame, dataset: str, attribute: str) -> pd.DataFrame:
    return groups[(groups["dataset"] == dataset) & (groups["attribute"] == attribute)]


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
            "effect (points)": [report.number(value, 2, sign=True) for value in verdicts["effect"]],
            "interval": [
                report.MISSING
                if pd.isna(row.ci_low)
                else f"{report.number(row.ci_low, 2, sign=True)} to {report.number(row.ci_high, 2, sign=True)}"
                for row in verdicts.itertuples()
            ],
            "p": [report.number(value, 3) for value in verdicts["p"]],
            "n": [str(n) for n in verdicts["n_images"]],
            "verdict": verdicts["verdict"],
        }
    )


def _environment(store: Store) -> dict:
    path = store.root / "environment.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
