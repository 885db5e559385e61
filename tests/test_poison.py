"""Errors that leave a dead CUDA context: however they are told, and wherever a cell goes on after an error."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from config import load_config
from engines import EngineError
from execution.cells import is_poisoned
from phases import cross_evaluate, deploy, diagnose
from plan import Cell
from quantizers.numerics import QuantizationError
from runner import CellResult, Report, run_cells
from store import Store

CELL = Cell("c", "baseline", "fairface", "test_resnet", 0, "fp32")
CONFIG = load_config(None, ["data.dataset=fairface", "evaluation.also_on=utkface", "deployment.export=['*']"])
TEXTS = (
    "CUDA error: device-side assert triggered",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 710: device-side assert triggered ; GPU=0",
)


def made_of(error: Exception, how: str) -> Exception:
    """As engines and quantizers do: an error of their own, with or without `from`."""
    try:
        try:
            raise error
        except RuntimeError as caught:
            if how == "from":
                raise EngineError("it cannot run the model") from caught
            raise QuantizationError("the model cannot be run") from None
    except (EngineError, QuantizationError) as made:
        return made


@pytest.mark.parametrize("text", TEXTS)
def test_the_texts_of_a_dead_context(text):
    error = RuntimeError(text)
    assert is_poisoned(error) and is_poisoned(made_of(error, "from")) and is_poisoned(made_of(error, "none"))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        EngineError("CUDNN failure 9: CUDNN_STATUS_NOT_SUPPORTED"),  # it was asked for what it cannot do, no more
        made_of(torch.OutOfMemoryError("CUDA out of memory"), "from"),
    ],
)
def test_other_errors_leave_the_process_as_it_was(error):
    assert not is_poisoned(error)


# ------------------------------------------------------------------------------------------- who goes on after an error


@pytest.fixture
def store(tmp_path) -> Store:
    """With a cell that is done."""
    store = Store(tmp_path)
    store.prepare("")
    zeros = np.zeros(4, np.int64)
    predictions = SimpleNamespace(y_true=zeros, logits=np.zeros((4, 2), np.float32), sensitive={}, index=np.arange(4))
    store.write_predictions(CELL.id, predictions)
    simulation = {"simulation": {"engine": "torch", "size_mb": 1.0}, "deployment": []}
    row = {**CELL.identity(), "status": "done", "error": None, "size_mb": 1.0}
    store.write_cell(row, [], simulation)
    return store


def raises(error: Exception):
    def deed(*args, **kwargs):
        raise error

    return deed


def run_engine(error, store, monkeypatch):
    monkeypatch.setattr(deploy, "load_engine", raises(error))
    exported = SimpleNamespace(path="c.onnx")
    return deploy._run("onnxruntime", exported, None, CELL, None, None, {}, [], CONFIG, store, Report(quiet=True))


def export(error, store, monkeypatch):
    monkeypatch.setattr(deploy, "export_onnx", raises(error))
    monkeypatch.setattr(deploy, "_simulation_costs", lambda *args: {})
    dataset = SimpleNamespace(image_size=32, target="gender")
    names = {"classes": ["a", "b"]}
    return deploy.deploy(nn.Identity(), CELL, dataset, None, names, [], CONFIG, store, Report(quiet=True))


def add_to_a_finished_cell(error, store, monkeypatch):
    return deploy.keeping_results(raises(error), CONFIG, store)(CELL, Report(quiet=True))


def evaluate_elsewhere(error, store, monkeypatch):
    monkeypatch.setattr(cross_evaluate, "BatchLoader", lambda *args, **kwargs: [])
    monkeypatch.setattr(cross_evaluate, "predict", raises(error))
    data = SimpleNamespace(load_abroad=lambda *args: SimpleNamespace(splits={"test": None}))
    report = Report(quiet=True)
    return cross_evaluate.evaluate(nn.Identity(), CELL, None, {}, CONFIG, store, data, "cpu", report)


def diagnose_it(error, store, monkeypatch):
    monkeypatch.setattr(diagnose, "_measured", raises(error))
    return diagnose.measure_diagnostics(None, None, CELL, None, CONFIG, "cpu", Report(quiet=True))


@pytest.mark.parametrize(
    "part",
    [run_engine, export, add_to_a_finished_cell, evaluate_elsewhere, diagnose_it],
    ids=lambda part: part.__name__,
)
def test_no_part_of_a_cell_goes_on_in_a_process_that_is_dead(part, store, monkeypatch):
    part(RuntimeError("out of luck"), store, monkeypatch)  # which the cell's results survive
    for text in TEXTS[:3]:
        error = RuntimeError(text)
        for raised in (error, made_of(error, "from")):
            with pytest.raises(type(raised)) as caught:
                part(raised, store, monkeypatch)
            assert caught.value is raised


def poisoned_once(config, store, device, data=None):
    """An engine on a GPU may die in a process that computes on the CPU."""

    def compute(cell: Cell, report) -> CellResult:
        if cell.id == "bad":
            raise EngineError("CUDA failure 710: device-side assert triggered")
        return CellResult({"accuracy": 0.5}, [])

    return compute


def test_the_one_process_of_a_serial_run_goes_on_with_the_next_cell(tmp_path):
    store = Store(tmp_path)
    store.prepare("")
    cells = [Cell(name, "quantization", "synthetic", "m", 0, "ptq_static") for name in ("bad", "good")]
    run_cells("quantization", cells, poisoned_once, load_config(None, []), store, Report(quiet=True))
    rows = [store.record(cell.id)["row"] for cell in cells]
    assert [row["status"] for row in rows] == ["failed", "done"] and "device-side assert" in rows[0]["error"]


# ------------------------------------------------------------------------------------------------------- on a real GPU


def on_the_gpu(config, store, device, data=None):
    """Cells whose names say what they do to it."""

    def compute(cell: Cell, report) -> CellResult:
        if cell.id == "assert":
            values, outside = torch.zeros(2, device=device), torch.tensor([5], device=device)
            values[outside].sum().item()
        if cell.id == "memory":
            torch.cuda.set_per_process_memory_fraction(0.01)
            try:
                torch.empty(torch.cuda.get_device_properties(0).total_memory // 2, dtype=torch.uint8, device=device)
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
        return CellResult({"accuracy": torch.full((4,), 0.25, device=device).sum().item()}, [])

    return compute


class Log:
    def __init__(self):
        self.entries = []

    def record(self, entry: dict) -> None:
        self.entries.append(entry)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("executor", ["serial", "processes", "ray"])
def test_a_real_error_of_the_gpu_costs_one_cell(executor, tmp_path):
    """An index out of range kills the context, and its worker with it; want of memory does not."""
    if executor == "ray":
        pytest.importorskip("ray")
    store, report = Store(tmp_path), Report(quiet=True)
    store.prepare("")
    report.log = Log()
    config = load_config(None, [f"run.executor={executor}", "run.jobs=1", "run.retries=0", "run.gpus_per_cell=1"])
    names = ("first", "assert", "second", "memory", "third")
    cells = [Cell(name, "quantization", "synthetic", "m", 0, "ptq_static") for name in names]
    run_cells("quantization", cells, on_the_gpu, config, store, report, device="cuda")
    rows = {cell.id: store.record(cell.id)["row"] for cell in cells}
    assert {name: row["status"] for name, row in rows.items() if row["status"] != "done"} == {
        "assert": "failed",
        "memory": "failed",
    }
    assert {rows[name]["accuracy"] for name in ("first", "second", "third")} == {1.0}
    assert "device-side assert" in rows["assert"]["error"] and "its worker was thrown away" in rows["assert"]["error"]
    assert "out of memory" in rows["memory"]["error"] and "too little memory for this cell" in rows["memory"]["error"]
    workers = {entry["cell"]: entry["worker"] for entry in report.log.entries}
    assert workers["second"] != workers["assert"]
    if executor != "ray":  # there each cell has a process of its own
        assert workers["first"] == workers["assert"] and workers["second"] == workers["memory"] == workers["third"]
