"""What each repair gives back to the group that quantization hurt most, on real faces and on synthetic ones.

    python benchmarks/mitigation.py --data synthetic
    python benchmarks/mitigation.py --data fairface --set data.fairface.root=FOLDER
    python benchmarks/mitigation.py --print
    python benchmarks/mitigation.py --diagnose --setting W3A3 --data fairface --set data.fairface.root=FOLDER

Trains the float models of mitigation_<data>.yaml where they are missing (main.py's baseline phase: 3 seeds of a
MobileNetV2), and quantizes each of them in every way of METHODS. Which setting is compared at is found first: the
widest at which the best plain post-training quantization costs the worst group of the first attribute MOST_DROP points
on validation. The worst group is the one that loses most there, on validation images; all that is printed is measured
on test images. Groups are the first attribute's, of which the repairs know; a second table has those of all attributes.

Each result, the predictions of one model, is kept in RESULTS_DIR/<data>/mitigation/ as it is measured: run again, only
what is missing is computed; `--print` computes nothing. `--publish FOLDER` gathers what is shown in FOLDER/<data>.json;
with `--published FOLDER` such results count as measured, those of other float models left out. Differences are paired,
image by image, averaged over the seeds; intervals are 95 % percentile intervals of a bootstrap over the images, given
the seeds. `--diagnose` asks why instead: what the groups of the first attribute meet in the float model and in the best
plain one (diagnostics.py), on validation images.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import dataclasses
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from batches import BatchLoader
from config import dump_config, load_config
from datasets import Split, calibration_subset, load_dataset
from diagnostics import diagnose
from evaluation import model_size_mb, predict
from group_counts import count_table, group_metrics, intersect
from models import build_model, load_checkpoint
from phases import baseline
from plan import QUANTIZATION_VERSION, REPAIR_VERSION, REVISED, TRAINING_VERSION, plan
from quantization import QuantizationError, apply_quantization
from quantizers import methods
from quantizers.mixed_precision import table_of_widths
from quantizers.modules import QuantizedModel
from runner import Report
from store import Store, seed_for, short_hash, write_json, write_text

MODEL = "mobilenet_v2"
MOST_DROP = 3.0  # points that the best plain PTQ costs the worst group at the setting that is compared at
SETTINGS = ("W8A8", "W4A8", "W4A4", "W3A4", "W3A3", "W4A2", "W2A4", "W3A2", "W2A3", "W2A2")  # from wide to narrow
CALIBRATION_IMAGES = 512
EXTRA = {"validation": 1500, "test": 7800}  # of FairFace's training images that are not trained on, as many more
TRAINING = {"epochs": 1, "learning_rate": 1e-3}  # a short training, on all that the float models were trained on
REPLICATES = 2000
LATER = {"precision": "auto"}  # settings that came after results were kept, whose keys have nothing of them
NEAR = 1.0  # points, between which a whole interval has to lie for a group to be called near FP32
SAME_OPERATIONS = "inputs of twice the bits"  # the control of what may take twice the bit operations
LEAST_GROUP = 50  # validation images of a group that may be the worst one

ITERATIONS = {"fairface": 100, "synthetic": 300}  # optimizer steps a block
LONGER = 300  # the default of the configuration, which gives no more on FairFace: see "longer reconstruction"
FAIR_BATCH = {"fairface": 128, "synthetic": 64}  # some ten images of a group and class: of fewer the gap is chance
RECONSTRUCTION = {"rounding": "adaround"}
TWICE = {"extra_operations": 1.0}
START = {"start": "sensitive_layers", "start_options": TWICE}
STARTS = ("ptq_static", "sensitive_layers")  # methods that others start from
HESSIAN_IMAGES = 128  # of each group
PLAIN = {
    "PTQ": ("ptq_static", {}),
    "PTQ, bias corrected": ("ptq_static", {"bias_correction": True}),
    "PTQ, reconstruction": ("ptq_static", RECONSTRUCTION),
    "mixed precision, same bytes": ("mixed_precision", {}),
    "mixed precision, reconstruction": ("mixed_precision", RECONSTRUCTION),
}
CONTROLS = {  # which know of no groups: what a repair has to be compared with, beside the best plain one
    "longer reconstruction": ("ptq_static", {**RECONSTRUCTION, "reconstruction_iterations": LONGER}),
    "reconstruction, drawn again": ("ptq_static", {**RECONSTRUCTION, "draw": 1}),  # how much two draws differ
    "8-bit inputs": ("ptq_static", {**RECONSTRUCTION, "activation_bits": 8}),  # of all layers, which take no bytes
    "inputs of twice the bits": ("ptq_static", {**RECONSTRUCTION, "activation_bits": "twice"}),  # all of them
    "8-bit inputs, weights of a bit less": (
        "ptq_static",
        {**RECONSTRUCTION, "activation_bits": 8, "weight_bits": "less"},
    ),
}
WITHOUT_TRAINING = {
    "balanced calibration": ("bias_aware_calibration", RECONSTRUCTION),
    "group-weighted observers": ("group_weighted_observers", RECONSTRUCTION),
    "minimax ranges": ("minimax_ranges", RECONSTRUCTION),
    "bias correction, worst group": ("fair_bias_correction", RECONSTRUCTION),
    "reconstruction, balanced": ("fair_reconstruction", {**RECONSTRUCTION, "weighting": "balanced"}),
    "reconstruction, worst group": ("fair_reconstruction", RECONSTRUCTION),
    "sensitive channels, +5 % bytes": ("sensitive_channels", RECONSTRUCTION),
    "sensitive layers": ("sensitive_layers", RECONSTRUCTION),
    "sensitive layers, up to half": ("sensitive_layers", {**RECONSTRUCTION, "layer_share": 0.5}),
    "input widths, twice the operations": ("sensitive_layers", {**RECONSTRUCTION, **TWICE}),
    "input widths, all groups alike": ("sensitive_layers", {**RECONSTRUCTION, **TWICE, "worst_share": 1.0}),
    "fair mixed precision": ("fair_mixed_precision", RECONSTRUCTION),
    "output calibration": ("output_calibration", RECONSTRUCTION),
    "thresholds of groups": ("threshold_adjustment", RECONSTRUCTION),
}
WITH_TRAINING = {  # from the best that there is without: reconstruction, or the repair that is named
    "QAT": ("qat", {}),
    "balanced fine-tuning": ("balanced_finetuning", RECONSTRUCTION),
    "reweighing": ("reweighing", RECONSTRUCTION),
    "fairness fine-tuning": ("fairness_finetuning", {**RECONSTRUCTION, "batch_size": "fair"}),
    "group DRO": ("group_dro", RECONSTRUCTION),
    "distillation": ("distillation", RECONSTRUCTION),
    "distillation, all groups alike": ("distillation", {**RECONSTRUCTION, "step_size": 1e-9}),  # a control
    "input widths, then group DRO": ("group_dro", {**RECONSTRUCTION, **START}),
    "input widths, then distillation": ("distillation", {**RECONSTRUCTION, **START}),
}
UNGROUPED = ("ptq_static", "mixed_precision", "qat")  # methods that know of no groups
METHODS = {**PLAIN, **CONTROLS, **WITHOUT_TRAINING, **WITH_TRAINING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=["synthetic", "fairface"], default=["synthetic", "fairface"])
    parser.add_argument("--results-dir", type=Path, default=Path("results/mitigation"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--setting", choices=SETTINGS, help="compare at this one")
    parser.add_argument("--threads", type=int, default=1, help="of the quantization; the float models have their own")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw what is printed")
    parser.add_argument("--publish", type=Path, metavar="FOLDER", help="write the predictions behind what is printed")
    parser.add_argument("--published", type=Path, metavar="FOLDER", help="take what is not in RESULTS_DIR from there")
    parser.add_argument("--print", action="store_true", dest="only_print", help="compute nothing")
    parser.add_argument("--diagnose", action="store_true", help="why groups suffer from the best plain quantization")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    comparisons = []
    for data in arguments.data:
        config = load_config(Path(__file__).with_name(f"mitigation_{data}.yaml"), arguments.set)
        study = Study(data, config, arguments.results_dir / data, arguments.published)
        if not arguments.only_print:
            study.train()
        seeds = arguments.seeds or config.run.seeds
        torch.set_num_threads(arguments.threads)
        if not arguments.only_print:
            for seed in seeds:
                study.measure(seed, "FP32", None)
            setting = arguments.setting or study.find_setting(seeds)
            repairs = () if arguments.diagnose else arguments.methods or METHODS
            left_out = set()
            if ITERATIONS[data] >= LONGER:
                left_out.add("longer reconstruction")
            if setting is not None and int(setting[1]) == 2:
                left_out.add("8-bit inputs, weights of a bit less")
            repairs = [label for label in repairs if label not in left_out]
            for seed in seeds:  # one after the other: what several methods start from is kept for a seed
                for label in dict.fromkeys((*PLAIN, *repairs)):  # they are compared with the best of all plain ones
                    study.measure(seed, label, setting)
        else:
            setting = arguments.setting or study.measured_setting(seeds)
        if arguments.diagnose:
            study.diagnose(seeds, setting, arguments.only_print)
        else:
            comparisons.append(show(study, seeds, setting))
        if arguments.publish is not None:
            study.publish(seeds, setting, arguments.publish)
    if len(comparisons) > 1:
        side_by_side(comparisons)
    if arguments.figure is not None and comparisons:
        figure(comparisons).savefig(arguments.figure, dpi=150)


class Study:
    """One data set: its float models, and what each method makes of them."""

    def __init__(self, data: str, config, folder: Path, published: Path | None = None):
        self.data, self.config, self.folder = data, config, folder
        file = None if published is None else published / f"{data}.json"
        self.published = json.loads(file.read_text()) if file is not None and file.exists() else {}
        self.store = Store(folder)
        self.dataset = load_dataset(config, data)
        self.attribute = next(iter(self.dataset.sensitive_names))  # whose groups are repaired
        self.validation, self.test = self.held_out()
        self.loaded: tuple[int, torch.nn.Module] | None = None
        self.starts = Starts("")
        self.digests: dict[int, str] = {}

    def train(self) -> None:
        self.store.prepare(dump_config(self.config))
        baseline.run(self.config, self.store, Report())

    def held_out(self) -> tuple[list[Split], list[Split]]:
        """Validation and test splits; FairFace's untrained training images are divided between them."""
        splits = self.dataset.splits
        if self.data != "fairface":
            return [splits["validation"]], [splits["test"]]
        section = self.config.data.fairface.model_copy(update={"max_train": None})
        whole_config = self.config.model_copy(
            update={"data": self.config.data.model_copy(update={"fairface": section})}
        )
        whole = load_dataset(whole_config, self.data)
        used = np.concatenate([splits["train"].index, splits["validation"].index])
        order = np.random.default_rng(seed_for("mitigation", "held out"))
        validation, test = [splits["validation"]], [splits["test"]]
        rest = order.permutation(np.flatnonzero(~np.isin(whole.splits["train"].index, used)))
        for into, first, count in ((validation, 0, EXTRA["validation"]), (test, EXTRA["validation"], EXTRA["test"])):
            into.append(whole.splits["train"].subset(np.sort(rest[first : first + count])))
        return validation, test

    def model(self, seed: int) -> torch.nn.Module:
        if self.loaded is None or self.loaded[0] != seed:
            model = build_model(MODEL, len(self.dataset.class_names), self.dataset.image_size)
            (cell,) = [cell for cell in plan(self.config)["baseline"] if cell.seed == seed]
            expected = {"model": MODEL, "n_classes": len(self.dataset.class_names), "cell": cell.id}
            load_checkpoint(self.store.checkpoint_path(self.data, MODEL, seed), model, expected)
            self.starts = Starts(f"{self.data} {seed}")
            self.loaded = seed, model.to(memory_format=torch.channels_last).eval()
        return self.loaded[1]

    def path(self, seed: int, label: str, setting: str | None) -> Path:
        """Of a result; its name ends in a hash of the float model's cell and of all that is done with it."""
        (cell,) = [cell for cell in plan(self.config)["baseline"] if cell.seed == seed]
        done: list = []
        if setting is not None:
            method, options, draw, (weight_bits, activation_bits) = self.asked(label, setting)
            settings = methods._settings(method, methods.METHODS[method], options)
            settings = {key: value for key, value in settings.items() if (key, value) not in LATER.items()}
            done = [method, settings, draw, activation_bits, CALIBRATION_IMAGES, torch.get_num_threads()]
            done += [] if weight_bits == int(setting[1]) else [weight_bits]
        if label in WITHOUT_TRAINING or label in WITH_TRAINING:
            done.append(REVISED.get(METHODS[label][0], REPAIR_VERSION))
        if label in WITH_TRAINING:
            done.append(TRAINING_VERSION)
        key = short_hash([cell.id, done, EXTRA, QUANTIZATION_VERSION])
        return self.folder / "mitigation" / f"s{seed}-{label}{f'-{setting}' if setting else ''}-{key}.json"

    def asked(self, label: str, setting: str) -> tuple[str, dict, list[int], tuple[int, int]]:
        """The method, its options, whether its calibration images are drawn anew, and the bits of weights and
        activations."""
        method, options = METHODS[label]
        options = dict(options)
        draw = [options.pop("draw")] if "draw" in options else []
        bits = {"weight_bits": int(setting[1]), "activation_bits": int(setting[3])}
        changed = {"twice": 2 * bits["activation_bits"], "less": bits["weight_bits"] - 1}
        for name in bits:
            asked = options.pop(name, bits[name])
            bits[name] = changed.get(asked, asked)
        if options.get("batch_size") == "fair":
            options["batch_size"] = FAIR_BATCH[self.data]
        if method not in UNGROUPED:
            options["attributes"] = [self.attribute]
        if options.get("rounding") == "adaround":
            options.setdefault("reconstruction_iterations", ITERATIONS[self.data])
        if label in WITH_TRAINING:
            options = {**TRAINING, "batch_size": self.config.training.batch_size, **options}
        return method, options, draw, (bits["weight_bits"], bits["activation_bits"])

    def measure(self, seed: int, label: str, setting: str | None) -> None:
        path = self.path(seed, label, setting)
        digest = self.digest(seed)
        if (known := self.result(path)) is not None:
            if known["float_model"] != digest:
                raise SystemExit(f"{path}: is of another float model: delete it, or take another results folder")
            return
        self.model(seed)
        start, saved = time.perf_counter(), self.starts.saved
        try:
            model = self.model(seed) if setting is None else self.quantize(seed, label, setting)
        except QuantizationError as error:  # a budget that no model keeps; its row is left out
            print(f"{self.data} s{seed} {label} {setting}: {error}", flush=True)
            write_json(path, {"refused": str(error), "float_model": digest})
            return
        seconds = time.perf_counter() - start + self.starts.saved - saved
        result = {"seconds": seconds, "size_mb": model_size_mb(model), "threads": torch.get_num_threads()}
        result["float_model"] = digest
        reports = getattr(model, "reports", {})
        result["training_seconds"] = reports["training"]["seconds"] if "training" in reports else 0.0
        for name in ("budgets", "group_drift"):  # of the latter: which group was the worst one
            if name in reports:
                result[name] = json.loads(json.dumps(reports[name], default=_as_json))
        result["bit_operations"] = self.bit_operations(model)
        for part, splits in (("validation", self.validation), ("test", self.test)):
            predictions = [predict(model, BatchLoader(split, 128, channels_last=True)) for split in splits]
            result[part] = pack(np.concatenate([each.y_pred for each in predictions]))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        label_N = self.labels("validation")
        accuracy = (unpack(result["validation"], len(label_N)) == label_N).mean()
        print(f"{self.data} s{seed} {label} {setting or ''}: {100 * accuracy:.2f} %, {seconds:.0f} s", flush=True)

    def digest(self, seed: int) -> str:
        """Of the float model's checkpoint: results of another one, trained elsewhere, are not compared."""
        if seed not in self.digests:
            path = self.store.checkpoint_path(self.data, MODEL, seed)
            self.digests[seed] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return self.digests[seed]

    def result(self, path: Path) -> dict | None:
        """What was measured, from RESULTS_DIR or, of the same float model, from what was published."""
        if path.exists():
            return json.loads(path.read_text())
        found = self.published.get(path.name)
        seed = int(path.name.removeprefix("diagnosis-").removeprefix("s").split("-")[0])
        if found is not None and self.store.checkpoint_path(self.data, MODEL, seed).exists():
            return found if found["float_model"] == self.digest(seed) else None
        return found

    def publish(self, seeds: Sequence[int], setting: str, folder: Path) -> None:
        paths = [
            self.path(seed, label, None if label == "FP32" else setting)
            for label in ("FP32", *METHODS)
            for seed in seeds
        ]
        paths += [path.with_name(f"diagnosis-{path.name}") for path in paths]
        found = {path.name: result for path in paths if (result := self.result(path)) is not None}
        folder.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(result)}" for name, result in sorted(found.items()))
        write_text(folder / f"{self.data}.json", f"{{\n{lines}\n}}\n")

    def bit_operations(self, model: torch.nn.Module) -> int | None:
        """Of one image: products x the bits of both factors. None of a float model."""
        network = model.model if getattr(model, "reads_groups", False) else model
        if not isinstance(network, QuantizedModel):
            return None
        batch = next(iter(BatchLoader(self.test[0].subset(np.array([0])), 1, channels_last=True)))
        return int(table_of_widths(network, batch["image"])["bit_operations"].sum())

    def quantize(self, seed: int, label: str, setting: str):
        method, options, draw, (weight_bits, activation_bits) = self.asked(label, setting)
        split = self.dataset.splits["train"]
        generator = np.random.default_rng(seed_for("mitigation", self.data, seed, "calibration", *draw))
        start = options.get(
            "start", "ptq_static" if label in WITH_TRAINING or method == "output_calibration" else method
        )
        is_plain = start in ("ptq_static", "mixed_precision", "group_weighted_observers", "threshold_adjustment")
        balance = None if is_plain else [self.attribute]
        positions = np.unique(calibration_subset(split, CALIBRATION_IMAGES, generator, balance=balance))
        train = self.training_loader(seed, options["batch_size"]) if label in WITH_TRAINING else None
        validation = None
        if label in WITH_TRAINING or method == "threshold_adjustment":
            validation = BatchLoader(self.validation[-1], 128, channels_last=True)
        if method not in ("ptq_dynamic", "qat"):
            options["seed"] = seed_for("mitigation", seed, *draw)
        with self.starts.shared():
            return apply_quantization(
                self.model(seed),
                method,
                weight_bits,
                BatchLoader(split.subset(generator.permutation(positions)), 128, channels_last=True),
                activation_bits=activation_bits,
                train_data=train,
                validation_data=validation,
                calibration_samples=CALIBRATION_IMAGES,
                **options,
            )

    def training_loader(self, seed: int, batch_size: int) -> BatchLoader:
        settings = self.config.training
        return BatchLoader(
            self.dataset.splits["train"],
            batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed_for("mitigation", seed, "batches")),
            flip=settings.flip,
            shift=settings.shift,
            brightness=settings.brightness,
            drop_last=True,
            channels_last=True,
        )

    def diagnose(self, seeds: Sequence[int], setting: str, only_print: bool) -> None:
        """Print what each group of the first attribute meets in the float model and in the best plain one."""
        label, attribute = self.best_plain(seeds, setting), self.attribute
        found = []
        for seed in seeds:
            path = self.path(seed, label, setting)
            path = path.with_name(f"diagnosis-{path.name}")
            if self.result(path) is None and not only_print:
                write_json(path, self.diagnosis(seed, label, setting, attribute))
            if (known := self.result(path)) is not None:
                found.append(known)
                print(f"{self.data} s{seed} {label} {setting}: diagnosed", flush=True)
        if found:
            show_diagnosis(self, seeds[: len(found)], label, setting, attribute, found)

    def diagnosis(self, seed: int, label: str, setting: str, attribute: str) -> dict[str, list[dict]]:
        tables = diagnose(
            self.model(seed),
            self.quantize(seed, label, setting),
            BatchLoader(self.validation[-1], 128, channels_last=True),
            attribute,
            names=self.dataset.sensitive_names,
            hessian_samples=HESSIAN_IMAGES,
            seed=seed_for("mitigation", seed, "hessian"),
        )
        clipping = tables.clipping.groupby("group", sort=False)["clipping_rate"].mean()
        return {
            "float_model": self.digest(seed),
            "groups": json.loads(tables.groups.to_json(orient="records")),
            "exemplars": json.loads(tables.exemplars.to_json(orient="records")),
            "clipping": [{"group": group, "clipping_rate": float(rate)} for group, rate in clipping.items()],
        }

    # ------------------------------------------------------------------------------------------------- what was found

    def labels(self, part: str) -> np.ndarray:
        return np.concatenate([split.labels for split in getattr(self, part)])

    def groups(self, part: str, attributes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        splits = getattr(self, part)
        codes = {name: np.concatenate([split.sensitive[name] for split in splits]) for name in attributes}
        return intersect(codes, {name: self.dataset.sensitive_names[name] for name in attributes})

    def check_one_float_model(self, seeds: Sequence[int], setting: str) -> None:
        """SystemExit where results of different float models would be compared."""
        for seed in seeds:
            paths = [self.path(seed, label, None if label == "FP32" else setting) for label in ("FP32", *METHODS)]
            found = {result["float_model"] for path in paths if (result := self.result(path)) is not None}
            if len(found) > 1:
                raise SystemExit(f"{self.data} seed {seed}: results of {len(found)} different float models")

    def predictions(self, seeds: Sequence[int], label: str, setting: str | None, part: str) -> np.ndarray | None:
        """(S, N) classes; None where a seed is missing, or was refused."""
        results = [self.result(self.path(seed, label, setting)) for seed in seeds]
        if any(result is None or "refused" in result for result in results):
            return None
        images = len(self.labels(part))
        return np.array([unpack(result[part], images) for result in results])

    def worst_group(self, seeds, label: str, setting: str, attributes) -> tuple[int, float]:
        """The group that loses most on validation, and how many points."""
        codes_N, names = self.groups("validation", attributes)
        label_N = self.labels("validation")
        fp32, quantized = (
            (self.predictions(seeds, name, width, "validation") == label_N).mean(axis=0)
            for name, width in (("FP32", None), (label, setting))
        )
        drops = np.full(len(names), -np.inf)
        for group in range(len(names)):
            member = codes_N == group
            if member.sum() >= LEAST_GROUP:
                drops[group] = 100 * (fp32[member] - quantized[member]).mean()
        return int(drops.argmax()), float(drops.max())

    def best_plain(self, seeds, setting: str) -> str:
        """The plain post-training method that costs the worst group of the first attribute least on validation."""
        self.check_one_float_model(seeds, setting)
        missing = [label for label in PLAIN for seed in seeds if self.result(self.path(seed, label, setting)) is None]
        if missing:
            raise SystemExit(f"{self.data} {setting}: not measured yet: {', '.join(dict.fromkeys(missing))}")
        found = {
            label: self.worst_group(seeds, label, setting, [self.attribute])[1]
            for label in PLAIN
            if self.predictions(seeds, label, setting, "validation") is not None
        }
        return min(found, key=found.get)

    def find_setting(self, seeds) -> str:
        """The widest setting at which the best plain method costs the worst group MOST_DROP points on validation.

        Of the first attribute: of the many small groups of an intersection some seem to lose as much by chance alone.
        """
        attributes = [self.attribute]
        for setting in SETTINGS:
            drops = {}
            for label in sorted(PLAIN, key=lambda label: (label != "PTQ", label != "PTQ, reconstruction")):
                for seed in seeds:
                    self.measure(seed, label, setting)
                if self.predictions(seeds, label, setting, "validation") is not None:
                    drops[label] = self.worst_group(seeds, label, setting, attributes)[1]
                if drops and min(drops.values()) < MOST_DROP:
                    break  # the best one costs no more
            best = min(drops, key=drops.get)
            print(f"{self.data} {setting}: {best} costs the worst group {drops[best]:.1f} points", flush=True)
            if drops[best] >= MOST_DROP:
                return setting
        raise SystemExit(f"{self.data}: no setting costs a group {MOST_DROP} points")

    def measured_setting(self, seeds) -> str:
        """The setting that most methods were measured at."""
        counts = {
            setting: sum(
                self.result(self.path(seed, label, setting)) is not None for label in METHODS for seed in seeds
            )
            for setting in SETTINGS
        }
        return max(counts, key=counts.get)


class Starts:
    """What several methods start from, of one float model: computed once, and its seconds counted in each of them."""

    def __init__(self, model: str):
        self.model = model  # which one: its results are not another one's
        self.kept: dict[str, tuple[torch.nn.Module, float]] = {}
        self.saved = 0.0  # seconds

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        before = {name: methods.METHODS[name] for name in STARTS}
        for name, entry in before.items():
            methods.METHODS[name] = dataclasses.replace(entry, apply=self.remembering(name, entry.apply))
        try:
            yield
        finally:
            methods.METHODS.update(before)

    def remembering(self, name: str, apply: Callable) -> Callable:
        def remembered(model, data, weight_bits, activation_bits, settings):
            images = torch.cat([torch.as_tensor(batch["image"]) for batch in data.calibration])
            key = short_hash([self.model, name, _digest_of(images), weight_bits, activation_bits, settings])
            if key in self.kept:
                self.saved += self.kept[key][1]
            else:
                start, saved = time.perf_counter(), self.saved
                made = apply(model, data, weight_bits, activation_bits, settings)
                self.kept[key] = (made, time.perf_counter() - start + self.saved - saved)
            return copy.deepcopy(self.kept[key][0])

        return remembered


def _digest_of(images: torch.Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ the table


class Comparison:
    """Everything about one data set, setting and grouping, on test images."""

    def __init__(self, study: Study, seeds, setting: str, attributes: Sequence[str]):
        self.study, self.seeds, self.setting, self.attributes = study, seeds, setting, attributes
        self.plain = study.best_plain(seeds, setting)
        self.group, self.validation_drop = study.worst_group(seeds, self.plain, setting, attributes)
        self.codes_N, self.names = study.groups("test", attributes)
        self.label_N = study.labels("test")
        self.member_N = self.codes_N == self.group
        generator = np.random.default_rng(seed_for("mitigation", "bootstrap", *attributes))
        strata = [np.flatnonzero(self.codes_N == group) for group in range(len(self.names))]
        self.weights_BN = np.zeros((REPLICATES, len(self.label_N)), dtype=np.float32)
        for stratum in strata:
            if len(stratum):
                self.weights_BN[:, stratum] = generator.multinomial(
                    len(stratum), np.full(len(stratum), 1 / len(stratum)), size=REPLICATES
                )

    def predicted(self, label: str) -> np.ndarray | None:
        return self.study.predictions(self.seeds, label, None if label == "FP32" else self.setting, "test")

    def accuracy(self, label: str) -> float:
        """Of the worst group, in %."""
        return float(100 * (self.predicted(label) == self.label_N)[:, self.member_N].mean())

    def accuracy_of_all(self, label: str) -> float:
        return float(100 * (self.predicted(label) == self.label_N).mean())

    def difference(self, label: str, reference: str) -> tuple[float, float, float]:
        """Accuracy of the worst group, label - reference, in points, with its interval."""
        hits = [(self.predicted(name) == self.label_N).mean(axis=0)[self.member_N] for name in (label, reference)]
        change_N = 100 * (hits[0] - hits[1])
        weights_BN = self.weights_BN[:, self.member_N]
        values_B = weights_BN @ change_N / weights_BN.sum(axis=1)
        return (float(change_N.mean()), *map(float, np.quantile(values_B, [0.025, 0.975])))

    def share(self, label: str) -> tuple[float, float, float]:
        """Of what the best plain method costs the worst group, the share that is recovered, in %, with its interval."""
        before_N, after_N, plain_N = (
            (self.predicted(name) == self.label_N).mean(axis=0)[self.member_N] for name in ("FP32", label, self.plain)
        )
        weights_BN = self.weights_BN[:, self.member_N]
        gain_B, loss_B = weights_BN @ (after_N - plain_N), weights_BN @ (before_N - plain_N)
        share = 100 * (after_N - plain_N).mean() / (before_N - plain_N).mean()
        return (float(share), *map(float, np.quantile(100 * gain_B / loss_B, [0.025, 0.975])))

    def drop_on_validation(self, label: str) -> float:
        """Points that the group that this method costs most loses there."""
        return self.study.worst_group(self.seeds, label, self.setting, self.attributes)[1]

    def worst_of(self, label: str) -> tuple[str, tuple[float, float, float]]:
        """The group that loses most on test, of those that are large enough there, and by how much; the interval is not
        corrected for the choice."""
        change_N = (self.predicted(label) == self.label_N).mean(axis=0) - (self.predicted("FP32") == self.label_N).mean(
            axis=0
        )
        members = {name: self.codes_N == code for code, name in enumerate(self.names)}
        means = {name: change_N[member].mean() for name, member in members.items() if member.sum() >= LEAST_GROUP}
        name = min(means, key=means.get)
        weights_BN = self.weights_BN[:, members[name]]
        values_B = weights_BN @ change_N[members[name]] / weights_BN.sum(axis=1)
        return name, (float(100 * means[name]), *map(float, 100 * np.quantile(values_B, [0.025, 0.975])))

    def gains(self, label: str) -> list[float]:
        """Of the worst group, label - the best plain method, in points, seed by seed."""
        hits = [(self.predicted(name) == self.label_N)[:, self.member_N].mean(axis=1) for name in (label, self.plain)]
        return (100 * (hits[0] - hits[1])).tolist()

    def detectable(self, label: str, reference: str) -> float:
        """The smallest true difference that is found 4 times out of 5, in points: 2.8 standard errors."""
        hits = [(self.predicted(name) == self.label_N).mean(axis=0)[self.member_N] for name in (label, reference)]
        change_N = 100 * (hits[0] - hits[1])
        return float(2.8 * change_N.std(ddof=1) / np.sqrt(len(change_N)))

    def gap(self, label: str, metric: str) -> float:
        return float(100 * self._gaps(label, metric, None))

    def gap_difference(self, label: str, reference: str, metric: str) -> tuple[float, float, float]:
        values_B = self._gaps(label, metric, self.weights_BN) - self._gaps(reference, metric, self.weights_BN)
        observed = self.gap(label, metric) - self.gap(reference, metric)
        return (observed, *map(float, 100 * np.quantile(values_B, [0.025, 0.975])))

    def _gaps(self, label: str, metric: str, weights_BN: np.ndarray | None):
        groups, classes = len(self.names), 2
        values = []
        for predicted_N in self.predicted(label):
            if weights_BN is None:
                counts = count_table(self.codes_N, self.label_N, predicted_N, groups, classes)
            else:
                cell_N = (self.codes_N * classes + self.label_N) * classes + predicted_N
                indicator = np.zeros((len(cell_N), groups * classes**2), dtype=np.float32)
                indicator[np.arange(len(cell_N)), cell_N] = 1
                counts = (weights_BN @ indicator).reshape(-1, groups, classes, classes)
            values.append(group_metrics(counts, LEAST_GROUP)[metric])
        return np.mean(values, axis=0)


def show(study: Study, seeds, setting: str) -> Comparison:
    """Print the tables of the first attribute's groups, which were repaired, and of the intersection's; returns the
    former."""
    attributes = list(study.dataset.sensitive_names)
    shown = []
    for grouping in (attributes[:1], attributes):
        comparison = Comparison(study, seeds, setting, grouping)
        name, plain = comparison.names[comparison.group], comparison.plain
        loss = comparison.difference("FP32", plain)
        print(
            f"\n{study.data}, {' x '.join(grouping)}, {setting}, {len(seeds)} seeds: the worst group on validation is "
            f"{name} (it loses {comparison.validation_drop:.1f} points there with {plain}); on test, "
            f"{int(comparison.member_N.sum())} images of it, {_interval(loss)} points\n"
        )
        print(
            "| method | accuracy | worst group | against FP32 | against best plain PTQ | seed by seed | equalized odds "
            "| demographic parity | MB | bit operations | seconds |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for label in ("FP32", *METHODS):
            if comparison.predicted(label) is not None:
                print(_row(comparison, study, seeds, label))
        print()
        for label in ("FP32", *METHODS) if grouping == attributes[:1] else ():
            if (predicted_SN := comparison.predicted(label)) is not None:
                accuracies = ", ".join(f"{100 * (row == comparison.label_N).mean():.1f}" for row in predicted_SN)
                print(f"- {label}: accuracy of all, seed by seed: {accuracies}")
        for line in (*verdicts(comparison), *(partly(study, seeds, setting) if grouping == attributes[:1] else ())):
            print(f"- {line}")
        shown.append(comparison)
    return shown[0]


def partly(study: Study, seeds, setting: str) -> Iterator[str]:
    """Of methods that were measured for some of the seeds, which are not shown."""
    for label in METHODS:
        known = [seed for seed in seeds if study.result(study.path(seed, label, setting)) is not None]
        if known and len(known) < len(seeds):
            yield f"{label}: measured for {len(known)} of {len(seeds)} seeds, and not shown"


def side_by_side(comparisons: Sequence[Comparison]) -> None:
    """Print a row a method with what its worst group gains and loses in each data set."""
    heads = [f"{c.study.data} {c.setting}: against FP32 | against {c.plain} | bit operations" for c in comparisons]
    print(f"| method | {' | '.join(heads)} |\n|---|{'---|' * 3 * len(comparisons)}")
    for label in METHODS:
        cells = []
        for comparison in comparisons:
            if comparison.predicted(label) is None:
                results = [
                    comparison.study.result(comparison.study.path(seed, label, comparison.setting))
                    for seed in comparison.seeds
                ]
                is_refused = any(result is not None and "refused" in result for result in results)
                cells += ["refused" if is_refused else "not measured", "", ""]
                continue
            is_plain = label == comparison.plain
            cells += [
                _interval(comparison.difference(label, "FP32")),
                "" if is_plain else _interval(comparison.difference(label, comparison.plain)),
                _operations(comparison, label),
            ]
        if set(cells) != {"not measured", ""}:
            print(f"| {label} | {' | '.join(cells)} |")
    print()


def _operations(comparison: Comparison, label: str) -> str:
    """Bit operations of one image, as a share of the uniform model's."""

    def mean(name: str) -> float | None:
        setting = None if name == "FP32" else comparison.setting
        found = [comparison.study.result(comparison.study.path(s, name, setting)) for s in comparison.seeds]
        operations = [result["bit_operations"] for result in found]
        return None if None in operations else float(np.mean(operations))

    return "" if mean(label) is None else f"{100 * mean(label) / mean('PTQ'):.0f} %"


def show_diagnosis(study: Study, seeds, label: str, setting: str, attribute: str, found: list[dict]) -> None:
    """A row a group, means over the seeds; "->" is from the float model to the quantized one."""
    codes_N, names = study.groups("test", [attribute])
    label_N = study.labels("test")
    before, after = (
        (study.predictions(seeds, method, width, "test") == label_N).mean(axis=0)
        for method, width in (("FP32", None), (label, setting))
    )
    tables = {
        part: pd.concat([pd.DataFrame(each[part]) for each in found]) for part in ("groups", "clipping", "exemplars")
    }
    of_model = tables["groups"].groupby(["model", "group"]).mean(numeric_only=True)
    clipping = tables["clipping"].groupby("group")["clipping_rate"].mean()
    exemplars = tables["exemplars"].groupby("group")[["share", "over_representation"]].mean()
    print(f"\n{study.data}, {attribute}, {setting}, {label}, {len(found)} seeds\n")
    print(
        "| group | lost on test | margin | smallest tenth of margins below | logit variance | gradient norm (by "
        "chance) | Hessian eigenvalue | activations clipped | predictions changed | over-represented |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for group in names:
        if group not in exemplars.index:
            continue
        member = codes_N == names.index(group)
        fp32, quantized = of_model.loc["fp32", group], of_model.loc["quantized", group]
        both = [
            f"{fp32[name]:.{digits}f} -> {quantized[name]:.{digits}f}"
            for name, digits in (("margin", 2), ("margin_p10", 2), ("logit_variance", 2))
        ]
        norms = [f"{row['gradient_norm']:.2f} ({row['gradient_noise']:.2f})" for row in (fp32, quantized)]
        both += [" -> ".join(norms), f"{fp32['hessian_eigenvalue']:.0f} -> {quantized['hessian_eigenvalue']:.0f}"]
        cells = [
            group, f"{100 * (before - after)[member].mean():.1f}", *both, f"{100 * clipping[group]:.2f} %",
            f"{100 * exemplars.loc[group, 'share']:.1f} %", f"{exemplars.loc[group, 'over_representation']:.2f}",
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def figure(comparisons: Sequence[Comparison]) -> Figure:
    """For each data set, what the worst group loses against FP32 by method, with its interval."""
    found = Figure(figsize=(4.2 * len(comparisons), 5.2), layout="constrained")
    axes = found.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]
    labels = [label for label in METHODS if any(c.predicted(label) is not None for c in comparisons)]
    colours = {
        id(PLAIN): "#555555", id(CONTROLS): "#CC79A7", id(WITHOUT_TRAINING): "#0072B2", id(WITH_TRAINING): "#D55E00"
    }  # fmt: skip
    for axis, comparison in zip(axes, comparisons, strict=True):
        edge = 2.0 * comparison.difference(comparison.plain, "FP32")[0]  # what is worse is written there
        right = max(0.5, -0.08 * edge)
        for place, label in enumerate(labels):
            if comparison.predicted(label) is None:
                continue
            value, low, high = comparison.difference(label, "FP32")
            kind = next(kind for kind in (PLAIN, CONTROLS, WITHOUT_TRAINING, WITH_TRAINING) if label in kind)
            if value < edge:
                axis.annotate(
                    f"◂ {value:.0f}", (edge, place), color=colours[id(kind)], fontsize=8, va="center", ha="left"
                )
                continue
            right = max(right, 1.1 * high)
            axis.errorbar(
                value, place, xerr=[[value - low], [high - value]], fmt="o", markersize=4, color=colours[id(kind)],
                capsize=2, linewidth=1,
            )  # fmt: skip
        best = comparison.difference(comparison.plain, "FP32")[0]
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlim(edge * 1.05, right)
        axis.axvline(best, color="#555555", linewidth=0.8, linestyle="--")
        axis.set_title(
            f"{comparison.study.data}, {comparison.setting}: {comparison.names[comparison.group]}", fontsize=9
        )
        axis.set_xlabel("accuracy of the worst group against FP32, points", fontsize=8)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", linewidth=0.3)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    found.suptitle(
        "plain (grey; dashed: the best), controls that know of no groups (pink), repairs without training (blue), with "
        "short training (orange)",
        fontsize=8,
    )
    return found


def _row(comparison: Comparison, study: Study, seeds, label: str) -> str:
    setting = None if label == "FP32" else comparison.setting
    results = [study.result(study.path(seed, label, setting)) for seed in seeds]
    cells = [
        f"**{label}**" if label == comparison.plain else label,
        f"{comparison.accuracy_of_all(label):.1f}",
        f"{comparison.accuracy(label):.1f}",
        "" if label == "FP32" else _interval(comparison.difference(label, "FP32")),
        "" if label in ("FP32", comparison.plain) else _interval(comparison.difference(label, comparison.plain)),
        "" if label in ("FP32", comparison.plain) else ", ".join(f"{x:+.1f}" for x in comparison.gains(label)),
    ]
    for metric in ("equalized_odds_difference", "demographic_parity_difference"):
        text = f"{comparison.gap(label, metric):.1f}"
        if label != comparison.plain:
            _, low, high = comparison.gap_difference(label, comparison.plain, metric)
            text += f" ({low:+.1f} to {high:+.1f})"
        cells.append(text)
    cells += [
        f"{np.mean([result['size_mb'] for result in results]):.2f}",
        _operations(comparison, label),
        f"{np.mean([result['seconds'] for result in results]):.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def verdicts(comparison: Comparison) -> list[str]:
    """What the comparison was made to find out."""
    plain = comparison.plain
    loss = comparison.difference("FP32", plain)
    measured = [label for label in METHODS if label not in PLAIN and comparison.predicted(label) is not None]
    shown = [comparison.detectable(label, plain) for label in measured]
    lines = []
    if shown:
        lines.append(
            f"true differences to {plain} that the group's {int(comparison.member_N.sum())} images show with a power "
            f"of 80 %: {np.median(shown):.1f} points for the median repair ({min(shown):.1f} to {max(shown):.1f})"
        )
    kinds = {"control": CONTROLS, "without training": WITHOUT_TRAINING, "with short training": WITH_TRAINING}
    for kind, labels in kinds.items():
        known = [label for label in labels if label in measured]
        if known and labels is not CONTROLS:
            chosen = min(known, key=comparison.drop_on_validation)
            gain, rest = comparison.difference(chosen, plain), comparison.difference(chosen, "FP32")
            share = comparison.share(chosen)
            group, lost = comparison.worst_of(chosen)
            line = (
                f"{kind}, chosen on validation: {chosen}: {_interval(gain)} points, {share[0]:.0f} % [{share[1]:.0f}, "
                f"{share[2]:.0f}] of the loss; against FP32 {_interval(rest)}; its own worst group on test is {group}, "
                f"{_interval(lost)}"
            )
            same = SAME_OPERATIONS in measured and _operations(comparison, SAME_OPERATIONS)
            if same and same == _operations(comparison, chosen):
                line += f"; against {SAME_OPERATIONS}, of the same operations and without groups, "
                line += _interval(comparison.difference(chosen, SAME_OPERATIONS))
            lines.append(line)
        for label in labels:
            if comparison.predicted(label) is None:
                continue
            gain, rest = comparison.difference(label, plain), comparison.difference(label, "FP32")
            found = []
            if gain[1] > 0:
                share, low, high = comparison.share(label)
                found.append(f"recovers {share:.0f} % [{low:.0f}, {high:.0f}] of the loss ({_interval(gain)} points)")
            elif gain[2] < 0:
                found.append(f"makes it worse ({_interval(gain)} points)")
            if rest[1] <= 0 <= rest[2] and rest[2] - rest[1] <= loss[0]:  # which does not say that they are equal
                found.append(f"not told from FP32, by an interval no wider than the loss ({_interval(rest)})")
            elif rest[1] > 0:
                found.append(f"the group is above FP32 ({_interval(rest)})")
            if rest[1] >= -NEAR and rest[2] <= NEAR:
                found.append(f"within {NEAR:g} point of FP32 ({_interval(rest)})")
            if found:
                lines.append(f"{label} ({kind}): {'; '.join(found)}")
    return lines


def pack(classes_N: np.ndarray) -> str:
    """Predictions of two classes: how many, and a bit each in base64."""
    if classes_N.size and not set(np.unique(classes_N)) <= {0, 1}:
        raise ValueError(f"two classes are packed, not {sorted(set(classes_N.tolist()))}")
    return f"{len(classes_N)} {base64.b64encode(np.packbits(classes_N.astype(bool))).decode()}"


def unpack(text: str, images: int) -> np.ndarray:
    """ValueError where they are of another number of images."""
    count, bits = text.split()
    packed = np.frombuffer(base64.b64decode(bits), dtype=np.uint8)
    if int(count) != images or len(packed) != -(-images // 8):
        raise ValueError(f"predictions of {count} images, {len(packed)} bytes, where there are {images} images")
    return np.unpackbits(packed, count=images).astype(np.int64)


def _as_json(value):
    return value.to_dict("records") if isinstance(value, pd.DataFrame) else value.item()


def _interval(values: tuple[float, float, float]) -> str:
    return f"{values[0]:+.1f} [{values[1]:+.1f}, {values[2]:+.1f}]"


if __name__ == "__main__":
    main()
