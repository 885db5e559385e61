"""Sensitive layers stay wide: those whose quantization costs the worst group most, paid for by those that cost least.

One layer at a time is quantized alone in the float network, with every width of its input and its weights that may be
chosen, and every calibration image's drift from the float model is measured (the sensitivity of HAWQ: Dong et al., ICCV
2019, of each group). An integer program (quantizers.group_allocation) then chooses which layers become wider and which
narrower, so that the model's file is no larger than before and the worst group has lost least. It takes the layers'
drifts as if they added up, and knows nothing of the rounding of biases, whose step is that of the input times that of
the weights; what the choice is worth is measured on the calibration images once the model is quantized: see
fair_ptq.sensitive_layers.

Measured the other way round, by what a layer's width would give back to a model that is quantized throughout, nothing
seems to help: weights whose rounding is learned make up for the narrow inputs that they have, and suffer from others
until they are rounded again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from quantizers import ptq
from quantizers.calibration import Statistics, set_ranges
from quantizers.group_allocation import allocate_for_groups
from quantizers.groups import Drift, GroupedImages, drift, float_logits, logits_of
from quantizers.modules import ActivationQuantizer, QuantizedLayer, QuantizedModel
from quantizers.numerics import QuantizationError, check_bits

NARROWEST = 2
AS_IT_IS, WIDER, NARROWER, WIDER_INPUT = 0, 1, 2, 3  # what can be done with a layer

Widen = Literal["inputs", "weights_and_inputs"]

CHOICES = {AS_IT_IS: "as it is", WIDER: "wider", NARROWER: "narrower", WIDER_INPUT: "wider input"}


@dataclass(frozen=True)
class SensitiveLayers:
    """What is done with each candidate, by name, and a table with a row for each."""

    choices: dict[str, int]
    widen: Widen
    wide_bits: int
    table: pd.DataFrame

    def is_uniform(self) -> bool:
        return all(choice == AS_IT_IS for choice in self.choices.values())


@dataclass(frozen=True)
class Candidate:
    """A layer with the quantizer that it reads; or a quantizer alone, whoever reads it."""

    layer: QuantizedLayer | None
    source: ActivationQuantizer | None

    def width(self, option: int, wide_bits: int) -> int | None:
        """Bits of the weights, where it has some."""
        if self.layer is None:
            return None
        return {WIDER: wide_bits, NARROWER: self.layer.bits - 1}.get(option, self.layer.bits)

    def bytes_at(self, width: int | None) -> int:
        return 0 if self.layer is None else self.layer.bytes_at(width)

    def options(self, wide_bits: int) -> list[int]:
        """What may be done with it."""
        found = [AS_IT_IS]
        if self.layer is not None and self.layer.bits < wide_bits:
            found += [WIDER, NARROWER] if self.layer.bits > NARROWEST else [WIDER]
        if self.source is not None and self.source.bits < wide_bits:
            found.append(WIDER_INPUT)
        return found


def choose_sensitive_layers(
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
    """Which activations are to get `wide_bits`, which take no bytes: at most `layer_share` of all that are quantized,
    the layers' inputs and what else is, such as summands. Or which layers, at most `layer_share` of these and of the
    activations that no layer reads, are to get them for weights and input, within the bytes that the layers take now
    and `extra_share` of them more; the others pay with one bit of theirs.

    Of the model are read its widths, `statistics`, what its quantizers have seen, and its float parameters; its ranges
    are set and its weights rounded to nearest. What is brought down is the sum of the mean drifts over the worst
    `worst_share` of the groups; None: of the worst one. QuantizationError where `wide_bits` is no wider than what there
    is.
    """
    check_bits(wide_bits, "wide_bits")
    every = _candidates(model, widen)
    candidates = {name: each for name, each in every.items() if each.options(wide_bits) != [AS_IT_IS]}
    if not candidates:
        what = "input" if widen == "inputs" else "layer and no input"
        raise QuantizationError(f"no {what} has fewer than {wide_bits} bits: there is nothing to widen")
    set_ranges(model, statistics, recipe.observer, recipe.percentile)
    ptq.quantize_weights(model, recipe)
    exact_NK = float_logits(model, grouped.images)

    def drifts(candidate: Candidate) -> np.ndarray:
        """(G,) with this one quantized, everything else in float."""
        parts = {part for part in (candidate.source, candidate.layer) if part is not None}
        with model.as_float(but=parts):
            drift_N = drift(exact_NK, logits_of(model, grouped.images), grouped.labels, metric)
        return grouped.means(drift_N).numpy()

    options = (AS_IT_IS, WIDER, NARROWER, WIDER_INPUT)
    costs_GLC = np.full((len(grouped.names), len(candidates), len(options)), np.inf)  # that which cannot be chosen
    bytes_LC = np.zeros((len(candidates), len(options)), dtype=np.int64)
    for place, (name, candidate) in enumerate(candidates.items()):
        for option in candidate.options(wide_bits):
            bytes_LC[place, option] = candidate.bytes_at(candidate.width(option, wide_bits))
            with _changed(candidate, option, wide_bits, statistics, recipe):
                costs_GLC[:, place, option] = drifts(candidate)
        if progress is not None:
            progress(f"sensitivity of {name}", (place + 1) / len(candidates))
    share = 1 / len(grouped.names) if worst_share is None else worst_share
    found = allocate_for_groups(
        costs_GLC,
        bytes_LC,
        size_budget=int(bytes_LC[:, AS_IT_IS].sum() * (1 + extra_share)),
        share=share,
        marked_LC=np.array([[option in (WIDER, WIDER_INPUT) for option in options]] * len(candidates)),
        most_marked=int(layer_share * len(candidates)),
    )
    gains_GLC = np.where(np.isfinite(costs_GLC), costs_GLC[:, :, :1] - costs_GLC, np.nan)  # NaN: not to be had
    worst = int(costs_GLC[:, :, AS_IT_IS].sum(axis=1).argmax())
    chosen = dict(zip(candidates, found.choices, strict=True))
    widths = {option: [each.width(option, wide_bits) for each in candidates.values()] for option in options}
    table = pd.DataFrame(
        {
            "layer": list(candidates),
            "bits": pd.array(widths[AS_IT_IS], dtype="Int64"),  # of the weights, where they are looked at
            "chosen_bits": pd.array(
                [widths[choice][place] for place, choice in enumerate(found.choices)], dtype="Int64"
            ),
            "gain_worst_group": gains_GLC[worst, :, WIDER],
            "gain_mean": gains_GLC[:, :, WIDER].mean(axis=0),
            "gain_worst_group_input": gains_GLC[worst, :, WIDER_INPUT],
            "choice": [CHOICES[choice] for choice in found.choices],
            "bytes": bytes_LC[:, AS_IT_IS],
        }
    )
    return SensitiveLayers(chosen, widen, wide_bits, table)


def give_widths(model: QuantizedModel, chosen: SensitiveLayers) -> None:
    """The widths that were chosen, in place; ranges have to be set and weights quantized anew."""
    candidates = _candidates(model, chosen.widen)
    for name, option in chosen.choices.items():
        candidate = candidates[name]
        width = candidate.width(option, chosen.wide_bits)
        if candidate.layer is not None and width != candidate.layer.bits:
            candidate.layer.set_bits(width)
        if option in (WIDER, WIDER_INPUT) and candidate.source is not None:
            candidate.source.set_bits(max(candidate.source.bits, chosen.wide_bits))


def as_it_is(table: pd.DataFrame) -> pd.DataFrame:
    """The table of choices that were not kept."""
    return table.assign(chosen_bits=table["bits"], choice=CHOICES[AS_IT_IS])


def _candidates(model: QuantizedModel, widen: Widen) -> dict[str, Candidate]:
    """For inputs every static quantizer, by the names of the layers that read it; for weights too every layer, with the
    static quantizer that it reads. Quantizers that no layer reads are there either way, by their own names."""
    readers: dict[ActivationQuantizer, list[QuantizedLayer]] = {}
    for source, layer in model.inputs():
        if isinstance(source, ActivationQuantizer) and layer not in readers.setdefault(source, []):
            readers[source].append(layer)
    if widen == "inputs":
        found = {
            " and ".join(layer.name for layer in layers): Candidate(None, source) for source, layers in readers.items()
        }
    else:
        inputs = {layer: source for source, layers in readers.items() for layer in layers}
        found = {name: Candidate(layer, inputs.get(layer)) for name, layer in model.layers().items()}
    for name, quantizer in model.activation_quantizers().items():
        if isinstance(quantizer, ActivationQuantizer) and quantizer not in readers:
            found[f"activation {name}"] = Candidate(None, quantizer)
    return found


@contextlib.contextmanager
def _changed(
    candidate: Candidate, option: int, wide_bits: int, statistics: Statistics, recipe: ptq.Recipe
) -> Iterator[None]:
    """Meanwhile the weights have another width, and what is read too where that becomes wider."""
    layer, source = candidate.layer, candidate.source
    bits, width = candidate.width(AS_IT_IS, wide_bits), candidate.width(option, wide_bits)
    weights = None if layer is None else (layer.weight_integer.clone(), layer.weight_scale.clone())
    widens = option in (WIDER, WIDER_INPUT) and source is not None and source.bits < wide_bits
    before = (source.bits, source.scale.clone(), source.zero_point.clone()) if widens else None
    try:
        if width != bits:
            layer.set_bits(width)
            layer.quantize_weights(recipe.weight_scales().scales)
        if widens:
            source.set_bits(wide_bits)
            seen = statistics[source.name]
            source.set_range(*seen.range(recipe.observer, wide_bits, recipe.percentile, source.is_symmetric))
        yield
    finally:
        if width != bits:
            layer.set_bits(bits)
            layer.set_weights(*weights)
        if before is not None:
            source.set_bits(before[0])
            source.set_parameters(before[1], before[2])
