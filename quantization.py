"""The public API of quantization: what a notebook imports.

    from quantization import FairnessAwareQuantizer, apply_quantization, compare_quantization_methods
    qmodel = apply_quantization(model, method="ptq_static", bit_width=4, activation_bits=8, calibration_data=loader)

The caller's model is never changed. The table of methods is in quantizers/methods.py, how each works beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from fairness_metrics import compute_fairness_metrics
from quantizers.fairness_aware import FairnessAwareQuantizer, FairnessConstraintError
from quantizers.methods import METHODS, apply_quantization, options_of, resolve
from quantizers.numerics import QuantizationError, check_bits
from sections.quantization import SHORTHANDS

__all__ = [
    "METHODS",
    "Comparison",
    "FairnessAwareQuantizer",
    "FairnessConstraintError",
    "QuantizationError",
    "apply_quantization",
    "compare_quantization_methods",
]


@dataclass(frozen=True)
class Comparison:
    """What `compare_quantization_methods` measured: `table`, one row a (method, sensitive attribute), FP32 first."""

    table: pd.DataFrame

    def save_to_csv(self, path: str | Path) -> None:
        self.table.to_csv(path, index=False)

    def plot_comparison(self, path: str | Path | None = None):
        """A matplotlib Figure of accuracy, worst group and gap by method; saved to `path` where one is given."""
        from visualizations import method_comparison

        figure = method_comparison(self.table)
        if path is not None:
            figure.savefig(path)
        return figure


def compare_quantization_methods(
    model: nn.Module,
    methods: Sequence[str],
    test_loader: Iterable,
    sensitive_attrs: Sequence[str],
    calibration_data: Iterable | None = None,
    *,
    train_loader: Iterable | None = None,
    validation_loader: Iterable | None = None,
    bit_width: int | None = None,
    activation_bits: int | None = None,
    min_group_size: int = 1,
    **options: Any,
) -> Comparison:
    """Measure `model` in FP32 and under each of `methods` on `test_loader`, for each sensitive attribute.

    Methods are as in `apply_quantization`; an option is passed to the methods that have it, `train_loader` and
    `validation_loader` to those that train. `bit_width` (default 8) and `activation_bits` are those of the methods
    whose names do not say their width, as PTQ_INT4 does. `test_loader` is iterated once a model. Raises
    QuantizationError before anything is computed where a method is unknown, or an option is one that none of the
    methods has.
    """
    names = {method: resolve(method, None)[0] for method in methods}
    if len(names) != len(list(methods)):
        raise QuantizationError(f"a method is there twice: {', '.join(methods)}")
    accepted = {name: options_of(METHODS[name]) for name in names.values()}
    for key in options:
        if not any(key in keys for keys in accepted.values()):
            raise QuantizationError(f"none of the methods has an option {key!r}")
    trained = [method for method, name in names.items() if METHODS[name].needs_train_data]
    if train_loader is None and trained:
        raise QuantizationError(f"{trained[0]} needs train_loader: an iterable of batches of images and labels")
    for argument, bits in (("bit_width", bit_width), ("activation_bits", activation_bits)):
        if bits is not None:
            check_bits(bits, argument)
    attributes = [sensitive_attrs] if isinstance(sensitive_attrs, str) else list(sensitive_attrs)
    rows = _comparison_rows("FP32", model, test_loader, attributes, min_group_size, {})
    for method, name in names.items():
        given = {key: value for key, value in options.items() if key in accepted[name]}
        has_own_width = method in SHORTHANDS and SHORTHANDS[method][2] is not None
        widths = {} if has_own_width else {"bit_width": bit_width, "activation_bits": activation_bits}
        quantized = apply_quantization(
            model,
            method,
            **widths,
            calibration_data=calibration_data,
            train_data=train_loader,
            validation_data=validation_loader,
            **given,
        )
        rows += _comparison_rows(method, quantized, test_loader, attributes, min_group_size, quantized.description)
    return Comparison(pd.DataFrame(rows))


def _comparison_rows(
    label: str, model: nn.Module, loader: Iterable, attributes: list[str], min_group_size: int, description: dict
) -> list[dict]:
    metrics = compute_fairness_metrics(model, loader, attributes, min_group_size=min_group_size)
    kept = ("n", "accuracy", "balanced_accuracy", "worst_group", "worst_group_accuracy", "accuracy_gap",
            "demographic_parity_difference", "disparate_impact", "equalized_odds_difference",
            "equal_opportunity_difference", "predictive_equality_difference", "predictive_parity_difference",
            "groups_left_out")  # fmt: skip
    return [
        {
            "method": label,
            "weight_bits": description.get("weight_bits"),
            "activation_bits": description.get("activation_bits"),
            "sensitive_attribute": attribute,
            **{key: metrics["by_attribute"][attribute][key] for key in kept},
            "model_size_mb": metrics["model_size_mb"],
        }
        for attribute in attributes
    ]
