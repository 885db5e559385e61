"""Mixed precision: each layer gets the width that it needs, within a budget for the whole model.

The sensitivity of each layer to each width is measured on the calibration images (quantizers.sensitivity), the widths
are chosen by exact integer programming (quantizers.allocation), and the model is then quantized as any other, with the
same ranges, equalization, learned rounding and bias correction. The classifier stays in float unless it is told not to
(Choi et al., 2018, and most work since, keep the last layer wide).

Sizes are those of everything that the model's file holds, biases, scales and what is left in float included. Bit
operations are the products of multiply-accumulates with the bits of both factors (Baskin et al., "UNIQ", 2021), of the
quantized layers for one image. An activation that only wide layers read is wide itself: 16 bits where all of them have
16 or more, float where all of them are in float. One that only averages read is as wide as the layer that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import fx, nn

from quantizers import ptq
from quantizers.allocation import Allocation, allocate
from quantizers.calibration import check_images
from quantizers.graph import is_average, is_rectifier
from quantizers.group_allocation import GroupAllocation, allocate_for_groups
from quantizers.modules import QuantizedInputLayer, QuantizedLayer, QuantizedModel
from quantizers.numerics import FLOAT_BITS, MAX_BITS, QuantizationError
from quantizers.sensitivity import WIDTHS, Sensitivity, measure_sensitivity, multiply_accumulates


def mixed_precision(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    weight_bits: int,
    activation_bits: int,
    widths: Sequence[int] = WIDTHS,
    size_budget_bytes: int | None = None,
    bit_operations_budget: int | None = None,
    metric: str = "kl",
    sensitivity_samples: int = 128,
    classifier_bits: int | None = FLOAT_BITS,
    sensitivity: Sensitivity | Callable[[Callable[[], Sensitivity]], Sensitivity] | None = None,
    groups: torch.Tensor | None = None,
    worst_share: float | None = None,
    progress: ptq.Progress | None = None,
    keep_float: bool = False,
    **recipe,
) -> QuantizedModel:
    """A quantized copy of `model` whose layers have widths of their own, out of `widths`.

    With `groups` (n,), a code for each image, the widths are those of the least loss of the groups that lose most: the
    mean over the worst `worst_share` of them, None: the worst one's (quantizers.group_allocation). Then there is no
    budget of bit operations.

    Without a budget the size is that of the model with `weight_bits` everywhere. `classifier_bits` None lets the last
    layer be chosen like the others. Sensitivities are measured on the first `sensitivity_samples` of `images`
    (n, 3, H, W), with `labels` (n,) where `metric` is "loss"; or they are those of an earlier call for the same model
    and images, whatever its widths and budgets: `sensitivity=earlier.reports["measurement"]`, or a function that gives
    them, itself given one that measures them. `recipe` holds fields of `ptq.Recipe`.

    `reports` of the result has the DataFrames `sensitivity` and `widths`, a row for each layer, and the dict `budgets`:
    what was asked for (`size_budget_bytes`, `bit_operations_budget`; None: no limit), and what is used (`size_bytes`,
    `bit_operations`, `cost`, the sum of the sensitivities).
    Raises QuantizationError for a budget below the smallest possible model, naming it.
    """
    recipe = ptq.Recipe(**recipe)
    if recipe.first_last_bits is not None:
        raise QuantizationError("mixed_precision chooses every layer's width: leave out first_last_bits")
    if groups is not None and bit_operations_budget is not None:
        raise QuantizationError("fair_mixed_precision has a budget of bytes: leave out bit_operations_budget")
    check_images(images)
    quantized = ptq.attach(model, images, "mixed_precision", weight_bits, activation_bits, recipe)
    statistics = ptq.observe_activations(quantized, images, recipe)
    measured = [name for name in quantized.placement.layers if name != _classifier(quantized, classifier_bits)]

    def measure() -> Sensitivity:
        return measure_sensitivity(
            quantized,
            images[:sensitivity_samples],
            None if labels is None else labels[:sensitivity_samples],
            widths=tuple(sorted(widths)),
            metric=metric,
            weight_observer=recipe.weight_scales(),
            layers=measured,
            progress=progress,
        )

    if sensitivity is None:
        sensitivity = measure()
    elif callable(sensitivity):
        sensitivity = sensitivity(measure)
    if list(sensitivity.layers) != measured:
        raise QuantizationError("the sensitivity that was given is of another model, or of another classifier_bits")
    chosen, found, budgets = choose_widths(
        quantized,
        sensitivity,
        images,
        activation_bits=activation_bits,
        weight_bits=weight_bits,
        size_budget_bytes=size_budget_bytes,
        bit_operations_budget=bit_operations_budget,
        classifier_bits=classifier_bits,
        with_biases=recipe.bias_correction,
        groups=None if groups is None else groups[:sensitivity_samples],
        worst_share=worst_share,
    )
    set_widths(quantized, chosen, activation_bits)
    ptq.quantize(quantized, statistics, images, recipe, progress)
    if not keep_float:
        quantized.forget_float()
    widths_table = table_of_widths(quantized, images)
    budgets |= {
        "size_bytes": sum(tensor.numel() * tensor.element_size() for tensor in quantized.packed_tensors().values()),
        "bit_operations": int(widths_table["bit_operations"].sum()),
        "cost": found.objective if isinstance(found, GroupAllocation) else found.cost,
        "is_optimal": found.is_optimal,
    }
    quantized.description["mixed_precision"] = {**budgets, "metric": metric}
    quantized.reports |= {
        "measurement": sensitivity,
        "sensitivity": sensitivity.table(),
        "widths": widths_table,
        "budgets": budgets,
    }
    return quantized


def choose_widths(
    model: QuantizedModel,
    sensitivity: Sensitivity,
    images: torch.Tensor,
    *,
    weight_bits: int,
    activation_bits: int,
    size_budget_bytes: int | None = None,
    bit_operations_budget: int | None = None,
    classifier_bits: int | None = FLOAT_BITS,
    with_biases: bool = False,
    groups: torch.Tensor | None = None,
    worst_share: float | None = None,
) -> tuple[dict[str, int], Allocation | GroupAllocation, dict]:
    """The width of each layer, how it was chosen, and the budgets. `sensitivity` is of all layers but the classifier,
    where that has `classifier_bits`; `with_biases` counts a bias for each layer, as a bias correction will give it.
    `groups` (N,) are those of the images that the sensitivity was measured on.
    """
    layers = model.layers()
    classifier = _classifier(model, classifier_bits)
    fixed = {} if classifier is None else {classifier: classifier_bits}
    macs = multiply_accumulates(model, images)
    rest = _rest_bytes(model, with_biases)
    if size_budget_bytes is None and bit_operations_budget is None:
        size_budget_bytes = rest + sum(layer.bytes_at(weight_bits) for layer in layers.values())
    operations_LW = [
        [macs[name] * bits * _width_beside(bits, activation_bits) for bits in sensitivity.widths]
        for name in sensitivity.layers
    ]
    fixed_bytes = rest + sum(layers[name].bytes_at(bits) for name, bits in fixed.items())
    found: Allocation | GroupAllocation
    if groups is not None:
        costs_GLW = group_sensitivities(sensitivity, groups)
        found = allocate_for_groups(
            costs_GLW,
            sensitivity.bytes_LW,
            size_budget=size_budget_bytes,
            share=1 / len(costs_GLW) if worst_share is None else worst_share,
            fixed_bytes=fixed_bytes,
        )
    else:
        found = allocate(
            sensitivity.values_LW,
            sensitivity.bytes_LW,
            operations_LW,
            size_budget=size_budget_bytes,
            operations_budget=bit_operations_budget,
            fixed_bytes=fixed_bytes,
            fixed_operations=sum(
                macs[name] * bits * _width_beside(bits, activation_bits) for name, bits in fixed.items()
            ),
            names=sensitivity.layers,
        )
    widths = {name: sensitivity.widths[choice] for name, choice in zip(sensitivity.layers, found.choices, strict=True)}
    return (
        widths | fixed,
        found,
        {"size_budget_bytes": size_budget_bytes, "bit_operations_budget": bit_operations_budget},
    )


def group_sensitivities(sensitivity: Sensitivity, groups: torch.Tensor) -> np.ndarray:
    """(G, L, W): the mean over each group's images. QuantizationError where a group has none of them."""
    values_LWN, groups_N = sensitivity.values_LWN, groups.cpu().numpy()
    if values_LWN.shape[2] != len(groups_N):
        raise QuantizationError(
            f"the sensitivity was measured on {values_LWN.shape[2]} images, the groups are of {len(groups_N)}"
        )
    members = [groups_N == group for group in range(int(groups_N.max()) + 1)]
    if not all(member.any() for member in members):
        raise QuantizationError("a group has no image among those of the sensitivity: raise sensitivity_samples")
    return np.stack([values_LWN[:, :, member].mean(axis=2) for member in members])


def set_widths(model: QuantizedModel, widths: dict[str, int], activation_bits: int) -> None:
    """Give each named layer its width, and each activation the one that its readers need; nothing is quantized yet."""
    layers, quantizers = model.layers(), model.activation_quantizers()
    for name, bits in widths.items():
        layers[name].set_bits(bits)
    for name, readers in _layers_reading(model).items():
        narrowest = min((layers[reader].bits for reader in readers), default=0)
        quantizers[name].set_bits(_width_beside(narrowest, activation_bits))


def _width_beside(weight_bits: int, activation_bits: int) -> int:
    """The width of an activation whose narrowest reader has `weight_bits`."""
    return weight_bits if weight_bits > MAX_BITS else activation_bits


def table_of_widths(model: QuantizedModel, images: torch.Tensor) -> pd.DataFrame:
    """A row for each layer: `layer, bits, activation_bits, bytes, multiply_accumulates, bit_operations`."""
    macs = multiply_accumulates(model, images)
    quantizers = model.activation_quantizers()
    beside = {reader: quantizers[name].bits for name, readers in _readers(model).items() for reader in readers}
    rows = [
        {
            "layer": name,
            "bits": layer.bits,
            "activation_bits": beside[name],
            "bytes": layer.weight_bytes(),
            "multiply_accumulates": macs[name],
            "bit_operations": macs[name] * layer.bits * beside[name],
        }
        for name, layer in model.layers().items()
    ]
    return pd.DataFrame(rows)


def _layers_reading(model: QuantizedModel) -> dict[str, list[str]]:
    """For each activation quantizer the layers that alone read it, or the one that writes what averages alone read;
    none where something else reads it too."""
    modules = dict(model.network.named_modules())
    names = {layer: name for name, layer in model.layers().items()}
    quantizers = model.activation_quantizers()
    users: dict[nn.Module, list] = {}
    sources: dict[nn.Module, list] = {}
    for node in model.network.graph.nodes:
        if node.op == "call_module":
            users.setdefault(modules[node.target], []).extend(node.users)
            sources.setdefault(modules[node.target], []).extend(node.all_input_nodes)

    def writer(source: fx.Node) -> list[str]:
        while is_rectifier(source, modules):
            source = source.all_input_nodes[0]
        is_layer = source.op == "call_module" and modules[source.target] in names
        return [names[modules[source.target]]] if is_layer else []

    found = {}
    for name, readers in _readers(model).items():
        reading = users.get(quantizers[name], [])
        if reading and all(is_average(user, modules) for user in reading):
            found[name] = [layer for source in sources[quantizers[name]] for layer in writer(source)]
        elif all(user.op == "call_module" and modules[user.target] in names for user in reading):
            found[name] = readers
        else:
            found[name] = []
    return found


def _readers(model: QuantizedModel) -> dict[str, list[str]]:
    """The layers that read each activation quantizer."""
    modules = dict(model.network.named_modules())
    names = {layer: name for name, layer in model.layers().items()}
    found: dict[str, list[str]] = {name: [] for name in model.activation_quantizers()}
    for node in model.network.graph.nodes:
        if node.op == "call_module" and modules[node.target] in names:
            found[modules[node.args[0].target].name].append(names[modules[node.target]])
    for module in model.modules():
        if isinstance(module, QuantizedInputLayer):  # where the code around it could not be traced
            found[module[0].name].append(names[module[1]])
    return found


def _classifier(model: QuantizedModel, classifier_bits: int | None) -> str | None:
    """The last layer, where it has a width of its own."""
    return None if classifier_bits is None else model.placement.layers[-1]


def _rest_bytes(model: QuantizedModel, with_biases: bool) -> int:
    """What the model's file holds beside the weights and their scales: biases, norms, ranges, embeddings."""
    own = {
        f"{path}.{part}"
        for path, module in model.named_modules()
        if isinstance(module, QuantizedLayer)
        for part in ("layer.weight", "weight_integer", "weight_scale")
    }
    missing = [layer for layer in model.layers().values() if with_biases and layer.layer.bias is None]
    new = sum(layer.layer.weight.shape[layer.axis] * layer.layer.weight.element_size() for layer in missing)
    return new + sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        if name not in own and not name.endswith("num_batches_tracked")
    )
