"""Sensitivity of a network to the width of each layer alone: what its output loses when one layer's weights go to b
bits and everything else stays in float. And to the width of each activation alone.

The images pass once through the float network, node by node. At each layer the network is what it was up to here, so
only the layer and what comes after it are run again, once for all the widths: these go through the rest of the network
as one larger batch. Nothing is copied or calibrated again, and the model is left as it was.

Two metrics, both means over images: `kl`, the Kullback-Leibler divergence of the softmax from the float network's, in
nats, which needs no labels (as in ZeroQ: Cai et al., CVPR 2020, section 3.2); `loss`, by how much the cross entropy
rises, which may be negative.

Shapes: L layers, W widths, N images, K classes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import fx, nn
from torch.nn import functional as F

from evaluation import class_logits, device_of, eval_mode
from quantizers.execution import WALK_MEMORY, Values, image_of, images_within, last_uses, run_node
from quantizers.modules import TRANSPOSED, ActivationQuantizer, QuantizedLayer, QuantizedModel
from quantizers.numerics import HALF_BITS, MAX_BITS, QuantizationError, dequantize_weight, quantize_weight
from quantizers.observers import WeightObserver

WIDTHS = (2, 3, 4, 6, 8, HALF_BITS)
METRICS = ("kl", "loss")
INTERVAL_Z = 1.959964  # of a 95 % interval of a mean over images

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Sensitivity:
    """`values_LWN` (L, W, N) is what each image says; `bytes_LW` what the layer's weights and scales take in a file."""

    layers: tuple[str, ...]
    widths: tuple[int, ...]
    values_LWN: np.ndarray
    bytes_LW: np.ndarray
    metric: str
    seconds: float

    @property
    def values_LW(self) -> np.ndarray:
        return self.values_LWN.mean(axis=2)

    def table(self) -> pd.DataFrame:
        """A row for each layer and width: `layer, bits, sensitivity, sensitivity_low, sensitivity_high, bytes`, with
        the 95 % normal interval of the mean over images (NaN for a single one)."""
        images = self.values_LWN.shape[2]
        spread_LW = self.values_LWN.std(axis=2, ddof=1) if images > 1 else np.full(self.bytes_LW.shape, np.nan)
        half_LW = INTERVAL_Z * spread_LW / np.sqrt(images)
        values_LW = self.values_LW
        return pd.DataFrame(
            {
                "layer": np.repeat(self.layers, len(self.widths)),
                "bits": np.tile(self.widths, len(self.layers)),
                "sensitivity": values_LW.ravel(),
                "sensitivity_low": (values_LW - half_LW).ravel(),
                "sensitivity_high": (values_LW + half_LW).ravel(),
                "bytes": self.bytes_LW.ravel(),
            }
        )


@torch.no_grad()
def measure_sensitivity(
    model: QuantizedModel,
    images: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    widths: Sequence[int] = WIDTHS,
    metric: str = "kl",
    weight_observer: WeightObserver | None = None,
    layers: Sequence[str] | None = None,
    reuse_prefix: bool = True,
    batch_size: int = 64,
    memory_bytes: int = WALK_MEMORY,
    progress: Progress | None = None,
) -> Sensitivity:
    """Sensitivity of each of `layers` (None: all) to each of `widths` (2 to 8, 16, or 32, whose is zero), on `images`
    (N, 3, H, W), with `labels` (N,) where the metric is `loss`.

    The float parameters must not yet be forgotten (a model that `ptq.attach` gave has them). As many images at a time
    as `memory_bytes` of activations hold. `reuse_prefix=False` runs the whole network for every layer and width: the
    same numbers, slowly. QuantizationError for an unknown metric, missing labels, or logits that are not finite.
    """
    if metric not in METRICS:
        raise QuantizationError(f"unknown sensitivity metric {metric!r}; choose from {', '.join(METRICS)}")
    if metric == "loss" and labels is None:
        raise QuantizationError("the sensitivity metric loss needs the labels of the images; kl needs none")
    observer = weight_observer or WeightObserver()
    device = device_of(model)
    every = model.layers()
    chosen = {name: every[name] for name in (every if layers is None else layers)}
    for layer in every.values():
        layer.keep_float()
    start = time.perf_counter()
    with eval_mode(model), model.as_float():
        candidates = {name: [_candidate(layer, bits, observer) for bits in widths] for name, layer in chosen.items()}
        at_once = images_within(model.network, images.to(device), memory_bytes)
        size = max(1, min(batch_size, at_once // (len(widths) + 1)))
        parts = []
        for done in range(0, len(images), size):
            batch = images[done : done + size].to(device)
            wanted = None if labels is None else torch.as_tensor(labels[done : done + size]).to(device)

            def tell(name: str, share: float, done: int = done, count: int = len(batch)) -> None:
                if progress is not None:
                    progress(f"sensitivity of {name}", (done + share * count) / len(images))

            run = _sweep if reuse_prefix else _sweep_whole
            parts.append(run(model, batch, _score(metric, wanted), chosen, candidates, tell))
        values_LWN = torch.cat(parts, dim=2).cpu().numpy()
    seconds = time.perf_counter() - start
    if not np.isfinite(values_LWN).all():
        name = list(chosen)[int(np.argwhere(~np.isfinite(values_LWN))[0][0])]
        raise QuantizationError(f"{name}: the network's output is not finite when this layer is quantized")
    bytes_LW = np.array([[layer.bytes_at(bits) for bits in widths] for layer in chosen.values()], dtype=np.int64)
    return Sensitivity(tuple(chosen), tuple(widths), values_LWN, bytes_LW, metric, seconds)


def multiply_accumulates(model: QuantizedModel, images: torch.Tensor) -> dict[str, int]:
    """Multiplications of weights with activations in each quantized layer, for one image of the shape of `images`."""
    counts = dict.fromkeys(model.layers(), 0)

    def count(layer: QuantizedLayer, inputs: tuple, output: torch.Tensor) -> None:
        weight = layer.layer.weight
        # each output value is a sum of as many products as one output channel has weights; transposed, an input value
        values = inputs[0] if isinstance(layer.layer, TRANSPOSED) else output
        counts[layer.name] += values.numel() * (weight.numel() // weight.shape[0])

    hooks = [layer.register_forward_hook(count) for layer in model.layers().values()]
    try:
        with torch.no_grad(), eval_mode(model), model.as_float():
            model(images[:1].to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    return counts


@torch.no_grad()
def measure_activations(
    model: QuantizedModel,
    images: torch.Tensor,
    quantizers: Mapping[str, ActivationQuantizer],
    widths: Sequence[int],
    calibrate: Callable[[ActivationQuantizer], None],
    score: Callable[[torch.Tensor, slice], torch.Tensor],
    *,
    batch_size: int = 64,
    memory_bytes: int = WALK_MEMORY,
    progress: Progress | None = None,
) -> torch.Tensor:
    """(Q, W, N) float64: of each of `quantizers`, alone in the float network at each of `widths`, what `score` gives.

    `calibrate` sets the range of a quantizer whose width has just been set; `score` gets logits (N, K) of those images
    (N, 3, H, W) that the slice says, and gives a number (N,) for each. The float parameters must not be forgotten. The
    model is left as it was.
    """
    network = model.network
    nodes = list(network.graph.nodes) if isinstance(network, fx.GraphModule) else []
    modules = dict(network.named_modules())
    places: dict[nn.Module, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "call_module":
            places.setdefault(modules[node.target], []).append(node)
    # where a quantizer is called once the network up to there is run once; else all of it for each width
    names = {places[q][0]: name for name, q in quantizers.items() if len(places.get(q, ())) == 1}
    moving, freed = _depends_on_images(nodes) if nodes else set(), last_uses(nodes)
    found = torch.zeros(len(quantizers), len(widths), len(images), dtype=torch.float64)
    order = {name: place for place, name in enumerate(quantizers)}
    device = device_of(model)
    with eval_mode(model):
        with model.as_float():
            at_once = images_within(network, images.to(device), memory_bytes) if nodes else batch_size
        size = max(1, min(batch_size, at_once // (len(widths) + 1)))
        for start in range(0, len(images), size):
            part = slice(start, min(start + size, len(images)))
            batch = images[part].to(device)
            values: Values = {}
            with model.as_float():
                for place, node in enumerate(nodes):
                    if node in names:
                        name = names[node]
                        (source,) = node.all_input_nodes
                        outputs = [_at_width(quantizers[name], bits, calibrate, values[source]) for bits in widths]
                        stacked = _run_stacked(network, nodes[place:], values, node, outputs, moving)
                        for width, logits_NK in enumerate(stacked):
                            found[order[name], width, part] = score(logits_NK.float().cpu(), part)
                        if progress is not None:
                            done = (order[name] + 1) / len(order)
                            progress(f"sensitivity of {name}", (start + done * len(batch)) / len(images))
                    values[node] = batch if node is image_of(nodes) else run_node(network, node, values)
                    for source in freed[node]:
                        del values[source]
            for name, quantizer in quantizers.items():
                if name in names.values():
                    continue
                for width, bits in enumerate(widths):
                    with _width(quantizer, bits, calibrate), model.as_float(but=[quantizer]):
                        found[order[name], width, part] = score(model(batch).float().cpu(), part)
    return found


@contextlib.contextmanager
def _width(
    quantizer: ActivationQuantizer, bits: int, calibrate: Callable[[ActivationQuantizer], None]
) -> Iterator[None]:
    """Meanwhile the quantizer has this width."""
    before = (quantizer.bits, quantizer.scale.clone(), quantizer.zero_point.clone())
    try:
        quantizer.set_bits(bits)
        calibrate(quantizer)
        yield
    finally:
        quantizer.set_bits(before[0])
        quantizer.set_parameters(*before[1:])


def _at_width(
    quantizer: ActivationQuantizer, bits: int, calibrate: Callable[[ActivationQuantizer], None], x: torch.Tensor
) -> torch.Tensor:
    """What the quantizer gives for x, though it is observed."""
    observer = quantizer.observer
    try:
        quantizer.observer = None
        with _width(quantizer, bits, calibrate):
            return quantizer(x)
    finally:
        quantizer.observer = observer


Candidate = tuple[torch.Tensor, torch.Tensor | None]  # weights of one width, integers with their scale or floats


def _candidate(layer: QuantizedLayer, bits: int, observer: WeightObserver) -> Candidate:
    """The layer's float weights as `bits` bits can hold them."""
    weight = layer.float_weight
    if bits > MAX_BITS:
        return (weight.half() if bits == HALF_BITS else weight), None
    scale = observer.scales(weight, bits, layer.axis, layer.name)
    return quantize_weight(weight, scale, bits, layer.axis, layer.int8_range), scale


Score = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits (W, N, K), float logits (N, K)) -> (W, N)


def _score(metric: str, labels_N: torch.Tensor | None) -> Score:
    def log_softmax(logits: torch.Tensor, dimensions: int) -> torch.Tensor:
        logits = logits.double().reshape(*logits.shape[:dimensions], -1)
        return F.log_softmax(class_logits(logits), dim=-1)

    def kl(logits_WNK: torch.Tensor, exact_NK: torch.Tensor) -> torch.Tensor:
        exact_NK = log_softmax(exact_NK, 1)
        return (exact_NK.exp() * (exact_NK - log_softmax(logits_WNK, 2))).sum(dim=-1)

    def loss(logits_WNK: torch.Tensor, exact_NK: torch.Tensor) -> torch.Tensor:
        def entropy(logits: torch.Tensor, dimensions: int) -> torch.Tensor:
            picked = labels_N.expand(logits.shape[:dimensions]).unsqueeze(-1)
            return -log_softmax(logits, dimensions).gather(-1, picked).squeeze(-1)

        return entropy(logits_WNK, 2) - entropy(exact_NK, 1)

    return kl if metric == "kl" else loss


def _sweep(
    model: QuantizedModel,
    batch: torch.Tensor,
    score: Score,
    layers: dict[str, QuantizedLayer],
    candidates: dict[str, list[Candidate]],
    tell: Callable[[str, float], None],
) -> torch.Tensor:
    """(L, W, N), the network run again only from each layer on."""
    network = model.network
    nodes = list(network.graph.nodes)
    freed = last_uses(nodes)
    uses = _uses(network, nodes, layers)
    exact = _logits(network, nodes, batch)
    scores: dict[str, torch.Tensor] = {}
    values: Values = {}
    moving = _depends_on_images(nodes)
    for place, node in enumerate(nodes):
        for name in uses.get(node, ()):
            if name in scores:
                continue  # used before: done there, with all its uses
            tell(name, len(scores) / len(layers))
            is_once = sum(name in names for names in uses.values()) == 1
            rest = nodes[place:]
            if is_once:
                outputs = []
                for candidate in candidates[name]:
                    with _swapped(layers[name], candidate):
                        outputs.append(run_node(network, node, values))
                stacked = _run_stacked(network, rest, values, node, outputs, moving)
            else:
                results = []
                for candidate in candidates[name]:
                    with _swapped(layers[name], candidate):
                        results.append(_run_rest(network, rest, dict(values)))
                stacked = torch.stack(results)
            scores[name] = score(stacked, exact)
        values[node] = batch if node is image_of(nodes) else run_node(network, node, values)
        for source in freed[node]:
            del values[source]
    return torch.stack([scores[name] for name in layers])


def _sweep_whole(model, batch, score, layers, candidates, tell) -> torch.Tensor:
    """The same, the whole network run for every layer and width."""
    exact = model(batch)
    rows = []
    for name, layer in layers.items():
        tell(name, len(rows) / len(layers))
        logits = []
        for candidate in candidates[name]:
            with _swapped(layer, candidate):
                logits.append(model(batch))
        rows.append(score(torch.stack(logits), exact))
    return torch.stack(rows)


def _uses(network: fx.GraphModule, nodes: list[fx.Node], layers: dict[str, QuantizedLayer]) -> dict[fx.Node, list[str]]:
    """The layers that each node runs."""
    names = {layer: name for name, layer in layers.items()}
    found = {}
    for node in nodes:
        if node.op == "call_module":
            inside = [names[module] for module in network.get_submodule(node.target).modules() if module in names]
            if inside:
                found[node] = inside
    return found


def _depends_on_images(nodes: list[fx.Node]) -> set[fx.Node]:
    moving = {image_of(nodes)}
    for node in nodes:
        if any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    return moving


def _logits(network: fx.GraphModule, nodes: list[fx.Node], batch: torch.Tensor) -> torch.Tensor:
    return _run_rest(network, nodes, {image_of(nodes): batch})


def _run_rest(network: fx.GraphModule, rest: list[fx.Node], values: Values) -> torch.Tensor:
    """The value of the last of the nodes `rest`, from the live values before them."""
    freed = last_uses(rest)
    for node in rest:
        if node not in values:
            values[node] = run_node(network, node, values)
        for source in freed[node]:
            del values[source]
    return values[rest[-1]]


def _run_stacked(
    network: fx.GraphModule,
    rest: list[fx.Node],
    values: Values,
    node: fx.Node,
    outputs: list[torch.Tensor],
    moving: set[fx.Node],
) -> torch.Tensor:
    """(W, N, K): the rest of the network run on the node's W outputs as one batch, what else is alive repeated.

    Where a value that depends on the images is no tensor with them in its first dimension (a size, a transposed
    tensor), one after the other instead.
    """
    count = len(outputs[0]) if isinstance(outputs[0], torch.Tensor) and outputs[0].ndim else 0
    alive = {key: value for key, value in values.items() if any(user in set(rest) for user in key.users)}
    can_stack = count > 0 and all(
        isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count
        for key, value in alive.items()
        if key in moving
    )
    if can_stack:
        widths = len(outputs)
        repeated = {key: torch.cat([value] * widths) if key in moving else value for key, value in alive.items()}
        result = _run_rest(network, rest, {**repeated, node: torch.cat(outputs)})
        return result.unflatten(0, (widths, count))
    return torch.stack([_run_rest(network, rest, {**alive, node: output}) for output in outputs])


@contextlib.contextmanager
def _swapped(layer: QuantizedLayer, candidate: Candidate) -> Iterator[None]:
    """Meanwhile the layer's float computation uses the candidate's weights."""
    before, (weight, scale) = layer.float_weight, candidate
    try:
        layer.float_weight = weight.to(before.dtype) if scale is None else dequantize_weight(weight, scale, layer.axis)
        yield
    finally:
        layer.float_weight = before
