"""Deploying a cell's model: its ONNX file, what engines make of it on the test split, and what it costs.

Which cells are exported, and which are run, is the config's choice (`deployment`), and not part of a cell's identity:
a finished cell that a later config selects is made again from its checkpoint, deployed, and keeps its results.
Latencies are recorded and decide nothing; no other cell computes while one is measured (quiet.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batches import MEAN, STD
from config import Config
from datasets import FaceDataset
from deployment import DeploymentError, Export, export_onnx, load_engine
from engines import EngineError
from evaluation import EvaluationError, Latency, latency, predict, write_model
from execution import quiet
from phases import cross_evaluate, diagnose
from phases.complete import deployed_name, deployment_settings, is_selected
from phases.complete import is_deployed as is_complete
from phases.measure import Predicted, compression, measure_deployed
from plan import Cell
from runner import FATAL, CellResult, Compute, one_line, raise_poison
from store import DEPLOYED_COLUMNS, Store, StoreError, Table, write_errors

BATCHES = (1, 32)  # of the latencies
SINGLES = 4  # passes of one image for each pass of a batch
DISTURBED = "latency_disturbed"  # in a record, beside latencies that were perhaps not measured alone: why
DEPLOYMENT_COLUMNS = (
    "engine", "provider", "status", "error", "weight_types", "size_mb", "agreement", "latency_ms_b1",
    "latency_p95_ms_b1", "latency_ms_b32", "throughput",
)  # fmt: skip


def unmatched_patterns(config: Config, cells: Iterable[Cell]) -> list[str]:
    """Lines about patterns of the config that select nothing."""
    cells, deployment = list(cells), config.deployment
    return [
        f"deployment.{key}: {pattern!r} selects no cell of this config"
        for key, patterns in (("cells", deployment.cells), ("export", deployment.export))
        for pattern in patterns
        if pattern not in type(deployment).model_fields[key].default
        and not any(is_selected(cell, [pattern]) for cell in cells)
    ] + [
        f"mitigation.diagnostics.cells: {pattern!r} selects no quantized cell of this config"
        for pattern in config.mitigation.diagnostics.cells
        if not any(cell.method != "none" and is_selected(cell, [pattern]) for cell in cells)
    ]


def deploy(
    model: nn.Module,
    cell: Cell,
    dataset: FaceDataset,
    predictions: Predicted,
    names: dict[str, Any],
    loader: Iterable,
    config: Config,
    store: Store,
    report: Any,
) -> CellResult:
    """The cost columns of a cell, and for the cells that the config selects its file and what engines make of it.

    `predictions` are the simulation's on `loader`, the test split. What fails is a row of its own with the error, and
    leaves the cell's results as they are.
    """
    example = torch.zeros(1, 3, dataset.image_size, dataset.image_size)
    rows: list[dict] = []
    groups: list[dict] = []
    model_bytes = None
    if is_selected(cell, (*config.deployment.cells, *config.deployment.export)):
        report.progress("exporting", 0.95)
        with _model_place(cell, config, store) as path:
            try:
                exported = export_onnx(
                    model,
                    path,
                    example,
                    class_names=names["classes"],
                    mean=MEAN,
                    std=STD,
                    cell=cell.id,
                    config={**cell.identity(), "options": dict(cell.options), "target": dataset.target},
                )
            except FATAL:
                raise
            except Exception as error:
                raise_poison(error)
                if isinstance(error.__cause__, StoreError):  # not this cell's fault: no other could be written either
                    raise error.__cause__ from None
                rows = [_failed(engine, error) for engine in config.deployment.engines]
            else:
                if is_selected(cell, config.deployment.export):
                    model_bytes = path.stat().st_size
                if is_selected(cell, config.deployment.cells):
                    for engine in config.deployment.engines:
                        report.progress(f"running {engine}", 0.97)
                        row, of_groups = _run(
                            engine, exported, model, cell, example, predictions, names, loader, config, store, report
                        )
                        rows.append(row)
                        groups += of_groups
    simulation = _simulation_costs(model, cell, example, config, store, report)
    return _result(rows, groups, simulation, model_bytes, config)


def _result(
    rows: list[dict], groups: list[dict], simulation: dict[str, Any], model_bytes: int | None, config: Config
) -> CellResult:
    """The cost columns, which are those of the first engine that ran, or of the simulation; and what is kept.
    `model_bytes` is the length of the file that the config keeps."""
    columns = {key: value for key, value in simulation.items() if key != DISTURBED}
    first = next((row for row in rows if row["status"] == "done"), None)
    if first is not None:
        columns |= {key: value for key, value in first.items() if key in DEPENDENT_COLUMNS}
    extra = {
        "simulation": simulation,
        "deployment": rows,
        "deployment_groups": groups,
        "deployment_settings": deployment_settings(config),
        "model_bytes": model_bytes,
    }
    return CellResult(columns, [], extra)


def deploy_again(cell: Cell, deployed: CellResult, measured: CellResult, config: Config, store: Store) -> CellResult:
    """A finished cell's result with another deployment; `measured` is made of its saved predictions."""
    record = store.record(cell.id)
    is_run = is_selected(cell, config.deployment.cells) or deployed.extra["deployment"]
    if not is_run and any(row["status"] == "done" for row in record["extra"]["deployment"]):
        # only its file was missing: an earlier deployment stays
        row, extra = record["row"], record["extra"] | {"model_bytes": deployed.extra["model_bytes"]}
    else:
        row = {key: value for key, value in record["row"].items() if key not in DEPENDENT_COLUMNS} | deployed.columns
        extra = record["extra"] | deployed.extra
    baseline_row = None if cell.baseline_cell is None else store.record(cell.baseline_cell)["row"]
    identity = {*cell.identity(), "status", "error"}
    columns = {key: value for key, value in row.items() if key not in identity} | measured.columns
    columns["compression"] = compression(row["size_mb"], baseline_row)
    return CellResult(columns, measured.groups, extra | measured.extra)


def kept(cell: Cell, more: dict[str, Any], store: Store) -> CellResult:
    """A finished cell's result as it is, with `more` in its record."""
    record = store.record(cell.id)
    identity = {*cell.identity(), "status", "error"}
    columns = {key: value for key, value in record["row"].items() if key not in identity}
    return CellResult(columns, record["groups"], record["extra"] | more)


def check_same_model(model: nn.Module, loader: Iterable, saved: Predicted, device: str) -> None:
    """DeploymentError unless a model that was made again predicts what the finished cell's did."""
    differing = int((predict(model, loader, device).y_pred != saved.y_pred).sum())
    if differing:
        raise DeploymentError(
            f"the model made again differs on {differing} of {len(saved.y_pred)} images from the one whose results are "
            "there (another device or version?); compute the cell anew with --fresh"
        )


def keeping_results(compute: Compute, config: Config, store: Store) -> Compute:
    """`compute`, for run_cells: where a finished cell, which only lacks a deployment, fails, it keeps its results."""

    def compute_or_keep(cell: Cell, report: Any) -> CellResult:
        if not store.is_done(cell.id):
            return compute(cell, report)
        try:
            return compute(cell, report)
        except FATAL:
            raise
        except Exception as error:  # told by a row of its own and the exit status
            raise_poison(error)
            return keep(cell, error, report, config, store)

    return compute_or_keep


def keep(cell: Cell, error: Exception, report: Any, config: Config, store: Store) -> CellResult:
    """The result of a finished cell to which nothing could be added, for this reason: it is that of all it lacks."""
    lacks = {} if diagnose.is_complete(cell, config, store) else diagnose.failed(cell, error, config)
    lacks |= cross_evaluate.failed(cell, error, config, store)
    if is_complete(cell, config, store):  # it lacked other things: its deployment stands
        report.line(f"  {cell.id}: what it lacks could not be added: {one_line(error)}")
        return kept(cell, lacks, store)
    record = store.record(cell.id)
    rows = [_failed(engine, error) for engine in config.deployment.engines]
    deployed = _result(rows, [], record["extra"]["simulation"], record["extra"].get("model_bytes"), config)
    return deploy_again(cell, deployed, CellResult({}, record["groups"], lacks), config, store)


def tables(store: Store) -> list[Table]:
    return [
        store.extra_table("deployment_results", "deployment", DEPLOYMENT_COLUMNS, prefix="deployed_"),
        store.extra_table("deployment_groups", "deployment_groups", GROUP_COLUMNS),
    ]


DEPENDENT_COLUMNS = (  # of a row: what depends on the engine
    "engine", "size_mb", "latency_ms_b1", "latency_p95_ms_b1", "latency_ms_b32", "throughput", *DEPLOYED_COLUMNS,
)  # fmt: skip
GROUP_COLUMNS = (
    "engine", "attribute", "group", "n", "agreement", "accuracy", "deployed_accuracy", "selection_rate",
    "deployed_selection_rate",
)  # fmt: skip


def _run(
    name: str,
    exported: Export,
    model: nn.Module,
    cell: Cell,
    example: torch.Tensor,
    predictions: Predicted,
    names: dict[str, Any],
    loader: Iterable,
    config: Config,
    store: Store,
    report: Any,
) -> tuple[dict, list[dict]]:
    """(row, group rows) of one engine."""
    settings = config.deployment
    try:
        own = {
            "onnxruntime": {"provider": settings.provider},
            "openvino": {"float_precision": settings.float_precision},
        }
        engine = load_engine(
            exported.path if name in own else model, name, threads=config.run.threads_per_cell, **own.get(name, {})
        )
        deployed = predict(engine, loader, "cpu")
        costs = {
            "size_mb": exported.size_mb,
            **_latencies(engine.latency, example, config, f"{cell.id}: {name}", report),
        }
    except FATAL:
        raise
    except Exception as error:  # an engine may raise anything: its row says what
        raise_poison(error)
        return _failed(name, error), []
    store.write_predictions(deployed_name(cell.id, name), deployed)
    columns, groups = measure_deployed(cell, deployed, predictions, names, config)
    row = {
        "engine": name,
        "provider": engine.provider,
        "status": "done",
        "error": None,
        "weight_types": exported.weight_types(),
        **costs,
        **columns,
    }
    return row, [{"engine": name, **group} for group in groups]


def _failed(engine: str, error: Exception) -> dict:
    expected = isinstance(error, (DeploymentError, EngineError, EvaluationError))  # whose messages stand alone
    message = " ".join(str(error).split()) if expected else one_line(error)
    return {"engine": engine, "status": "failed", "error": message}


@contextlib.contextmanager
def _model_place(cell: Cell, config: Config, store: Store) -> Iterator[Path]:
    """Where the cell's file goes: models/<cell>.onnx where the config keeps it, else a temporary name beside it."""
    path = store.model_path(cell.id)
    if is_selected(cell, config.deployment.export):
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _simulation_costs(
    model: nn.Module, cell: Cell, example: torch.Tensor, config: Config, store: Store, report: Any
) -> dict[str, Any]:
    """engine, size_mb of the packed tensors' file, and latencies of the simulation."""
    path = store.packed_path(cell.id)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with write_errors(path):
            size = write_model(model, temporary)
    finally:
        temporary.unlink(missing_ok=True)

    timed = model.model if getattr(model, "reads_groups", False) else model  # a threshold takes no time

    def measured(images, repeats: int) -> Latency:
        return latency(timed, torch.from_numpy(images), repeats)

    return {"engine": "torch", "size_mb": size, **_latencies(measured, example, config, f"{cell.id}: torch", report)}


def _latencies(measure, example: torch.Tensor, config: Config, what: str, report: Any) -> dict[str, Any]:
    """`measure(x_NCHW, repeats) -> Latency` on one image and on a batch, while no other cell computes; where one
    perhaps did, DISTURBED says why, and so does a line."""
    if not config.deployment.latency:
        return {}
    generator = torch.Generator().manual_seed(0)
    repeats = config.deployment.latency_repeats
    with quiet.alone() as measurement:
        one, many = (
            measure(
                torch.randn(batch, *example.shape[1:], generator=generator).numpy(),
                repeats * (SINGLES if batch == 1 else 1),
            )
            for batch in BATCHES
        )
    measured = {
        "latency_ms_b1": one.median_ms,
        "latency_p95_ms_b1": one.p95_ms,
        "latency_ms_b32": many.median_ms,
        "throughput": many.throughput,
    }
    if measurement.disturbed is not None:
        report.line(f"  {what}: its latency was perhaps not measured alone: {measurement.disturbed}")
        measured[DISTURBED] = measurement.disturbed
    return measured
