"""What benchmarks/mitigation.py says of predictions that are made by hand: no model is trained or quantized."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from quantizers import reconstruction

ROOT = Path(__file__).parent.parent
SETTING = "W2A2"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_mitigation", ROOT / "benchmarks" / "mitigation.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


@pytest.fixture
def study(benchmark, tmp_path):
    """Two groups of 400 images in each part, all of class 1; group b is the second half."""
    groups = np.repeat([0, 1], 400)
    part = SimpleNamespace(labels=np.ones(800, np.int64), sensitive={"skin": groups})

    class Made(benchmark.Study):
        def __init__(self):
            self.data, self.attribute, self.published = "synthetic", "skin", {}
            self.store = SimpleNamespace(checkpoint_path=lambda *_: tmp_path / "none")
            self.dataset = SimpleNamespace(sensitive_names={"skin": ["a", "b"]})
            self.validation, self.test = [part], [part]

        def path(self, seed, label, setting):
            return tmp_path / f"{seed}-{label}-{setting}.json"

        def write(self, label, right, seeds=(0, 1)):
            """`right`: of group a and of group b how many images are, in validation and in test."""
            for seed in seeds:
                result = {"size_mb": 1.0, "seconds": 2.0, "bit_operations": 10, "float_model": f"of seed {seed}"}
                for name, counts in right.items():
                    y = np.zeros(800, int)
                    for group, count in enumerate(counts):
                        y[400 * group : 400 * group + count] = 1
                    result[name] = benchmark.pack(y)
                self.path(seed, label, None if label == "FP32" else SETTING).write_text(json.dumps(result))

    made = Made()
    made.write("FP32", {"validation": (400, 400), "test": (400, 400)})
    for label in benchmark.PLAIN:
        made.write(label, {"validation": (400, 100), "test": (100, 100)})
    made.write("PTQ, reconstruction", {"validation": (390, 360), "test": (300, 360)})
    return made


def test_the_reference_and_the_worst_group_are_chosen_on_validation_and_measured_on_test(benchmark, study):
    """On test group a loses more: the choice must not see that."""
    comparison = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    assert comparison.plain == "PTQ, reconstruction" and comparison.names[comparison.group] == "b"
    assert comparison.validation_drop == pytest.approx(10.0)  # 40 of 400 images
    loss, low, high = comparison.difference("FP32", comparison.plain)
    assert loss == pytest.approx(10.0) and low < 10 < high
    error = 100 * np.sqrt(0.1 * 0.9 / 400)  # binomial: the seeds' predictions are the same
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert comparison.detectable("FP32", comparison.plain) == pytest.approx(2.8 * error, rel=0.01)


def test_what_is_recovered_is_a_share_of_the_loss_with_an_interval(benchmark, study):
    study.write("output calibration", {"validation": (390, 380), "test": (300, 390)})  # 30 of the 40 images come back
    comparison = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    share, low, high = comparison.share("output calibration")
    assert share == pytest.approx(75.0) and 50 < low < 75 < high < 100
    assert comparison.gains("output calibration") == pytest.approx([7.5, 7.5])
    told = [line for line in benchmark.verdicts(comparison) if line.startswith("output calibration")]
    assert len(told) == 1 and "recovers 75 % [" in told[0] and "FP32" not in told[0]


def test_a_repair_that_does_nothing_or_harm_is_not_said_to_recover(benchmark, study):
    study.write("minimax ranges", {"validation": (390, 360), "test": (300, 360)})
    study.write("group DRO", {"validation": (390, 300), "test": (300, 320)})
    comparison = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    told = benchmark.verdicts(comparison)
    assert not any(line.startswith("minimax ranges") or "recovers" in line for line in told)
    assert any(line.startswith("group DRO") and "makes it worse" in line for line in told)


def test_one_that_is_back_at_fp32_is_said_to_be(benchmark, study):
    study.write("distillation", {"validation": (390, 400), "test": (300, 399)})
    comparison = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    (told,) = [line for line in benchmark.verdicts(comparison) if line.startswith("distillation")]
    assert "not told from FP32, by an interval no wider than the loss" in told and "within 1 point of FP32" in told


@pytest.mark.parametrize("operations", [20, 30])
def test_a_choice_by_groups_is_compared_with_the_same_operations_without_groups(benchmark, study, operations):
    study.write("input widths, twice the operations", {"validation": (400, 395), "test": (390, 390)})
    study.write("inputs of twice the bits", {"validation": (400, 395), "test": (390, 380)})
    for seed in (0, 1):
        path = study.path(seed, "inputs of twice the bits", SETTING)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bit_operations": operations}))
        path = study.path(seed, "input widths, twice the operations", SETTING)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bit_operations": 20}))
    (told,) = [
        line
        for line in benchmark.verdicts(benchmark.Comparison(study, (0, 1), SETTING, ["skin"]))
        if "chosen on validation" in line
    ]
    same = "against inputs of twice the bits, of the same operations and without groups, +2.5 ["
    assert (same in told) is (operations == 20)


def test_what_some_seeds_lack_is_said(benchmark, study):
    study.write("distillation", {"validation": (390, 400), "test": (300, 399)}, seeds=[1])
    comparison = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    assert not any(line.startswith("distillation") for line in benchmark.verdicts(comparison))
    assert list(benchmark.partly(study, (0, 1), SETTING)) == ["distillation: measured for 1 of 2 seeds, and not shown"]


def test_plain_methods_that_are_missing_are_named_and_refused_ones_left_out(benchmark, study):
    study.path(1, "mixed precision, same bytes", SETTING).unlink()
    with pytest.raises(SystemExit, match="not measured yet: mixed precision, same bytes"):
        study.best_plain((0, 1), SETTING)
    study.path(1, "mixed precision, same bytes", SETTING).write_text(
        '{"refused": "no model is as small", "float_model": "of seed 1"}'
    )
    assert study.best_plain((0, 1), SETTING) == "PTQ, reconstruction"
    assert study.predictions((0, 1), "mixed precision, same bytes", SETTING, "test") is None


def test_what_is_published_is_what_was_measured(benchmark, study, tmp_path):
    before = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    expected = before.difference("FP32", before.plain)
    study.publish((0, 1), SETTING, tmp_path / "published")
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert study.predictions((0, 1), "FP32", None, "test") is None
    study.published = json.loads((tmp_path / "published" / "synthetic.json").read_text())
    after = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    assert after.difference("FP32", after.plain) == expected


def test_results_of_another_float_model_are_not_compared(benchmark, study):
    path = study.path(1, "PTQ, reconstruction", SETTING)
    other = json.loads(path.read_text()) | {"float_model": "trained elsewhere"}
    path.write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="seed 1: results of 2 different float models"):
        benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    benchmark.Comparison(study, (0,), SETTING, ["skin"])


def test_the_repair_that_is_told_of_first_is_chosen_on_validation(benchmark, study):
    study.write("minimax ranges", {"validation": (390, 390), "test": (330, 370)})
    study.write("output calibration", {"validation": (390, 370), "test": (400, 400)})  # better on test, by chance
    study.write("8-bit inputs", {"validation": (400, 400), "test": (400, 400)})  # a control, which is no repair
    comparison = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    (told,) = [line for line in benchmark.verdicts(comparison) if "chosen on validation" in line]
    assert told.startswith("without training, chosen on validation: minimax ranges: +2.5 [")
    assert "25 % [" in told and "its own worst group on test is a, -17.5 [" in told
    assert any(line.startswith("8-bit inputs (control): recovers 100 %") for line in benchmark.verdicts(comparison))


@pytest.mark.parametrize("images", [1, 7, 8, 801])
def test_packed_predictions_are_the_predictions(benchmark, images):
    classes_N = np.random.default_rng(images).integers(0, 2, images)
    packed = benchmark.pack(classes_N)
    assert (benchmark.unpack(packed, images) == classes_N).all()
    with pytest.raises(ValueError, match=f"where there are {images + 1} images"):
        benchmark.unpack(packed, images + 1)
    with pytest.raises(ValueError, match="two classes"):
        benchmark.pack(classes_N + 2)


def test_what_methods_start_from_is_computed_once_and_is_what_each_would_have_computed(benchmark, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    images, groups = torch.randn(24, 3, 8, 8), torch.arange(24) % 2
    batches = [{"image": images, "label": groups, "sensitive": {"skin": groups}}]
    options = {"rounding": "adaround", "reconstruction_iterations": 5, "calibration_samples": 24}

    def all_of_them() -> list[torch.Tensor]:
        made = [
            benchmark.apply_quantization(model, method, bits, batches, **options)
            for method in ("ptq_static", "output_calibration", "ptq_static")
            for bits in (3, 4)
        ]
        with torch.no_grad():
            return [each(images) for each in made]

    apart = all_of_them()
    computed = []
    reconstruct = reconstruction.reconstruct
    monkeypatch.setattr(
        reconstruction, "reconstruct", lambda *a, **k: (computed.append(1), time.sleep(0.05), reconstruct(*a, **k))[-1]
    )
    starts = benchmark.Starts("one")
    with starts.shared():
        together = all_of_them()
    assert len(computed) == 2 and 0.2 < starts.saved < 20  # a width each; used again twice each
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    before = len(computed)
    all_of_them()
    assert len(computed) == before + 6  # nothing is kept afterwards


def test_side_by_side_a_row_a_method_and_nothing_of_what_was_not_measured(benchmark, study, capsys):
    study.write("output calibration", {"validation": (390, 380), "test": (300, 390)})
    comparison = benchmark.Comparison(study, (0, 1), SETTING, ["skin"])
    benchmark.side_by_side([comparison, comparison])
    head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert head.count("synthetic W2A2: against FP32 | against PTQ, reconstruction | bit operations") == 2
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows}
    assert list(cells) == [*benchmark.PLAIN, "output calibration"]
    assert cells["PTQ, reconstruction"][1] == "" and cells["PTQ, reconstruction"][2] == "100 %"
    assert cells["output calibration"][0].startswith("-2.5 [") and cells["output calibration"][1].startswith("+7.5 [")
    assert cells["output calibration"][:3] == cells["output calibration"][3:]
