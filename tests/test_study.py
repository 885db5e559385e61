"""The study from the command line, end to end: artifacts, resume, kill -9, bad input, on data made here and real
faces."""

import csv
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import main
import training
from config import load_config
from models import build_model
from phases.drawing import TIMED
from plan import plan
from store import COST_COLUMNS, DEPLOYED_COLUMNS, GROUP_COLUMNS, ROW_COLUMNS, SCHEMA_VERSION, TIMING_COLUMNS

ROOT = Path(__file__).parent.parent
TINY = {
    "data": {
        "dataset": "synthetic",
        "min_group_size": 5,
        "synthetic": {
            "target": "smile",
            "sensitive": ["gender", "skin"],
            "train_images": 192,
            "validation_images": 64,
            "test_images": 160,
        },
    },
    "models": {"architectures": ["test_resnet", "test_efficientnet"]},
    "training": {"epochs": 1, "learning_rate": 0.003},
    "quantization": {
        "bit_widths": [8, 2],
        "methods": [
            "ptq_static",
            "ptq_dynamic",
            "PTQ_W4A8",
            {
                "method": "ptq_static",
                "bit_widths": [4],
                "equalize": True,
                "bias_correction": True,
                "rounding": "adaround",
                "reconstruction_iterations": 5,
            },
            {"method": "mixed_precision", "bit_widths": ["W4A8", 8], "sensitivity_samples": 4},
            {"method": "qat", "bit_widths": [4], "epochs": 2, "max_train": 64},
        ],
        "ptq_static": {"calibration_samples": 64},
    },
    "analysis": {"bootstrap_replicates": 200, "vector_format": "svg"},  # PDFs take half as long again
    "deployment": {"cells": [], "export": [], "latency_repeats": 1},  # test_deploy.py is about those
    "run": {"threads_per_cell": 1},
}
CELLS = {"baseline": 2, "quantization": 18, "mitigation": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def write_config(folder: Path, cache: Path, **changes) -> Path:
    """TINY with sections of `changes` merged over it, as a file (JSON is YAML)."""
    config = json.loads(json.dumps(TINY))
    config["data"]["cache"] = str(cache)
    for section, keys in changes.items():
        config.setdefault(section, {}).update(keys)
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(config))
    return path


def study(config: Path, results: Path, *arguments: str, phase: str = "all") -> int:
    return main.main(
        [
            "--phase",
            phase,
            "--config",
            str(config),
            "--results-dir",
            str(results),
            "--device",
            "cpu",
            "--quiet",
            *arguments,
        ]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache) -> tuple[Path, Path]:
    """(config, results) of one uninterrupted study; tests only read it."""
    folder = tmp_path_factory.mktemp("study")
    config = write_config(folder, cache)
    assert study(config, folder / "results") == 0
    return config, folder / "results"


def tables(results: Path) -> dict[str, str]:
    """The result files as text, without what is measured in time."""
    texts = {}
    for path in sorted(
        [*results.glob("*_results.csv"), results / "training_log.csv", results / "layer_sensitivity.csv"]
    ):
        frame = pd.read_csv(path, keep_default_na=False, dtype=str)
        texts[path.name] = frame.drop(columns=[c for c in (*TIMING_COLUMNS, "seconds") if c in frame]).to_csv(
            index=False
        )
    for path in sorted((results / "predictions").glob("*.npz")):
        texts[path.name] = str(hash(path.read_bytes()))
    for path in sorted((results / "analysis").rglob("*")):
        if path.stem in TIMED:  # drawn from seconds
            continue
        if path.suffix in (".csv", ".json", ".png") or (
            path.suffix == ".md" and path.stem not in ("results", "repairs")
        ):
            texts[f"analysis/{path.name}"] = str(hash(path.read_bytes()))
        if path.name == "summary.md":
            texts["analysis/summary.md"] = re.sub(r"[\d.]+ ms an image", "", path.read_text())
        if path.name == "results.csv":
            texts["analysis/results.csv"] = pd.read_csv(path, dtype=str).drop(columns="ms").to_csv(index=False)
        if path.name == "costs.csv":  # seconds
            texts["analysis/costs.csv"] = pd.read_csv(path)[["hypothesis", "cell", "reference"]].to_csv(index=False)
        if path.name == "repairs.csv":
            texts["analysis/repairs.csv"] = (
                pd.read_csv(path, dtype=str).drop(columns=["calibration s", "training s"]).to_csv(index=False)
            )
    return texts


# ----------------------------------------------------------------------------------------------------------- artifacts


def test_training_and_mixed_precision_leave_their_tables(finished):
    config, results = finished
    cells = {cell.id: cell for block in plan(load_config(config)).values() for cell in block}
    rows = pd.read_csv(results / "quantization_results.csv").set_index("cell")
    log = pd.read_csv(results / "training_log.csv")
    trained = log.groupby("cell")["epoch"].max()
    assert {cells[cell].method for cell in trained.index} == {"none", "qat"}
    for cell, epochs in trained.items():
        if cells[cell].method == "qat":
            assert epochs == 2 and rows.loc[cell, "training_seconds"] > 0 and rows.loc[cell, "calibration_seconds"] > 0
    assert rows["training_seconds"].notna().sum() == 2
    table = pd.read_csv(results / "layer_sensitivity.csv")
    mixed = [cell for cell in rows.index if cells[cell].method == "mixed_precision"]
    assert list(dict.fromkeys(table["cell"])) == mixed and len(mixed) == 4
    for cell in mixed:
        record = json.loads((results / "cells" / f"{cell}.json").read_text())["extra"]
        block = table[table["cell"] == cell]
        assert len(block) == 6 * (len(record["widths"]) - 1)  # six widths of every layer but the classifier
        chosen = block.drop_duplicates("layer").set_index("layer")["chosen_bits"].to_dict()
        assert chosen == {row["layer"]: row["bits"] for row in record["widths"] if row["bits"] != 32}
        assert record["budgets"]["size_bytes"] <= record["budgets"]["size_budget_bytes"]
        uniform = rows[(rows.method == "ptq_static") & (rows.weight_bits == rows.loc[cell, "weight_bits"])]
        uniform = uniform[uniform.activation_bits == 8]
        uniform = uniform[uniform.model == rows.loc[cell, "model"]]
        assert rows.loc[cell, "size_mb"] < 1.1 * float(uniform["size_mb"].iloc[0])
    assert (results / "analysis" / "layer_sensitivity.png").stat().st_size > 10_000


def test_every_cell_is_there_and_every_column_is_true(finished):
    config, results = finished
    planned = plan(load_config(config))
    assert {phase: len(cells) for phase, cells in planned.items()} == CELLS
    baselines = {}
    for phase, cells in planned.items():
        with (results / f"{phase}_results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == ROW_COLUMNS
        assert [row["cell"] for row in rows] == [cell.id for cell in cells]
        for row, cell in zip(rows, cells, strict=True):
            assert (row["status"], row["error"], row["engine"]) == ("done", "", "torch")
            with np.load(results / "predictions" / f"{cell.id}.npz") as saved:
                y_true, y_pred = saved["y_true"], saved["logits"].argmax(1)
                gender, skin = saved["sensitive_gender"], saved["sensitive_skin"]
                assert len(saved["index"]) == len(set(saved["index"].tolist())) == 160
            assert row["n_test"] == "160"
            correct = y_true == y_pred
            assert float(row["accuracy"]) == pytest.approx(correct.mean(), abs=1e-12)
            rates = [y_pred[gender == g].mean() for g in (0, 1)]
            assert float(row["demographic_parity_difference"]) == pytest.approx(abs(rates[0] - rates[1]), abs=1e-12)
            joint = [correct[(gender == g) & (skin == s)].mean() for g in (0, 1) for s in (0, 1)]
            assert float(row["intersectional_worst_group_accuracy"]) == pytest.approx(min(joint), abs=1e-12)
            assert float(row["accuracy_ci_low"]) <= float(row["accuracy"]) <= float(row["accuracy_ci_high"])
            for column in set(COST_COLUMNS) - {"engine", "calibration_seconds", "training_seconds"}:
                assert float(row[column]) > 0
            empty = {column for column, value in row.items() if value == ""}
            assert set(DEPLOYED_COLUMNS) <= empty  # nothing was deployed: not one image agrees or disagrees
            empty -= set(DEPLOYED_COLUMNS)
            if phase == "baseline":
                baselines[cell.id] = row
                assert float(row["training_seconds"]) > 0 and row["weight_bits"] == ""
            else:
                reference = baselines[row["baseline_cell"]]
                delta = float(row["accuracy"]) - float(reference["accuracy"])
                assert float(row["delta_accuracy"]) == pytest.approx(delta, abs=1e-12)
                assert float(row["compression"]) == pytest.approx(float(reference["size_mb"]) / float(row["size_mb"]))
                # nothing else is missing but what cannot be: rates without a denominator in a collapsed model
                undefined = {c for c in empty if "predictive_parity" in c or "disparate_impact" in c}
                assert empty <= {"error", "strategy", "training_seconds", *undefined}
            assert all(math.isfinite(float(row[c])) for c in ROW_COLUMNS if c.startswith("delta_") and row[c])


def test_sizes_follow_the_bits(finished):
    rows = pd.read_csv(finished[1] / "quantization_results.csv").query(
        "model == 'test_resnet' and method == 'ptq_static'"
    )
    size = rows.set_index(["weight_bits", "activation_bits"])["size_mb"]
    fp32 = pd.read_csv(finished[1] / "baseline_results.csv").query("model == 'test_resnet'")["size_mb"].item()
    weights = sum(p.numel() for p in build_model("test_resnet", 2, 32).parameters() if p.ndim > 1) / 1e6
    assert fp32 == pytest.approx(4 * weights, rel=0.05)
    assert size[8, 8] - size[4, 8] == pytest.approx(weights / 2, rel=0.02)
    assert size[4, 8] - size[2, 2] == pytest.approx(weights / 4, rel=0.02)


def test_artifacts_named_in_the_design_are_there(finished):
    results = finished[1]
    for name in ("config.yaml", "environment.json", "group_results.csv", "quantization_results.json",
                 "mitigation_results.json", "training_log.csv", "analysis/summary.md", "analysis/report.html",
                 "analysis/significance.csv", "analysis/hypotheses.json", "analysis/pareto.csv"):  # fmt: skip
        assert (results / name).stat().st_size > 0, name
    for figure in ("accuracy_heatmap", "per_group_performance", "mitigation_comparison", "hypothesis_validation",
                   "pareto_frontier"):  # fmt: skip
        with Image.open(results / "analysis" / f"{figure}.png") as image:
            assert min(image.size) > 300 and np.asarray(image.convert("L")).std() > 5, figure
    assert list((results / "analysis" / "tables").glob("*.tex"))
    assert not list(results.rglob(".*.tmp")) and not list((results / "models").iterdir())
    assert load_config(results / "config.yaml").results_dir == str(results)
    environment = json.loads((results / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]


def test_group_results_count_every_image_once(finished):
    groups = pd.read_csv(finished[1] / "group_results.csv", keep_default_na=False, na_values=[""])
    assert tuple(groups) == GROUP_COLUMNS
    assert groups["cell"].nunique() == sum(CELLS.values())
    for (_, attribute), rows in groups.groupby(["cell", "attribute"]):
        assert rows["n"].sum() == 160, attribute
        assert ((rows["accuracy_ci_low"] <= rows["accuracy"]) & (rows["accuracy"] <= rows["accuracy_ci_high"])).all()
    assert set(groups["attribute"]) == {"gender", "skin", "intersection"}


def test_the_checkpoint_gives_the_saved_predictions(finished):
    config, results = finished
    cell = plan(load_config(config))["baseline"][0]
    path = results / "checkpoints" / "synthetic-test_resnet-s0.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["checkpoint"])["description"]["cell"] == cell.id
    from datasets import BatchLoader, load_dataset
    from evaluation import predict
    from models import load_checkpoint

    dataset = load_dataset(load_config(config), "synthetic")
    model = build_model("test_resnet", 2, 32)
    load_checkpoint(path, model, {"model": "test_resnet"})
    predictions = predict(model, BatchLoader(dataset.splits["test"], 50))
    with np.load(results / "predictions" / f"{cell.id}.npz") as saved:
        np.testing.assert_allclose(predictions.logits, saved["logits"], atol=1e-4)


# -------------------------------------------------------------------------------------------------- running it again


def test_the_same_seed_twice_gives_the_same_files(finished, tmp_path):
    config, results = finished
    assert study(config, tmp_path / "again") == 0
    ours, theirs = tables(tmp_path / "again"), tables(results)
    for name in ("analysis/report.html",):
        assert name not in ours
    assert ours == theirs


def test_an_analysis_is_of_the_records_whatever_the_tables_were(finished, tmp_path):
    """A run that is killed leaves its tables behind its records."""
    config, results = finished
    copied = tmp_path / "copied"
    shutil.copytree(results, copied)
    behind = ["quantization_results.csv", "group_results.csv", "deployment_results.csv", "layer_sensitivity.csv"]
    for name in behind:
        lines = (copied / name).read_text().splitlines(keepends=True)
        (copied / name).write_text("".join(lines[: 1 + len(lines) // 2]))
    assert study(config, copied, phase="analysis") == 0
    ours, theirs = tables(copied), tables(results)
    assert {name: ours[name] == theirs[name] for name in theirs} == dict.fromkeys(theirs, True)


def test_another_seed_gives_another_model(finished, tmp_path):
    config, results = finished
    assert study(config, tmp_path / "r", "--set", "run.seeds=[1]", phase="baseline") == 0
    one = pd.read_csv(results / "baseline_results.csv")["accuracy"].tolist()
    other = pd.read_csv(tmp_path / "r" / "baseline_results.csv")
    assert other["seed"].tolist() == [1, 1]
    assert one != other["accuracy"].tolist()


def test_a_finished_study_is_kept(finished, tmp_path, capsys):
    results = tmp_path / "results"
    shutil.copytree(finished[1], results)
    stamps = {
        p: p.stat().st_mtime_ns
        for folder in ("checkpoints", "cells", "predictions")
        for p in (results / folder).iterdir()
    }
    before = tables(results)
    assert study(finished[0], results) == 0
    assert "2 of them done before" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert tables(results) == before


def test_an_edited_sweep_computes_only_what_is_new(finished, tmp_path, capsys):
    results = tmp_path / "results"
    shutil.copytree(finished[1], results)
    stamps = {p.name: p.stat().st_mtime_ns for p in (results / "cells").iterdir()}
    assert study(finished[0], results, "--set", "quantization.bit_widths=[8,3]") == 0
    fresh = [p.name for p in (results / "cells").iterdir() if stamps.get(p.name) != p.stat().st_mtime_ns]
    assert len(fresh) == 6 and all("w3a3" in name for name in fresh)
    rows = pd.read_csv(results / "quantization_results.csv")
    assert rows["weight_bits"].tolist()[:4] == [8, 3, 8, 3] and set(rows["weight_bits"].tail(4)) == {
        2
    }  # left over, last
    summary = (results / "analysis" / "summary.md").read_text()
    assert "w2a2" in summary and "left out" in summary


def test_metric_settings_need_no_new_predictions(finished, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished[1], results)
    stamps = {
        p: p.stat().st_mtime_ns for folder in ("checkpoints", "predictions") for p in (results / folder).iterdir()
    }
    changes = ("--set", "analysis.attribute=skin", "data.min_group_size=30")
    assert study(finished[0], results, *changes) == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    for phase in CELLS:
        rows = pd.read_csv(results / f"{phase}_results.csv")
        assert set(rows["worst_group"]) <= {"light", "dark"}
    groups = pd.read_csv(results / "group_results.csv")
    assert groups.query("n < 30")["too_small"].all() and not groups.query("n >= 30")["too_small"].any()
    assert len(groups.query("n < 30")) > 0


def test_fresh_computes_again(finished, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished[1], results)
    before, stamps = tables(results), {p: p.stat().st_mtime_ns for p in (results / "cells").iterdir()}
    assert study(finished[0], results, "--fresh", phase="mitigation") == 0
    renewed = {p.name for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp}
    assert len(renewed) == CELLS["mitigation"] and all("bias_aware" in name for name in renewed)
    assert tables(results) == before


def test_dry_run_prints_the_cells_and_writes_nothing(finished, tmp_path, capsys):
    assert study(finished[0], tmp_path / "none", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "quantization: 18 cells, 0 done, 18 to do" in out and out.count("to do   ") == sum(CELLS.values())
    assert not (tmp_path / "none").exists()
    assert study(finished[0], finished[1], "--dry-run", phase="baseline") == 0
    assert "baseline: 2 cells, 2 done, 0 to do" in capsys.readouterr().out


@pytest.mark.slow
def test_kill_9_at_several_points_loses_the_cell_in_flight_and_nothing_else(finished, tmp_path):
    """Killed again and again as soon as 1, 4, 8, 12 and 15 cells are there; then left to finish."""
    config, uninterrupted = finished
    results = tmp_path / "results"
    command = [sys.executable, "main.py", "--phase", "all", "--config", str(config), "--results-dir", str(results),
               "--device", "cpu"]  # fmt: skip
    survivors: dict[Path, int] = {}
    for cells in (1, 4, 8, 12, 15):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while len(list((results / "cells").glob("*.json"))) < cells and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert {p: p.stat().st_mtime_ns for p in survivors} == survivors, "a finished cell was touched"
        survivors = {p: p.stat().st_mtime_ns for p in (results / "cells").glob("*.json")}
        assert len(survivors) >= cells
    finish = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert finish.returncode == 0, finish.stderr
    assert {p: p.stat().st_mtime_ns for p in survivors} == survivors
    assert not list(results.rglob(".*.tmp"))
    ours, theirs = tables(results), tables(uninterrupted)
    assert ours == {**theirs, **{name: ours[name] for name in theirs if name not in ours}}
    assert ours.keys() == theirs.keys()


def test_ctrl_c_says_how_to_go_on(finished, tmp_path, monkeypatch, capsys):
    import evaluation

    calls = iter(range(100))

    def interrupted(*args, **kwargs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return evaluation.predict(*args, **kwargs)

    monkeypatch.setattr("phases.derived.predict", interrupted)
    results = tmp_path / "results"
    assert study(finished[0], results) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert len(pd.read_csv(results / "quantization_results.csv")) == 3  # the table holds what was finished
    monkeypatch.undo()
    assert study(finished[0], results) == 0
    assert tables(results) == tables(finished[1])


# ------------------------------------------------------------------------------------------------------- failing cells


def test_a_cell_that_fails_is_named_and_the_sweep_goes_on(finished, tmp_path, cache, capsys):
    diverging = {"per_model": {"test_resnet": {"learning_rate": 1e30, "warmup_epochs": 0.0}}}
    config = write_config(tmp_path, cache, training={**TINY["training"], **diverging})
    results = tmp_path / "results"
    assert study(config, results) == 1
    out = capsys.readouterr().out
    rows = pd.read_csv(results / "baseline_results.csv").set_index("model")
    assert rows["status"].to_dict() == {"test_resnet": "failed", "test_efficientnet": "done"}
    assert "training.learning_rate" in rows["error"]["test_resnet"] and "\n" not in rows["error"]["test_resnet"]
    assert math.isnan(rows["accuracy"]["test_resnet"]) and rows["accuracy"]["test_efficientnet"] > 0
    derived = pd.read_csv(results / "quantization_results.csv").groupby("model")["status"].unique()
    assert derived.map(list).to_dict() == {"test_efficientnet": ["done"], "test_resnet": ["failed"]}
    assert "12 cells failed" in out  # 1 baseline, 9 quantized, 2 mitigated
    assert "failed: synthetic-test_resnet-s0-fp32" in out
    summary = (results / "analysis" / "summary.md").read_text()
    assert "synthetic-test_resnet-s0-fp32" in summary
    # mending the config and running again computes what failed and keeps the rest
    stamps = {p: p.stat().st_mtime_ns for p in (results / "cells").glob("*efficientnet*")}
    write_config(tmp_path, cache)
    assert study(config, results) == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_the_mitigation_phase_calibrates_on_a_balanced_set(finished):
    """Every gender x skin group has the same number of calibration images, ±1; plain cells draw as the data are."""
    from datasets import load_dataset
    from phases.derived import _calibration_data

    config = load_config(finished[0])
    dataset, cells = load_dataset(config, "synthetic"), plan(config)

    def counts(cell) -> np.ndarray:
        sets = [batch["sensitive"] for batch in _calibration_data(cell, dict(cell.options), dataset, config, "cpu")]
        code = torch.cat([2 * groups["gender"] + groups["skin"] for groups in sets])
        return np.bincount(code.numpy(), minlength=4)

    balanced, plain = counts(cells["mitigation"][0]), counts(cells["quantization"][0])
    assert balanced.sum() == plain.sum() == 64
    assert balanced.max() - balanced.min() <= 1 < plain.max() - plain.min()


def test_a_later_phase_names_the_file_it_needs(finished, tmp_path, capsys):
    for phase in ("quantization", "mitigation", "analysis"):
        assert study(finished[0], tmp_path / "r", phase=phase) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "python main.py --phase" in error and str(tmp_path) in error


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, config: Path, results: Path, *arguments: str, phase: str = "all") -> str:
    """The one line of a run that is refused with exit status 2."""
    assert study(config, results, *arguments, phase=phase) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def tiny_fairface(root: Path, n_train: int = 60, n_val: int = 40) -> Path:
    """FairFace's layout with small random pictures; no East Asian in val."""
    rng = np.random.default_rng(0)
    for split, n in (("train", n_train), ("val", n_val)):
        (root / split).mkdir(parents=True)
        lines = ["file,age,gender,race,service_test"]
        for i in range(1, n + 1):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i}.jpg")
            race = ("White", "Black", "East Asian" if split == "train" else "Indian")[i % 3]
            lines.append(f"{split}/{i}.jpg,{('20-29', '50-59')[i % 2]},{('Male', 'Female')[i // 2 % 2]},{race},True")
        (root / f"fairface_label_{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def fairface_config(folder: Path, cache: Path, root: Path) -> Path:
    fairface = {"root": str(root), "image_size": 32}
    return write_config(
        folder,
        cache,
        data={"dataset": "fairface", "fairface": fairface, "cache": str(cache), "min_group_size": 3},
        models={"architectures": ["test_resnet"]},
    )


def test_bad_config_and_arguments(finished, tmp_path, capsys):
    config, results = finished[0], tmp_path / "r"
    assert "did you mean epochs?" in refused(capsys, config, results, "--set", "training.epchs=2")
    assert "did you mean resnet50?" in refused(capsys, config, results, "--set", "models.architectures=[resnet5]")
    assert "no such config" in refused(capsys, tmp_path / "none.yaml", results)
    if not torch.cuda.is_available():
        assert "--device cpu" in refused(capsys, config, results, "--device", "cuda")
    assert not results.exists()
    with pytest.raises(SystemExit) as stop:
        main.main(["--phase", "everything"])
    assert stop.value.code == 2


def test_bad_data(finished, tmp_path, cache, capsys):
    root = tmp_path / "fairface"
    config, results = fairface_config(tmp_path, cache, root), tmp_path / "r"
    assert str(root) in refused(capsys, config, results)  # missing
    tiny_fairface(root)
    labels = root / "fairface_label_val.csv"
    good = labels.read_text()
    labels.write_text("")
    assert "fairface_label_val.csv" in refused(capsys, config, results)
    labels.write_text("<!DOCTYPE html><html>not found</html>")
    assert "fairface_label_val.csv" in refused(capsys, config, results)
    labels.write_text(good)
    error = refused(capsys, config, results, "--set", "data.fairface.sensitive=[hair]")
    assert "hair" in error and "race" in error


def test_a_group_absent_from_the_test_split_and_broken_images(tmp_path, cache, capsys):
    root = tiny_fairface(tmp_path / "fairface")
    (root / "val" / "4.jpg").write_bytes(b"")
    (root / "val" / "5.jpg").write_bytes((root / "val" / "5.jpg").read_bytes()[:300])
    (root / "train" / "6.jpg").write_text("<html></html>")
    config, results = fairface_config(tmp_path, cache, root), tmp_path / "r"
    assert study(config, results) == 0
    out = capsys.readouterr().out
    assert "val/4.jpg" in out and "val/5.jpg" in out and "train/6.jpg" in out
    row = pd.read_csv(results / "quantization_results.csv").iloc[0]
    assert row["n_test"] == 38 and row["groups_left_out"] == 4  # of the seven races, four have no face in val
    groups = pd.read_csv(results / "group_results.csv", keep_default_na=False, na_values=[""])
    absent = groups.query("attribute == 'race' and group == 'East Asian'")
    assert (absent["n"] == 0).all() and absent["accuracy"].isna().all() and absent["too_small"].all()


def test_changed_data_are_noticed(tmp_path, cache, capsys):
    root = tiny_fairface(tmp_path / "fairface")
    config, results = fairface_config(tmp_path, cache, root), tmp_path / "r"
    assert study(config, results, phase="baseline") == 0
    labels = root / "fairface_label_val.csv"
    labels.write_text(
        labels.read_text().replace("Female", "Xemale").replace("Male", "Female").replace("Xemale", "Male")
    )
    capsys.readouterr()
    assert "--fresh" in refused(capsys, config, results, phase="quantization")
    moved = root.rename(tmp_path / "moved")
    labels = moved / "fairface_label_val.csv"
    labels.write_text(
        labels.read_text().replace("Female", "Xemale").replace("Male", "Female").replace("Xemale", "Male")
    )
    assert (
        study(config, results, "--set", f"data.fairface.root={moved}", phase="quantization") == 0
    )  # moved, not changed


def test_a_damaged_or_foreign_checkpoint_is_refused(finished, tmp_path, capsys):
    results = tmp_path / "results"
    shutil.copytree(finished[1], results)
    path = results / "checkpoints" / "synthetic-test_resnet-s0.safetensors"
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        b"<html>",
        (path.parent / "synthetic-test_efficientnet-s0.safetensors").read_bytes(),
    ):
        path.write_bytes(damaged)
        error = refused(capsys, finished[0], results, "--fresh", phase="quantization")
        assert path.name in error and "--phase baseline" in error
    # and the baseline phase makes it again, the same
    assert study(finished[0], results) == 0
    assert tables(results) == tables(finished[1])


def test_a_checkpoint_of_the_users_own(finished, tmp_path, capsys):
    source = finished[1] / "checkpoints" / "synthetic-test_resnet-s0.safetensors"
    overrides = (
        "--set",
        "models.architectures=[test_resnet]",
        f"models.weights={{test_resnet: {source}}}",
        "run.seeds=[5]",
    )
    assert study(finished[0], tmp_path / "r", *overrides, phase="baseline") == 0
    wrong = ("--set", "models.architectures=[test_efficientnet]", f"models.weights={{test_efficientnet: {source}}}")
    capsys.readouterr()
    assert "test_resnet" in refused(capsys, finished[0], tmp_path / "s", *wrong)


def test_a_results_folder_that_cannot_be_used(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert str(tmp_path / "file") in refused(capsys, finished[0], tmp_path / "file" / "results")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "environment.json").write_text('{"schema_version": 99}')
    error = refused(capsys, finished[0], foreign)
    assert "99" in error and f"reads {SCHEMA_VERSION}" in error
    assert [p.name for p in foreign.iterdir()] == ["environment.json"]


def test_a_full_disk_stops_with_one_line_and_loses_nothing(finished, tmp_path):
    """A real write error: no file may grow past 900 kB, which the first checkpoint needs."""
    results = tmp_path / "results"
    command = [sys.executable, "main.py", "--phase", "all", "--config", str(finished[0]), "--results-dir", str(results),
               "--device", "cpu"]  # fmt: skip

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))

    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=300)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and "finished cells are safe" in run.stderr
    assert not list(results.rglob(".*.tmp")) and not list((results / "checkpoints").iterdir())
    assert study(finished[0], results) == 0
    assert tables(results) == tables(finished[1])


def test_one_training_loop_reports_and_no_cell_depends_on_another(finished, tmp_path):
    """A cell computed alone equals the same cell within the sweep."""
    only = (
        "--set",
        "models.architectures=[test_efficientnet]",
        "quantization.methods=[ptq_dynamic]",
        "quantization.bit_widths=[2]",
    )
    assert study(finished[0], tmp_path / "r", *only) == 0
    alone = pd.read_csv(tmp_path / "r" / "quantization_results.csv", dtype=str)
    sweep = pd.read_csv(finished[1] / "quantization_results.csv", dtype=str)
    assert len(alone) == 1
    kept = [column for column in ROW_COLUMNS if column not in TIMING_COLUMNS]
    row = sweep[sweep["cell"] == alone["cell"][0]][kept]
    pd.testing.assert_frame_equal(alone[kept].reset_index(drop=True), row.reset_index(drop=True))


# ------------------------------------------------------------------------------------------------------------ real
# faces


@pytest.mark.fairface
def test_real_faces_end_to_end(fairface_root, tmp_path, cache):
    """A small network on 4,000 real faces beats chance, and 8 bits keep it; races and ages are counted as published."""
    config = write_config(
        tmp_path,
        cache,
        data={
            "dataset": "fairface",
            "cache": str(cache),
            "min_group_size": 20,
            "fairface": {"root": str(fairface_root), "image_size": 32, "max_train": 4000, "max_test": 1500},
        },
        models={"architectures": ["test_resnet"]},
        training={"epochs": 6, "learning_rate": 0.003, "flip": True},
    )
    results = tmp_path / "results"
    assert study(config, results) == 0
    baseline = pd.read_csv(results / "baseline_results.csv").iloc[0]
    assert baseline["n_test"] == 1500 and baseline["accuracy_ci_low"] > 0.58
    rows = pd.read_csv(results / "quantization_results.csv").query("method == 'ptq_static'")
    accuracy = rows.set_index(["weight_bits", "activation_bits"])["accuracy"]
    assert abs(accuracy[8, 8] - baseline["accuracy"]) < 0.02
    assert accuracy[2, 2] < accuracy[8, 8]
    groups = pd.read_csv(results / "group_results.csv", keep_default_na=False, na_values=[""])
    races = groups[(groups["cell"] == baseline["cell"]) & (groups["attribute"] == "race")]
    assert set(races["group"]) == {"Black", "East Asian", "Indian", "Latino_Hispanic", "Middle Eastern",
                                   "Southeast Asian", "White"}  # fmt: skip
    assert races["n"].sum() == 1500 and races["n"].min() > 100


def test_the_training_loop_is_the_only_one():
    """Nothing else in the project trains a network; reconstruction learns pieces of one, without labels. The example's
    own model is trained as its users would."""
    apart = {".venv", "tests", "benchmarks", "examples"}
    sources = [p for p in ROOT.rglob("*.py") if not apart & set(p.relative_to(ROOT).parts)]
    found = {p.name for p in sources if ".backward(" in p.read_text()}
    assert found == {Path(training.__file__).name, "reconstruction.py"}


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_ci_calls_the_documented_command():
    text = (ROOT / ".ci" / "run").read_text()
    assert "make test" in text and "BNQ_FAIRFACE_ROOT" in text
    readme = (ROOT / "README.md").read_text()
    assert readme.index("make study") < readme.index("make test")
