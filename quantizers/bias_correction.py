"""Bias correction: the mean error that quantization makes in each channel, taken back through the biases
(Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019, section 4.2).

The empirical form: the calibration images go through the float and the quantized network side by side, and each layer's
bias takes up the difference of the means of its output channels before the next layer is looked at, so that what is
corrected is the error of the layer's own weights and of all that stands before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx, nn

from evaluation import device_of, eval_mode
from quantizers.execution import WALK_MEMORY, Walk, images_within
from quantizers.groups import ImageWeights, weights_of_first
from quantizers.modules import QuantizedLayer, QuantizedModel

Progress = Callable[[str, float], None]


@torch.no_grad()
def correct_biases(
    model: QuantizedModel,
    images: torch.Tensor,
    *,
    memory_bytes: int = WALK_MEMORY,
    progress: Progress | None = None,
    image_weights: ImageWeights | None = None,
) -> int:
    """Correct the bias of every quantized layer, in place; a layer without a bias gets one. Weights and activation
    ranges must be set, and the float parameters not yet forgotten.

    `images` (n, 3, H, W): as many as `memory_bytes` of live activations hold, the first ones. Returns how many.
    The mean error that is taken back is over all of them alike, or weighted by `image_weights` (n,), or
    a function that gives those of so many of the first images.
    """
    network, device = model.network, device_of(model)
    with eval_mode(model):
        images = images[: images_within(network, images.to(device), memory_bytes // 2)].to(device)
        weights_N = weights_of_first(image_weights, len(images)).to(device)
        exact, quantized = Walk(network, images), Walk(network, images)
        nodes = list(network.graph.nodes)
        for place, node in enumerate(nodes):
            layers = _layers_of(network, node)
            with model.as_float():
                targets = _channel_means(exact, node, layers, weights_N)
            for layer in layers:
                means = _channel_means(quantized, node, [layer], weights_N)
                if layer in means:
                    bias = 0 if layer.layer.bias is None else layer.layer.bias
                    layer.set_bias((bias + targets[layer] - means[layer]).to(layer.layer.weight.dtype))
            quantized.run(node)
            exact.free(node)
            quantized.free(node)
            if progress is not None and layers:
                progress(f"bias of {layers[-1].name}", (place + 1) / len(nodes))
    return len(images)


def _layers_of(network: fx.GraphModule, node: fx.Node) -> list[QuantizedLayer]:
    if node.op != "call_module":
        return []
    return [module for module in network.get_submodule(node.target).modules() if isinstance(module, QuantizedLayer)]


def _channel_means(
    walk: Walk, node: fx.Node, layers: list[QuantizedLayer], weights_N: torch.Tensor
) -> dict[QuantizedLayer, torch.Tensor]:
    """Run the node on every batch; the weighted mean (O,) of each output channel of the layers that ran meanwhile."""
    sums: dict[QuantizedLayer, torch.Tensor] = {}
    totals: dict[QuantizedLayer, float] = {}
    weights = weights_N.split(walk.batch_size)

    def take_note(layer: QuantizedLayer, _inputs: tuple, output: torch.Tensor) -> None:
        y_RO = (output if isinstance(layer.layer, nn.Linear) else output.transpose(1, -1)).flatten(0, -2)
        batch_N = weights[walk.current]
        # rows of an image follow one another: positions, tokens, windows
        is_of_images = len(y_RO) % len(batch_N) == 0
        weights_R = batch_N.repeat_interleave(len(y_RO) // len(batch_N)) if is_of_images else y_RO.new_ones(len(y_RO))
        sums[layer] = sums.get(layer, 0) + (y_RO * weights_R[:, None]).sum(dim=0, dtype=torch.float64)
        totals[layer] = totals.get(layer, 0.0) + float(weights_R.sum(dtype=torch.float64))

    hooks = [layer.register_forward_hook(take_note) for layer in layers]
    try:
        walk.run(node)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: total / totals[layer] for layer, total in sums.items()}
