"""Experiment tracking: what is logged is what was measured, offline; and nothing that it does costs a result."""

import importlib.util
import json

import pandas as pd
import pytest

import main
from config import ConfigError, load_config
from execution import tracking
from execution.tracking import Tracker, check_installed, entry_of
from plan import plan
from store import TIMING_COLUMNS, Store

STUDY = {
    "data": {
        "min_group_size": 5,
        "synthetic": {
            "target": "smile", "sensitive": ["gender", "skin"], "train_images": 96, "validation_images": 32,
            "test_images": 64,
        },
    },
    "models": {"architectures": ["test_resnet"]},
    "training": {"epochs": 2},
    "quantization": {"bit_widths": [8], "methods": ["ptq_static"], "ptq_static": {"calibration_samples": 16}},
    "mitigation": {"strategies": []},
    "analysis": {"bootstrap_replicates": 100},
    "deployment": {"cells": [], "export": [], "latency": False},
    "run": {"threads_per_cell": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config file, results) of two cells, not tracked."""
    root = tmp_path_factory.mktemp("tracking")
    (root / "study.yaml").write_text(json.dumps({**STUDY, "data": {**STUDY["data"], "cache": str(root / "cache")}}))
    assert study(root / "study.yaml", root / "results") == 0
    assert not (root / "results" / "tracking").exists()  # off by default
    return root / "study.yaml", root / "results"


def study(config, results, *overrides) -> int:
    for phase in ("baseline", "quantization"):
        sets = ["--set", *overrides] if overrides else []
        arguments = ["--config", str(config), "--results-dir", str(results), "--device", "cpu", "--quiet", *sets]
        status = main.main(["--phase", phase, *arguments])
        if status:
            return status
    return 0


@pytest.fixture
def log(finished, tmp_path):
    """log(name): both cells of the study logged by that tracker below tmp_path; -> their entries."""
    config_path, results = finished

    def log_with(name):
        config, store = load_config(config_path, [f"tracking={name}"]), Store(results)
        told: list[str] = []
        tracker = Tracker(config, tmp_path, told.append)
        entries = []
        for cell in (cell for cells in plan(config).values() for cell in cells):
            record = store.record(cell.id)
            for _ in range(2):  # a second time, as when a deployment is added
                tracker.log(cell, record["row"], record["extra"])
            entries.append(entry_of(cell, record["row"], record["extra"], config))
        assert told == []
        return entries

    return log_with


def needs(package: str):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (pip install {package})")


# -------------------------------------------------------------------------------------------------------- what is told


def test_an_entry_holds_the_row_the_settings_and_the_curve(finished):
    config, store = load_config(finished[0]), Store(finished[1])
    baseline, quantized = (cell for cells in plan(config).values() for cell in cells)
    record = store.record(baseline.id)
    entry = entry_of(baseline, record["row"], record["extra"], config)
    assert (entry.cell, entry.phase, entry.status, entry.error) == (baseline.id, "baseline", "done", None)
    assert entry.settings["training.epochs"] == 2 and entry.settings["sensitive"] == "['gender', 'skin']"
    assert [epoch for epoch, _ in entry.curve] == [1, 2]
    log = pd.read_csv(finished[1] / "training_log.csv").set_index("epoch")
    for epoch, values in entry.curve:
        assert values["training/train_loss"] == pytest.approx(log.loc[epoch, "train_loss"])
        assert values["training/validation_accuracy"] == pytest.approx(log.loc[epoch, "validation_accuracy"])
    row = pd.read_csv(finished[1] / "quantization_results.csv").iloc[0]
    record = store.record(quantized.id)
    undefined = {"disparate_impact": None, "predictive_parity_difference": float("nan")}
    entry = entry_of(quantized, {**record["row"], **undefined}, record["extra"], config)
    assert entry.settings["weight_bits"] == 8 and entry.settings["options.observer"] == "mse"
    assert entry.metrics["accuracy"] == pytest.approx(row["accuracy"]) and entry.curve == []
    assert entry.metrics["delta_accuracy"] == pytest.approx(row["delta_accuracy"])
    assert not undefined.keys() & entry.metrics.keys()  # it is not logged, and not 0
    assert not {"seed", "weight_bits", "cell", "worst_group"} & entry.metrics.keys()


def test_a_failed_cell_has_its_error_and_no_metrics(finished):
    config = load_config(finished[0])
    cell = plan(config)["quantization"][0]
    entry = entry_of(cell, {**cell.identity(), "status": "failed", "error": "RuntimeError: no"}, {}, config)
    assert (entry.status, entry.error, entry.metrics, entry.curve) == ("failed", "RuntimeError: no", {}, [])


# ---------------------------------------------------------------------------------------------------- reading it back


@needs("tensorboard")
def test_tensorboard_event_files_hold_the_entries(log, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for entry in log("tensorboard"):
        folder = tmp_path / "tracking" / "tensorboard" / entry.cell
        assert len(list(folder.iterdir())) == 1  # logged twice, there once
        events = EventAccumulator(str(folder))
        events.Reload()
        names = set(events.Tags()["scalars"])
        assert names == entry.metrics.keys() | {name for _, values in entry.curve for name in values}
        for name, value in entry.metrics.items():
            assert [event.value for event in events.Scalars(name)] == pytest.approx([value], rel=1e-6)
        for name in entry.curve[0][1] if entry.curve else ():
            found = [(event.step, event.value) for event in events.Scalars(name)]
            assert found == [(epoch, pytest.approx(values[name], rel=1e-6)) for epoch, values in entry.curve]
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        settings = HParamsPluginData.FromString(content).session_start_info.hparams
        assert settings["cell"].string_value == entry.cell
        assert settings["method"].string_value == entry.settings["method"]


@needs("mlflow")
def test_mlflow_runs_hold_the_entries(log, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    entries = log("mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'tracking' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tracking.PROJECT)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {entry.cell for entry in entries}  # logged twice, there once
    for entry in entries:
        run = runs[entry.cell]
        assert run.info.status == "FINISHED" and run.data.tags["status"] == "done"
        assert {key: run.data.metrics[key] for key in entry.metrics} == pytest.approx(entry.metrics)
        assert run.data.params == {key: str(value) for key, value in entry.settings.items()}
        if entry.curve:
            history = client.get_metric_history(run.info.run_id, "training/train_loss")
            found = {point.step: point.value for point in history}
            assert found == {epoch: pytest.approx(values["training/train_loss"]) for epoch, values in entry.curve}
    assert not (tmp_path / "mlruns").exists()  # nothing outside results_dir


@needs("wandb")
def test_wandb_stays_offline_without_a_key(log, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    entries = log("wandb")
    for entry in entries:
        files = list((tmp_path / "tracking" / "wandb").glob(f"offline-run-*/run-{entry.cell}.wandb"))
        assert files, entry.cell
        content = files[-1].read_bytes()
        for told in ("accuracy", entry.settings["method"], *(("train_loss",) if entry.curve else ())):
            assert told.encode() in content, told


# ------------------------------------------------------------------------------------------------------------- failing


class Broken:
    made = 0

    def __init__(self, folder):
        Broken.made += 1

    def log(self, entry):
        raise OSError("no space\nleft")


def test_a_tracker_that_fails_costs_no_result_and_is_told_of_once(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tracking.BACKENDS, "tensorboard", Broken)
    Broken.made = 0
    results = tmp_path / "results"
    assert study(finished[0], results, "tracking=tensorboard") == 0
    out = capsys.readouterr().out
    assert out.count("tracking with tensorboard failed and is off from here on: OSError: no space left") == 2  # 2 runs
    assert Broken.made == 2
    for name in ("baseline_results.csv", "quantization_results.csv"):  # the same cells, and the same numbers
        ours, theirs = (pd.read_csv(root / name).drop(columns=list(TIMING_COLUMNS)) for root in (results, finished[1]))
        pd.testing.assert_frame_equal(ours, theirs)


def test_it_is_off_after_the_first_failure(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.BACKENDS, "mlflow", Broken)
    config, store = load_config(finished[0], ["tracking=mlflow"]), Store(finished[1])
    told: list[str] = []
    tracker = Tracker(config, tmp_path, told.append)
    for cell in (cell for cells in plan(config).values() for cell in cells):
        tracker.log(cell, store.record(cell.id)["row"], {})
    assert len(told) == 1


def test_a_missing_package_is_refused_at_the_start(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for name in tracking.PIP:
        with pytest.raises(ConfigError, match=f"tracking: {name} is not installed; pip install {tracking.PIP[name]}"):
            check_installed(name)
    check_installed("none")
    assert study(finished[0], tmp_path / "r", "tracking=wandb") == 2
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "r").exists()
    assert main.main(["--phase", "baseline", "--set", "tracking=tensorbord"]) == 2
    assert "tracking: unknown value 'tensorbord' (did you mean tensorboard?)" in capsys.readouterr().err
