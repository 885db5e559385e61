"""Accuracy of every quantization method on real faces, beside FP32 and beside Brevitas.

    python main.py --phase baseline --config benchmarks/quantization_quality.yaml --results-dir results/quality \\
        --set data.fairface.root=FOLDER
    pip install brevitas    # for this benchmark only; without it its rows are left out
    python benchmarks/quantization_quality.py --results-dir results/quality --set data.fairface.root=FOLDER

The first command trains the float models (once), the last one quantizes them, tests each on the whole test split and
prints the table and what it says. Each result is kept in RESULTS_DIR/quality/ as it is measured: run again, only what
is missing is computed; --print computes nothing. `--models` and `--methods` choose; two processes can share the work.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from scipy.stats import binomtest

from analysis.result_rows import model_label
from batches import BatchLoader
from config import load_config
from datasets import calibration_subset, load_dataset
from evaluation import predict
from models import build_model, load_checkpoint
from quantization import apply_quantization
from store import Store, seed_for, write_json

CONFIG = Path(__file__).with_suffix(".yaml")
CALIBRATION_IMAGES = 256
WIDTHS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W2A4": (2, 4)}
PER_TENSOR = {"weight_granularity": "per_tensor"}
# optimizer steps a block and training images: as many as an afternoon on two cores allows
ITERATIONS = {"mobilenet_v2": 200}  # others: 50
QAT_IMAGES = {"mobilenet_v2": 6000}  # others: 2000
QAT_LEARNING_RATES = {"vit_small_patch16_224": 1e-4}  # others: 1e-3

# label -> (method, options, widths)
METHODS = {
    "PTQ": ("ptq_static", {}, ("W8A8", "W4A8", "W4A4", "W2A4")),
    "PTQ, per tensor": ("ptq_static", PER_TENSOR, ("W8A8", "W4A8")),
    "PTQ, per tensor, equalized": ("ptq_static", {**PER_TENSOR, "equalize": True}, ("W8A8", "W4A8")),
    "PTQ, per tensor, bias corrected": ("ptq_static", {**PER_TENSOR, "bias_correction": True}, ("W8A8", "W4A8")),
    "PTQ, per tensor, both": (
        "ptq_static",
        {**PER_TENSOR, "equalize": True, "bias_correction": True},
        ("W8A8", "W4A8"),
    ),
    "PTQ, equalized, bias corrected": (
        "ptq_static",
        {"equalize": True, "bias_correction": True},
        ("W8A8", "W4A8", "W4A4", "W2A4"),
    ),
    "mixed precision, same size": ("mixed_precision", {"sensitivity_samples": 32}, ("W4A8", "W4A4")),
    "reconstruction": ("ptq_static", {"rounding": "adaround"}, ("W4A8", "W4A4", "W2A4")),
    "QAT": ("qat", {"epochs": 1}, ("W8A8", "W4A4", "W2A4")),
    "Brevitas": ("brevitas", {}, ("W8A8", "W4A8")),
}


SAME_RECIPE = "PTQ, equalized, bias corrected"  # what Brevitas is told to do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results-dir", type=Path, default=Path("results/quality"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--print", action="store_true", dest="only_print", help="compute nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    config = load_config(CONFIG, arguments.set)
    models = arguments.models or config.models.architectures
    results = arguments.results_dir / "quality"
    if not arguments.only_print:
        study = Study(config, Store(arguments.results_dir), results)
        for model in models:
            study.measure(model, arguments.methods or list(METHODS))
    show(results, models)


class Study:
    def __init__(self, config, store: Store, results: Path):
        self.config, self.store, self.results = config, store, results
        self.dataset = load_dataset(config, "fairface")
        self.test = BatchLoader(self.dataset.splits["test"], 128, channels_last=True)

    def measure(self, name: str, methods: list[str]) -> None:
        model = build_model(
            name, len(self.dataset.class_names), self.dataset.image_size, options=self.config.models.options.get(name)
        )
        path = self.store.checkpoint_path("fairface", name, 0)
        load_checkpoint(path, model, {"model": name, "n_classes": len(self.dataset.class_names)})
        model = model.to(memory_format=torch.channels_last).eval()
        if not (self.results / f"{name}-FP32.json").exists():
            self._write(name, "FP32", "", model, 0.0)
        for label in methods:
            method, options, widths = METHODS[label]
            for width in widths:
                if (self.results / f"{name}-{label}-{width}.json").exists():
                    continue
                start = time.perf_counter()
                quantized = self._quantize(name, model, method, WIDTHS[width], options)
                if quantized is None:
                    print(f"{name} {label}: not installed, left out", flush=True)
                    break
                self._write(name, label, width, quantized, time.perf_counter() - start)

    def _quantize(self, name: str, model, method: str, bits: tuple[int, int], options: dict):
        calibration = self._calibration(name)
        if method == "brevitas":
            return brevitas(model, torch.cat([batch["image"] for batch in calibration]), *bits)
        options = dict(options)
        if options.get("rounding") == "adaround":
            options["reconstruction_iterations"] = ITERATIONS.get(name, 50)
        train = None
        if method == "qat":
            settings = self.config.training
            options |= {"batch_size": settings.batch_size, "learning_rate": QAT_LEARNING_RATES.get(name, 1e-3)}
            train = BatchLoader(
                self._subset(QAT_IMAGES.get(name, 2000), "qat"),
                settings.batch_size,
                shuffle=True,
                generator=torch.Generator().manual_seed(0),
                flip=settings.flip,
                shift=settings.shift,
                brightness=settings.brightness,
                drop_last=True,
                channels_last=True,
            )
        weight_bits, activation_bits = bits
        return apply_quantization(
            model,
            method,
            weight_bits,
            calibration,
            activation_bits=activation_bits,
            train_data=train,
            calibration_samples=CALIBRATION_IMAGES,
            **options,
        )

    def _calibration(self, name: str) -> BatchLoader:
        split = self.dataset.splits["train"]
        generator = np.random.default_rng(seed_for("quality", name, "calibration"))
        positions = calibration_subset(split, CALIBRATION_IMAGES, generator)
        return BatchLoader(split.subset(positions), 64, channels_last=True)

    def _subset(self, count: int, purpose: str):
        split = self.dataset.splits["train"]
        order = np.random.default_rng(seed_for("quality", purpose)).permutation(len(split))
        return split.subset(np.sort(order[:count]))

    def _write(self, name: str, label: str, width: str, model, seconds: float) -> None:
        predictions = predict(model, self.test, torch.device("cpu"))
        hits = (predictions.y_pred == predictions.y_true).astype(int)
        result = {"model": name, "method": label, "width": width, "accuracy": float(hits.mean()), "seconds": seconds,
                  "threads": torch.get_num_threads(), "hits": "".join(map(str, hits))}  # fmt: skip
        for report in ("budgets",):
            if report in getattr(model, "reports", {}):
                result[report] = model.reports[report]
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(self.results / (f"{name}-{label}-{width}.json" if width else f"{name}-{label}.json"), result)
        print(f"{name} {label} {width}: {100 * result['accuracy']:.2f} % ({seconds:.0f} s)", flush=True)


def brevitas(model, images: torch.Tensor, weight_bits: int, activation_bits: int):
    """Its own recipe for ImageNet: equalization, per-channel MSE weight scales, affine activations, bias correction."""
    try:
        from brevitas.graph.quantize import preprocess_for_quantize
        from brevitas_examples.imagenet_classification.ptq import ptq_common
    except ImportError:
        return None
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    is_attention = any(type(module).__name__ == "Attention" for module in model.modules())  # its tracer stops there
    if not is_attention:
        model = preprocess_for_quantize(model, equalize_iters=20, equalize_merge_bias=True, merge_bn=True)
    quantized = ptq_common.quantize_model(
        model, "layerwise" if is_attention else "fx", weight_bits, activation_bits, 32, "per_channel", 99.999, "asym",
        "float_scale", "int", weight_narrow_range=False, weight_param_method="mse", act_param_method="stats",
        layerwise_first_last_bit_width=weight_bits,
    )  # fmt: skip
    loader = [(batch, torch.zeros(len(batch))) for batch in images.contiguous().split(64)]
    ptq_common.calibrate(loader, quantized)
    ptq_common.apply_bias_correction(loader, quantized)
    return quantized.eval()


# ------------------------------------------------------------------------------------------------------------ the table


def show(results: Path, models: list[str]) -> None:
    found = {}
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        found[result["model"], result["method"], result["width"]] = result
    models = [model for model in models if (model, "FP32", "") in found]
    print(
        "\n| top-1 accuracy in % (change, predictions changed, time) | " + " | ".join(map(model_label, models)) + " |"
    )
    print("|---|" + "---|" * len(models))
    row = [f"{100 * found[model, 'FP32', '']['accuracy']:.1f}" for model in models]
    print("| FP32 | " + " | ".join(row) + " |")
    for width in WIDTHS:
        for label in METHODS:
            cells = [_cell(found, model, label, width) for model in models]
            if any(cells):
                print(f"| {width} {label} | " + " | ".join(cell or "–" for cell in cells) + " |")
    print()
    for line in verdicts(found, models):
        print(f"- {line}")


class Paired:
    """A method against FP32 on the same images: points lost, their 95 % interval, predictions changed (in %)."""

    def __init__(self, fp32: dict, result: dict):
        before, after = (np.array(list(one["hits"])) == "1" for one in (fp32, result))
        difference = before.astype(float) - after.astype(float)
        half = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
        self.after = after
        self.lost = 100 * difference.mean()
        self.low, self.high = self.lost - 100 * half, self.lost + 100 * half
        self.changed = 100 * float((before != after).mean())  # of two classes, right to wrong or wrong to right
        self.seconds = result["seconds"]

    def text(self) -> str:
        return f"{self.lost:.2f} [{self.low:.2f}, {self.high:.2f}]"


def _cell(found: dict, model: str, label: str, width: str) -> str | None:
    result = found.get((model, label, width))
    if result is None:
        return None
    paired = Paired(found[model, "FP32", ""], result)
    return f"{100 * result['accuracy']:.1f} ({-paired.lost:+.1f}, {paired.changed:.1f} %, {paired.seconds:.0f} s)"


def verdicts(found: dict, models: list[str]) -> list[str]:
    """What the table was made to find out, each with its number and the 95 % interval of the paired difference."""
    lines = []
    for model in models:
        name = model_label(model)
        of = {
            key[1:]: Paired(found[model, "FP32", ""], result)
            for key, result in found.items()
            if key[0] == model and key[1] != "FP32"
        }
        for label, width, most in (("PTQ", "W8A8", 0.5), ("reconstruction", "W4A8", 1.5), ("QAT", "W4A4", 2.0)):
            if (label, width) in of:
                one = of[label, width]
                verdict = "within" if one.lost <= most else "NOT within"
                lines.append(f"{name}: {width} {label} loses {one.text()} points, {verdict} {most}")
        for width in ("W4A8", "W4A4", "W2A4"):
            if ("PTQ", width) in of and ("reconstruction", width) in of:
                plain, learned = of["PTQ", width], of["reconstruction", width]
                share = f", {100 * (1 - learned.lost / plain.lost):.0f} % of it recovered" if plain.low > 0 else ""
                lines.append(
                    f"{name}: {width} PTQ loses {plain.text()} points, reconstruction {learned.text()}{share}; they "
                    f"change {plain.changed:.1f} % and {learned.changed:.1f} % of the predictions"
                )
        for width in ("W8A8", "W4A8"):
            if ("PTQ, per tensor", width) in of and ("PTQ, per tensor, both", width) in of:
                plain, both = of["PTQ, per tensor", width], of["PTQ, per tensor, both", width]
                lines.append(
                    f"{name}: {width} per tensor loses {plain.text()} points and changes {plain.changed:.1f} % of the "
                    f"predictions; equalized and bias corrected {both.text()} and {both.changed:.1f} %"
                )
        for width in ("W4A8", "W4A4"):
            if ("mixed precision, same size", width) in of and ("PTQ", width) in of:
                mixed, uniform = of["mixed precision, same size", width], of["PTQ", width]
                verdict = "beats" if mixed.lost < uniform.lost else "does NOT beat"
                lines.append(
                    f"{name}: mixed precision of the size of {width} {verdict} it: loses {mixed.text()} points, not "
                    f"{uniform.text()}; changes {mixed.changed:.1f} % of the predictions, not {uniform.changed:.1f} %"
                )
        for width in ("W8A8", "W4A8"):
            if ("Brevitas", width) in of and (SAME_RECIPE, width) in of:
                theirs, same, plain = of["Brevitas", width], of[SAME_RECIPE, width], of["PTQ", width]
                winner = "ours" if same.lost < theirs.lost else "Brevitas" if theirs.lost < same.lost else "neither"
                test = binomtest(
                    int((same.after & ~theirs.after).sum()), max(1, int((same.after != theirs.after).sum()))
                )
                lines.append(
                    f"{name}: {width} Brevitas loses {theirs.text()}, the same recipe of ours {same.text()}: {winner} "
                    f"wins, McNemar p = {test.pvalue:.2g} (our plain PTQ {plain.text()})"
                )
    return lines


if __name__ == "__main__":
    main()
