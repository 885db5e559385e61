"""From saved predictions to the columns of a row: metrics over the configured attribute and over the intersection."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from config import Config
from fairness_metrics import metrics_of_predictions
from group_counts import METRICS, count_table, intersect
from phases.complete import deployed_name, metric_settings
from plan import Cell
from runner import CellResult
from significance.intervals import bootstrap_intervals
from store import (
    DEPLOYED_COLUMNS,
    GROUP_METRIC_COLUMNS,
    INTERSECTION,
    MissingArtifactError,
    Store,
    StoreError,
    seed_for,
    short_hash,
)


def measure(cell: Cell, predictions, names: dict[str, Any], config: Config, baseline_row: dict | None) -> CellResult:
    """Metric columns and group rows of a cell's test predictions.

    `names` is {"classes": […], "sensitive": {attribute: [value names]}}; `baseline_row` the row of the FP32 cell that
    the delta_ columns are against (None for a baseline).
    """
    settings = metric_settings(config, cell.dataset)
    attribute = settings["attribute"]
    groupings = _groupings(predictions.sensitive, names)
    measured = {
        name: metrics_of_predictions(
            predictions.y_true,
            predictions.y_pred,
            codes,
            group_names,
            names["classes"],
            min_group_size=settings["min_group_size"],
        )
        for name, (codes, group_names) in groupings.items()
    }
    columns: dict[str, Any] = {"n_test": len(predictions.y_true)}
    columns |= {column: measured[attribute][column] for column in GROUP_METRIC_COLUMNS}
    columns |= {
        f"intersectional_{column}": measured[INTERSECTION][column]
        for column in GROUP_METRIC_COLUMNS
        if column not in ("accuracy", "balanced_accuracy")
    }
    codes, group_names = groupings[attribute]
    table = count_table(codes, predictions.y_true, predictions.y_pred, len(group_names), len(names["classes"]))
    intervals = bootstrap_intervals(
        table,
        settings["min_group_size"],
        settings["replicates"],
        settings["confidence"],
        generator=np.random.default_rng(seed_for(cell.seed, cell.dataset, cell.model, cell.id, "bootstrap")),
    )
    for metric in METRICS:
        columns[f"{metric}_ci_low"], columns[f"{metric}_ci_high"] = intervals[metric]
        if baseline_row is not None:
            columns[f"delta_{metric}"] = _difference(columns[metric], baseline_row[metric])
    groups = [{"attribute": name, **group} for name in groupings for group in measured[name]["groups"]]
    extra = {"names": names, "metrics_key": short_hash(settings)}
    return CellResult(columns, groups, extra)


class Predicted(Protocol):
    """Predictions, fresh or saved: (N,) arrays."""

    y_true: np.ndarray
    y_pred: np.ndarray
    sensitive: dict[str, np.ndarray]


def measure_deployed(
    cell: Cell, deployed: Predicted, simulated: Predicted, names: dict[str, Any], config: Config
) -> tuple[dict[str, Any], list[dict]]:
    """What an engine's predictions of the test split are worth beside the simulation's: `agreement`, the share of
    images of the same class, and the metrics of the configured attribute as deployed_<metric>; a row for each group."""
    if not np.array_equal(deployed.y_true, simulated.y_true):
        raise AssertionError(f"{cell.id}: the engine was run on other images than the simulation")
    settings = metric_settings(config, cell.dataset)
    same = deployed.y_pred == simulated.y_pred
    columns: dict[str, Any] = {"agreement": float(same.mean())}
    rows = []
    for attribute, (codes, group_names) in _groupings(deployed.sensitive, names).items():
        of_engine, of_simulation = (
            metrics_of_predictions(
                each.y_true,
                each.y_pred,
                codes,
                group_names,
                names["classes"],
                min_group_size=settings["min_group_size"],
            )
            for each in (deployed, simulated)
        )
        if attribute == settings["attribute"]:
            columns |= {f"deployed_{column}": of_engine[column] for column in GROUP_METRIC_COLUMNS}
        agreements = {name: same[codes == code] for code, name in enumerate(group_names)}
        for mine, other in zip(of_engine["groups"], of_simulation["groups"], strict=True):
            agreement = agreements[mine["group"]]
            rows.append(
                {
                    "attribute": attribute,
                    "group": mine["group"],
                    "n": mine["n"],
                    "agreement": float(agreement.mean()) if len(agreement) else None,
                    "accuracy": other["accuracy"],
                    "deployed_accuracy": mine["accuracy"],
                    "selection_rate": other["selection_rate"],
                    "deployed_selection_rate": mine["selection_rate"],
                }
            )
    return columns, rows


def _groupings(sensitive: dict[str, np.ndarray], names: dict[str, Any]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """(codes, names) of each attribute and of their intersection."""
    kept = {name: sensitive[name] for name in names["sensitive"]}
    groupings = {name: (codes, list(names["sensitive"][name])) for name, codes in kept.items()}
    return groupings | {INTERSECTION: intersect(kept, names["sensitive"])}


def refresh_metrics(cells: list[Cell], config: Config, store: Store) -> int:
    """Derive again, from saved predictions, the rows that were made with other metric settings, and the compressions
    of those whose baseline's file is another one by now (it was deployed later); how many there were. A row whose
    predictions cannot be read stays as it is: the analysis names it and does without."""
    refreshed = 0
    for cell in cells:
        if not store.is_done(cell.id):
            continue
        record = store.record(cell.id)
        is_current = record["extra"].get("metrics_key") == short_hash(metric_settings(config, cell.dataset))
        baseline_row = None
        if cell.baseline_cell is not None:
            if not store.is_done(cell.baseline_cell):  # its baseline was cleared: nothing to compare with
                if is_current:
                    continue
                raise MissingArtifactError(
                    f"{store.record_path(cell.baseline_cell)}: missing; make it with python main.py --phase baseline"
                )
            baseline_row = store.record(cell.baseline_cell)["row"]
        if is_current:
            ratio = compression(record["row"]["size_mb"], baseline_row)
            if ratio != record["row"]["compression"]:
                store.write_cell(record["row"] | {"compression": ratio}, record["groups"], record["extra"])
                refreshed += 1
            continue
        try:
            predictions, names = store.predictions(cell.id), record["extra"]["names"]
        except StoreError:
            continue
        result = measure(cell, predictions, names, config, baseline_row)
        _refresh_deployed(cell, predictions, names, record, result, config, store)
        result.columns["compression"] = compression(
            result.columns.get("size_mb", record["row"]["size_mb"]), baseline_row
        )
        identity = {key: record["groups"][0][key] for key in record["groups"][0] if key not in result.groups[0]}
        store.write_cell(
            record["row"] | result.columns,
            [identity | group for group in result.groups],
            record["extra"] | result.extra,
        )
        refreshed += 1
    return refreshed


def _refresh_deployed(
    cell: Cell, predictions: Predicted, names: dict, record: dict, result: CellResult, config: Config, store: Store
) -> None:
    """Derive the deployed metrics again too, of every engine, and those of the row."""
    rows, groups = [], []
    for row in record["extra"].get("deployment", []):
        if row["status"] == "done":
            try:
                deployed = store.predictions(deployed_name(cell.id, row["engine"]))
                columns, of_groups = measure_deployed(cell, deployed, predictions, names, config)
            except StoreError as error:  # the phase runs the engine again
                if row["engine"] == record["row"]["engine"]:
                    result.columns |= dict.fromkeys(DEPLOYED_COLUMNS) | record["extra"]["simulation"]
                rows.append({"engine": row["engine"], "status": "failed", "error": str(error)})
                continue
            row = row | columns
            groups += [{"engine": row["engine"], **group} for group in of_groups]
            if row["engine"] == record["row"]["engine"]:
                result.columns |= columns
        rows.append(row)
    result.extra |= {"deployment": rows, "deployment_groups": groups}


def compression(size_mb: float, baseline_row: dict | None) -> float | None:
    """How many times smaller the file is than the FP32 model's; None where there is none any more."""
    if baseline_row is None:
        return 1.0
    return baseline_row["size_mb"] / size_mb if "size_mb" in baseline_row else None


def _difference(value: float | None, reference: float | None) -> float:
    """value - reference; NaN where either is undefined (a record holds NaN as null)."""
    return float("nan") if value is None or reference is None else value - reference
