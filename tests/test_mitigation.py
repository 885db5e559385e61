"""The mitigation phase from the command line: every strategy, hybrids, diagnostics added later, a cell lost."""

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import main
from config import load_config
from datasets import BatchLoader, load_dataset
from fairness_losses import Groups
from phases import diagnose
from plan import plan
from quantization import apply_quantization
from quantizers.numerics import QuantizationWarning
from sections.mitigation import PTQ_STRATEGIES, STRATEGIES, TRAINED_STRATEGIES

CONFIG = {
    "data": {
        "dataset": "synthetic",
        "min_group_size": 5,
        "synthetic": {
            "target": "smile",
            "sensitive": ["gender", "skin"],
            "train_images": 192,
            "validation_images": 120,
            "test_images": 160,
        },
    },
    "models": {"architectures": ["test_resnet"]},
    "training": {"epochs": 2, "learning_rate": 0.003},
    "quantization": {
        "bit_widths": [4],
        "methods": ["ptq_static"],
        "ptq_static": {"calibration_samples": 64, "reconstruction_iterations": 5},
        "qat": {"batch_size": 48},
    },
    "mitigation": {
        "strategies": [
            *STRATEGIES,
            {"strategy": "distillation", "start": "sensitive_layers", "start_options": {"layer_share": 0.5}},
            {"strategy": "fair_reconstruction", "weighting": "balanced", "balance": "attribute"},
        ],
        "fair_mixed_precision": {"sensitivity_samples": 32, "calibration_samples": 64},
        "sensitive_layers": {"widen": "weights_and_inputs"},
    },
    "analysis": {"bootstrap_replicates": 200},
    "deployment": {"cells": [], "export": [], "latency_repeats": 1},
    "run": {"threads_per_cell": 1},
}


def write_config(folder: Path, cache: Path, **changes) -> Path:
    config = json.loads(json.dumps(CONFIG))
    config["data"]["cache"] = str(cache)
    for section, keys in changes.items():
        config[section].update(keys)
    path = folder / "mitigation.yaml"
    path.write_text(json.dumps(config))
    return path


def study(config: Path, results: Path, *arguments: str) -> int:
    return main.main(["--config", str(config), "--results-dir", str(results), "--device", "cpu", "--quiet", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mitigation")
    config = write_config(folder, folder / "cache")
    assert study(config, folder / "results", "--phase", "all") == 0
    return config, folder / "results"


def rows_of(results: Path, phase: str = "mitigation") -> pd.DataFrame:
    return pd.read_csv(results / f"{phase}_results.csv").set_index("cell")


def record(results: Path, cell: str) -> dict:
    return json.loads((results / "cells" / f"{cell}.json").read_text())


def cells_of(config: Path, strategy: str) -> list:
    return [cell for cell in plan(load_config(config))["mitigation"] if cell.strategy == strategy]


def test_every_strategy_is_a_cell_that_gives_a_model_of_its_own(finished):
    _, results = finished
    rows = rows_of(results)
    assert set(rows["strategy"]) == set(STRATEGIES) and len(rows) == len(STRATEGIES) + 2
    assert (rows["status"] == "done").all() and rows["accuracy"].between(0, 1).all()
    predictions = {cell: np.load(results / "predictions" / f"{cell}.npz")["logits"] for cell in rows.index}
    (plain,) = rows_of(results, "quantization").index
    predictions["plain"] = np.load(results / "predictions" / f"{plain}.npz")["logits"]
    names = list(predictions)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            assert not np.array_equal(predictions[one], predictions[other]), (one, other)


def test_what_each_repair_costs_and_did_is_in_its_row_and_record(finished):
    config, results = finished
    rows = rows_of(results)
    for strategy in TRAINED_STRATEGIES:
        for cell in cells_of(config, strategy):
            assert rows.loc[cell.id, "training_seconds"] > 0 and rows.loc[cell.id, "method"] == "qat"
            assert len(record(results, cell.id)["extra"]["training_log"]) == 1
    for strategy in PTQ_STRATEGIES:
        for cell in cells_of(config, strategy):
            assert np.isnan(rows.loc[cell.id, "training_seconds"]) and rows.loc[cell.id, "calibration_seconds"] > 0
            groups = record(results, cell.id)["extra"]["calibration_groups"]
            expected = 2 if cell.options["balance"] == "gender" else 4
            assert len(groups) == expected and sum(groups.values()) <= 64
    log = pd.read_csv(results / "training_log.csv")
    assert {cell.id for strategy in TRAINED_STRATEGIES for cell in cells_of(config, strategy)} <= set(log["cell"])
    (layers,) = cells_of(config, "sensitive_layers")
    drifts = pd.DataFrame(record(results, layers.id)["extra"]["sensitive_layers_groups"])
    assert len(drifts) == 4 and drifts["drift_chosen"].max() <= drifts["drift_uniform"].max()
    (output,) = cells_of(config, "output_calibration")
    drifts = pd.DataFrame(record(results, output.id)["extra"]["output_calibration"])
    assert len(drifts) == 4 and drifts["drift_after"].mean() < drifts["drift_before"].mean()
    plain = rows_of(results, "quantization")
    assert rows.loc[layers.id, "size_mb"] <= plain["size_mb"].iloc[0] * 1.01  # the same bytes


def test_running_it_again_computes_nothing_and_a_lost_cell_comes_back_the_same(finished):
    config, results = finished
    times = {path: path.stat().st_mtime_ns for path in (results / "cells").iterdir()}
    assert study(config, results, "--phase", "mitigation") == 0
    assert {path: path.stat().st_mtime_ns for path in (results / "cells").iterdir()} == times
    (cell,) = [cell for cell in cells_of(config, "distillation") if cell.options["start"] == "sensitive_layers"]
    (thresholds,) = cells_of(config, "threshold_adjustment")
    for lost in (cell.id, thresholds.id):
        before = np.load(results / "predictions" / f"{lost}.npz")["logits"]
        (results / "cells" / f"{lost}.json").unlink()
        (results / "predictions" / f"{lost}.npz").unlink()
        assert study(config, results, "--phase", "mitigation") == 0
        assert np.array_equal(np.load(results / "predictions" / f"{lost}.npz")["logits"], before)


def test_diagnostics_of_finished_cells_can_be_asked_for_later(finished, capsys):
    config, results = finished
    (cell,) = cells_of(config, "minimax_ranges")
    before = rows_of(results).drop(columns=["calibration_seconds"])
    sets = ("--set", "mitigation.diagnostics={cells: '*:minimax_ranges', samples: 100, hessian_samples: 4}")
    assert study(config, results, "--phase", "mitigation", "--dry-run", *sets) == 0
    assert f"diagnose {cell.id}" in capsys.readouterr().out
    assert study(config, results, "--phase", "mitigation", *sets) == 0
    pd.testing.assert_frame_equal(rows_of(results).drop(columns=["calibration_seconds"]), before)
    table = pd.read_csv(results / "diagnostics.csv")
    assert set(table["cell"]) == {cell.id} and set(table["model"]) == {"fp32", "quantized"}
    assert table.groupby("model")["n"].sum().tolist() == [100, 100]
    assert table["hessian_eigenvalue"].notna().all() and table["logit_variance"].notna().all()
    clipping = pd.read_csv(results / "diagnostics_clipping.csv")
    assert clipping["clipping_rate"].between(0, 1).all() and clipping["layer"].nunique() > 5
    assert len(pd.read_csv(results / "diagnostics_exemplars.csv")) == table["group"].nunique()
    assert study(config, results, "--phase", "mitigation", "--dry-run", *sets) == 0
    assert "diagnose" not in capsys.readouterr().out


def test_a_diagnosis_that_fails_leaves_the_cell_as_it_is(finished, monkeypatch, capsys):
    config, results = finished
    (cell,) = cells_of(config, "fair_bias_correction")
    before = record(results, cell.id)

    def fail(*arguments, **options):
        raise RuntimeError("another machine")

    monkeypatch.setattr("phases.derived.apply_quantization", fail)
    sets = ("--set", "mitigation.diagnostics={cells: '*:fair_bias_correction', samples: 50}")
    assert study(config, results, "--phase", "mitigation", *sets) == 1
    told = capsys.readouterr().out
    assert "what it lacks could not be added: RuntimeError: another machine" in told
    assert f"diagnostics failed: {cell.id}: RuntimeError: another machine" in told and "; 1 diagnostics failed" in told
    after = record(results, cell.id)
    assert after["extra"].pop("diagnostics_failure")["error"] == "RuntimeError: another machine"
    assert after == before


def test_diagnostics_that_failed_are_retried_and_nothing_else(finished, monkeypatch, capsys):
    """Of two cells one fails; a third is asked for later: it is to do, and not retried."""
    config, results = finished
    (failing,), (other,) = (cells_of(config, name) for name in ("bias_aware_calibration", "group_weighted_observers"))
    (later,) = cells_of(config, "output_calibration")
    stamp = lambda cell: (results / "cells" / f"{cell.id}.json").stat().st_mtime_ns  # noqa: E731

    def diagnosing(*cells: str) -> tuple[str, str]:
        patterns = ", ".join(f"'*:{cell.strategy}'" for cell in cells)
        return ("--set", f"mitigation.diagnostics={{cells: [{patterns}], samples: 50, hessian_samples: 2}}")

    def status(*arguments: str) -> dict:
        capsys.readouterr()
        assert study(config, results, "--status", "--json", *arguments) == 0
        return json.loads(capsys.readouterr().out)

    def fails(fp32, quantized, cell, *more):
        if cell.id == failing.id:
            raise RuntimeError("no slopes")
        return measured(fp32, quantized, cell, *more)

    measured = diagnose._measured
    monkeypatch.setattr(diagnose, "_measured", fails)
    assert study(config, results, "--phase", "mitigation", *diagnosing(failing, other)) == 1
    assert f"diagnostics failed: {failing.id}: RuntimeError: no slopes" in capsys.readouterr().out
    told = status(*diagnosing(failing, other, later))
    assert [(each["cell"], each["error"], each["because_of"]) for each in told["failed"]] == [
        (failing.id, "diagnostics failed: RuntimeError: no slopes", None)
    ]
    assert (told["phases"]["mitigation"]["failed"], told["phases"]["mitigation"]["to_do"]) == (1, 1)
    before = {cell.id: stamp(cell) for cell in (failing, other, later)}
    again = ("--phase", "mitigation", "--retry-failed", *diagnosing(failing, other, later))
    assert study(config, results, *again) == 1
    monkeypatch.setattr(diagnose, "_measured", measured)
    assert study(config, results, *again) == 0
    assert [cell.id for cell in (failing, other, later) if stamp(cell) != before[cell.id]] == [failing.id]
    told = status(*diagnosing(failing, other, later))
    assert told["failed"] == [] and told["phases"]["mitigation"]["to_do"] == 1
    capsys.readouterr()
    assert study(config, results, *again) == 0
    assert "no cell of these phases has failed" in capsys.readouterr().out
    assert failing.id in set(pd.read_csv(results / "diagnostics.csv")["cell"])
    assert record(results, failing.id)["extra"]["diagnostics_failure"] is None  # other settings do not bring it back


def test_groups_are_counted_on_the_whole_training_split(tmp_path):
    """Not on an epoch, which leaves out a last, smaller batch that may hold a group's only image."""
    config = load_config(write_config(tmp_path, tmp_path / "cache"))
    dataset = load_dataset(config, "synthetic")
    split = dataset.splits["train"].subset(np.arange(79))
    split.sensitive["gender"][:] = 0
    split.sensitive["gender"][3] = 1  # one image alone
    for seed in range(10):
        loader = BatchLoader(split, 32, shuffle=True, generator=torch.Generator().manual_seed(seed), drop_last=True)
        assert Groups.of(loader.annotations(), ["gender"]).counts.tolist() == [78, 1]
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        options = {"calibration_samples": 16, "attributes": ["gender"], "epochs": 2}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QuantizationWarning)
            apply_quantization(model, "reweighing", 8, loader, train_data=loader, **options)


def test_what_a_cell_cannot_do_is_its_own_row(tmp_path, finished, capsys):
    """A group without images of one class: thresholds are refused with the counts, the others go on."""
    config, _ = finished
    changed = write_config(
        tmp_path,
        Path(json.loads(config.read_text())["data"]["cache"]),
        data={
            "synthetic": {
                **CONFIG["data"]["synthetic"],
                "sensitive": ["gender", "skin", "age"],
                "label_correlation": 1.0,
                "target": "smile",
            }
        },
        mitigation={"strategies": ["threshold_adjustment", "bias_aware_calibration"]},
    )
    assert study(changed, tmp_path / "results", "--phase", "all") == 1
    rows = rows_of(tmp_path / "results").set_index("strategy")
    assert rows.loc["bias_aware_calibration", "status"] == "done"
    assert rows.loc["threshold_adjustment", "status"] == "failed"
    assert "positives among" in rows.loc["threshold_adjustment", "error"]
    assert "failed: " in capsys.readouterr().out
