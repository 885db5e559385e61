"""What the quantization and mitigation phases share: a cell that is derived from a baseline's checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from config import Config
from datasets import BatchLoader, FaceDataset, calibration_subset
from evaluation import predict
from fairness_losses import FairnessWarning
from models import checkpoint_description, checkpoint_matches
from phases import cross_evaluate, deploy, diagnose
from phases.baseline import (
    DatasetCache,
    load_baseline,
    names_of,
    test_loader,
    training_loader,
)
from phases.measure import compression, measure
from phases.shared import SharedSensitivity, SharedStatistics
from phases.tables import write_tables
from plan import Cell, plan
from quantization import apply_quantization
from quantizers.calibration import observing_through
from quantizers.numerics import QuantizationWarning
from runner import CellResult, Compute, Report, run_cells
from sections.quantization import QAT
from sections.training import Training
from store import MissingArtifactError, Store, StoreError, seed_for


def run(phase: str, config: Config, store: Store, report: Report, device: str) -> pd.DataFrame:
    """Compute the cells of `phase` that are not done yet; returns its rows."""
    planned = plan(config)
    cells = planned[phase]

    def is_complete(cell: Cell) -> bool:
        return all(part.is_complete(cell, config, store) for part in (deploy, diagnose, cross_evaluate))

    todo = [cell for cell in cells if not is_complete(cell)]
    needed = {cell.baseline_cell for cell in (report.chosen(todo) if report.chosen else todo)}
    _check_baselines([cell for cell in planned["baseline"] if cell.id in needed], store)
    data = DatasetCache(config)
    cross_evaluate.check_data(cells, config, store, data, report)
    run_cells(phase, cells, prepare, config, store, report, is_complete, device=device, data=data, keep=deploy.keep)
    write_tables(config, store)
    return store.read_table(phase)


# tables of a repair that its cell's record has
SAID = (QuantizationWarning, FairnessWarning)  # warnings that are lines of the report
REPORTS = ("group_drift", "sensitive_layers", "sensitive_layers_groups", "sensitive_channels", "output_calibration")


def prepare(config: Config, store: Store, device: str, data: DatasetCache | None = None) -> Compute:
    """What computes a cell, in this process or a worker's: see runner.run_cells."""
    inputs = Inputs(config, store, device, data or DatasetCache(config))
    return deploy.keeping_results(functools.partial(compute, inputs=inputs), config, store)


def compute(cell: Cell, report: Any, *, inputs: Inputs) -> CellResult:
    """Quantize the baseline's model as the cell says, predict the test split, measure, deploy where that is wanted."""
    config, store = inputs.config, inputs.store
    baseline_row = inputs.baseline_row(cell)
    dataset = inputs.datasets.load(cell.dataset, report)
    model = inputs.model(cell, dataset)
    options = dict(cell.options)
    report.progress("calibrating", 0.0)
    start = time.perf_counter()
    data = _calibration_data(cell, options, dataset, config, inputs.device)
    train_data = validation_data = None
    if cell.method == "qat" or cell.strategy == "threshold_adjustment":
        validation_data = BatchLoader(
            dataset.splits["validation"], config.run.evaluation_batch_size, device=inputs.device, channels_last=True
        )
    if cell.method == "qat":
        settings = config.training.model_copy(update={key: options[key] for key in TRAINING_KEYS if key in options})
        names = (cell.seed, cell.dataset, cell.model, "qat")
        train_data = training_loader(dataset, settings, inputs.device, names)
        options = {key: value for key, value in options.items() if key != "max_train"}  # the loader has it
    if cell.strategy is not None:  # the same groups and orders for all repairs of a model
        options["seed"] = seed_for(cell.seed, cell.dataset, cell.model, "repair")
    elif cell.method in ("ptq_static", "mixed_precision"):
        options["seed"] = seed_for(cell.seed, cell.dataset, cell.model, "rounding")
    if cell.method == "mixed_precision":
        options["sensitivity"] = functools.partial(inputs.sensitivities.once, cell, dataset.fingerprint)
    with warnings.catch_warnings(record=True) as said, observing_through(inputs.statistics.of(cell)):
        for category in SAID:
            warnings.simplefilter("always", category)
        quantized = apply_quantization(
            model,
            cell.strategy or cell.method,
            cell.weight_bits,
            data,
            activation_bits=cell.activation_bits,
            train_data=train_data,
            validation_data=validation_data,
            progress=lambda what, share: report.progress(what, 0.9 * share),
            **options,
        )
    for warning in said:
        if issubclass(warning.category, SAID):
            report.detail(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    # what another cell measured counts as if this one had
    seconds = time.perf_counter() - start + inputs.statistics.correction
    report.progress("predicting", 0.9)
    loader, names = test_loader(dataset, config, inputs.device), names_of(dataset)
    more: dict[str, Any] = {}

    def evaluate_abroad(predictions: Any) -> dict[str, Any]:
        return cross_evaluate.evaluate(
            quantized, cell, predictions, names, config, store, inputs.datasets, inputs.device, report
        )

    if not diagnose.is_complete(cell, config, store):
        more = diagnose.measure_diagnostics(model, quantized, cell, dataset, config, inputs.device, report)
    if store.is_done(cell.id):  # it only lacks a deployment, diagnostics or other data sets
        saved = store.predictions(cell.id)
        deploy.check_same_model(quantized, loader, saved, inputs.device)
        more |= evaluate_abroad(saved)
        if deploy.is_complete(cell, config, store):
            return deploy.kept(cell, more, store)
        deployed = deploy.deploy(quantized, cell, dataset, saved, names, loader, config, store, report)
        measured = measure(cell, saved, names, config, baseline_row)
        measured.extra |= more
        return deploy.deploy_again(cell, deployed, measured, config, store)
    predictions = predict(quantized, loader, inputs.device)
    store.write_predictions(cell.id, predictions)
    measured = measure(cell, predictions, names, config, baseline_row)
    deployed = deploy.deploy(quantized, cell, dataset, predictions, names, loader, config, store, report)
    measured.columns |= deployed.columns
    measured.columns["compression"] = compression(measured.columns["size_mb"], baseline_row)
    measured.extra |= deployed.extra
    training = quantized.reports.get("training")
    if training is not None:
        measured.columns["training_seconds"] = training["seconds"]
        measured.extra["training_log"] = training["log"]
        seconds -= training["seconds"]
    if "measurement" in quantized.reports:
        seconds += quantized.reports["measurement"].seconds - inputs.sensitivities.spent
    measured.columns["calibration_seconds"] = seconds
    measured.extra |= more | evaluate_abroad(predictions)
    measured.extra["placement"] = quantized.placement.summary()
    if "reconstruction" in quantized.reports:
        measured.extra["reconstruction"] = quantized.reports["reconstruction"].to_dict("records")
    for name in REPORTS:
        if name in quantized.reports:
            measured.extra[name] = quantized.reports[name].to_dict("records")
    if "calibration_groups" in quantized.description:
        measured.extra["calibration_groups"] = quantized.description["calibration_groups"]
    if "sensitivity" in quantized.reports:
        budgets, widths = quantized.reports["budgets"], quantized.reports["widths"]
        sensitivity = quantized.reports["sensitivity"].merge(
            widths[["layer", "bits"]].rename(columns={"bits": "chosen_bits"}), on="layer"
        )
        measured.extra |= {"sensitivity": sensitivity.to_dict("records"), "widths": widths.to_dict("records")}
        measured.extra["budgets"] = budgets
        report.detail(_budget_line(budgets))
    return measured


TRAINING_KEYS = tuple(key for key in QAT.model_fields if key in Training.model_fields)


def _budget_line(budgets: dict) -> str:
    """What a mixed-precision model may use and does use."""
    parts = [f"{budgets['size_bytes']:,} bytes", f"{budgets['bit_operations']:,} bit operations"]
    for place, key in enumerate(("size_budget_bytes", "bit_operations_budget")):
        if budgets[key] is not None:
            parts[place] += f" (budget {budgets[key]:,})"
    return "mixed precision: " + ", ".join(parts)


def _calibration_data(cell: Cell, options: dict, dataset: FaceDataset, config: Config, device: str):
    """The cell's calibration images; takes out of `options` what chose them. two images where it needs none."""
    if "calibration_samples" not in options:  # a look at two images, to check the traced network
        return BatchLoader(dataset.splits["validation"].subset(np.arange(2)), 2, device=device, channels_last=True)
    samples, split = options["calibration_samples"], dataset.splits[options.pop("calibration_split")]
    balance = options.pop("balance", None)
    attributes = list(split.sensitive) if balance == "intersection" else [balance] if balance else None
    if attributes is not None:
        options["attributes"] = attributes
    is_balanced = attributes is not None and not _sees_groups_as_they_come(cell)
    # the same draw for every method, width and observer of a model, so that they differ in nothing else
    purpose = balance if is_balanced else None
    generator = np.random.default_rng(seed_for(cell.seed, cell.dataset, cell.model, "calibration", purpose))
    positions = calibration_subset(split, samples, generator, balance=attributes if is_balanced else None)
    if is_balanced:  # each image once: the method repeats those of the groups that have too few, and says so
        positions = np.unique(positions)
    return BatchLoader(split.subset(positions), config.run.evaluation_batch_size, device=device, channels_last=True)


def _sees_groups_as_they_come(cell: Cell) -> bool:
    """Whether a repair calibrates on a plain sample: it weighs groups itself, or adjusts a plain model."""
    return "group_weighted_observers" in (cell.strategy, cell.options.get("start")) or (
        cell.strategy == "threshold_adjustment" or cell.options.get("start") == "ptq_static"
    )


class Inputs:
    """Checkpoints and data sets, each opened once; cells of one model follow one another."""

    def __init__(self, config: Config, store: Store, device: str, datasets: DatasetCache):
        self.config, self.store, self.device = config, store, device
        self.datasets = datasets
        self.loaded: tuple[str, nn.Module] | None = None
        self.sensitivities = SharedSensitivity(store, device, config.run.threads_per_cell)
        self.statistics = SharedStatistics(store, device, config.run.threads_per_cell)

    def baseline_row(self, cell: Cell) -> dict:
        row = self.store.record(cell.baseline_cell)["row"]
        if row["status"] != "done":
            raise RuntimeError(f"its baseline {cell.baseline_cell} failed: {row['error']}")
        return row

    def model(self, cell: Cell, dataset: FaceDataset) -> nn.Module:
        """The trained FP32 model; CheckpointError or StoreError where the checkpoint is not the baseline's."""
        if self.loaded is not None and self.loaded[0] == cell.baseline_cell:
            return self.loaded[1]
        path = self.store.checkpoint_path(cell.dataset, cell.model, cell.seed)
        description = checkpoint_description(path)
        if description["fingerprint"] != dataset.fingerprint:
            raise StoreError(
                f"{path}: trained on other data than {cell.dataset} has now (labels, splits or images changed); "
                "put the data back, use another results_dir, or start again with --fresh"
            )
        model = load_baseline(
            dataclasses.replace(cell, id=cell.baseline_cell), dataset, self.config, self.store, self.device
        )
        self.loaded = (cell.baseline_cell, model)
        return model


def _check_baselines(baselines: list[Cell], store: Store) -> None:
    for cell in baselines:
        record = store.record(cell.id)
        path = store.checkpoint_path(cell.dataset, cell.model, cell.seed)
        if record is None or (record["row"]["status"] == "done" and not checkpoint_matches(path, cell.id)):
            raise MissingArtifactError(
                f"{path}: not trained yet with this configuration; make it with python main.py --phase baseline"
            )
