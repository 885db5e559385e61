"""Activation ranges that look at groups: each group counts the same, or the worst one decides.

Every group is seen on its own (one pass over the images, as in quantizers.calibration), and the ranges are then taken

weighted    from the groups' histograms put together, each with the same weight however many images it has: what
            calibrating on a balanced set aims at, without leaving images out or repeating any
minimax     so that the largest of the groups' squared errors is least: the `mse` search of quantizers.observers with
            the maximum over the groups, each group's error relative to its own images' energy, in place of the mean
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from evaluation import device_of, eval_mode
from quantizers.calibration import CALIBRATION_BATCH
from quantizers.groups import GroupedImages
from quantizers.modules import ActivationQuantizer, QuantizedModel
from quantizers.numerics import MAX_BITS
from quantizers.observers import HISTOGRAM_OBSERVERS, ActivationStatistics, mse_range

Kind = Literal["weighted", "minimax"]


class GroupStatistics:
    """What each group's images are at one activation. It stands where an `ActivationStatistics` does."""

    def __init__(self, name: str, n_groups: int, kind: Kind, with_histogram: bool):
        self.name = name
        self.kind = kind
        self.parts = [ActivationStatistics(name, with_histogram) for _ in range(n_groups)]
        self.current = 0  # the group that is being seen

    def observe(self, x: torch.Tensor) -> None:
        part = self.parts[self.current]
        part.share_scale(self.parts)
        part.observe(x)

    def bounds(self) -> tuple[float, float]:
        ends = [part.bounds() for part in self.parts]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def is_silent(self) -> bool:
        return self.bounds() == (0.0, 0.0)

    def range(self, observer: str, bits: int, percentile: float, is_symmetric: bool = False) -> tuple[float, float]:
        """As `ActivationStatistics.range`; of kind minimax whatever the observer."""
        if self.kind == "weighted":
            return ActivationStatistics.mixed(self.parts).range(observer, bits, percentile, is_symmetric)
        low, high = self.bounds()
        low, high = min(low, 0.0), max(high, 0.0)
        if bits <= MAX_BITS and low < high:
            mixed = ActivationStatistics.mixed(self.parts)
            values, counts_VG = mixed.histograms_of(self.parts)
            low, high = mse_range(values, counts_VG, low, high, bits, is_symmetric)
        return (-max(-low, high), max(-low, high)) if is_symmetric else (low, high)

    def group_errors(self, bits: int, low: float, high: float) -> np.ndarray:
        """(G,) mean squared error of each group in this range, relative to the energy of its images."""
        values, counts_VG = ActivationStatistics.mixed(self.parts).histograms_of(self.parts)
        scale = (high - low) / (2**bits - 1)
        zero_point = np.round(-low / scale)
        rounded = np.clip(np.rint(values / scale), -zero_point, 2**bits - 1 - zero_point) * scale
        return (rounded - values) ** 2 @ counts_VG


def observe_groups(
    model: QuantizedModel, grouped: GroupedImages, kind: Kind, observer: str
) -> dict[str, GroupStatistics]:
    """What every static activation quantizer sees of each group in the float model, in one pass over the images.

    QuantizationError where a quantizer sees nothing, or values that are not finite.
    """
    with_histogram = kind == "minimax" or observer in HISTOGRAM_OBSERVERS
    statistics = {
        name: GroupStatistics(name, len(grouped.names), kind, with_histogram)
        for name, quantizer in model.activation_quantizers().items()
        if isinstance(quantizer, ActivationQuantizer)
    }
    device = device_of(model)
    observers = {name: seen.observe for name, seen in statistics.items()}
    with torch.inference_mode(), eval_mode(model), model.as_float(), model.observing(observers):
        for group in range(len(grouped.names)):
            for seen in statistics.values():
                seen.current = group
            for batch in grouped.images[grouped.groups == group].split(CALIBRATION_BATCH):
                model(batch.to(device))
    for seen in statistics.values():
        seen.bounds()
    return statistics
