"""Post-training repairs: quantization that looks at groups, without training. Each is post-training static quantization
(quantizers.ptq) with one thing done otherwise; minutes on the calibration images, labels only where that is said.

group_weighted_observers   ranges from all images, each group with the same weight (quantizers.fair_ranges)
minimax_ranges             ranges whose worst group's error is least (quantizers.fair_ranges)
fair_bias_correction       the mean error that is taken back is the worst group's, or that of balanced groups
fair_reconstruction        learned rounding (quantizers.reconstruction) on a reweighted error
sensitive_channels         output channels that cost the worst group most keep 8 bits (quantizers.sensitive_channels)
sensitive_layers           layers that cost the worst group most keep 8 bits (quantizers.sensitive_layers)

Each gives a model whose float parameters are kept, for training to start from: `forget_float` ends that.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pandas as pd
from torch import nn

from quantizers import ptq
from quantizers.calibration import check_images, set_ranges
from quantizers.fair_ranges import Kind, observe_groups
from quantizers.group_allocation import conditional_value_at_risk
from quantizers.groups import (
    Drift,
    GroupedImages,
    ImageWeights,
    Weighting,
    drift,
    float_logits,
    group_shares,
    logits_of,
)
from quantizers.modules import QuantizedModel
from quantizers.numerics import MAX_BITS, QuantizationError
from quantizers.observers import HISTOGRAM_OBSERVERS
from quantizers.sensitive_channels import choose_channels, preserve_channels
from quantizers.sensitive_layers import Widen, as_it_is, choose_sensitive_layers, give_widths


def group_ranges(
    model: nn.Module,
    grouped: GroupedImages,
    *,
    kind: Kind,
    weight_bits: int,
    activation_bits: int,
    progress: ptq.Progress | None = None,
    **recipe,
) -> QuantizedModel:
    """Activation ranges `weighted` by groups, or `minimax` over them; the rest as in `ptq.ptq_static`.
    QuantizationError for weights that the observer would not look at."""
    recipe = ptq.Recipe(**recipe)
    if kind == "weighted" and recipe.observer not in HISTOGRAM_OBSERVERS:
        raise QuantizationError(
            f"observer {recipe.observer} takes the extremes of all images, whatever the weights of their groups: for "
            f"group_weighted_observers choose {' or '.join(HISTOGRAM_OBSERVERS)}"
        )
    quantized = _attached(model, grouped, weight_bits, activation_bits, recipe)
    statistics = observe_groups(quantized, grouped, kind, recipe.observer)
    ptq.quantize(quantized, statistics, grouped.images, recipe, progress)
    return quantized


def fair_bias_correction(
    model: nn.Module,
    grouped: GroupedImages,
    *,
    weighting: Weighting = "worst_group",
    metric: Drift = "kl",
    weight_bits: int,
    activation_bits: int,
    progress: ptq.Progress | None = None,
    **recipe,
) -> QuantizedModel:
    """Bias correction (quantizers.bias_correction) of the mean error over reweighted groups. The worst group is the one
    whose predictions drift most under plain quantization."""
    recipe = dataclasses.replace(ptq.Recipe(**recipe), bias_correction=True)
    quantized = _attached(model, grouped, weight_bits, activation_bits, recipe)
    statistics = ptq.observe_activations(quantized, grouped.images, recipe)
    weights_N = _weights(quantized, statistics, grouped, recipe, weighting, metric)
    ptq.quantize(quantized, statistics, grouped.images, recipe, progress, bias_weights=weights_N)
    return quantized


def fair_reconstruction(
    model: nn.Module,
    grouped: GroupedImages,
    *,
    weighting: Weighting = "worst_group",
    metric: Drift = "kl",
    weight_bits: int,
    activation_bits: int,
    progress: ptq.Progress | None = None,
    **recipe,
) -> QuantizedModel:
    """Learned rounding (AdaRound, BRECQ) on an error in which every group counts the same, or the worst one half. The
    worst group is the one whose predictions drift most under plain quantization."""
    recipe = dataclasses.replace(ptq.Recipe(**recipe), rounding="adaround")
    quantized = _attached(model, grouped, weight_bits, activation_bits, recipe)
    statistics = ptq.observe_activations(quantized, grouped.images, recipe)
    weights_N = _weights(quantized, statistics, grouped, recipe, weighting, metric)
    ptq.quantize(quantized, statistics, grouped.images, recipe, progress, rounding_weights=weights_N)
    return quantized


def sensitive_channels(
    model: nn.Module,
    grouped: GroupedImages,
    *,
    extra_share: float = 0.05,
    weighting: Weighting = "worst_group",
    metric: Drift = "kl",
    weight_bits: int,
    activation_bits: int,
    progress: ptq.Progress | None = None,
    **recipe,
) -> QuantizedModel:
    """Keep the output channels that cost the worst group most in 8 bits, for `extra_share` of the layers' bytes."""
    if weight_bits >= MAX_BITS:
        raise QuantizationError(f"sensitive_channels widens channels to {MAX_BITS} bits: give fewer weight bits")
    recipe = ptq.Recipe(**recipe)
    if recipe.weight_granularity != "per_channel":
        raise QuantizationError("sensitive_channels needs a scale for each channel: set weight_granularity per_channel")
    quantized = _attached(model, grouped, weight_bits, activation_bits, recipe)
    chosen, report = choose_channels(
        quantized,
        grouped.images,
        grouped.labels,
        grouped.groups,
        len(grouped.names),
        extra_share=extra_share,
        metric=metric,
        weighting=weighting,
        weight_observer=recipe.weight_scales(),
        seed=recipe.seed,
    )
    preserve_channels(quantized, chosen)
    statistics = ptq.observe_activations(quantized, grouped.images, recipe)
    ptq.quantize(quantized, statistics, grouped.images, recipe, progress)
    quantized.reports["sensitive_channels"] = report
    return quantized


def sensitive_layers(
    model: nn.Module,
    grouped: GroupedImages,
    *,
    sensitivity_samples: int = 256,
    layer_share: float = 0.25,
    extra_share: float = 0.0,
    extra_operations: float | None = None,
    wide_bits: int = MAX_BITS,
    metric: Drift = "kl",
    worst_share: float | None = None,
    widen: Widen = "inputs",
    weight_bits: int,
    activation_bits: int,
    progress: ptq.Progress | None = None,
    **recipe,
) -> QuantizedModel:
    """Keep what the layers that cost the worst group most read, or their weights too, in 8 bits, in a file of the same
    size. Which they are is measured on the first `sensitivity_samples` images, and whether the worst group has gained
    by it: if not, the model is the uniform one."""
    recipe = ptq.Recipe(**recipe)
    if recipe.first_last_bits is not None:
        raise QuantizationError("sensitive_layers chooses which layers are wide: leave out first_last_bits")
    uniform = _attached(model, grouped, weight_bits, activation_bits, recipe)
    statistics = ptq.observe_activations(uniform, grouped.images, recipe)
    watched = grouped.first(sensitivity_samples)
    chosen = choose_sensitive_layers(
        uniform,
        statistics,
        watched,
        recipe,
        wide_bits=wide_bits,
        layer_share=layer_share,
        extra_share=extra_share,
        extra_operations=extra_operations,
        metric=metric,
        worst_share=worst_share,
        widen=widen,
        progress=progress,
    )
    wide = copy.deepcopy(uniform)

    def finished(quantized: QuantizedModel) -> np.ndarray:
        """The mean drift of each group (G,) of the model, quantized as the recipe says."""
        ptq.quantize(quantized, statistics, grouped.images, recipe, progress)
        exact_NK, logits_NK = float_logits(quantized, watched.images), logits_of(quantized, watched.images)
        return watched.means(drift(exact_NK, logits_NK, watched.labels, metric)).numpy()

    before_G = after_G = finished(uniform)
    is_kept = False
    if not chosen.is_uniform:
        give_widths(wide, chosen)
        wide_G = finished(wide)
        share = 1 / len(grouped.names) if worst_share is None else worst_share
        is_kept = conditional_value_at_risk(wide_G, share) < conditional_value_at_risk(before_G, share)
        after_G = wide_G if is_kept else before_G
    quantized, table = (wide, chosen.table) if is_kept else (uniform, as_it_is(chosen.table))
    quantized.reports["sensitive_layers"] = table
    quantized.reports["sensitive_layers_groups"] = pd.DataFrame(
        {"group": list(grouped.names), "drift_uniform": before_G, "drift_chosen": after_G}
    )
    quantized.description["sensitive_layers_kept"] = is_kept
    return quantized


def _attached(
    model: nn.Module, grouped: GroupedImages, weight_bits: int, activation_bits: int, recipe: ptq.Recipe
) -> QuantizedModel:
    check_images(grouped.images)
    return ptq.attach(model, grouped.images, "ptq_static", weight_bits, activation_bits, recipe)


def _weights(quantized, statistics, grouped: GroupedImages, recipe: ptq.Recipe, weighting, metric) -> ImageWeights:
    """What each image counts; also of those that the memory holds a group has its share. The worst group is found with
    the weights rounded to nearest."""
    set_ranges(quantized, statistics, recipe.observer, recipe.percentile)
    ptq.quantize_weights(quantized, recipe)
    exact_NK = float_logits(quantized, grouped.images)
    drift_N = drift(exact_NK, logits_of(quantized, grouped.images), grouped.labels, metric)
    drift_G = grouped.means(drift_N)
    quantized.reports["group_drift"] = pd.DataFrame({"group": list(grouped.names), "drift": drift_G.numpy()})
    shares_G = group_shares(drift_G, weighting)
    return lambda count: grouped.first(count).image_weights(shares_G)
