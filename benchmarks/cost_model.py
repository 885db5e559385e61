"""What every kind of cell costs, measured by small runs; from it the time and the money of a whole study.

    python benchmarks/cost_model.py measure [--models …] [--output docs/scaling/cost_model.json]
    python benchmarks/cost_model.py predict [--config FILE] [--set KEY=VALUE …] [--gpu-speedup 40] [--gpu-price 2.5]

*measure* runs each step of a cell on random images with one thread, at several image sizes and numbers of images and
groups, and fits seconds = sum of coefficient x feature for each kind and model, no coefficient below 0, by least
squares of relative errors. One image size is held out: what the fit says of it is compared with the measurement, and
the errors are printed and kept in the file. Seconds are those of the processor, so that other programs on the machine
matter little; a machine of another kind needs measurements of its own.

*predict* lists the cells that a config plans, with the sizes of the data sets as published where the config does not
limit them, says what each costs, and schedules them as the runner does (benchmarks/schedule.py). **There is no GPU in
it**: what a GPU does in less time is an assumption (`--gpu-speedup`, over one CPU core; one number, or MODEL=NUMBER),
and applies to what passes images through a network. The rest (tracing, folding, scales of weights, statistics) stays on
a CPU core. Prices are assumptions too. While a latency is measured the other cells of its machine stand still
(`--per-machine`): that time is in it. Left out: fetching and decoding the data (benchmarks/data_pipeline.py), engines
other than PyTorch, diagnostics, other data sets, and starting processes.

Several machines may measure a model each (`--output`); `merge` makes one file of theirs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import platform
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
from config import Config, load_config
from evaluation import WARMUP
from execution.order import longest_first, split_sizes
from phases.deploy import BATCHES, SINGLES
from plan import Cell, plan
from sections.base import MODELS

OUTPUT = Path("docs/scaling/cost_model.json")
BATCH = 32  # of training; of evaluation 128 in a config, which costs an image as much
FIT_SIZES, HELD_OUT_SIZE = (64, 160), 112
ITERATIONS = 3  # of reconstruction, beside 1: their difference is the cost of one

STEP = ("one", "images", "image pixels")  # a training step of `images` images
PASS = ("images", "image pixels")
CALIBRATION = ("one", "images", "image pixels")
GROUPED = (*CALIBRATION, "groups")
FEATURES = {
    "training step": STEP,
    "qat step": STEP,
    "prediction, float": PASS,
    "prediction, quantized": PASS,
    "prediction, dynamic": PASS,
    "sensitivity": PASS,
    "reconstruction iteration": ("one", "pixels"),
    "ptq_static": CALIBRATION,
    "ptq_static, minmax": CALIBRATION,
    "ptq_static, entropy": CALIBRATION,
    "ptq_static, corrected": CALIBRATION,
    "ptq_dynamic": ("one",),
    "group_weighted_observers": GROUPED,
    "minimax_ranges": GROUPED,
    "fair_bias_correction": GROUPED,
    "sensitive_channels": GROUPED,
    "sensitive_layers": GROUPED,
    "analysis": ("one", "cells", "cell images"),
}
APPLIED = {  # kind -> what apply_quantization is called with
    "ptq_static": ("ptq_static", {}),
    "ptq_static, minmax": ("ptq_static", {"observer": "minmax"}),
    "ptq_static, entropy": ("ptq_static", {"observer": "entropy"}),
    "ptq_static, corrected": ("ptq_static", {"equalize": True, "bias_correction": True}),
    "ptq_dynamic": ("ptq_dynamic", {}),
    "group_weighted_observers": ("group_weighted_observers", {}),
    "minimax_ranges": ("minimax_ranges", {}),
    "fair_bias_correction": ("fair_bias_correction", {}),
    "sensitive_channels": ("sensitive_channels", {}),
    "sensitive_layers": ("sensitive_layers", {}),
}
STAYS_ON_CPU = ("one", "groups")  # features whose cost no GPU divides, but for the kinds whose work is all its own:
ALL_ON_GPU = ("training step", "qat step", "reconstruction iteration")  # the optimizer's step, rounding of weights


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
    for name in models if kinds != ["analysis"] else []:
        for size, (images, groups) in grid():
            for measurement in measured(name, size, images, groups, kinds):
                found.append(measurement)
                print(
                    f"{measurement.kind}, {name}, {size} px, {measurement.images} images, {measurement.groups} groups: "
                    f"{measurement.seconds:.3f} s",
                    flush=True,
                )
        write(found, output)
    if "analysis" in kinds:
        found += measured_analysis()
    write(found, output)


def grid() -> Iterator[tuple[int, tuple[int, int]]]:
    """(image size, (images, groups)): at the small size also more of either; one of the size that is held out."""
    yield from ((FIT_SIZES[0], sizes) for sizes in ((8, 2), (24, 2), (8, 4)))
    yield FIT_SIZES[1], (4, 2)
    yield HELD_OUT_SIZE, (6, 2)


def measured(name: str, size: int, images: int, groups: int, kinds: list[str]) -> Iterator[Measurement]:
    import torch

    from evaluation import predict
    from models import build_model
    from quantization import apply_quantization
    from quantizers import ptq
    from quantizers.sensitivity import measure_sensitivity
    from sections.training import Training
    from training import train

    generator = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randn(images, 3, size, size, generator=generator).to(memory_format=torch.channels_last),
        "label": torch.arange(images) // 2 % 2,
        "sensitive": {"group": torch.arange(images) % groups},
    }
    model = build_model(name, 2, size, seed=0).to(memory_format=torch.channels_last)
    settings = Training(epochs=1, batch_size=images)
    is_more_groups = groups != 2
    is_wanted = {kind: kind in kinds for kind in FEATURES}

    def result(kind: str, seconds: float) -> Measurement:
        return Measurement(kind, name, size, images, groups, seconds)

    train(model, [batch], None, settings)  # BatchNorm has seen something; the libraries have chosen their kernels
    if not is_more_groups and is_wanted["training step"]:
        few, many = (seconds_of(lambda n=n: train(model, [batch] * n, None, settings)) for n in (1, 4))
        yield result("training step", max(many - few, 0.0) / 3)
    model.eval()
    options = {"calibration_data": [batch], "activation_bits": 8}
    quantized = {}
    with quiet():
        for kind, (method, more) in APPLIED.items():
            if not is_wanted[kind] or (is_more_groups and "groups" not in FEATURES[kind]):
                continue
            more = {**more, "seed": 0} if method != "ptq_dynamic" else dict(more)
            if method != "ptq_dynamic":
                more["calibration_samples"] = images
            if "groups" in FEATURES[kind]:
                more["attributes"] = ["group"]
            if method == "sensitive_layers":
                more["sensitivity_samples"] = images

            def run(kind=kind, method=method, more=more):
                quantized[kind] = apply_quantization(model, method, 4, **options, **more)

            yield result(kind, seconds_of(run))
        if is_more_groups:
            return
        if is_wanted["sensitivity"]:
            attached = ptq.attach(model, batch["image"], "mixed_precision", 4, 8, ptq.Recipe())
            yield result("sensitivity", seconds_of(lambda: measure_sensitivity(attached, batch["image"])))
        if is_wanted["reconstruction iteration"]:
            learn = {"rounding": "adaround", "calibration_samples": images, "seed": 0}
            one, more = (
                seconds_of(
                    lambda n=n: apply_quantization(
                        model, "ptq_static", 4, **options, **learn, reconstruction_iterations=n
                    )
                )
                for n in (1, 1 + ITERATIONS)
            )
            # a batch of reconstruction has 32 images where there are as many
            yield result("reconstruction iteration", max(more - one, 0.0) / ITERATIONS * BATCH / min(images, BATCH))
        if is_wanted["qat step"]:
            own = {"calibration_samples": images, "epochs": 1, "batch_size": images}
            few, many = (
                seconds_of(lambda n=n: apply_quantization(model, "qat", 4, **options, **own, train_data=[batch] * n))
                for n in (1, 3)
            )
            yield result("qat step", max(many - few, 0.0) / 2)
    ways = {"float": model, "quantized": quantized.get("ptq_static"), "dynamic": quantized.get("ptq_dynamic")}
    for way, predictor in ways.items():
        if predictor is not None and is_wanted[f"prediction, {way}"]:
            yield result(
                f"prediction, {way}", min(seconds_of(lambda p=predictor: predict(p, [batch])) for _ in range(2))
            )


def measured_analysis(sizes=((30, 2000), (60, 2000), (60, 6000)), held_out=(45, 4000)) -> Iterator[Measurement]:
    """The analysis of generated studies with the attributes of FairFace (7 races, 2 genders, 14 intersections)."""
    import tempfile

    from benchmarks import analysis_speed
    from phases import analysis
    from store import Store

    config = load_config(None, list(analysis_speed.CELLS))
    for cells, images in (*sizes, held_out):
        with tempfile.TemporaryDirectory() as folder, quiet():
            planned = analysis_speed.write_study(Path(folder), config, cells, images)
            run = lambda: analysis.analyse(config, Store(Path(folder)), planned, lambda *told: None)  # noqa: B023, E731
            size = HELD_OUT_SIZE if (cells, images) == held_out else FIT_SIZES[0]
            yield Measurement("analysis", "", size, images, 14, seconds_of(run), cells)


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
        known = [m for m in members if m.image_size != HELD_OUT_SIZE]
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
        models = self.fitted[kind]
        if model not in models:
            raise SystemExit(f"{model}: its costs have not been measured; run cost_model.py measure --models {model}")
        known = features(image_size, images, groups, cells)
        parts = {name: value * known[name] for name, value in models[model]["coefficients"].items()}
        stays = () if kind in ALL_ON_GPU else STAYS_ON_CPU
        cpu = sum(seconds for name, seconds in parts.items() if name in stays)
        return Seconds(sum(parts.values()) - cpu, cpu)

    def analysis(self, config: Config, cells: int) -> float:
        """Seconds of the analysis phase, over the largest test split."""
        test = max(split_sizes(config, name)[2] for name in config.data.dataset)
        return self.step("analysis", "", 0, test, 0, cells).on()

    def cells(self, config: Config) -> list[tuple[Cell, Seconds]]:
        """Each planned cell with its cost, phase by phase, in the order in which workers get them; a sensitivity table
        is paid by the first that needs it."""
        paid: set[tuple] = set()
        ordered = [cell for cells in plan(config).values() for cell in longest_first(cells, config)]
        return [(cell, self.cell(cell, config, paid)) for cell in ordered]

    def alone(self, cell: Cell, config: Config) -> Seconds:
        """Of measuring its latency as PyTorch computes it, while the other cells of the machine stand still."""
        if not config.deployment.latency:
            return Seconds()
        repeats = config.deployment.latency_repeats
        images = sum(batch * (WARMUP + repeats * (SINGLES if batch == 1 else 1)) for batch in BATCHES)
        way = {"none": "float", "ptq_dynamic": "dynamic"}.get(cell.method, "quantized")
        return self.step(f"prediction, {way}", cell.model, config.dataset(cell.dataset).image_size, images)

    def cell(self, cell: Cell, config: Config, paid: set[tuple] | None = None) -> Seconds:
        """What it costs, its latency included."""
        return self._work(cell, config, paid) + self.alone(cell, config)

    def _work(self, cell: Cell, config: Config, paid: set[tuple] | None) -> Seconds:
        size = config.dataset(cell.dataset).image_size
        train, validation, test = split_sizes(config, cell.dataset)
        o = cell.options

        def step(kind: str, images: float = 0, groups: int = 0) -> Seconds:
            return self.step(kind, cell.model, size, images, groups)

        if cell.phase == "baseline":
            settings = config.training.for_model(cell.model)
            seen = min(train, settings.max_train or train)
            steps = seen / settings.batch_size
            epoch = step("training step", settings.batch_size) * steps + step("prediction, float", validation)
            return epoch * settings.epochs + step("prediction, float", test)
        if cell.method == "ptq_dynamic":
            return step("ptq_dynamic") + step("prediction, dynamic", test)
        groups = n_groups(config, cell)
        samples = o.get("calibration_samples", 0)
        name = cell.strategy or cell.method
        is_trained = cell.method == "qat"
        if is_trained:
            name = o.get("start", "ptq_static")
        base = self._calibration_kind(o.get("start", name) if name == "output_calibration" else name, o)
        total = step(base, samples, groups)
        if cell.method == "mixed_precision" or name == "fair_mixed_precision":
            key = (cell.baseline_cell, o.get("balance"), samples, o.get("sensitivity_samples"), str(o.get("widths")))
            if paid is None or key not in paid:
                total += step("sensitivity", o.get("sensitivity_samples", samples))
            if paid is not None:
                paid.add(key)
        if o.get("rounding") == "adaround" or name == "fair_reconstruction":
            total += step("reconstruction iteration") * o.get("reconstruction_iterations", 300)
        if name == "threshold_adjustment":
            total += step("prediction, quantized", validation)
        if name == "output_calibration":  # the logits of both models, after what it starts from
            total += step("prediction, float", samples) + step("prediction, quantized", samples)
        if is_trained:
            seen = min(train, o.get("max_train") or train)
            epoch = step("qat step", o["batch_size"]) * (seen / o["batch_size"])
            epoch += step("prediction, quantized", validation)
            if cell.strategy == "distillation":
                epoch += step("prediction, float", seen)
            total += epoch * o["epochs"]
        return total + step("prediction, quantized", test)

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


VALUES = {"race": {"fairface": 7, "utkface": 5}, "age_group": {"fairface": 3, "utkface": 3}, "age": {"fairface": 9}}


def n_groups(config: Config, cell: Cell) -> int:
    """Groups that a repair looks at: an attribute has two values where VALUES does not say otherwise."""
    balance = cell.options.get("balance")
    if balance is None:
        return 0
    names = config.dataset(cell.dataset).sensitive if balance == "intersection" else [balance]
    return int(np.prod([VALUES.get(name, {}).get(cell.dataset, 2) for name in names]))


def tasks_of(costs: list[tuple[Cell, Seconds]], speedup: Callable[[str], float], analysis: float) -> list[Task]:
    phases = {"baseline": 0, "quantization": 1, "mitigation": 2}
    tasks = [
        Task(
            cell.id,
            phases[cell.phase],
            seconds.on(speedup(cell.model)),
            () if cell.baseline_cell is None else (cell.baseline_cell,),
        )
        for cell, seconds in costs
    ]
    return [*tasks, Task("analysis", 3, analysis, tuple(task.name for task in tasks))]


def predict(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.set)
    model = CostModel.read(arguments.model)
    costs = model.cells(config)
    analysis = model.analysis(config, len(costs))
    gpu = speedups(arguments.gpu_speedup)
    print(
        f"{len(costs)} cells: " + ", ".join(f"{n} {phase}" for phase, n in Counter(c.phase for c, _ in costs).items())
    )
    table_of_kinds(costs)
    print(
        "\nassumed, not measured: a GPU passes images so many times as fast as one CPU core: "
        + ", ".join(f"{name} {gpu(name):g}" for name in config.models.architectures)
        + f"; {arguments.cpu_price:g} a core-hour, {arguments.gpu_price:g} a GPU-hour, idle ones paid\n"
    )
    print(
        "| workers | hours | of these standing still | busy | bound: work / workers (h) | critical path (h) | "
        "without barriers (h) | price |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for label, workers, speedup, price in (
        ("1 CPU core", 1, lambda name: 1.0, arguments.cpu_price),
        *((f"{n} GPU{'s' if n > 1 else ''}", n, gpu, arguments.gpu_price) for n in (1, 8, 64)),
    ):
        tasks = tasks_of(costs, speedup, analysis)
        found = schedule(tasks, workers)
        work = sum(task.seconds for task in tasks)
        path, names = critical_path(tasks)
        free = schedule(tasks, workers, barriers=False).makespan
        still = standing_still(
            [model.alone(cell, config).on(speedup(cell.model)) for cell, _ in costs], workers, arguments.per_machine
        )
        hours = (found.makespan + still) / 3600
        print(
            f"| {label} | {hours:.1f} | {still / 3600:.1f} | {work / workers / 3600 / hours:.0%} | "
            f"{work / workers / 3600:.1f} | {path / 3600:.1f} | {(free + still) / 3600:.1f} | "
            f"{workers * hours * price:.0f} |"
        )
    print("\ncritical path with 64 GPUs: " + " -> ".join(names))


def standing_still(alone: Sequence[float], workers: int, per_machine: int) -> float:
    """Seconds for which the workers of a machine wait for one another's latencies, spread evenly over machines: those
    of all, but for each worker's own, which are among its work."""
    machines = -(-workers // per_machine)
    return sum(alone) / machines * (1 - machines / workers)


def table_of_kinds(costs: list[tuple[Cell, Seconds]]) -> None:
    by_kind: dict[str, list[float]] = defaultdict(list)
    for cell, seconds in costs:
        by_kind[cell.strategy or (cell.method if cell.phase != "baseline" else "baseline")].append(seconds.on())
    total = sum(itertools.chain.from_iterable(by_kind.values()))
    print("\n| kind | cells | minutes of a core, median | largest | share of all |\n|---|---|---|---|---|")
    for kind, seconds in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        print(
            f"| {kind} | {len(seconds)} | {np.median(seconds) / 60:.1f} | {max(seconds) / 60:.1f} | "
            f"{sum(seconds) / total:.1%} |"
        )


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
    merging = actions.add_parser("merge")
    merging.add_argument("files", type=Path, nargs="+")
    merging.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    if arguments.action == "merge":
        parts = [json.loads(path.read_text())["measurements"] for path in arguments.files]
        write([Measurement(**each) for each in itertools.chain.from_iterable(parts)], arguments.output)
    elif arguments.action == "measure":
        measure(arguments.models, arguments.output, arguments.kinds)
    else:
        predict(arguments)


if __name__ == "__main__":
    main()
