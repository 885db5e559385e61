"""Sensitive layers stay wide: those whose quantization costs the worst group most, paid for by those that cost least.

From the quantized model, one layer at a time is given wider weights and a wider input, a wider input alone, or narrower
weights, everything else as it is, and every calibration image's drift from the float model is measured again. Taken
away from a model that is quantized throughout, a layer's error is measured where it matters, in the company of all the
others (the usual sensitivity, one layer quantized in a float network, sees none of their interactions, and no
activations).

An integer program (quantizers.group_allocation) then chooses which layers become wider and which narrower, so that the
model's file is no larger than before and the worst group has lost least. It takes the changes as if they added up;
whether they do is measured on the calibration images, and the model is left as it was where that group gained nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import nn

from quantizers import ptq
from quantizers.calibration import Statistics
from quantizers.group_allocation import allocate_for_groups, conditional_value_at_risk
from quantizers.groups import Drift, GroupedImages, drift, float_logits, logits_of
from quantizers.modules import LARGEST_BIAS, ActivationQuantizer, QuantizedLayer, QuantizedModel
from quantizers.numerics import MAX_BITS, QuantizationError, check_bits

NARROWEST = 2
AS_IT_IS, WIDER, NARROWER, WIDER_INPUT = 0, 1, 2, 3  # what can be done with a layer

Widen = Literal["inputs", "weights_and_inputs"]

CHOICES = {AS_IT_IS: "as it is", WIDER: "wider", NARROWER: "narrower", WIDER_INPUT: "wider input"}


@dataclass(frozen=True)
class SensitiveLayers:
    """What was chosen: `table`, a row for each layer; `before_G` and `after_G`, the mean drift of each group; and
    whether the changes were kept, since the worst group gained by them."""

    table: pd.DataFrame
    before_G: np.ndarray
    after_G: np.ndarray
    is_kept: bool


def widen_sensitive_layers(
    model: QuantizedModel,
    statistics: Statistics,
    grouped: GroupedImages,
    recipe: ptq.Recipe,
    *,
    wide_bits: int = 8,
    layer_share: float = 0.25,
    extra_share: float = 0.0,
    metric: Drift = "kl",
    worst_share: float | None = None,
    widen: Widen = "inputs",
    progress: ptq.Progress | None = None,
) -> SensitiveLayers:
    """Give at most `layer_share` of the layers `wide_bits`, in place: of their inputs alone, which take no bytes, or of
    weights and inputs, within the bytes that the layers take now and `extra_share` of them more; the others pay with
    one bit of theirs.

    Weights and ranges must be set, `statistics` be what they were set from, and the float parameters not forgotten;
    weights that change are rounded to nearest. What is brought down is the mean drift over the worst `worst_share` of
    the groups; None: of the worst one. QuantizationError where `wide_bits` is no wider than what there is.
    """
    check_bits(wide_bits, "wide_bits")
    inputs = _inputs(model)

    def is_narrow(layer: QuantizedLayer) -> bool:
        return layer.bits < wide_bits or ((source := inputs.get(layer)) is not None and source.bits < wide_bits)

    layers = {name: layer for name, layer in model.layers().items() if is_narrow(layer)}
    if not layers:
        raise QuantizationError(f"no layer and no input has fewer than {wide_bits} bits: there is nothing to widen")
    exact_NK = float_logits(model, grouped.images)

    def drifts() -> np.ndarray:
        _round_biases(model)
        drift_N = drift(exact_NK, logits_of(model, grouped.images), grouped.labels, metric)
        return grouped.means(drift_N).numpy()

    base_G = drifts()
    options = (AS_IT_IS, WIDER, NARROWER, WIDER_INPUT)
    costs_GLC = np.zeros((len(base_G), len(layers), len(options)))
    bytes_LC = np.zeros((len(layers), len(options)), dtype=np.int64)
    for place, (name, layer) in enumerate(layers.items()):
        for option in options:
            width = _width(layer, option, wide_bits)
            bytes_LC[place, option] = layer.bytes_at(width)
            source = inputs.get(layer)
            has_no_input = option == WIDER_INPUT and (source is None or source.bits >= wide_bits)
            is_of_weights = option in (WIDER, NARROWER) and (widen == "inputs" or layer.bits >= wide_bits)
            if width < NARROWEST or has_no_input or is_of_weights:
                costs_GLC[:, place, option] = np.inf
            elif option != AS_IT_IS:
                with _changed(layer, source, width, option, wide_bits, statistics, recipe):
                    costs_GLC[:, place, option] = drifts() - base_G
        if progress is not None:
            progress(f"without the rounding of {name}", (place + 1) / len(layers))
    budget = int(bytes_LC[:, AS_IT_IS].sum() * (1 + extra_share))
    found = allocate_for_groups(
        costs_GLC,
        bytes_LC,
        size_budget=budget,
        share=1 / len(base_G) if worst_share is None else worst_share,
        base_G=base_G,
        marked_LC=np.array([[option in (WIDER, WIDER_INPUT) for option in options]] * len(layers)),
        most_marked=int(layer_share * len(layers)),
    )
    before = {name: layer.bits for name, layer in layers.items()}
    undo: list[Callable[[], None]] = []
    for layer, option in zip(layers.values(), found.choices, strict=True):
        if option != AS_IT_IS:
            width = _width(layer, option, wide_bits)
            undo.append(_change(layer, inputs.get(layer), width, option, wide_bits, statistics, recipe))
    after_G = drifts()
    share = 1 / len(base_G) if worst_share is None else worst_share
    is_kept = conditional_value_at_risk(after_G, share) < conditional_value_at_risk(base_G, share)
    if not is_kept:
        for take_back in reversed(undo):
            take_back()
        after_G = base_G
    for layer in model.layers().values():
        if layer.float_bias is not None:
            layer.set_bias(layer.float_bias)
    gains_GLC = np.where(np.isfinite(costs_GLC), -costs_GLC, np.nan)  # NaN: not to be had
    worst = int(base_G.argmax())
    table = pd.DataFrame(
        {
            "layer": list(layers),
            "bits": list(before.values()),
            "chosen_bits": [layer.bits for layer in layers.values()],
            "gain_worst_group": gains_GLC[worst, :, WIDER],
            "gain_mean": gains_GLC[:, :, WIDER].mean(axis=0),
            "gain_worst_group_input": gains_GLC[worst, :, WIDER_INPUT],
            "choice": [CHOICES[option] for option in found.choices] if is_kept else CHOICES[AS_IT_IS],
            "bytes": bytes_LC[:, AS_IT_IS],
        }
    )
    return SensitiveLayers(table, base_G, after_G, is_kept)


@torch.no_grad()
def _round_biases(model: QuantizedModel) -> None:
    """Biases as engines will round them (QuantizedLayer.round_bias), from the float ones; weights stay as they are."""
    for source, layer in model.inputs():
        if layer.float_bias is not None and isinstance(source, ActivationQuantizer) and layer.bits <= MAX_BITS:
            step = source.scale * layer.weight_scale
            steps = layer.float_bias / step
            layer.set_bias(torch.where(steps.abs() < LARGEST_BIAS, steps.round() * step, layer.float_bias))


def _width(layer: QuantizedLayer, option: int, wide_bits: int) -> int:
    return {WIDER: wide_bits, NARROWER: layer.bits - 1}.get(option, layer.bits)


def _inputs(model: QuantizedModel) -> dict[nn.Module, ActivationQuantizer]:
    """The static quantizer that each layer reads."""
    return {layer: source for source, layer in model.inputs() if isinstance(source, ActivationQuantizer)}


@contextlib.contextmanager
def _changed(*change) -> Iterator[None]:
    """Meanwhile the layer is changed."""
    take_back = _change(*change)
    try:
        yield
    finally:
        take_back()


def _change(
    layer: QuantizedLayer,
    source: ActivationQuantizer | None,
    width: int,
    option: int,
    wide_bits: int,
    statistics: Statistics,
    recipe: ptq.Recipe,
) -> Callable[[], None]:
    """Give the layer's weights another width, and its input too where that becomes wider; returns what undoes it."""
    bits, integer, scale = layer.bits, layer.weight_integer.clone(), layer.weight_scale.clone()
    widens = option in (WIDER, WIDER_INPUT) and source is not None and source.bits < wide_bits
    before = (source.bits, source.scale.clone(), source.zero_point.clone()) if widens else None

    def take_back() -> None:
        if width != bits:
            layer.set_bits(bits)
            layer.set_weights(integer, scale)
        if before is not None:
            source.set_bits(before[0])
            source.set_parameters(before[1], before[2])

    if width != bits:  # a wider input alone leaves the weights, whose rounding may be learned
        layer.set_bits(width)
        layer.quantize_weights(recipe.weight_scales().scales)
    if widens:
        source.set_bits(wide_bits)
        seen = statistics[source.name]
        source.set_range(*seen.range(recipe.observer, wide_bits, recipe.percentile, source.is_symmetric))
    return take_back
