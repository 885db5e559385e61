"""Sensitive layers stay wide: those whose quantization costs the worst group most, paid for by those that cost least.

One layer at a time is quantized alone in the float network, with every width of its input and its weights that may be
chosen, and every calibration image's drift from the float model is measured (the sensitivity of HAWQ: Dong et al., ICCV
2019, of each group). An integer program (quantizers.group_allocation) then chooses which layers become wider and which
narrower, so that the model's file is no larger than before and the worst group has lost least. It takes the layers'
drifts as if they added up, and knows nothing of the rounding of biases, whose step is that of the input times that of
the weights; what the choice is worth is measured on the calibration images once the model is quantized: see
fair_ptq.sensitive_layers.

Measured the other way round, by what a width would give back to a model that is quantized throughout, too little
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
from quantizers.sensitivity import measure_activations, multiply_accumulates

NARROWEST = 2
AS_IT_IS = "as it is"

Widen = Literal["inputs", "weights_and_inputs"]
Widths = tuple[int | None, int | None]  # of the weights and of what is read, where there are any


@dataclass(frozen=True)
class SensitiveLayers:
    """The widths of each candidate, by name, and a table with a row for each."""

    widths: dict[str, Widths]
    widen: Widen
    is_uniform: bool
    table: pd.DataFrame


@dataclass(frozen=True)
class Candidate:
    """A layer with the quantizer that it reads; or a quantizer alone, and the layers that read it."""

    layer: QuantizedLayer | None
    source: ActivationQuantizer | None
    readers: tuple[QuantizedLayer, ...] = ()

    def now(self) -> Widths:
        return None if self.layer is None else self.layer.bits, None if self.source is None else self.source.bits

    def options(self, wide_bits: int, is_gradual: bool) -> list[Widths]:
        """What widths it may have, first those that it has; between them and `wide_bits` those that lie between too,
        where the choice is gradual."""
        weights, read = self.now()
        found = [(weights, read)]
        if read is not None and read < wide_bits:
            wider = range(read + 1, wide_bits + 1) if is_gradual else (wide_bits,)
            found += [(weights, bits) for bits in wider]
        if weights is not None and weights < wide_bits:
            found.append((wide_bits, None if read is None else max(read, wide_bits)))
            found += [(weights - 1, read)] if weights > NARROWEST else []
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
    extra_operations: float | None = None,
    metric: Drift = "kl",
    worst_share: float | None = None,
    widen: Widen = "inputs",
    progress: ptq.Progress | None = None,
) -> SensitiveLayers:
    """Which activations are to get `wide_bits`, which take no bytes: at most `layer_share` of all that are quantized,
    the layers' inputs and what else is, such as summands. With `extra_operations` every one may get any width up to
    `wide_bits`, as long as the bit operations of an image grow by no more than that share.

    Or which layers, at most `layer_share` of these and of the activations that no layer reads, are to get them for
    weights and input, within the bytes that the layers take now and `extra_share` of them more; the others pay with one
    bit of theirs.

    Of the model are read its widths, `statistics`, what its quantizers have seen, and its float parameters; its ranges
    are set and its weights rounded to nearest. What is brought down is the sum of the mean drifts over the worst
    `worst_share` of the groups; None: of the worst one. QuantizationError where `wide_bits` is no wider than what there
    is, or for `extra_operations` of weights.
    """
    check_bits(wide_bits, "wide_bits")
    if extra_operations is not None and widen != "inputs":
        raise QuantizationError("extra_operations is for inputs: leave it out, or set widen: inputs")
    is_gradual = extra_operations is not None
    every = _candidates(model, widen)
    candidates = {name: each for name, each in every.items() if len(each.options(wide_bits, is_gradual)) > 1}
    if not candidates:
        what = "input" if widen == "inputs" else "layer and no input"
        raise QuantizationError(f"no {what} has fewer than {wide_bits} bits: there is nothing to widen")
    set_ranges(model, statistics, recipe.observer, recipe.percentile)
    ptq.quantize_weights(model, recipe)
    options = {name: each.options(wide_bits, is_gradual) for name, each in candidates.items()}
    measure = _drifts_of_inputs if widen == "inputs" else _drifts_of_layers
    costs_GLC = measure(model, candidates, options, statistics, grouped, recipe, metric, progress)
    uses_LC = np.zeros(costs_GLC.shape[1:], dtype=np.int64)  # bytes, or bit operations
    marked_LC = np.zeros(costs_GLC.shape[1:], dtype=bool)
    macs = multiply_accumulates(model, grouped.images) if is_gradual else {}
    for place, (name, candidate) in enumerate(candidates.items()):
        for option, (weights, read) in enumerate(options[name]):
            marked_LC[place, option] = read is not None and read > candidate.source.bits
            if is_gradual:
                uses_LC[place, option] = sum(macs[layer.name] * layer.bits * read for layer in candidate.readers)
            elif candidate.layer is not None:
                uses_LC[place, option] = candidate.layer.bytes_at(weights)
                marked_LC[place, option] |= weights > candidate.layer.bits
    found = allocate_for_groups(
        costs_GLC,
        uses_LC,
        size_budget=int(uses_LC[:, 0].sum() * (1 + (extra_operations if is_gradual else extra_share))),
        share=1 / len(grouped.names) if worst_share is None else worst_share,
        marked_LC=None if is_gradual else marked_LC,
        most_marked=None if is_gradual else int(layer_share * len(candidates)),
    )
    widths = {name: options[name][choice] for name, choice in zip(candidates, found.choices, strict=True)}
    is_uniform = all(choice == 0 for choice in found.choices)
    return SensitiveLayers(widths, widen, is_uniform, _table(candidates, options, widths, costs_GLC, wide_bits))


def give_widths(model: QuantizedModel, chosen: SensitiveLayers) -> None:
    """The widths that were chosen, in place; ranges have to be set and weights quantized anew."""
    candidates = _candidates(model, chosen.widen)
    for name, (weights, read) in chosen.widths.items():
        candidate = candidates[name]
        if candidate.layer is not None and weights != candidate.layer.bits:
            candidate.layer.set_bits(weights)
        if candidate.source is not None and read > candidate.source.bits:
            candidate.source.set_bits(read)


def as_it_is(table: pd.DataFrame) -> pd.DataFrame:
    """The table of choices that were not kept."""
    return table.assign(chosen_bits=table["bits"], chosen_input_bits=table["input_bits"], choice=AS_IT_IS)


def _candidates(model: QuantizedModel, widen: Widen) -> dict[str, Candidate]:
    """For inputs every static quantizer, by the names of the layers that read it; for weights too every layer, with the
    static quantizer that it reads. Quantizers that no layer reads are there either way, by their own names."""
    readers: dict[ActivationQuantizer, list[QuantizedLayer]] = {}
    for source, layer in model.inputs():
        if isinstance(source, ActivationQuantizer) and layer not in readers.setdefault(source, []):
            readers[source].append(layer)
    if widen == "inputs":
        found = {
            " and ".join(layer.name for layer in layers): Candidate(None, source, tuple(layers))
            for source, layers in readers.items()
        }
    else:
        inputs = {layer: source for source, layers in readers.items() for layer in layers}
        found = {name: Candidate(layer, inputs.get(layer)) for name, layer in model.layers().items()}
    for name, quantizer in model.activation_quantizers().items():
        if isinstance(quantizer, ActivationQuantizer) and quantizer not in readers:
            found[f"activation {name}"] = Candidate(None, quantizer)
    return found


# -------------------------------------------------------------------------------------------------------- what it costs


def _drifts_of_inputs(model, candidates, options, statistics, grouped, recipe, metric, progress) -> np.ndarray:
    """(G, L, C) mean drift with one activation quantized to each of its options, everything else in float; infinite
    where a candidate has fewer options."""
    exact_NK = float_logits(model, grouped.images)
    widths = sorted({read for widths in options.values() for _, read in widths})

    def calibrate(quantizer: ActivationQuantizer) -> None:
        seen = statistics[quantizer.name]
        quantizer.set_range(*seen.range(recipe.observer, quantizer.bits, recipe.percentile, quantizer.is_symmetric))

    drift_LWN = measure_activations(
        model,
        grouped.images,
        {name: candidate.source for name, candidate in candidates.items()},
        widths,
        calibrate,
        lambda logits_NK, part: drift(exact_NK[part], logits_NK, grouped.labels[part], metric),
        progress=progress,
    )
    costs_GLC = np.full((len(grouped.names), len(candidates), max(map(len, options.values()))), np.inf)
    for place, name in enumerate(candidates):
        for option, (_, read) in enumerate(options[name]):
            costs_GLC[:, place, option] = grouped.means(drift_LWN[place, widths.index(read)]).numpy()
    return costs_GLC


def _drifts_of_layers(model, candidates, options, statistics, grouped, recipe, metric, progress) -> np.ndarray:
    """The same with one layer quantized, its weights and what it reads."""
    exact_NK = float_logits(model, grouped.images)
    costs_GLC = np.full((len(grouped.names), len(candidates), max(map(len, options.values()))), np.inf)
    for place, (name, candidate) in enumerate(candidates.items()):
        parts = {part for part in (candidate.source, candidate.layer) if part is not None}
        for option, widths in enumerate(options[name]):
            with _changed(candidate, widths, statistics, recipe), model.as_float(but=parts):
                drift_N = drift(exact_NK, logits_of(model, grouped.images), grouped.labels, metric)
            costs_GLC[:, place, option] = grouped.means(drift_N).numpy()
        if progress is not None:
            progress(f"sensitivity of {name}", (place + 1) / len(candidates))
    return costs_GLC


@contextlib.contextmanager
def _changed(candidate: Candidate, widths: Widths, statistics: Statistics, recipe: ptq.Recipe) -> Iterator[None]:
    """Meanwhile the weights have another width, and what is read too where that becomes wider."""
    layer, source = candidate.layer, candidate.source
    (weights, read), (bits, narrow) = widths, candidate.now()
    kept = None if layer is None else (layer.weight_integer.clone(), layer.weight_scale.clone())
    before = None if source is None or read == narrow else (source.scale.clone(), source.zero_point.clone())
    try:
        if weights != bits:
            layer.set_bits(weights)
            layer.quantize_weights(recipe.weight_scales().scales)
        if before is not None:
            source.set_bits(read)
            seen = statistics[source.name]
            source.set_range(*seen.range(recipe.observer, read, recipe.percentile, source.is_symmetric))
        yield
    finally:
        if weights != bits:
            layer.set_bits(bits)
            layer.set_weights(*kept)
        if before is not None:
            source.set_bits(narrow)
            source.set_parameters(*before)


def _table(
    candidates: dict[str, Candidate],
    options: dict[str, list[Widths]],
    widths: dict[str, Widths],
    costs_GLC: np.ndarray,
    wide_bits: int,
) -> pd.DataFrame:
    """A row for each candidate; gains, of `wide_bits` over what there is, are of the group that all of them together
    cost most. NaN: not to be had."""
    worst = int(costs_GLC[:, :, 0].sum(axis=1).argmax())
    rows = []
    for place, (name, candidate) in enumerate(candidates.items()):
        now = candidate.now()
        of = {option: costs_GLC[:, place, choice] for choice, option in enumerate(options[name])}
        wider = next((cost_G for (weights, _), cost_G in of.items() if now[0] is not None and weights > now[0]), None)
        wider_input = of.get((now[0], wide_bits)) if now[1] != wide_bits else None
        rows.append(
            {
                "layer": name,
                "bits": now[0],
                "chosen_bits": widths[name][0],
                "input_bits": now[1],
                "chosen_input_bits": widths[name][1],
                "gain_worst_group": np.nan if wider is None else (of[now] - wider)[worst],
                "gain_mean": np.nan if wider is None else (of[now] - wider).mean(),
                "gain_worst_group_input": np.nan if wider_input is None else (of[now] - wider_input)[worst],
                "choice": _choice(now, widths[name]),
                "bytes": 0 if candidate.layer is None else candidate.layer.bytes_at(now[0]),
            }
        )
    whole = ("bits", "chosen_bits", "input_bits", "chosen_input_bits")
    return pd.DataFrame(rows).astype(dict.fromkeys(whole, "Int64"))


def _choice(now: Widths, then: Widths) -> str:
    if then == now:
        return AS_IT_IS
    if then[0] == now[0]:
        return "wider input"
    return "wider" if then[0] > now[0] else "narrower"
