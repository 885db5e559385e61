"""Which cells are complete: done, and deployed, diagnosed and measured elsewhere as the config wants it; and which of
these have failed.

From the records alone, so that what only asks (--status) loads no model and imports no torch.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from config import Config
from group_mapping import correspondence
from plan import Cell
from store import Store, short_hash

FP32 = "FP32"
DIAGNOSTICS_FAILURE = "diagnostics_failure"  # in a record: settings and error of the last try; None: it succeeded
# of a data set's section: what its test split does not depend on
NOT_OF_THE_TEST_SPLIT = {
    "root", "image_size", "max_train", "validation_share", "train_images", "validation_images",
}  # fmt: skip


def missing(cell: Cell, config: Config, store: Store) -> str | None:
    """What the cell lacks: 'deploy' (where it is not computed: all of it), 'diagnose' or 'measure'; None: nothing."""
    if not is_deployed(cell, config, store):
        return "deploy"
    if not is_diagnosed(cell, config, store):
        return "diagnose"
    return None if is_evaluated(cell, config, store) else "measure"


@dataclass(frozen=True)
class Failure:
    """Of a finished cell: something that the config wants of it and that was tried in vain."""

    what: str  # 'deployment', 'diagnostics' or 'evaluation'
    where: str | None  # the engine, or the data set
    error: str

    def told(self, cell: str | None = None) -> str:
        """A line for the person at the keyboard, with the cell's name where that is not known from elsewhere."""
        return ": ".join(part for part in (f"{self.what} failed", cell, self.where, self.error) if part)


def failures(cell: Cell, config: Config, store: Store) -> list[Failure]:
    """What a finished cell lacks because it failed, not because it was never tried with these settings."""
    record = store.record(cell.id) if store.is_done(cell.id) else None
    if record is None:  # or deleted just now
        return []
    found = []
    if not is_deployed(cell, config, store) and _is_deployed_with(config, record):
        found += [
            Failure("deployment", row["engine"], row["error"])
            for row in record["extra"].get("deployment", [])
            if row["status"] == "failed" and row["engine"] in config.deployment.engines
        ]
    failed = record["extra"].get(DIAGNOSTICS_FAILURE)
    if failed and not is_diagnosed(cell, config, store) and failed["settings"] == diagnosis_settings(cell, config):
        found.append(Failure("diagnostics", None, failed["error"]))
    rows = rows_elsewhere(cell, store)
    for name in other_datasets(cell, config):
        row = rows.get(name)
        if row and row["status"] == "failed" and row["settings"] == evaluation_settings(cell, name, config):
            found.append(Failure("evaluation", name, row["error"]))
    return found


def is_selected(cell: Cell, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns MODEL:METHOD:BITS names the cell."""
    method = cell.strategy or cell.method
    bits = FP32 if cell.weight_bits is None else f"W{cell.weight_bits}A{cell.activation_bits}"
    for pattern in patterns:
        model_pattern, method_pattern, bits_pattern = (*pattern.split(":"), "*", "*")[:3]
        if bits_pattern.isdigit():  # 8 means W8A8, as in bit_widths
            bits_pattern = f"W{bits_pattern}A{bits_pattern}"
        if (
            fnmatch.fnmatchcase(cell.model, model_pattern)
            and fnmatch.fnmatchcase(method, method_pattern)
            and fnmatch.fnmatchcase(bits, bits_pattern)
        ):
            return True
    return False


def deployed_name(cell: str, engine: str) -> str:
    """Under which an engine's predictions are saved."""
    return f"{cell}@{engine}"


def metric_settings(config: Config, dataset: str) -> dict[str, Any]:
    """What the metric columns depend on beside the predictions."""
    return {
        "attribute": config.group_attribute(dataset),
        "min_group_size": config.data.min_group_size,
        "replicates": config.analysis.bootstrap_replicates,
        "confidence": config.analysis.confidence,
    }


# ------------------------------------------------------------------------------------------------------------- deployed


def is_deployed(cell: Cell, config: Config, store: Store) -> bool:
    """Whether the cell is done and deployed as the config wants it."""
    record = store.record(cell.id) if store.is_done(cell.id) else None
    if record is None:  # or deleted just now, by another run's --fresh
        return False
    if is_selected(cell, config.deployment.export) and not _has_its_file(record, store):
        return False
    if not is_selected(cell, config.deployment.cells):
        return True
    done = {row["engine"]: row for row in record["extra"].get("deployment", []) if row["status"] == "done"}
    return (
        done.keys() >= set(config.deployment.engines)
        and not (config.deployment.latency and any("latency_ms_b1" not in row for row in done.values()))
        and all(store.predictions_path(deployed_name(cell.id, engine)).exists() for engine in config.deployment.engines)
        and record["row"]["engine"] == config.deployment.engines[0]
        and _is_deployed_with(config, record)
    )


def _is_deployed_with(config: Config, record: dict) -> bool:
    """Whether engines ran the cell's model, or failed to, with the settings of the config."""
    return record["extra"].get("deployment_settings") == deployment_settings(config)


def _has_its_file(record: dict, store: Store) -> bool:
    """Whether models/<cell>.onnx is there and whole: as long as it was when it was written."""
    path = store.model_path(record["row"]["cell"])
    size = record["extra"].get("model_bytes")  # None: exported before lengths were kept
    try:
        return size in (None, path.stat().st_size)
    except FileNotFoundError:  # one look: between two another run's --fresh may delete it
        return False


def deployment_settings(config: Config) -> dict[str, str]:
    """What an engine's predictions depend on beside the model."""
    return {"provider": config.deployment.provider, "float_precision": config.deployment.float_precision}


# ------------------------------------------------------------------------------------------------------------ diagnosed


def is_diagnosed(cell: Cell, config: Config, store: Store) -> bool:
    """Whether the finished cell is diagnosed as the config wants it; True where it does not want it."""
    if not wants_diagnosis(cell, config):
        return True
    record = store.record(cell.id)
    return record is not None and record["extra"].get("diagnostics_settings") == diagnosis_settings(cell, config)


def wants_diagnosis(cell: Cell, config: Config) -> bool:
    return cell.method != "none" and is_selected(cell, config.mitigation.diagnostics.cells)


def diagnosis_settings(cell: Cell, config: Config) -> dict[str, Any]:
    settings = config.mitigation.diagnostics
    return {
        "samples": settings.samples,
        "hessian_samples": settings.hessian_samples,
        "attribute": config.group_attribute(cell.dataset),
    }


# --------------------------------------------------------------------------------------------------- measured elsewhere


def other_datasets(cell: Cell, config: Config) -> list[str]:
    """The other data sets that the config wants the cell's model measured on."""
    return [name for name in config.evaluation.also_on if name != cell.dataset]


def is_evaluated(cell: Cell, config: Config, store: Store) -> bool:
    """Whether the finished cell is measured on every other data set that the config wants."""
    return all(is_evaluated_on(cell, name, config, store) for name in other_datasets(cell, config))


def is_evaluated_on(cell: Cell, name: str, config: Config, store: Store) -> bool:
    """Whether the cell has predictions of that data set as the config has it, or a reason why it cannot have any."""
    row = rows_elsewhere(cell, store).get(name)
    if row is None or row["settings"] != evaluation_settings(cell, name, config):
        return False
    if row["status"] == "skipped":
        return row["metrics_key"] == evaluation_metrics_key(cell, name, config)
    return row["status"] == "done" and store.predictions_path(deployed_name(cell.id, name)).exists()


def rows_elsewhere(cell: Cell, store: Store) -> dict[str, dict]:
    """The rows of a finished cell, by data set."""
    record = store.record(cell.id) if store.is_done(cell.id) else None
    return {} if record is None else {row["evaluated_on"]: row for row in record["extra"].get("cross_dataset", [])}


def evaluation_settings(cell: Cell, name: str, config: Config) -> str:
    """Of everything that predictions on another data set depend on beside the model and the data themselves."""
    section = config.dataset(name).model_dump(mode="json", exclude=NOT_OF_THE_TEST_SPLIT)
    classes = correspondence(config, cell.dataset, name).class_codes.tolist()
    return short_hash({"data": section, "classes": classes, "image_size": config.dataset(cell.dataset).image_size})


def evaluation_metrics_key(cell: Cell, name: str, config: Config) -> str:
    """Of everything that the metrics depend on beside the predictions."""
    mapping = correspondence(config, cell.dataset, name)
    groups = [
        [
            common.name,
            common.home,
            common.abroad,
            common.groups,
            common.home_codes.tolist(),
            common.abroad_codes.tolist(),
        ]
        for common in mapping.attributes
    ]
    return short_hash({"metrics": metric_settings(config, cell.dataset), "groups": groups})
