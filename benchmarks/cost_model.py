"""What every kind of cell costs, measured by small runs; from it the time and the money of a whole study.

    python benchmarks/cost_model.py measure [--models …] [--output docs/scaling/cost_model.json]
    python benchmarks/cost_model.py predict [--config FILE] [--set KEY=VALUE …] [--gpu-speedup 40] [--gpu-price 2.5]
    python benchmarks/cost_model.py check RESULTS     a run of one thread that is there: what was predicted of it

*measure* runs each step of a cell on random images with one thread, at several image sizes and numbers of images and
groups (POINTS), and fits seconds = sum of coefficient x feature for each kind and model, no coefficient below 0, by
least squares of relative errors. One image size is held out: what the fit says of it is compared with the measurement,
and the errors are printed and kept in the file. Seconds are those of the processor, so that other programs on the
machine matter little; a machine of another kind needs measurements of its own.

*predict* lists the cells that a config plans, with the sizes of the data sets as published where the config does not
limit them, says what each costs, and schedules them as the runner does (benchmarks/schedule.py). **There is no GPU in
it**: what a GPU does in less time is an assumption (`--gpu-speedup`, over one CPU core; one number, or MODEL=NUMBER),
and applies to what passes images through a network. The rest (tracing, folding, scales of weights, statistics, files)
stays on a CPU core, and so does ONNX Runtime. On a GPU each cell has a process of its own, as it has on Ray, whose
start is measured without the GPU's. Prices are assumptions too. While a latency is measured the other cells of its
machine stand still (`--per-machine`): that time is in it. Left out: fetching and decoding the data
(benchmarks/data_pipeline.py), engines other than PyTorch and ONNX Runtime, diagnostics, other data sets.

*check* compares with the seconds in the log.jsonl of a results folder, kind by kind and model by model, and prints what
share of the run the prediction is.

Several machines may measure a model each (`--output`); `merge` makes one file of theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from benchmarks.schedule import Task, critical_path, schedule
from config import Config, ConfigError, load_config
from evaluation import WARMUP
from execution.order import longest_first, split_sizes
from execution.run_log import RunLog
from phases.complete import is_selected
from phases.deploy import BATCHES, SINGLES
from plan import Cell, plan
from quantizers.calibration import CALIBRATION_BATCH
from sections.base import MODELS
from store import Store, StoreError

ROOT = Path(__file__).parent.parent
OUTPUT = Path("docs/scaling/cost_model.json")
FIT_SIZE, HELD_OUT_SIZE = 64, 96
ITERATIONS = 4  # of reconstruction, beside 1: their difference is the cost of so many
RECONSTRUCTION_BATCH = 32
REPEATS, ENOUGH_SECONDS = 5, 2.0  # what is short is measured again

BATCH = ("one", "images", "image pixels")  # of one batch of `images` images
CALIBRATION = ("one", "images", "image pixels")
GROUPED = (*CALIBRATION, "groups")
PREDICTION, ENGINE = ("float", "quantized", "dynamic"), ("engine float", "engine quantized")
APPLIED = {  # kind -> what apply_quantization is called with; what the images show is known before, see "observation"
    "ptq_static": ("ptq_static", {}),
    "ptq_static, minmax": ("ptq_static", {"observer": "minmax"}),
    "ptq_static, entropy": ("ptq_static", {"observer": "entropy"}),
    "ptq_static, corrected": ("ptq_static", {"equalize": True, "bias_correction": True}),
    "ptq_dynamic": ("ptq_dynamic", {}),
    "group_weighted_observers": ("group_weighted_observers", {}),
    "minimax_ranges": ("minimax_ranges", {}),
    "fair_bias_correction": ("fair_bias_correction", {}),
    "sensitive_channels": ("sensitive_channels", {}),
    "sensitive_layers": ("sensitive_layers", {}),  # what it costs is measuring, on `images`
}
GROUP_METHODS = tuple(APPLIED)[5:]
FEATURES = {
    "training step": BATCH,
    "qat step": BATCH,
    **{f"prediction, {way}": BATCH for way in (*PREDICTION, *ENGINE)},
    "observation": BATCH,
    "sensitivity": CALIBRATION,
    "reconstruction iteration": ("one", "pixels"),
    **{kind: GROUPED if kind in GROUP_METHODS else CALIBRATION for kind in APPLIED},
    "ptq_dynamic": ("one",),
    "packing": ("one",),  # the tensors' file
    "export, float": ("one",),  # the ONNX file, and loading it
    "export, quantized": ("one",),
    "start": ("one",),  # of a process that imports what a cell needs
    "analysis": ("one", "cells", "cell images"),
}
_STEPS = ((32, 8), (32, 32), (64, 8), (64, 32), (128, 8), (HELD_OUT_SIZE, 16))
_PASSES = ((32, 1), (32, 32), (32, 128), (64, 1), (64, 128), (128, 32), (HELD_OUT_SIZE, 64))
_OBSERVED = ((32, 16), (32, 64), (64, 16), (64, 64), (128, 16), (HELD_OUT_SIZE, 32))
_CALIBRATED = ((32, 32), (32, 128), (64, 64), (128, 32), (HELD_OUT_SIZE, 64))
_LAYERWISE = ((32, 8), (32, 32), (64, 16), (128, 4), (HELD_OUT_SIZE, 8))
_SIZES = ((32, 1), (64, 1), (128, 1), (HELD_OUT_SIZE, 1))
GROUPS = 2  # where nothing else is said
# kind -> (image size, images) or (image size, images, groups)
POINTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "training step": _STEPS,
    "qat step": ((32, 8), (32, 32), (64, 16), (128, 8), (HELD_OUT_SIZE, 8)),
    **{f"prediction, {way}": _PASSES for way in (*PREDICTION, *ENGINE)},
    "observation": _OBSERVED,
    "sensitivity": _LAYERWISE,
    "reconstruction iteration": tuple((size, RECONSTRUCTION_BATCH) for size, _ in _SIZES),
    **{kind: _CALIBRATED for kind in APPLIED},
    **{kind: (*_CALIBRATED, (32, 128, 8)) for kind in GROUP_METHODS},
    "sensitive_layers": (*_LAYERWISE, (32, 32, 8)),
    "ptq_dynamic": _SIZES,
    "packing": _SIZES,
    "export, float": _SIZES,
    "export, quantized": _SIZES,
}
# features whose cost no GPU divides, but for the kinds whose work is all its own, or none of it
STAYS_ON_CPU = ("one", "groups")
ALL_ON_GPU = ("training step", "qat step", "reconstruction iteration", *(f"prediction, {way}" for way in PREDICTION))
ALL_ON_CPU = (*(f"prediction, {way}" for way in ENGINE), "packing", "start", "analysis")


@dataclass(frozen=True)
class Measurement:
    kind: str
    model: str
    image_size: int
    images: int
    groups: int
    seconds: float
    cells: int = 0

    def features(self) -> dict[str, float]:
        return features(self.image_size, self.images, self.groups, self.cells)


def features(image_size: int, images: float, groups: int = 0, cells: int = 0) -> dict[str, float]:
    """Megapixels, so that the coefficients are of one order."""
    pixels = image_size**2 / 1e6
    return {
        "one": 1.0,
        "images": images,
        "pixels": pixels,
        "image pixels": images * pixels,
        "groups": groups,
        "cells": cells,
        "cell images": cells * images / 1e3,
    }


# -------------------------------------------------------------------------------------------------------------- measure


def measure(models: list[str], output: Path, kinds: list[str]) -> None:
    """Measure, fit and write after each model."""
    import torch

    torch.set_num_threads(1)
    found: list[Measurement] = []
    for name in models if set(kinds) & set(POINTS) else []:
        for measurement in measured(name, kinds):
            found.append(measurement)
            print(
                f"{measurement.kind}, {name}, {measurement.image_size} px, {measurement.images} images, "
                f"{measurement.groups} groups: {measurement.seconds:.3f} s",
                flush=True,
            )
        write(found, output)
    if "start" in kinds:
        found += [Measurement("start", "", FIT_SIZE, 1, 0, start_seconds()) for _ in range(3)]
    if "analysis" in kinds:
        found += measured_analysis()
    write(found, output)


def measured(name: str, kinds: Sequence[str], sizes: Sequence[int] | None = None) -> Iterator[Measurement]:
    """Of one model, at all points of its kinds, or at those of the given image sizes."""
    points = [(size, kind, images, *groups) for kind in kinds for size, images, *groups in POINTS.get(kind, ())]
    bench = None
    for size, kind, images, *groups in sorted(points, key=lambda point: point[0]):
        if sizes is not None and size not in sizes:
            continue
        if bench is None or bench.size != size:
            bench = Bench(name, size)
        n_groups = groups[0] if groups else GROUPS
        start, took = time.perf_counter(), []
        with quiet():
            while len(took) < REPEATS and (not took or time.perf_counter() < start + ENOUGH_SECONDS):
                took.append(bench.seconds(kind, images, n_groups))
        yield Measurement(kind, name, size, images, n_groups, statistics.median(took))


class Bench:
    """A network for images of one size, and what is made of it, on which steps are timed."""

    def __init__(self, name: str, size: int):
        import torch

        from models import build_model
        from sections.training import Training
        from training import train

        self.size, self.models = size, {}
        self.model = build_model(name, 2, size, seed=0).to(memory_format=torch.channels_last)
        self.train = lambda batches: train(
            self.model, batches, None, Training(epochs=1, batch_size=len(batches[0]["label"]))
        )
        self.train([self.batch(8)])  # BatchNorm has seen something
        self.model.eval()
        with quiet():
            self.of("quantized")  # everything is imported and has run once
            self.quantized(
                "qat", self.batch(8), calibration_samples=8, epochs=1, batch_size=8, train_data=[self.batch(8)]
            )

    def batch(self, images: int, groups: int = GROUPS) -> dict:
        import torch

        generator = torch.Generator().manual_seed(0)
        image = torch.randn(images, 3, self.size, self.size, generator=generator)
        return {
            "image": image.to(memory_format=torch.channels_last),
            "label": torch.arange(images) // 2 % 2,
            "sensitive": {"group": torch.arange(images) % groups},
        }

    def seconds(self, kind: str, images: int, groups: int) -> float:
        batch = self.batch(images, groups)
        if kind == "training step":
            self.train([batch])  # the libraries have chosen their kernels
            few, many = (seconds_of(lambda n=n: self.train([batch] * n)) for n in (1, 4))
            return max(many - few, 0.0) / 3
        self.model.eval()
        if kind in APPLIED:
            return self.applied(kind, batch)
        if kind == "observation":
            return self.observation(batch)
        if kind.startswith("prediction, "):
            return self.prediction(kind.removeprefix("prediction, "), batch)
        if kind.startswith("export, "):
            return seconds_of(lambda: self.engine(kind.removeprefix("export, ")))
        return {
            "sensitivity": self.sensitivity,
            "reconstruction iteration": self.reconstruction,
            "qat step": self.qat_step,
            "packing": self.packing,
        }[kind](batch)

    def quantized(self, method: str, batch: dict, **options):
        """Weights and activations of 4 bits."""
        from quantization import apply_quantization

        return apply_quantization(self.model, method, 4, calibration_data=[batch], activation_bits=4, **options)

    def applied(self, kind: str, batch: dict) -> float:
        """Less the pass of the calibration images, which cells share."""
        from quantizers.calibration import observing_through

        method, options = APPLIED[kind]
        if method != "ptq_dynamic":
            options = {**options, "seed": 0, "calibration_samples": len(batch["label"])}
        if kind in GROUP_METHODS:
            options["attributes"] = ["group"]
        if method == "sensitive_layers":
            options["sensitivity_samples"] = len(batch["label"])
        observing = 0.0

        def source(model, images, look):
            nonlocal observing
            start = time.process_time()
            found = look()
            observing += time.process_time() - start
            return found

        with observing_through(source):
            return seconds_of(lambda: self.quantized(method, batch, **options)) - observing

    def observation(self, batch: dict) -> float:
        from quantizers import calibration, ptq

        attached = ptq.attach(self.model, batch["image"], "ptq_static", 4, 4, ptq.Recipe())
        return seconds_of(lambda: calibration.observe(attached, batch["image"]))

    def sensitivity(self, batch: dict) -> float:
        from quantizers import ptq
        from quantizers.sensitivity import measure_sensitivity

        attached = ptq.attach(self.model, batch["image"], "mixed_precision", 4, 8, ptq.Recipe())
        return seconds_of(lambda: measure_sensitivity(attached, batch["image"]))

    def reconstruction(self, batch: dict) -> float:
        learn = {"rounding": "adaround", "calibration_samples": len(batch["label"]), "seed": 0}
        few, many = (
            seconds_of(lambda n=n: self.quantized("ptq_static", batch, **learn, reconstruction_iterations=n))
            for n in (1, 1 + ITERATIONS)
        )
        return max(many - few, 0.0) / ITERATIONS

    def qat_step(self, batch: dict) -> float:
        images = len(batch["label"])
        own = {"calibration_samples": images, "epochs": 1, "batch_size": images}
        few, many = (
            seconds_of(lambda n=n: self.quantized("qat", batch, **own, train_data=[batch] * n)) for n in (1, 4)
        )
        return max(many - few, 0.0) / 3

    def packing(self, batch: dict) -> float:
        import tempfile

        from evaluation import write_model

        with tempfile.TemporaryDirectory() as folder:
            return seconds_of(lambda: write_model(self.of("quantized"), Path(folder) / "model"))

    def prediction(self, way: str, batch: dict) -> float:
        from evaluation import predict

        predictor = self.of(way)
        predict(predictor, [batch], "cpu")  # the libraries have chosen their kernels
        return seconds_of(lambda: predict(predictor, [batch], "cpu"))

    def of(self, way: str):
        """What predicts that way, made once."""
        if way not in self.models:
            self.models[way] = self.made(way)
        return self.models[way]

    def made(self, way: str):
        if way == "float":
            return self.model
        if way == "quantized":
            return self.quantized("ptq_static", self.batch(8), calibration_samples=8, seed=0)
        if way == "dynamic":
            return self.quantized("ptq_dynamic", self.batch(8))
        return self.engine(way.removeprefix("engine "))

    def engine(self, way: str):
        """ONNX Runtime with the exported model."""
        import tempfile

        import torch

        from deployment import export_onnx, load_engine

        model, example = self.of(way), torch.zeros(1, 3, self.size, self.size)
        with tempfile.TemporaryDirectory() as folder:
            return load_engine(export_onnx(model, Path(folder) / "model.onnx", example).path, "onnxruntime", threads=1)


def start_seconds() -> float:
    """Wall time until a new process has imported what a cell needs."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import phases.baseline, phases.derived"], cwd=ROOT, check=True)
    return time.perf_counter() - start


def measured_analysis(sizes=((40, 2000), (120, 2000), (40, 6000)), held_out=(160, 4000)) -> Iterator[Measurement]:
    """The analysis of generated studies with the attributes of FairFace (7 races, 2 genders, 14 intersections), in wall
    time: it waits for what draws."""
    import tempfile

    from benchmarks import analysis_speed
    from phases import analysis
    from store import Store

    config = load_config(None, list(analysis_speed.CELLS))
    for cells, images in (*sizes, held_out):
        with tempfile.TemporaryDirectory() as folder, quiet():
            planned = analysis_speed.write_study(Path(folder), config, cells, images)
            run = lambda: analysis.analyse(config, Store(Path(folder)), planned, lambda *told: None)  # noqa: E731, B023
            size = HELD_OUT_SIZE if (cells, images) == held_out else FIT_SIZE
            start = time.perf_counter()
            run()
            yield Measurement("analysis", "", size, images, 14, time.perf_counter() - start, cells)


def seconds_of(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Random images and few of them: what the quantizers say of that is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ------------------------------------------------------------------------------------------------------------------ fit


def fit(measurements: list[Measurement]) -> dict[str, dict[str, dict]]:
    """{kind: {model: {"coefficients": {feature: seconds}, "r2", "held_out": [relative errors]}}}."""
    from scipy.optimize import nnls

    by_kind: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        by_kind[measurement.kind, measurement.model].append(measurement)
    fitted: dict[str, dict[str, dict]] = defaultdict(dict)
    for (kind, model), members in by_kind.items():
        names = FEATURES[kind]
        # a difference of two times that came out as nothing is no measurement
        known = [m for m in members if m.image_size != HELD_OUT_SIZE and m.seconds > 0]
        if not known:
            continue
        x = np.array([[m.features()[name] for name in names] for m in known])
        y = np.array([max(m.seconds, 1e-6) for m in known])
        scale = x.max(axis=0)
        scale[scale == 0] = 1
        solution, _ = nnls(x / scale / y[:, None], np.ones(len(y)))
        coefficients = dict(zip(names, (solution / scale).tolist(), strict=True))
        explained = x @ (solution / scale)
        spread = float(((y - y.mean()) ** 2).sum())
        fitted[kind][model] = {
            "coefficients": coefficients,
            "is_determined": bool(np.linalg.matrix_rank(x / scale) == len(names)),
            "r2": 1 - float(((y - explained) ** 2).sum()) / spread if spread else None,
            "held_out": [
                sum(coefficients[name] * m.features()[name] for name in names) / max(m.seconds, 1e-6) - 1
                for m in members
                if m.image_size == HELD_OUT_SIZE
            ],
        }
    return dict(fitted)


def write(measurements: list[Measurement], output: Path) -> None:
    fitted = fit(measurements)
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": platform.processor() or platform.machine(),
        "held_out_image_size": HELD_OUT_SIZE,
        "fit": fitted,
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    output.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    print(table_of_errors(fitted))


def table_of_errors(fitted: dict) -> str:
    """How far the fit is from the size that was held out, kind by kind, which fits are bad, and of which models there
    were fewer measurements than coefficients."""
    lines = ["| kind | models held out | median error | largest error | |", "|---|---|---|---|---|"]
    for kind, models in sorted(fitted.items()):
        errors = np.abs([error for entry in models.values() for error in entry["held_out"]])
        vague = [model for model, entry in models.items() if not entry["is_determined"]]
        remarks = ["bad"] if len(errors) and np.median(errors) > 0.3 else []
        remarks += [f"too few measurements of {', '.join(vague)}"] if vague else []
        held_out = sum(bool(entry["held_out"]) for entry in models.values())
        shown = f"{np.median(errors):.0%} | {errors.max():.0%}" if len(errors) else "– | –"
        lines.append(f"| {kind} | {held_out} of {len(models)} | {shown} | {'; '.join(remarks)} |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- predict


@dataclass(frozen=True)
class Seconds:
    """Of one CPU core: what a GPU would do faster, and what stays there."""

    images: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.images + other.images, self.cpu + other.cpu)

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(self.images * factor, self.cpu * factor)

    def on(self, speedup: float = 1.0) -> float:
        return self.images / speedup + self.cpu


class CostModel:
    """What a fitted model says of single steps and of whole cells."""

    def __init__(self, fitted: dict):
        self.fitted = fitted

    @classmethod
    def read(cls, path: Path) -> CostModel:
        return cls(json.loads(path.read_text())["fit"])

    def step(self, kind: str, model: str, image_size: int = 0, images: float = 0, groups: int = 0, cells: int = 0):
        models = self.fitted.get(kind, {})
        if model not in models:
            more = f" --models {model}" if model else ""
            raise SystemExit(
                f"{model or 'all models'}: what '{kind}' costs has not been measured; run cost_model.py measure{more}"
            )
        known = features(image_size, images, groups, cells)
        parts = {name: value * known[name] for name, value in models[model]["coefficients"].items()}
        if kind in ALL_ON_CPU:
            return Seconds(cpu=sum(parts.values()))
        stays = () if kind in ALL_ON_GPU else STAYS_ON_CPU
        cpu = sum(seconds for name, seconds in parts.items() if name in stays)
        return Seconds(sum(parts.values()) - cpu, cpu)

    def start(self) -> float:
        """Seconds until a new process has imported what a cell needs."""
        return self.step("start", "").on()

    def analysis(self, cells: Sequence[Cell], config: Config) -> float:
        """Seconds of the analysis phase, over the mean test split of the cells."""
        test = float(np.mean([split_sizes(config, cell.dataset)[2] for cell in cells]))
        return self.step("analysis", "", 0, test, 0, len(cells)).on()

    def cells(self, config: Config) -> list[tuple[Cell, Seconds]]:
        """Each planned cell with its cost, phase by phase, in the order in which workers get them; what cells share is
        paid by the first that needs it."""
        paid: set[tuple] = set()
        ordered = [cell for cells in plan(config).values() for cell in longest_first(cells, config)]
        return [(cell, self.cell(cell, config, paid)) for cell in ordered]

    def alone(self, cell: Cell, config: Config) -> Seconds:
        """Of measuring its latencies, while the other cells of the machine stand still."""
        ways = [{"none": "float", "ptq_dynamic": "dynamic"}.get(cell.method, "quantized")]
        ways += [f"engine {ways[0]}"] if _runs_engine(cell, config) else []
        total = Seconds()
        if config.deployment.latency:
            repeats = config.deployment.latency_repeats
            for way, batch in itertools.product(ways, BATCHES):
                passes = WARMUP + repeats * (SINGLES if batch == 1 else 1)
                total += self._batch(f"prediction, {way}", cell, config, batch) * passes
        return total

    def cell(self, cell: Cell, config: Config, paid: set[tuple] | None = None) -> Seconds:
        """What it costs, its latencies included; `paid` is what cells before it have left for it."""
        return self._work(cell, config, set() if paid is None else paid) + self.alone(cell, config)

    def _batch(self, kind: str, cell: Cell, config: Config, images: int) -> Seconds:
        return self.step(kind, cell.model, config.dataset(cell.dataset).image_size, images)

    def _batches(self, kind: str, cell: Cell, config: Config, images: int, size: int) -> Seconds:
        """Of a kind that works batch by batch: whole batches of `size`, and what is left."""
        total = self._batch(kind, cell, config, size) * (images // size)
        return total + self._batch(kind, cell, config, images % size) if images % size else total

    def _work(self, cell: Cell, config: Config, paid: set[tuple]) -> Seconds:
        train, validation, test = split_sizes(config, cell.dataset)
        o = cell.options

        def step(kind: str, images: float = 0, groups: int = 0) -> Seconds:
            return self.step(kind, cell.model, config.dataset(cell.dataset).image_size, images, groups)

        def batches(kind: str, images: int, size: int = config.run.evaluation_batch_size) -> Seconds:
            return self._batches(kind, cell, config, images, size)

        def once(what: Seconds, *key: object) -> Seconds:
            if (cell.baseline_cell, *key) in paid:
                return Seconds()
            paid.add((cell.baseline_cell, *key))
            return what

        way = {"none": "float", "ptq_dynamic": "dynamic"}.get(cell.method, "quantized")
        total = batches(f"prediction, {way}", test) + step("packing")
        if is_selected(cell, (*config.deployment.cells, *config.deployment.export)) and way != "dynamic":
            total += step(f"export, {way}")
        if _runs_engine(cell, config):
            total += batches(f"prediction, engine {way}", test)
        if cell.phase == "baseline":
            settings = config.training.for_model(cell.model)
            epoch = batches("training step", min(train, settings.max_train or train), settings.batch_size)
            return total + (epoch + batches("prediction, float", validation)) * settings.epochs
        if cell.method == "ptq_dynamic":
            return total + step("ptq_dynamic")
        groups, samples = n_groups(config, cell), o.get("calibration_samples", 0)
        draw = (None if name_of(cell) in AS_THEY_COME else o.get("balance"), samples)  # of calibration images
        name = o.get("start", "ptq_static") if cell.method == "qat" else name_of(cell)
        started = o.get("start", name) if name == "output_calibration" else name
        observed = batches("observation", samples, CALIBRATION_BATCH)
        total += once(observed, "observation", *draw, bool(o.get("equalize")))
        images = o.get("sensitivity_samples", samples) if started == "sensitive_layers" else samples
        total += step(self._calibration_kind(started, o), images, groups)
        if cell.method == "mixed_precision" or name == "fair_mixed_precision":
            watched = o.get("sensitivity_samples", samples)
            total += once(step("sensitivity", watched), "sensitivity", *draw, watched, str(o.get("widths")))
        if o.get("rounding") == "adaround" or name == "fair_reconstruction":
            learned = step("reconstruction iteration") * o.get("reconstruction_iterations", 300)
            total += learned * (2.0 if started == "sensitive_layers" else 1.0)  # it compares two models
        if name == "threshold_adjustment":
            total += batches("prediction, quantized", validation)
        if name == "output_calibration":  # the logits of both models, after what it starts from
            total += batches("prediction, float", samples) + batches("prediction, quantized", samples)
        if cell.method == "qat":
            seen = min(train, o.get("max_train") or train)
            epoch = batches("qat step", seen, o["batch_size"]) + batches("prediction, quantized", validation)
            if cell.strategy == "distillation":
                epoch += batches("prediction, float", seen, o["batch_size"])
            total += epoch * o["epochs"]
        return total

    def _calibration_kind(self, name: str, options: dict) -> str:
        if name in GROUP_KINDS:
            return GROUP_KINDS[name]
        if options.get("equalize") or options.get("bias_correction"):
            return "ptq_static, corrected"
        observer = options.get("observer")
        return {"entropy": "ptq_static, entropy", "minmax": "ptq_static, minmax"}.get(observer, "ptq_static")


GROUP_KINDS = {
    "group_weighted_observers": "group_weighted_observers",
    "minimax_ranges": "minimax_ranges",
    "fair_bias_correction": "fair_bias_correction",
    "fair_reconstruction": "fair_bias_correction",  # finds the worst group likewise, then learns the rounding
    "sensitive_channels": "sensitive_channels",
    "sensitive_layers": "sensitive_layers",
}


AS_THEY_COME = ("group_weighted_observers", "threshold_adjustment")  # repairs that calibrate on a plain draw


def name_of(cell: Cell) -> str:
    return cell.strategy or cell.method


def kind_of(cell: Cell) -> str:
    return "baseline" if cell.phase == "baseline" else name_of(cell)


def _runs_engine(cell: Cell, config: Config) -> bool:
    """Whether ONNX Runtime runs it, which has no ranges that depend on the image."""
    is_run = is_selected(cell, config.deployment.cells) and cell.method != "ptq_dynamic"
    return is_run and "onnxruntime" in config.deployment.engines


VALUES = {"race": {"fairface": 7, "utkface": 5}, "age_group": {"fairface": 3, "utkface": 3}, "age": {"fairface": 9}}


def n_groups(config: Config, cell: Cell) -> int:
    """Groups that a repair looks at: an attribute has two values where VALUES does not say otherwise."""
    balance = cell.options.get("balance")
    if balance is None:
        return 0
    names = config.dataset(cell.dataset).sensitive if balance == "intersection" else [balance]
    return int(np.prod([VALUES.get(name, {}).get(cell.dataset, 2) for name in names]))


def tasks_of(
    costs: list[tuple[Cell, Seconds]], speedup: Callable[[str], float], analysis: float, start: float = 0.0
) -> list[Task]:
    """`start`: seconds that each cell needs beside, for a process of its own."""
    phases = {"baseline": 0, "quantization": 1, "mitigation": 2}
    tasks = [
        Task(
            cell.id,
            phases[cell.phase],
            start + seconds.on(speedup(cell.model)),
            () if cell.baseline_cell is None else (cell.baseline_cell,),
        )
        for cell, seconds in costs
    ]
    return [*tasks, Task("analysis", 3, analysis, tuple(task.name for task in tasks))]


def predict(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.set)
    model = CostModel.read(arguments.model)
    costs = model.cells(config)
    analysis = model.analysis([cell for cell, _ in costs], config)
    gpu = speedups(arguments.gpu_speedup)
    print(
        f"{len(costs)} cells: " + ", ".join(f"{n} {phase}" for phase, n in Counter(c.phase for c, _ in costs).items())
    )
    table_of_kinds(costs)
    print(
        "\nassumed, not measured: a GPU passes images so many times as fast as one CPU core: "
        + ", ".join(f"{name} {gpu(name):g}" for name in config.models.architectures)
        + f"; {arguments.cpu_price:g} a core-hour, {arguments.gpu_price:g} a GPU-hour, idle ones paid; a cell on a GPU "
        f"has a process of its own, which starts in {model.start():.1f} s here\n"
    )
    print(
        "| workers | hours | of these standing still | busy | bound: work / workers (h) | critical path (h) | "
        "without barriers (h) | price |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for label, workers, speedup, price in (
        ("1 CPU core", 1, one_core, arguments.cpu_price),
        *((f"{n} GPU{'s' if n > 1 else ''}", n, gpu, arguments.gpu_price) for n in (1, 8, 64)),
    ):
        tasks = tasks_of(costs, speedup, analysis, 0.0 if speedup is one_core else model.start())
        found = schedule(tasks, workers)
        work = sum(task.seconds for task in tasks)
        path, names = critical_path(tasks)
        free = schedule(tasks, workers, barriers=False).makespan
        still = standing_still(
            [model.alone(cell, config).on(speedup(cell.model)) for cell, _ in costs], workers, arguments.per_machine
        )
        hours = (found.makespan + still) / 3600
        print(
            f"| {label} | {hours:.2f} | {still / 3600:.2f} | {work / workers / 3600 / hours:.0%} | "
            f"{work / workers / 3600:.2f} | {path / 3600:.2f} | {(free + still) / 3600:.2f} | "
            f"{workers * hours * price:.0f} |"
        )
    print("\ncritical path with 64 GPUs: " + " -> ".join(names))


def one_core(model: str) -> float:
    return 1.0


def standing_still(alone: Sequence[float], workers: int, per_machine: int) -> float:
    """Seconds for which the workers of a machine wait for one another's latencies, spread evenly over machines: those
    of all, but for each worker's own, which are among its work."""
    machines = -(-workers // per_machine)
    return sum(alone) / machines * (1 - machines / workers)


def table_of_kinds(costs: list[tuple[Cell, Seconds]]) -> None:
    by_kind: dict[str, list[float]] = defaultdict(list)
    for cell, seconds in costs:
        by_kind[kind_of(cell)].append(seconds.on())
    total = sum(itertools.chain.from_iterable(by_kind.values()))
    print("\n| kind | cells | minutes of a core, median | largest | share of all |\n|---|---|---|---|---|")
    for kind, seconds in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        print(
            f"| {kind} | {len(seconds)} | {np.median(seconds) / 60:.1f} | {max(seconds) / 60:.1f} | "
            f"{sum(seconds) / total:.1%} |"
        )


# ---------------------------------------------------------------------------------------------------------------- check


def check(results: Path, model: CostModel) -> int:
    """Print what was predicted of the cells that a run has computed, and what they took, by its log.

    On another machine than the one that was measured the last row says how much faster it is, and the last column how
    far each kind is from that.
    """
    config = load_config(results / "config.yaml", [])
    if config.run.threads_per_cell != 1:
        print(f"{results}: {config.run.threads_per_cell} threads a cell; what is predicted is of one", file=sys.stderr)
    ran = recorded(results, config)
    if not ran:
        print(f"{results}: no cell of its config is done", file=sys.stderr)
        return 2
    paid: set[tuple] = set()
    pairs = [(cell, model.cell(cell, config, paid).on(), seconds) for cell, seconds in ran]
    print("| what | cells | measured (s) | predicted (s) | predicted / measured | median error of a cell | of all's |")
    print("|---|---|---|---|---|---|---|")
    overall = sum(said for _, said, _ in pairs) / sum(took for _, _, took in pairs)
    for label in (kind_of, lambda cell: cell.model, lambda cell: "all"):
        for name in sorted({label(cell) for cell, _, _ in pairs}):
            said, took = np.array([pair[1:] for pair in pairs if label(pair[0]) == name]).T
            print(
                f"| {name} | {len(took)} | {took.sum():.0f} | {said.sum():.0f} | {said.sum() / took.sum():.2f} | "
                f"{np.median(np.abs(said / took - 1)):.0%} | {said.sum() / took.sum() / overall:.2f} |"
            )
    return 0


def recorded(results: Path, config: Config) -> list[tuple[Cell, float]]:
    """The finished cells of a config in the order in which they began, and the seconds that they took by the log."""
    records = [record for record in RunLog(Store(results)).read() if record["status"] == "done" and record["cell"]]
    taken = {record["cell"]: record for record in records if not record.get("again")}
    planned = {cell.id: cell for cells in plan(config).values() for cell in cells}
    began = sorted(taken, key=lambda name: taken[name]["start"])
    return [(planned[name], taken[name]["seconds"]) for name in began if name in planned]


DEFAULT_SPEEDUP = 40.0


def speedups(given: list[str]) -> Callable[[str], float]:
    """Of a model: what `MODEL=NUMBER` says, or else `NUMBER`, or else DEFAULT_SPEEDUP."""
    own = dict(part.split("=") for part in given if "=" in part)
    common = next((float(part) for part in given if "=" not in part), DEFAULT_SPEEDUP)
    return lambda model: float(own.get(model, common))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    measuring = actions.add_parser("measure")
    measuring.add_argument("--models", nargs="+", default=list(MODELS))
    measuring.add_argument("--kinds", nargs="+", choices=FEATURES, default=list(FEATURES))
    measuring.add_argument("--output", type=Path, default=OUTPUT)
    predicting = actions.add_parser("predict")
    predicting.add_argument("--model", type=Path, default=OUTPUT)
    predicting.add_argument("--config", type=Path, default=Path("configs/config.yaml"))
    predicting.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    predicting.add_argument("--gpu-speedup", nargs="+", default=[], metavar="[MODEL=]NUMBER")
    predicting.add_argument("--cpu-price", type=float, default=0.05)
    predicting.add_argument("--gpu-price", type=float, default=2.5)
    predicting.add_argument("--per-machine", type=int, default=8, help="workers that wait for each other's latencies")
    checking = actions.add_parser("check")
    checking.add_argument("results", type=Path)
    checking.add_argument("--model", type=Path, default=OUTPUT)
    merging = actions.add_parser("merge")
    merging.add_argument("files", type=Path, nargs="+")
    merging.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.action == "merge":
        parts = [json.loads(path.read_text())["measurements"] for path in arguments.files]
        write([Measurement(**each) for each in itertools.chain.from_iterable(parts)], arguments.output)
    elif arguments.action == "measure":
        measure(arguments.models, arguments.output, arguments.kinds)
    elif arguments.action == "check":
        try:
            sys.exit(check(arguments.results, CostModel.read(arguments.model)))
        except (ConfigError, StoreError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    else:
        predict(arguments)


if __name__ == "__main__":
    main()
