"""Sensitive channels stay wide: the output channels whose rounding costs the groups' predictions most keep 8 bits
inside a layer of fewer.

What rounding one output channel o of a layer to the layer's width does to the loss of an image is, to first order, the
sum over positions of dL/dy_o dy_o, where y_o is the channel in the float network and dy_o what the same input gives
with the rounding error Q(W) - W for weights. Its square is the channel's score: the diagonal of the Fisher information
in the direction of the rounding (of weights: Theis et al., "Faster gaze prediction with dense networks and Fisher
pruning", 2018). L is the cross entropy with

loss   the labels of the images (the empirical Fisher);
kl     the model's own predictions as labels, in expectation over its softmax (the true Fisher: half the score is the
       second-order change of the Kullback-Leibler divergence). Exact for few classes, else one label drawn per image.

Scores are means within each group, and each group counts what `quantizers.groups.group_shares` gives it: the same, or
half of the whole for the group with the largest total. Then channels become wide in the order of score per extra byte,
while the extra bytes last. What is left of a wide channel's score, 1/256 of it from 4 to 8 bits, counts as nothing.

Shapes: N images, G groups, K classes, O output channels of a layer.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Mapping

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from evaluation import class_logits, device_of, eval_mode
from quantizers.groups import Drift, Weighting, group_shares
from quantizers.modules import QuantizedLayer, QuantizedModel
from quantizers.numerics import MAX_BITS, QuantizationError, dequantize_weight, quantize_weight
from quantizers.observers import WeightObserver

WIDE_BITS = MAX_BITS
EXACT_CLASSES = 8  # up to so many, every class is taken for the label in turn, with its probability
MEMORY = 1 << 30  # bytes of activations that a batch may keep for its gradients
KEPT = 4  # times the layers' outputs: themselves, what their weights' errors give, what lies between, gradients


def choose_channels(
    model: QuantizedModel,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    groups_N: torch.Tensor,
    n_groups: int,
    *,
    extra_share: float,
    metric: Drift = "kl",
    weighting: Weighting = "worst_group",
    weight_observer: WeightObserver | None = None,
    seed: int = 0,
    batch_size: int = 32,
    memory_bytes: int = MEMORY,
) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    """The output channels to keep wide, (O,) bool by the name of the layer, and a table of them.

    `model` is attached (ptq.attach) and has its float parameters; it is not changed. `images` (N, 3, H, W), `labels`
    (N,), needed by `loss` alone, `groups_N` (N,) codes below `n_groups`. `extra_share` of the bytes that all quantized
    layers take at their own widths may be spent, marks included, and never more. Layers of 8 bits or with one scale for
    all channels, and the last layer, are left alone. The table has a row for each other layer: `layer, channels, wide,
    score_share` (of all scores, what the layer's channels have), `wide_score_share` (what its wide ones have),
    `extra_bytes`. QuantizationError for gradients that are not finite and arguments that cannot be.
    """
    if metric not in ("kl", "loss"):
        raise QuantizationError(f"unknown metric {metric!r} of channels; choose from kl, loss")
    if weighting not in ("balanced", "worst_group"):
        raise QuantizationError(f"unknown weighting {weighting!r} of groups; choose from balanced, worst_group")
    if metric == "loss" and labels is None:
        raise QuantizationError("the channel metric loss needs the labels of the images; kl needs none")
    if not extra_share >= 0:
        raise QuantizationError(f"extra_share must not be negative, got {extra_share}")
    groups_N = torch.as_tensor(groups_N).cpu()
    if (
        len(images) == 0
        or groups_N.shape != images.shape[:1]
        or not 0 <= int(groups_N.min()) <= int(groups_N.max()) < n_groups
    ):
        raise QuantizationError(f"sensitive channels need images, each with a group of 0 … {n_groups - 1}")
    layers = _candidates(model)
    scores_GO = _group_scores(
        model, layers, images, labels, groups_N, n_groups, metric, weight_observer, seed, batch_size, memory_bytes
    )
    totals_G = sum((score.sum(dim=1) for score in scores_GO.values()), torch.zeros(n_groups, dtype=torch.float64))
    shares_G = group_shares(totals_G, weighting)
    scores = {name: shares_G @ score for name, score in scores_GO.items()}
    narrow = sum(layer.bytes_at(layer.bits) for layer in model.layers().values() if layer.bits <= MAX_BITS)
    chosen = _most_score_per_byte(layers, scores, int(extra_share * narrow))
    whole = sum(float(score.sum()) for score in scores.values()) or 1.0
    table = pd.DataFrame(
        [
            {
                "layer": name,
                "channels": len(wide),
                "wide": int(wide.sum()),
                "score_share": float(scores[name].sum()) / whole,
                "wide_score_share": float(scores[name][wide].sum()) / whole,
                "extra_bytes": _bytes(layers[name], int(wide.sum())) - _bytes(layers[name], 0),
            }
            for name, wide in chosen.items()
        ],
        columns=["layer", "channels", "wide", "score_share", "wide_score_share", "extra_bytes"],
    )
    return chosen, table


def preserve_channels(model: QuantizedModel, chosen: Mapping[str, torch.Tensor]) -> None:
    """Give the chosen channels 8 bits, in place; the weights have to be quantized afterwards."""
    layers = model.layers()
    for name, wide_O in chosen.items():
        if name not in layers:
            raise QuantizationError(f"the model has no layer {name!r} whose channels could stay wide")
        layers[name].set_wide_channels(wide_O, WIDE_BITS)
    count = sum(layer.wide_count() for layer in layers.values())
    if count:
        model.description["wide_channels"] = count


def _candidates(model: QuantizedModel) -> dict[str, QuantizedLayer]:
    return {
        name: layer
        for name, layer in model.layers().items()
        if layer.bits < WIDE_BITS and layer.granularity == "per_channel" and name != model.placement.layers[-1]
    }


# -------------------------------------------------------------------------------------------------------------- scores


def _group_scores(
    model, layers, images, labels, groups_N, n_groups, metric, observer, seed, batch_size, memory_bytes
) -> dict[str, torch.Tensor]:
    """(G, O) float64 for each layer: the mean score within each group; 0 for a group without images."""
    device = device_of(model)
    observer = observer or WeightObserver()
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers().values():
        layer.keep_float()
    errors = {name: _rounding_error(layer, observer) for name, layer in layers.items()}
    totals = {name: torch.zeros(n_groups, len(_channels(layer)), dtype=torch.float64) for name, layer in layers.items()}
    with eval_mode(model), model.as_float():
        size = max(1, min(batch_size, memory_bytes // _bytes_for_gradients(model, images[:1].to(device))))
        for start in range(0, len(images), size):
            batch = images[start : start + size].to(device)
            batch_labels = None if labels is None else torch.as_tensor(labels[start : start + size]).to(device)
            batch_groups = groups_N[start : start + size]
            for name, score_NO in _scores(model, layers, errors, batch, batch_labels, metric, generator).items():
                if not bool(torch.isfinite(score_NO).all()):
                    raise QuantizationError(f"{name}: its gradients are not finite on the calibration images")
                totals[name].index_add_(0, batch_groups, score_NO.cpu())
    counts_G = torch.bincount(groups_N, minlength=n_groups).clamp(min=1)
    return {name: total / counts_G[:, None] for name, total in totals.items()}


def _scores(model, layers, errors, batch, labels_N, metric, generator) -> dict[str, torch.Tensor]:
    """(N, O) float64 for each layer: the squared first-order change of each image's loss."""
    changes_NO: dict[str, torch.Tensor] = {}
    scores = {name: batch.new_zeros(1, dtype=torch.float64) for name in layers}
    with torch.enable_grad(), _watched(layers, errors, len(batch), changes_NO):
        images = batch.detach().requires_grad_()  # so that the first layer has gradients, and no parameter needs any
        logits_NK = model(images.clone())  # a network may begin in place
        logits_NK = class_logits(logits_NK.reshape(len(logits_NK), -1))
        targets = _targets(logits_NK.detach(), labels_N, metric, generator)
        for place, (target_N, probability_N) in enumerate(targets):
            changes_NO.clear()
            loss = F.cross_entropy(logits_NK, target_N, reduction="sum")  # images do not mix: each has its own gradient
            torch.autograd.grad(loss, images, retain_graph=place + 1 < len(targets))
            for name, change_NO in changes_NO.items():
                scores[name] = scores[name] + probability_N[:, None] * change_NO.square()
    return {name: score.expand(len(batch), len(_channels(layers[name]))) for name, score in scores.items()}


def _targets(logits_NK, labels_N, metric, generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The labels to take, and how much each image's score counts with them."""
    ones_N = torch.ones(len(logits_NK), dtype=torch.float64, device=logits_NK.device)
    if metric == "loss":
        return [(labels_N, ones_N)]
    softmax_NK = logits_NK.double().softmax(dim=1)
    if logits_NK.shape[1] <= EXACT_CLASSES:
        return [(torch.full_like(p, k, dtype=torch.int64), p) for k, p in enumerate(softmax_NK.unbind(1))]
    drawn_N = torch.multinomial(softmax_NK.cpu(), 1, generator=generator)[:, 0]
    return [(drawn_N.to(logits_NK.device), ones_N)]


@contextlib.contextmanager
def _watched(layers, errors, count: int, changes_NO: dict[str, torch.Tensor]) -> Iterator[None]:
    """Meanwhile a backward pass adds the change (N, O) of each image's loss to `changes_NO`, of every call."""

    def watch(layer: QuantizedLayer, inputs: tuple, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        with torch.no_grad():
            parameters = {"weight": errors[layer.name]}
            if layer.float_bias is not None:
                parameters["bias"] = torch.zeros_like(layer.float_bias)
            shift = torch.func.functional_call(layer.layer, parameters, (inputs[0],))

        def add(gradient: torch.Tensor) -> None:
            product = gradient.double() * shift
            product_PO = product if isinstance(layer.layer, nn.Linear) else product.movedim(1, -1)
            if len(product) % count:
                raise QuantizationError(f"{layer.name}: it is not known which of its outputs are of which image")
            # the rows of an image follow one another: positions, tokens, windows
            change_NO = product_PO.reshape(count, -1, product_PO.shape[-1]).sum(dim=1)
            changes_NO[layer.name] = changes_NO.get(layer.name, 0) + change_NO

        output.register_hook(add)

    hooks = [layer.register_forward_hook(watch) for layer in layers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounding_error(layer: QuantizedLayer, observer: WeightObserver) -> torch.Tensor:
    weight = layer.float_weight
    scale = observer.scales(weight, layer.bits, layer.axis, layer.name)
    return dequantize_weight(quantize_weight(weight, scale, layer.bits, layer.axis), scale, layer.axis) - weight


def _bytes_for_gradients(model: QuantizedModel, image: torch.Tensor) -> int:
    """About what one image takes with gradients."""
    sizes = [image.numel() * image.element_size()]
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, y: sizes.append(y.numel() * y.element_size()))
        for layer in model.layers().values()
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return KEPT * sum(sizes)


# -------------------------------------------------------------------------------------------------------------- choice


def _most_score_per_byte(
    layers: dict[str, QuantizedLayer], scores: dict[str, torch.Tensor], budget: int
) -> dict[str, torch.Tensor]:
    """Greedily: always the channel of the most score for what it takes, a layer's first one with the layer's marks."""
    chosen = {name: torch.zeros(len(score), dtype=torch.bool) for name, score in scores.items()}
    order = {name: score.argsort(descending=True, stable=True).tolist() for name, score in scores.items()}
    spent = 0
    waiting: list[tuple[float, int, str]] = []

    def offer(rank: int, name: str) -> None:
        """The layer's next channel, where one has a score and can be paid."""
        done = int(chosen[name].sum())
        if done == len(order[name]):
            return
        score, extra = float(scores[name][order[name][done]]), _bytes(layers[name], done + 1)
        extra -= _bytes(layers[name], done)
        if score > 0 and spent + extra <= budget:
            heapq.heappush(waiting, (-score / max(1, extra), rank, name))

    for rank, name in enumerate(layers):
        offer(rank, name)
    while waiting:
        _, rank, name = heapq.heappop(waiting)
        done = int(chosen[name].sum())
        extra = _bytes(layers[name], done + 1) - _bytes(layers[name], done)
        if spent + extra <= budget:  # others may have spent it meanwhile
            chosen[name][order[name][done]] = True
            spent += extra
            offer(rank, name)
    return chosen


def _bytes(layer: QuantizedLayer, wide: int) -> int:
    return layer.bytes_at(layer.bits, wide, WIDE_BITS)


def _channels(layer: QuantizedLayer) -> range:
    return range(layer.layer.weight.shape[layer.axis])
