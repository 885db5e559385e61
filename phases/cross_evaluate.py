"""Measuring a cell's model on the test images of other data sets (`evaluation.also_on`), groups under common names.

Which data sets these are is no part of a cell's identity: a finished cell that a later config wants measured elsewhere
is made again from its checkpoint, measured there, and keeps its results. Predictions are saved beside the cell's own,
labels as classes of the data set that the model was trained on, groups as the other set has them; everything else is
derived from them. Images get the size and the normalisation of the training images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from config import Config
from datasets import BatchLoader, FaceDataset, Split
from evaluation import Predictions, predict
from fairness_metrics import metrics_of_predictions
from group_mapping import Correspondence, correspondence
from phases.complete import (
    deployed_name,
    evaluation_metrics_key,
    evaluation_settings,
    is_evaluated,
    is_evaluated_on,
    other_datasets,
    rows_elsewhere,
)
from phases.measure import Predicted
from plan import Cell
from runner import FATAL, one_line, raise_poison
from store import GROUP_METRIC_COLUMNS, Store, StoreError, Table

COLUMNS = (
    "trained_on", "evaluated_on", "status", "error", "attribute", "n", *GROUP_METRIC_COLUMNS, "home_n",
    *(f"home_{column}" for column in GROUP_METRIC_COLUMNS),
)  # fmt: skip
HOME_GROUP_COLUMNS = ("n", "accuracy", "accuracy_ci_low", "accuracy_ci_high", "selection_rate")
GROUP_COLUMNS = (
    "trained_on", "evaluated_on", "attribute", "group", "class", "n", "positives", "base_rate", "accuracy",
    "accuracy_ci_low", "accuracy_ci_high", "selection_rate", "true_positive_rate", "false_positive_rate",
    "positive_predictive_value", "too_small", *(f"home_{column}" for column in HOME_GROUP_COLUMNS),
)  # fmt: skip

is_complete, wanted = is_evaluated, other_datasets


def check_data(cells: Iterable[Cell], config: Config, store: Store, data: Any, report: Any) -> None:
    """Open, before anything is computed, the test splits that the cells lack; StoreError where one is not that of the
    cells that are there already. `data` is a phases.baseline.DatasetCache."""
    cells = list(cells)
    pairs = {
        (cell.dataset, name)
        for cell in cells
        for name in other_datasets(cell, config)
        if not is_evaluated_on(cell, name, config, store)
    }
    if not pairs:
        return
    opened = {
        pair: data.load_abroad(pair[1], config.dataset(pair[0]).image_size, report).fingerprint
        for pair in sorted(pairs)
    }
    for cell in cells:
        for name, row in rows_elsewhere(cell, store).items():
            pair = (cell.dataset, name)
            is_compared = pair in pairs and row["status"] == "done" and is_evaluated_on(cell, name, config, store)
            if is_compared and row["fingerprint"] != opened[pair]:
                raise StoreError(
                    f"{store.predictions_path(deployed_name(cell.id, name))}: of other test images than {name} has "
                    "now; put the data back, use another results_dir, or start again with --fresh"
                )


def evaluate(
    model: nn.Module,
    cell: Cell,
    predictions: Predicted,
    names: dict[str, Any],
    config: Config,
    store: Store,
    data: Any,
    device: str,
    report: Any,
) -> dict[str, Any]:
    """What goes into the cell's record: a row for each other data set, and rows of its groups; nothing where there is
    none. `predictions` are those of the cell's own test split. A set that fails is a row with the error."""
    rows, groups = rows_elsewhere(cell, store), _groups(cell, store)
    for name in other_datasets(cell, config):
        if not is_evaluated_on(cell, name, config, store):
            report.progress(f"predicting {name}", 0.93)
            rows[name], groups[name] = _evaluate_on(
                name, model, cell, predictions, names, config, store, data, device, report
            )
    return _as_extra(rows, groups)


def failed(cell: Cell, error: Exception, config: Config, store: Store) -> dict[str, Any]:
    """What goes into the record of a finished cell whose model could not be measured elsewhere, for this reason."""
    rows, groups = rows_elsewhere(cell, store), _groups(cell, store)
    for name in other_datasets(cell, config):
        if not is_evaluated_on(cell, name, config, store):
            rows[name], groups[name] = _failed_row(cell, name, config) | {"error": one_line(error)}, []
    return _as_extra(rows, groups)


def refresh(cells: Iterable[Cell], config: Config, store: Store) -> int:
    """Derive again, from saved predictions, the rows that were made with other metric settings or mappings; of how
    many cells. Predictions that cannot be read are left to the analysis, which names them."""
    refreshed = 0
    for cell in cells:
        names = other_datasets(cell, config)
        rows = rows_elsewhere(cell, store) if names else {}
        stale = [
            name
            for name in names
            if name in rows
            and rows[name]["status"] == "done"
            and is_evaluated_on(cell, name, config, store)
            and rows[name]["metrics_key"] != evaluation_metrics_key(cell, name, config)
        ]
        if not stale:
            continue
        record, groups = store.record(cell.id), _groups(cell, store)
        try:
            at_home = store.predictions(cell.id)
            abroad = {name: store.predictions(deployed_name(cell.id, name)) for name in stale}
        except StoreError:
            continue
        for name in stale:
            columns, groups[name] = _measured(cell, name, at_home, abroad[name], record["extra"]["names"], config)
            rows[name] = rows[name] | columns
        store.write_cell(record["row"], record["groups"], record["extra"] | _as_extra(rows, groups))
        refreshed += 1
    return refreshed


def tables(store: Store) -> list[Table]:
    """cross_dataset.csv and cross_dataset_groups.csv, where a cell was measured on another data set."""
    is_abroad = lambda record: "cross_dataset" in record["extra"]  # noqa: E731
    return [
        store.extra_table("cross_dataset", "cross_dataset", COLUMNS, is_abroad),
        store.extra_table("cross_dataset_groups", "cross_dataset_groups", GROUP_COLUMNS, is_abroad),
    ]


# -------------------------------------------------------------------------------------------------------------- helpers


def _evaluate_on(
    name: str,
    model,
    cell: Cell,
    predictions: Predicted,
    names: dict,
    config: Config,
    store: Store,
    data,
    device,
    report,
) -> tuple[dict, list[dict]]:
    mapping = correspondence(config, cell.dataset, name)
    row = _failed_row(cell, name, config)
    dataset: FaceDataset = data.load_abroad(name, config.dataset(cell.dataset).image_size, report)
    try:
        split = dataset.splits["test"]
        if getattr(model, "reads_groups", False):
            unknown = [attribute for attribute in model.attributes if not _is_told(attribute, mapping)]
            if unknown:
                why = f"it decides by groups of {unknown[0]}, which {name} does not tell apart"
                return row | {"status": "skipped", "error": why}, []
            split = _with_home_groups(split, mapping)
        loader = BatchLoader(split, config.run.evaluation_batch_size, device=device, channels_last=True)
        predicted = predict(model, loader, device)
    except FATAL:
        raise
    except Exception as error:  # the cell's results stand without it; the next run tries again
        raise_poison(error)
        report.line(f"  {cell.id}: its evaluation on {name} failed: {one_line(error)}")
        return row | {"error": one_line(error)}, []
    abroad = Predictions(
        predicted.logits, mapping.class_codes[predicted.y_true], dict(dataset.splits["test"].sensitive), predicted.index
    )
    store.write_predictions(deployed_name(cell.id, name), abroad)
    columns, groups = _measured(cell, name, predictions, abroad, names, config)
    return row | {"status": "done", "fingerprint": dataset.fingerprint, **columns}, groups


def _failed_row(cell: Cell, name: str, config: Config) -> dict[str, Any]:
    """Until it is measured there; without the reason."""
    return {
        "trained_on": cell.dataset,
        "evaluated_on": name,
        "status": "failed",
        "error": None,
        "settings": evaluation_settings(cell, name, config),
        "metrics_key": evaluation_metrics_key(cell, name, config),
    }


def _as_extra(rows: dict[str, dict], groups: dict[str, list[dict]]) -> dict[str, Any]:
    """Of a record: rows, and rows of groups, by data set."""
    if not rows:
        return {}
    return {"cross_dataset": list(rows.values()), "cross_dataset_groups": [row for of in groups.values() for row in of]}


def _measured(
    cell: Cell, name: str, at_home: Predicted, abroad: Predicted, names: dict[str, Any], config: Config
) -> tuple[dict[str, Any], list[dict]]:
    """The metrics abroad, and at home over the same common groups."""
    mapping = correspondence(config, cell.dataset, name)
    columns: dict[str, Any] = {
        "attribute": mapping.primary.name,
        "metrics_key": evaluation_metrics_key(cell, name, config),
    }
    rows = []
    for attribute in mapping.attributes:
        found = [
            metrics_of_predictions(
                each.y_true,
                each.y_pred,
                codes,
                attribute.groups,
                names["classes"],
                min_group_size=config.data.min_group_size,
            )
            for each, codes in (
                (abroad, attribute.abroad_codes[abroad.sensitive[attribute.abroad]]),
                (at_home, attribute.home_codes[at_home.sensitive[attribute.home]]),
            )
        ]
        if attribute is mapping.primary:
            for each, predictions, prefix in zip(found, (abroad, at_home), ("", "home_"), strict=True):
                columns[f"{prefix}n"] = len(predictions.y_true)
                columns |= {f"{prefix}{column}": each[column] for column in GROUP_METRIC_COLUMNS}
        for mine, other in zip(found[0]["groups"], found[1]["groups"], strict=True):
            row = {"trained_on": cell.dataset, "evaluated_on": name, "attribute": attribute.name, **mine}
            rows.append(row | {f"home_{column}": other[column] for column in HOME_GROUP_COLUMNS})
    return columns, rows


def _is_told(attribute: str, mapping: Correspondence) -> bool:
    """Whether the other data set tells the groups of a home attribute apart."""
    return any(common.home == attribute and common.tells_home_groups_apart for common in mapping.attributes)


def _with_home_groups(split: Split, mapping: Correspondence) -> Split:
    """The split with its groups as the model knows them: home attributes and codes."""

    told = {
        common.home: common.abroad_codes[split.sensitive[common.abroad]]  # groups are in the order of home's values
        for common in mapping.attributes
        if common.tells_home_groups_apart
    }
    return dataclasses.replace(split, sensitive=told)


def _groups(cell: Cell, store: Store) -> dict[str, list[dict]]:
    record = store.record(cell.id) if store.is_done(cell.id) else None
    found: dict[str, list[dict]] = {}
    for row in [] if record is None else record["extra"].get("cross_dataset_groups", []):
        found.setdefault(row["evaluated_on"], []).append(row)
    return found
