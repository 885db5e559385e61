"""The cells that a configuration plans, phase by phase, in the order in which they run.

A cell's id is readable and ends in a hash of everything that determines its predictions. What only determines how they
are summarised (group attribute, smallest group, bootstrap) is not in it: rows are derived again from saved predictions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Config
from sections.base import Section, parse_width
from sections.mitigation import (
    STRATEGY_SECTIONS,
    Distillation,
    FairBiasCorrection,
    FairMixedPrecision,
    FairReconstruction,
    MinimaxRanges,
    Repair,
    SensitiveChannels,
    SensitiveLayers,
    Started,
    TrainedRepair,
)
from sections.quantization import QAT, RECONSTRUCTION_KEYS, SHORTHANDS, MethodEntry
from sections.training import Training
from store import SCHEMA_VERSION, short_hash

QUANTIZATION_VERSION = 4  # of how quantizers/ computes: another one makes other cells, whose results are not mixed
REPAIR_VERSION = 4  # likewise, of how the strategies of the mitigation phase do
REVISED = {"threshold_adjustment": 5}  # those changed alone since
TRAINING_VERSION = 2  # likewise, of how quantized models are trained
MEANINGFUL_NONE = ("classifier_bits", "gradient_clip")  # None says something else than the default


@dataclass(frozen=True)
class Cell:
    """One point of the sweep. `options` are the method's own settings; bits are None for FP32."""

    id: str
    phase: str
    dataset: str
    model: str
    seed: int
    method: str
    strategy: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    baseline_cell: str | None = None

    @property
    def options_text(self) -> str | None:
        return json.dumps(self.options, sort_keys=True, separators=(",", ":")) if self.options else None

    def identity(self) -> dict[str, Any]:
        """The columns of the row that name the cell."""
        return {
            "cell": self.id,
            "phase": self.phase,
            "dataset": self.dataset,
            "model": self.model,
            "seed": self.seed,
            "method": self.method,
            "strategy": self.strategy,
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "options": self.options_text,
            "baseline_cell": self.baseline_cell,
        }


def plan(config: Config) -> dict[str, list[Cell]]:
    """{'baseline': […], 'quantization': […], 'mitigation': […]}; each cell once."""
    cells: dict[str, list[Cell]] = {"baseline": [], "quantization": [], "mitigation": []}
    for dataset in config.data.dataset:
        for model in config.models.architectures:
            for seed in config.run.seeds:
                baseline = _baseline(config, dataset, model, seed)
                cells["baseline"].append(baseline)
                cells["quantization"] += _distinct(_quantization(config, baseline))
                cells["mitigation"] += _distinct(_mitigation(config, baseline))
    return cells


def _baseline(config: Config, dataset: str, model: str, seed: int) -> Cell:
    data = config.dataset(dataset).model_dump(mode="json", exclude={"root"})  # data may be moved: see fingerprint
    identity = {
        "schema": SCHEMA_VERSION,
        "dataset": dataset,
        "data": data,
        "model": model,
        "pretrained": config.models.pretrained,
        "weights": _digest(config.models.weights.get(model)),
        "options": config.models.options.get(model, {}),
        "training": config.training.for_model(model).model_dump(mode="json"),
        "seed": seed,
        "threads": config.run.threads_per_cell,
    }
    return Cell(f"{dataset}-{model}-s{seed}-fp32-{short_hash(identity)}", "baseline", dataset, model, seed, "none")


def _digest(path: str | None) -> str | None:
    """What a weights file holds, so that another file under the same name trains another model; its name if missing."""
    if path is None or not Path(path).is_file():
        return path
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quantization(config: Config, baseline: Cell) -> list[Cell]:
    cells = []
    for entry in config.quantization.methods:
        entry = MethodEntry(method=entry) if isinstance(entry, str) else entry
        if entry.architectures is not None and baseline.model not in entry.architectures:
            continue
        method, _, weight_bits, activation_bits = SHORTHANDS.get(entry.method, (entry.method, None, None, None))
        if weight_bits is not None:
            widths = [(weight_bits, activation_bits)]
        else:
            widths = [parse_width(width) for width in entry.bit_widths or config.quantization.bit_widths]
        settings = config.quantization.settings(entry)
        observers = settings.pop("observer", [None])
        cells += [
            _derived(
                baseline,
                "quantization",
                method,
                None,
                *width,
                _options(method, {**settings, **scheme, "observer": observer}),
            )
            for scheme in _schemes(config)
            for observer in observers
            for width in widths
        ]
    return cells


def _schemes(config: Config) -> list[dict[str, Any]]:
    """The settings of each backend that is swept."""
    reduce_range = config.quantization.reduce_range
    return [
        {"backend": backend, "reduce_range": reduce_range and backend == "x86"}
        for backend in config.quantization.backend
    ]


def _mitigation(config: Config, baseline: Cell) -> list[Cell]:
    cells = []
    for entry in config.mitigation.entries():
        if entry.architectures is not None and baseline.model not in entry.architectures:
            continue
        section = config.mitigation.section(entry)
        is_intersection = section.balance == "intersection"
        balance = {"balance": "intersection" if is_intersection else config.group_attribute(baseline.dataset)}
        cells += [
            _derived(
                baseline,
                "mitigation",
                section.method,
                entry.strategy,
                *parse_width(width),
                _options(section.method, {**settings, **balance, **scheme}),
            )
            for scheme in _schemes(config)
            for settings in _repair_settings(config, section)
            for width in section.bit_widths or config.quantization.bit_widths
            if not _has_nothing_to_widen(section, *parse_width(width))
        ]
    return cells


def _has_nothing_to_widen(section: Section, weight_bits: int, activation_bits: int) -> bool:
    """Whether a repair that keeps a part of the model in 8 bits would do nothing at these widths."""
    if isinstance(section, Started) and section.start != "ptq_static":
        section = STRATEGY_SECTIONS[section.start](**section.start_options)
    if isinstance(section, SensitiveLayers):
        narrowest = activation_bits if section.widen == "inputs" else min(weight_bits, activation_bits)
        return narrowest >= section.wide_bits
    return isinstance(section, SensitiveChannels) and weight_bits >= 8


def _repair_settings(config: Config, section: Repair | FairMixedPrecision) -> list[dict[str, Any]]:
    """The settings of a repair: what it leaves out is as in plain quantization. One for each observer of a list."""
    own = section.model_dump(exclude={"method", "bit_widths", "balance"})
    if isinstance(section, FairMixedPrecision):
        observers = own.pop("observer")
        return [{**own, "observer": observer} for observer in observers]
    common = config.quantization.ptq_static.model_dump()
    kind = type(section)
    training = {}
    if isinstance(section, TrainedRepair):
        training = config.quantization.qat.model_dump(include=TRAINING_KEYS)
    if isinstance(section, Started):
        kind = STRATEGY_SECTIONS.get(section.start)
        start = own.pop("start_options")
        if isinstance(start.get("observer"), str):
            start = {**start, "observer": [start["observer"]]}
        # settings that plain quantization has too are the cell's own, so that one model has one id
        common = {**common, **{key: value for key, value in start.items() if key in common}, **training}
        rest = {key: value for key, value in start.items() if key not in common}
        own |= {"start_options": rest} if rest else {}
    given = {key: value for key, value in own.items() if value is not None}
    if given.get("observer") is not None:
        given["observer"] = [given["observer"]]
    settings = {**common, **given, **FORCED.get(kind, {})}
    if kind in (SensitiveLayers, FairMixedPrecision):  # they choose the widths of all layers
        settings["first_last_bits"] = None
    if isinstance(section, Distillation):  # it reads no labels
        del settings["label_smoothing"]
    return [{**settings, "observer": observer} for observer in settings["observer"]]


# what a repair does whatever the settings say
FORCED: dict[type | None, dict[str, Any]] = {
    FairReconstruction: {"rounding": "adaround"},
    FairBiasCorrection: {"bias_correction": True},
    MinimaxRanges: {"observer": ["mse"]},
}
TRAINING_KEYS = set(QAT.model_fields) & set(Training.model_fields)


# settings that do nothing at these values are not part of a cell
OFF = {
    "weight_granularity": "per_channel",
    "activation_scheme": "affine",
    "equalize": False,
    "bias_correction": False,
    "rounding": "nearest",
    "backend": "x86",
    "reduce_range": False,
    "precision": "auto",
}


def _options(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that are given and matter; a percentile only where an observer reads it."""
    options = {key: value for key, value in settings.items() if value is not None or key in MEANINGFUL_NONE}
    if "percentile" not in (options.get("observer"), options["weight_observer"]):
        del options["percentile"]
    if options.get("rounding") == "nearest":
        options = {key: value for key, value in options.items() if key not in RECONSTRUCTION_KEYS}
    if options["backend"] == "tensorrt":  # which is symmetric anyway
        options.pop("activation_scheme", None)
    return {key: value for key, value in options.items() if key not in OFF or value != OFF[key]}


def _derived(
    baseline: Cell, phase: str, method: str, strategy: str | None, weight_bits: int, activation_bits: int, options: dict
) -> Cell:
    identity = {
        "baseline": baseline.id,
        "method": method,
        "strategy": strategy,
        "bits": [weight_bits, activation_bits],
        "options": options,
        "version": QUANTIZATION_VERSION,
    }
    if strategy is not None:
        identity["repair_version"] = REVISED.get(strategy, REPAIR_VERSION)
    if "epochs" in options:
        identity["training_version"] = TRAINING_VERSION
    label = [strategy or method, f"w{weight_bits}a{activation_bits}"]
    label += [
        str(options[key])
        for key in ("start", "observer", "rounding", "weight_granularity", "activation_scheme", "backend")
        if key in options
    ]
    label += [key for key in ("equalize", "bias_correction", "reduce_range") if options.get(key)]
    cell = f"{baseline.dataset}-{baseline.model}-s{baseline.seed}-{'-'.join(label)}-{short_hash(identity)}"
    return Cell(
        cell,
        phase,
        baseline.dataset,
        baseline.model,
        baseline.seed,
        method,
        strategy,
        weight_bits,
        activation_bits,
        options,
        baseline.id,
    )


def _distinct(cells: list[Cell]) -> list[Cell]:
    return list({cell.id: cell for cell in cells}.values())
