"""Deployment within the study: which cells, their files, what engines make of them; editing, failing, killing."""

import contextlib
import copy
import csv
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fake_study import small_config
from safetensors import safe_open

import deployment
import engines
import main
import onnx_export
from config import load_config
from deployment import DeploymentError, read_onnx
from evaluation import Latency
from execution import quiet
from phases import deploy
from phases.deploy import is_complete, is_selected, unmatched_patterns
from phases.measure import measure_deployed
from plan import Cell, plan
from store import COST_COLUMNS, DEPLOYED_COLUMNS, ROW_COLUMNS, TIMING_COLUMNS, Store

ROOT = Path(__file__).parent.parent
FP32 = Cell("fp32", "baseline", "synthetic", "mobilenet_v2", 0, "none")
W8A8 = Cell("w8a8", "quantization", "synthetic", "mobilenet_v2", 0, "ptq_static", None, 8, 8)
W4A8 = dataclasses.replace(W8A8, id="w4a8", weight_bits=4)
BIAS_AWARE = dataclasses.replace(W8A8, id="bias", phase="mitigation", strategy="bias_aware_calibration")
CELLS = (FP32, W8A8, W4A8, BIAS_AWARE)


# ------------------------------------------------------------------------------------------------------------ selecting


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("*", CELLS),
        ("mobilenet_v2", CELLS),
        ("mobile*:*", CELLS),
        ("resnet50", ()),
        ("mobilenet", ()),  # the whole name, not a part of it
        ("*:none", [FP32]),
        ("*:*:FP32", [FP32]),
        ("*:none:8", ()),
        ("*:ptq_static", [W8A8, W4A8]),  # a cell with a strategy is that strategy's
        ("*:ptq_*:W8A8", [W8A8]),
        ("*:bias_aware_calibration", [BIAS_AWARE]),
        ("*:*:8", [W8A8, BIAS_AWARE]),  # as in bit_widths: weights and activations
        ("*:*:4", ()),
        ("*:*:W?A8", [W8A8, W4A8, BIAS_AWARE]),
        ("*:*:W4*", [W4A8]),
        ("*:*:16", ()),  # there are none, which is told and no error
    ],
)
def test_a_pattern_is_of_model_method_and_bits(pattern, selected):
    assert [cell.id for cell in CELLS if is_selected(cell, [pattern])] == [cell.id for cell in selected]


def test_one_of_several_patterns_is_enough_and_none_selects_nothing():
    assert is_selected(W4A8, ["*:none", "*:*:W4A8"])
    assert not is_selected(W4A8, [])


def test_a_pattern_that_selects_nothing_is_told_but_not_a_default():
    patterns = ["*:none:FP32", "*:ptq_statc:W8A8", "*:ptq_static:W8A8"]  # the last selects nothing here
    config = small_config(
        "quantization.bit_widths=[4]", f"deployment.cells={patterns}", "deployment.export=['*:ptq_static:w4a4']"
    )
    cells = [cell for block in plan(config).values() for cell in block]
    assert not any(is_selected(cell, [patterns[2]]) for cell in cells)
    assert unmatched_patterns(config, cells) == [
        "deployment.cells: '*:ptq_statc:W8A8' selects no cell of this config",
        "deployment.export: '*:ptq_static:w4a4' selects no cell of this config",
    ]
    assert unmatched_patterns(small_config("quantization.bit_widths=[4]"), cells) == []


def test_complete_is_done_and_deployed_as_the_config_wants_it(tmp_path):
    store = Store(tmp_path)
    store.prepare("")
    anything = SimpleNamespace(y_true=np.zeros(2, int), logits=np.zeros((2, 2)), sensitive={}, index=np.arange(2))

    def complete(*overrides: str, cells="[]", export="[]") -> bool:
        overrides = (*overrides, f"deployment.cells={cells}", f"deployment.export={export}")
        return is_complete(W8A8, small_config(*overrides), store)

    def write(engine: str, *rows: dict) -> None:
        settings = {"provider": "cpu", "float_precision": "f32"}
        extra = {"deployment": list(rows), "deployment_settings": settings}
        store.write_cell({**W8A8.identity(), "status": "done", "engine": engine}, [], extra)

    assert not complete()  # not computed
    store.write_predictions(W8A8.id, anything)
    write("torch")
    assert complete() and complete(cells="['*:none']")
    assert not complete(cells="['*:*:8']") and not complete(export="['*:*:8']")
    store.model_path(W8A8.id).write_bytes(b"onnx")
    assert complete(export="['*:*:8']")
    write("torch", {"engine": "onnxruntime", "status": "failed"})
    store.write_predictions(f"{W8A8.id}@onnxruntime", anything)
    assert not complete(cells="['*:*:8']")
    write("onnxruntime", {"engine": "onnxruntime", "status": "done"})
    assert not complete(cells="['*:*:8']")  # it was run when latencies were not wanted
    assert complete("deployment.latency=false", cells="['*:*:8']")
    write("onnxruntime", {"engine": "onnxruntime", "status": "done", "latency_ms_b1": 1.0})
    assert complete(cells="['*:*:8']")
    assert not complete("deployment.provider=cuda", cells="['*:*:8']")
    assert complete("deployment.provider=cuda")  # it is not run
    assert complete("deployment.latency=false", cells="['*:*:8']")  # times decide nothing
    both = "deployment.engines=[openvino, onnxruntime]"
    assert not complete(both, cells="['*:*:8']")
    write(
        "onnxruntime",
        *({"engine": name, "status": "done", "latency_ms_b1": 1.0} for name in ("onnxruntime", "openvino")),
    )
    store.write_predictions(f"{W8A8.id}@openvino", anything)
    assert complete(cells="['*:*:8']")  # one engine more than it wants
    assert not complete(both, cells="['*:*:8']")  # the row is to be the other one's
    store.predictions_path(f"{W8A8.id}@onnxruntime").unlink()
    assert not complete(cells="['*:*:8']")


# ---------------------------------------------------------------------------------------------------------- by hand


def test_agreement_and_deployed_metrics_worked_by_hand():
    """Eight images of two genders, none of the third; the engine differs from the simulation on images 3 and 7."""
    names = {"classes": ["no", "yes"], "sensitive": {"gender": ["female", "male", "other"], "skin": ["light", "dark"]}}
    sensitive = {"gender": np.array([0, 0, 0, 0, 0, 1, 1, 1]), "skin": np.array([0, 0, 0, 1, 1, 0, 1, 1])}
    y_true = np.array([0, 0, 1, 1, 1, 0, 1, 1])

    def predicted(*classes: int) -> SimpleNamespace:
        return SimpleNamespace(y_true=y_true, y_pred=np.array(classes), sensitive=sensitive)

    simulated, deployed = predicted(0, 1, 1, 1, 1, 0, 0, 1), predicted(0, 1, 1, 0, 1, 0, 0, 0)
    config = small_config("analysis.attribute=gender", "data.min_group_size=1")
    columns, groups = measure_deployed(W8A8, deployed, simulated, names, config)
    assert set(columns) == set(DEPLOYED_COLUMNS)
    assert columns["agreement"] == 6 / 8
    assert columns["deployed_accuracy"] == 4 / 8  # images 1, 3, 6 and 7 are wrong
    assert columns["deployed_balanced_accuracy"] == pytest.approx((2 / 3 + 2 / 5) / 2)
    assert columns["deployed_worst_group"] == "male" and columns["deployed_worst_group_accuracy"] == 1 / 3
    assert columns["deployed_accuracy_gap"] == pytest.approx(3 / 5 - 1 / 3)
    assert columns["deployed_demographic_parity_difference"] == pytest.approx(3 / 5 - 0)
    assert columns["deployed_equal_opportunity_difference"] == pytest.approx(2 / 3 - 0)
    assert columns["deployed_groups_left_out"] == 1
    rows = {(row["attribute"], row["group"]): row for row in groups}
    assert len(rows) == len(groups) == 3 + 2 + 6
    assert rows["gender", "female"] == {
        "attribute": "gender", "group": "female", "n": 5, "agreement": 4 / 5, "accuracy": 4 / 5,
        "deployed_accuracy": 3 / 5, "selection_rate": 4 / 5, "deployed_selection_rate": 3 / 5,
    }  # fmt: skip
    assert rows["gender", "male"]["agreement"] == pytest.approx(2 / 3)
    assert rows["gender", "male"]["deployed_selection_rate"] == 0.0  # nobody is, which is not the same as no rate
    empty = rows["gender", "other"]
    assert empty["n"] == 0 and empty["agreement"] is None
    assert all(math.isnan(empty[name]) for name in ("accuracy", "deployed_accuracy", "deployed_selection_rate"))
    assert rows["skin", "light"]["agreement"] == 1.0 and rows["skin", "dark"]["agreement"] == 2 / 4
    assert rows["intersection", "female & dark"]["agreement"] == 1 / 2
    other = SimpleNamespace(y_true=1 - y_true, y_pred=deployed.y_pred, sensitive=sensitive)
    with pytest.raises(AssertionError, match="other images"):
        measure_deployed(W8A8, other, simulated, names, config)


# ---------------------------------------------------------------------------------------------------------- the study


TINY = {
    "data": {
        "min_group_size": 5,
        "synthetic": {
            "target": "smile",
            "sensitive": ["gender", "skin"],
            "train_images": 192,
            "validation_images": 64,
            "test_images": 160,
        },
    },
    "models": {"architectures": ["test_resnet"]},
    "training": {"epochs": 1, "learning_rate": 0.003},
    "quantization": {
        "bit_widths": [8, "W4A8"],
        "methods": ["ptq_static", {"method": "ptq_dynamic", "bit_widths": [8]}],
        "ptq_static": {"calibration_samples": 64},
    },
    "mitigation": {"strategies": []},
    "analysis": {"bootstrap_replicates": 100},
    "deployment": {"latency_repeats": 1},  # the rest is the default: FP32 and W8A8 run, W8A8 kept
    "run": {"threads_per_cell": 1},
}
ALSO_W4A8 = ("--set", "deployment.cells=['*:none', '*:ptq_static']", "deployment.export=['*:ptq_static']")


def study(config: Path, results: Path, *arguments: str, phases: tuple[str, ...] = ("baseline", "quantization")) -> int:
    """The worst exit status of the command line, phase by phase."""
    command = ["--config", str(config), "--results-dir", str(results), "--device", "cpu", "--quiet", *arguments]
    statuses = []
    for phase in phases:
        statuses.append(main.main(["--phase", phase, *command]))
        if statuses[-1] == 2:
            break
    return max(statuses)


EXPORTED: dict[str, object] = {}
TO_ONNX = onnx_export.to_onnx


@contextlib.contextmanager
def exported_once():
    """The exporter takes seconds: each cell's model, which is always the same, is exported once for all these tests."""

    def export(model, example, metadata):
        cell = metadata["cell"]
        if cell not in EXPORTED:
            EXPORTED[cell] = TO_ONNX(model, example, metadata)
        return copy.deepcopy(EXPORTED[cell])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "to_onnx", export)
        yield


@pytest.fixture
def quick_export():
    with exported_once():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """(config, results) of one uninterrupted study; tests only read it."""
    folder = tmp_path_factory.mktemp("deploy")
    config = folder / "tiny.yaml"
    config.write_text(json.dumps(TINY | {"data": {**TINY["data"], "cache": str(folder / "cache")}}))
    with exported_once():
        assert study(config, folder / "results") == 0
    return config, folder / "results"


@pytest.fixture
def copied(finished, tmp_path, quick_export) -> tuple[Path, Path]:
    """(config, results) of a copy that a test may change."""
    shutil.copytree(finished[1], tmp_path / "results")
    return finished[0], tmp_path / "results"


def cell_id(results: Path, part: str) -> str:
    """The only cell whose name has `part`."""
    (path,) = (results / "cells").glob(f"*{part}*.json")
    return path.stem


def row_of(results: Path, cell: str) -> dict[str, str]:
    for path in results.glob("*_results.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                if row["cell"] == cell and "phase" in row:
                    return row
    raise AssertionError(f"{cell} has no row")


def record_of(results: Path, cell: str) -> dict:
    return json.loads((results / "cells" / f"{cell}.json").read_text())


def stamps(results: Path, *folders: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for folder in folders for path in (results / folder).iterdir()}


def changed(before: dict[Path, int]) -> set[str]:
    """Names of files that are others by now; those that are new are not among them."""
    return {path.name for path, stamp in before.items() if not path.exists() or path.stat().st_mtime_ns != stamp}


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in (*TIMING_COLUMNS, "seconds")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def contents(results: Path) -> dict[str, object]:
    """Every file but the run's own description, the analysis and what cells share (and how long it took)."""
    found = {}
    for path in sorted(path for path in results.rglob("*") if path.is_file()):
        name = path.relative_to(results).as_posix()
        of_the_run = ("config.yaml", "environment.json", "log.jsonl", ".lock")
        if path.parent.name in ("analysis", "tables", "shared") or name in of_the_run:
            continue
        if path.suffix == ".csv":
            frame = pd.read_csv(path, keep_default_na=False, dtype=str)
            found[name] = without_times(frame.to_dict("records"))
        elif path.suffix == ".safetensors":  # whose metadata are in any order
            with safe_open(path, "numpy") as file:
                found[name] = file.metadata(), {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
        elif path.suffix == ".json":
            found[name] = json.dumps(without_times(json.loads(path.read_text())))  # keys in their order
        else:
            found[name] = path.read_bytes()
    return found


def assert_same(results: Path, reference: Path) -> None:
    ours, theirs = contents(results), contents(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def temporaries(results: Path) -> list[str]:
    return [path.name for path in results.rglob(".*.tmp")]


def refused(capsys, config: Path, results: Path, *arguments: str) -> str:
    """The one line of a run that is refused with exit status 2."""
    capsys.readouterr()
    assert study(config, results, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def failing(monkeypatch, part: str, error: Exception) -> None:
    """No engine loads the file of the cell whose name has `part`."""

    def load(model, *args, **kwargs):
        if part in str(model):
            raise error
        return deployment.load_engine(model, *args, **kwargs)

    monkeypatch.setattr("phases.deploy.load_engine", load)


def forbid(monkeypatch, *names: str) -> None:
    """Anything that computes."""

    def used(*args, **kwargs):
        raise AssertionError("nothing was to be computed")

    for name in names or (
        "phases.deploy.export_onnx", "phases.deploy.load_engine", "phases.baseline.train",
        "phases.baseline.predict", "phases.derived.predict", "phases.derived.apply_quantization",
    ):  # fmt: skip
        monkeypatch.setattr(name, used)


# ------------------------------------------------------------------------------------------------------ what is written


def test_the_selected_cells_and_no_others_are_deployed(finished):
    config, results = finished
    cells = [cell for block in plan(load_config(config)).values() for cell in block]
    assert len(cells) == 4
    run = {cell_id(results, "fp32"), cell_id(results, "ptq_static-w8a8")}
    kept = {path.name for path in (results / "models").iterdir()}
    assert kept == {f"{cell_id(results, 'ptq_static-w8a8')}.onnx"}
    assert {path.stem.partition("@")[0] for path in (results / "predictions").glob("*@onnxruntime.npz")} == run
    deployed = pd.read_csv(results / "deployment_results.csv", keep_default_na=False, dtype=str).set_index("cell")
    assert set(deployed.index) == run
    for cell in cells:
        row = row_of(results, cell.id)
        assert tuple(row) == ROW_COLUMNS
        if cell.id not in run:
            assert row["engine"] == "torch" and float(row["latency_p95_ms_b1"]) > 0
            assert {row[column] for column in DEPLOYED_COLUMNS} == {""}  # never 0
            continue
        assert row["engine"] == "onnxruntime"
        with (
            np.load(results / "predictions" / f"{cell.id}.npz") as simulated,
            np.load(results / "predictions" / f"{cell.id}@onnxruntime.npz") as engine,
        ):
            assert all(np.array_equal(simulated[key], engine[key]) for key in simulated.files if key != "logits")
            predicted = engine["logits"].argmax(1)
            agreement = (predicted == simulated["logits"].argmax(1)).mean()
            correct, gender = predicted == engine["y_true"], engine["sensitive_gender"]
        assert 0.9 <= agreement <= 1
        worst = min(correct[gender == code].mean() for code in (0, 1))
        assert float(row["agreement"]) == pytest.approx(agreement, abs=1e-12)
        assert float(row["deployed_accuracy"]) == pytest.approx(correct.mean(), abs=1e-12)
        assert float(row["deployed_worst_group_accuracy"]) == pytest.approx(worst, abs=1e-12)
        assert 0 < float(row["latency_ms_b1"]) <= float(row["latency_p95_ms_b1"])
        assert float(row["throughput"]) == pytest.approx(32_000 / float(row["latency_ms_b32"]))
        for column in ("size_mb", "agreement", "latency_ms_b1", "throughput", "deployed_accuracy"):
            assert row[column] == deployed.loc[cell.id, column], column
    fp32, w8a8 = (row_of(results, cell_id(results, part)) for part in ("fp32", "ptq_static-w8a8"))
    (path,) = (results / "models").iterdir()
    assert float(w8a8["size_mb"]) == path.stat().st_size / 1e6
    assert float(w8a8["compression"]) == float(fp32["size_mb"]) / float(w8a8["size_mb"])
    assert 3 < float(w8a8["compression"]) < 4
    w8a8_line = deployed.loc[cell_id(results, "ptq_static-w8a8")]
    assert w8a8_line[["status", "error", "provider"]].tolist() == ["done", "", "CPUExecutionProvider"]
    assert w8a8_line["weight_types"].endswith("x 8 bits in INT8")
    assert not temporaries(results)


def test_the_file_knows_its_cell(finished):
    config, results = finished
    (path,) = (results / "models").iterdir()
    file = read_onnx(path)
    assert file.cell == path.stem and file.classes == ["neutral", "smiling"]
    assert file.input["image_size"] == [32, 32]
    assert (file.config["method"], file.config["weight_bits"], file.config["target"]) == ("ptq_static", 8, "smile")
    with np.load(results / "predictions" / f"{path.stem}@onnxruntime.npz") as saved:
        from datasets import BatchLoader, load_dataset

        dataset = load_dataset(load_config(config), "synthetic")
        (batch,) = BatchLoader(dataset.splits["test"], 160)
        logits = deployment.load_engine(path, threads=1).predict(batch["image"].numpy())
        np.testing.assert_allclose(logits, saved["logits"], atol=1e-5)


def test_every_image_is_in_one_group_of_each_attribute(finished):
    results = finished[1]
    groups = pd.read_csv(results / "deployment_groups.csv", keep_default_na=False)
    assert set(groups["attribute"]) == {"gender", "skin", "intersection"}
    plain = pd.read_csv(results / "group_results.csv").set_index(["cell", "attribute", "group"])
    for (cell, engine, _), rows in groups.groupby(["cell", "engine", "attribute"]):
        row = row_of(results, cell)
        assert engine == "onnxruntime" and rows["n"].sum() == 160
        assert (rows["n"] * rows["agreement"]).sum() / 160 == pytest.approx(float(row["agreement"]))
        assert (rows["n"] * rows["deployed_accuracy"]).sum() / 160 == pytest.approx(float(row["deployed_accuracy"]))
        for group in rows.to_dict("records"):
            same = plain.loc[cell, group["attribute"], group["group"]]
            assert (group["n"], group["accuracy"]) == (same["n"], pytest.approx(same["accuracy"]))


def test_agreement_counts_the_images_on_which_the_engine_differs(copied, monkeypatch):
    """An engine that turns the first four of each batch of 160."""
    config, results = copied

    class Turned(SimpleNamespace):
        name, provider, latency = "onnxruntime", "TestProvider", None

        def predict(self, x_NCHW):
            logits = self.engine.predict(x_NCHW)
            logits[:4] = logits[:4, ::-1]
            return logits

    monkeypatch.setattr(
        "phases.deploy.load_engine",
        lambda *args, **kwargs: Turned(engine=deployment.load_engine(*args, **kwargs)),
    )
    cell = cell_id(results, "fp32")
    with np.load(results / "predictions" / f"{cell}.npz") as saved:
        turned = saved["logits"].argmax(1)
        turned[:4] = 1 - turned[:4]
        accuracy = (turned == saved["y_true"]).mean()
    honest = float(row_of(results, cell)["agreement"])
    (results / "predictions" / f"{cell}@onnxruntime.npz").unlink()
    changes = ("run.evaluation_batch_size=160", "deployment.latency=false")
    assert study(config, results, "--set", *changes, phases=("baseline",)) == 0
    row = row_of(results, cell)
    assert honest == 1.0 and float(row["agreement"]) == 1 - 4 / 160
    assert row["engine"] == "onnxruntime" and float(row["deployed_accuracy"]) == pytest.approx(accuracy, abs=1e-12)
    assert {row[column] for column in TIMING_COLUMNS if column != "training_seconds"} == {""}  # not those of before


# ------------------------------------------------------------------------------------------------- editing and resuming


def test_a_finished_cell_that_is_selected_later_is_deployed_and_nothing_else_happens(copied, monkeypatch, capsys):
    config, results = copied
    w4a8, w8a8 = cell_id(results, "ptq_static-w4a8"), cell_id(results, "ptq_static-w8a8")
    before, row = stamps(results, "cells", "predictions", "checkpoints", "models"), row_of(results, w4a8)
    log = (results / "training_log.csv").read_bytes()
    assert study(config, results, *ALSO_W4A8, "--dry-run", phases=("quantization",)) == 0
    out = capsys.readouterr().out
    assert f"deploy  {w4a8}" in out and f"done    {w8a8}" in out and "3 cells, 2 done, 1 to do" in out
    forbid(monkeypatch, "phases.baseline.train", "phases.baseline.predict", "phases.derived.predict")
    assert study(config, results, *ALSO_W4A8) == 0
    assert changed(before) == {f"{w4a8}.json"}
    assert (results / "training_log.csv").read_bytes() == log
    assert (results / "models" / f"{w4a8}.onnx").exists()
    after = row_of(results, w4a8)
    assert (row["engine"], after["engine"]) == ("torch", "onnxruntime") and 0.9 <= float(after["agreement"]) <= 1
    assert float(after["size_mb"]) == (results / "models" / f"{w4a8}.onnx").stat().st_size / 1e6
    others = [name for name in ROW_COLUMNS if name not in (*COST_COLUMNS, *DEPLOYED_COLUMNS)]
    assert [after[name] for name in others] == [row[name] for name in others]
    assert after["calibration_seconds"] == row["calibration_seconds"]
    capsys.readouterr()
    assert study(config, results, *ALSO_W4A8, "--dry-run") == 0
    assert "deploy  " not in capsys.readouterr().out


def test_deselecting_computes_nothing_and_keeps_what_there_is(copied, monkeypatch):
    config, results = copied
    before, everything = stamps(results, "cells", "predictions", "checkpoints", "models"), contents(results)
    forbid(monkeypatch)
    assert study(config, results, "--set", "deployment.cells=[]", "deployment.export=[]") == 0
    assert not changed(before) and contents(results) == everything


def test_a_study_that_is_deployed_later_ends_with_the_same_files(finished, tmp_path):
    """Compressions too, although the baseline's file is another one once it is deployed; and what is exported of a
    model that is made again from the checkpoint."""
    config, reference = finished
    results = tmp_path / "results"
    assert study(config, results, "--set", "deployment.cells=[]", "deployment.export=[]") == 0
    assert not list((results / "models").iterdir()) and not list((results / "predictions").glob("*@*"))
    assert study(config, results) == 0
    assert_same(results, reference)


def test_a_file_that_was_deleted_is_made_again(copied, finished, capsys):
    config, results = copied
    (path,) = (results / "models").iterdir()
    path.unlink()
    before = stamps(results, "checkpoints") | {
        file: stamp for file, stamp in stamps(results, "cells", "predictions").items() if path.stem not in file.name
    }
    assert study(config, results, "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"deploy  {path.stem}" in out and out.count("deploy  ") == 1
    assert study(config, results) == 0
    assert not changed(before)
    assert_same(results, finished[1])
    # where it is only to be kept, what the engines made of it before stays
    path.unlink()
    assert study(config, results, "--set", "deployment.cells=[]", phases=("quantization",)) == 0
    assert_same(results, finished[1])


def test_another_attribute_needs_no_engine(copied, finished, monkeypatch):
    config, results = copied
    before = stamps(results, "predictions", "checkpoints", "models")
    forbid(monkeypatch)
    assert study(config, results, "--set", "analysis.attribute=skin", phases=("analysis",)) == 0
    assert not changed(before)
    cell = cell_id(results, "ptq_static-w8a8")
    with np.load(results / "predictions" / f"{cell}@onnxruntime.npz") as saved:
        correct = saved["logits"].argmax(1) == saved["y_true"]
        by_skin = [correct[saved["sensitive_skin"] == code].mean() for code in (0, 1)]
    row = row_of(results, cell)
    table = pd.read_csv(results / "deployment_results.csv").set_index("cell").loc[cell]
    for deployed in (row, table):
        assert deployed["deployed_worst_group"] in ("light", "dark")
        assert float(deployed["deployed_worst_group_accuracy"]) == pytest.approx(min(by_skin), abs=1e-12)
    assert row["agreement"] == row_of(finished[1], cell)["agreement"]
    assert study(config, results, phases=("analysis",)) == 0
    assert_same(results, finished[1])


def test_lost_predictions_of_an_engine_are_made_again(copied, finished, capsys):
    config, results = copied
    cell = cell_id(results, "ptq_static-w8a8")
    (results / "predictions" / f"{cell}@onnxruntime.npz").unlink()
    assert study(config, results, "--dry-run") == 0
    assert f"deploy  {cell}" in capsys.readouterr().out
    # metrics of another attribute cannot be derived: they are empty, and not those of the first one
    assert study(config, results, "--set", "analysis.attribute=skin", phases=("analysis",)) == 0
    row = row_of(results, cell)
    assert row["worst_group"] in ("light", "dark") and {row[column] for column in DEPLOYED_COLUMNS} == {""}
    assert row["engine"] == "torch" and float(row["size_mb"]) != float(row_of(finished[1], cell)["size_mb"])
    assert study(config, results) == 0
    assert_same(results, finished[1])


def test_fresh_removes_what_was_deployed(copied):
    config, results = copied
    cell = cell_id(results, "ptq_static-w8a8")
    store, config = Store(results), load_config(config)
    store.clear([cell])
    assert [path.name for folder in ("cells", "models", "predictions") for path in (results / folder).glob("*")
            if cell in path.name] == []  # fmt: skip
    assert len(list((results / "predictions").glob("*@onnxruntime.npz"))) == 1  # the baseline's
    again = ("--fresh", "--set", "deployment.cells=[]", "deployment.export=[]")
    assert study(copied[0], results, *again) == 0
    assert not list((results / "models").iterdir()) and not list((results / "predictions").glob("*@*"))


# -------------------------------------------------------------------------------------------------------------- failing


def test_an_engine_that_fails_leaves_the_cell_done_and_is_tried_again(
    finished, tmp_path, quick_export, monkeypatch, capsys
):
    config, reference = finished
    results = tmp_path / "results"
    failing(monkeypatch, "w8a8", DeploymentError("it has\nno kernel"))
    assert study(config, results) == 1
    out = capsys.readouterr().out
    cell = cell_id(results, "ptq_static-w8a8")
    assert f"deployment failed: {cell}: onnxruntime: it has no kernel\n" in out and "1 deployments failed" in out
    row = row_of(results, cell)
    assert (row["status"], row["error"], row["engine"]) == ("done", "", "torch")
    assert row["accuracy"] == row_of(reference, cell)["accuracy"]
    assert {row[column] for column in DEPLOYED_COLUMNS} == {""}
    table = pd.read_csv(results / "deployment_results.csv", keep_default_na=False, dtype=str).set_index("cell")
    assert table.loc[cell, ["engine", "status", "error", "agreement", "size_mb"]].tolist() == [
        "onnxruntime", "failed", "it has no kernel", "", "",
    ]  # fmt: skip
    assert cell not in set(pd.read_csv(results / "deployment_groups.csv")["cell"])
    before = stamps(results, "checkpoints") | {
        path: stamp for path, stamp in stamps(results, "cells", "predictions").items() if cell not in path.name
    }
    # the status and a retry see what the exit status does
    assert study(config, results, "--status", phases=("quantization",)) == 0
    assert f"failed: {cell}: deployment failed: onnxruntime: it has no kernel\n" in capsys.readouterr().out
    assert study(config, results, "--retry-failed") == 1
    assert f"deployment failed: {cell}: onnxruntime: it has no kernel\n" in capsys.readouterr().out
    assert not changed(before)
    # deselecting it ends the complaint, selecting it again the failure
    assert study(config, results, "--set", "deployment.cells=['*:none']", phases=("quantization",)) == 0
    monkeypatch.undo()
    assert study(config, results, "--retry-failed") == 0
    assert not changed(before)
    assert_same(results, reference)
    capsys.readouterr()
    assert study(config, results, "--retry-failed") == 0
    assert "no cell of these phases has failed" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["engine", "export", "model"])
def test_a_finished_cell_is_never_lost_to_its_deployment(copied, finished, monkeypatch, capsys, place):
    """Whatever is raised, wherever; what the row said of an engine with other settings goes."""
    config, results = copied
    cell = cell_id(results, "ptq_static-w8a8")

    def broken(*args, **kwargs):
        raise MemoryError("out of\nmemory")

    target = {
        "engine": "phases.deploy.load_engine",
        "export": "phases.deploy.export_onnx",
        "model": "phases.derived.apply_quantization",
    }[place]
    monkeypatch.setattr(target, broken)
    other = ("--set", "deployment.provider=cuda")  # which ONNX Runtime does not look at, but who knows
    assert study(config, results, *other, phases=("quantization",)) == 1
    assert f"deployment failed: {cell}: onnxruntime: MemoryError: out of memory" in capsys.readouterr().out
    row, reference = row_of(results, cell), row_of(finished[1], cell)
    assert (row["status"], row["engine"]) == ("done", "torch")
    assert {row[column] for column in DEPLOYED_COLUMNS} == {""}
    others = [name for name in ROW_COLUMNS if name not in (*COST_COLUMNS, *DEPLOYED_COLUMNS)]
    assert [row[name] for name in others] == [reference[name] for name in others]
    baseline = float(row_of(results, cell_id(results, "fp32"))["size_mb"])
    assert float(row["compression"]) == pytest.approx(baseline / float(row["size_mb"]))
    monkeypatch.undo()
    assert study(config, results) == 0
    assert_same(results, finished[1])


def test_one_of_two_engines_that_fails(copied, monkeypatch, capsys):
    """The row is the other one's, both are in the table, and both are wanted the next time."""
    config, results = copied
    cell = cell_id(results, "ptq_static-w8a8")

    def load(model, engine, **kwargs):
        if engine == "openvino":
            raise DeploymentError("no such processor")
        return deployment.load_engine(model, engine, **kwargs)

    monkeypatch.setattr("phases.deploy.load_engine", load)
    monkeypatch.setitem(engines.REQUIREMENTS, "openvino", ("json", "openvino"))
    both = ("--set", "deployment.engines=[openvino, onnxruntime]", "deployment.cells=['*:ptq_static:8']")
    assert study(config, results, *both, phases=("quantization",)) == 1
    out = capsys.readouterr().out
    assert f"deployment failed: {cell}: openvino: no such processor" in out and "1 deployments failed" in out
    rows = record_of(results, cell)["extra"]["deployment"]
    assert [(row["engine"], row["status"]) for row in rows] == [("openvino", "failed"), ("onnxruntime", "done")]
    assert row_of(results, cell)["engine"] == "onnxruntime"
    assert not is_complete(
        next(c for c in plan(load_config(config))["quantization"] if c.id == cell),
        load_config(config, [*both[1:]]),
        Store(results),
    )


def test_an_engine_that_is_not_installed_is_told_before_anything_is_computed(finished, tmp_path, monkeypatch, capsys):
    config, results = finished[0], tmp_path / "results"
    monkeypatch.setitem(engines.REQUIREMENTS, "openvino", ("no_such_module", "openvino"))
    forbid(monkeypatch)
    both = ("--set", "deployment.engines=[onnxruntime, openvino]")
    error = refused(capsys, config, results, *both)
    assert "deployment.engines" in error and "pip install openvino" in error
    assert not results.exists()
    shutil.copytree(finished[1], results)
    assert study(config, results, *both, phases=("analysis",)) == 0  # which runs no engine
    assert study(config, tmp_path / "none", *both, "deployment.cells=[]", "--dry-run") == 0


def test_a_models_folder_that_cannot_be_written_stops_the_run_at_once(copied, monkeypatch, capsys):
    config, results = copied
    models, before = results / "models", contents(results)
    forbid(monkeypatch)
    if os.geteuid() == 0:  # who may write anywhere
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "models" and access(path, mode))
    models.chmod(0o500)
    try:
        assert f"{models}: cannot be written" in refused(capsys, config, results, *ALSO_W4A8)
    finally:
        models.chmod(0o700)
    assert contents(results) == before and not temporaries(results)


@pytest.mark.parametrize("kept", [True, False])
def test_a_file_that_cannot_be_written_loses_nothing(copied, finished, capsys, kept):
    """A real write error: no file may grow past 250 kB, which the ONNX file needs and nothing else does."""
    config, results = copied
    cell = cell_id(results, "ptq_static-w8a8")
    for path in (results / "models" / f"{cell}.onnx", results / "predictions" / f"{cell}@onnxruntime.npz"):
        path.unlink()
    records, tables = stamps(results, "cells"), contents(results)
    changes = () if kept else ("--set", "deployment.export=[]")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, limits[1]))
    try:
        error = refused(capsys, config, results, *changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{cell}.onnx" in error and "File too large" in error and "finished cells are safe" in error
    assert not changed(records) and contents(results) == tables and not temporaries(results)
    assert study(config, results) == 0
    assert_same(results, finished[1])


def test_killed_during_the_export_and_run_again(finished, tmp_path, quick_export):
    config, reference = finished
    results = tmp_path / "results"
    command = [sys.executable, "main.py", "--phase", "baseline", "--config", str(config), "--results-dir", str(results),
               "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((results / "models").glob(".*.tmp")) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [name for name in temporaries(results) if ".onnx." in name], "killed too late"
    assert not list((results / "cells").iterdir())
    assert study(config, results) == 0
    assert not temporaries(results)
    assert_same(results, reference)


def test_a_latency_that_was_perhaps_not_measured_alone_says_so(monkeypatch):
    """In the cell's record and in a line; the columns are those of every other cell."""
    why, lines = "a cell did not pause within 180 s", []
    config = load_config(None, [])
    report = SimpleNamespace(line=lines.append)
    one = Latency(1, 2.0, 3.0)
    for disturbed in (None, why):
        monkeypatch.setattr(
            quiet, "alone", lambda disturbed=disturbed: contextlib.nullcontext(quiet.Measurement(disturbed))
        )
        measured = deploy._latencies(lambda *_: one, torch.zeros(1, 3, 8, 8), config, "w8a8: torch", report)
        result = deploy._result([], [], {"size_mb": 1.0, **measured}, None, config)
        assert result.columns.keys() == {"size_mb", *TIMING_COLUMNS[:4]}
        assert result.extra["simulation"].get("latency_disturbed") == disturbed
    assert lines == [f"  w8a8: torch: its latency was perhaps not measured alone: {why}"]
