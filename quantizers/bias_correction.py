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
from quantizers.modules import QuantizedLayer, QuantizedModel

Progress = Callable[[str, float], None]


@torch.no_grad()
def correct_biases(
    model: QuantizedModel,
    images: torch.Tensor,
    *,
    memory_bytes: int = WALK_MEMORY,
    progress: Progress | None = None,
) -> int:
    """Correct the bias of every quantized layer, in place; a layer without a bias gets one. Weights and activation
    ranges must be set, and the float parameters not yet forgotten.

    `images` (n, 3, H, W): as many as `memory_bytes` of live activations hold, the first ones. Returns how many.
    """
    network, device = model.network, device_of(model)
    with eval_mode(model):
        images = images[: images_within(network, images.to(device), memory_bytes // 2)].to(device)
        exact, quantized = Walk(network, images), Walk(network, images)
        nodes = list(network.graph.nodes)
        for place, node in enumerate(nodes):
            layers = _layers_of(network, node)
            with model.as_float():
                targets = _channel_means(exact, node, layers)
            for layer in layers:
                means = _channel_means(quantized, node, [layer])
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


def _channel_means(walk: Walk, node: fx.Node, layers: list[QuantizedLayer]) -> dict[QuantizedLayer, torch.Tensor]:
    """Run the node on every batch; the mean (O,) of each output channel of the layers that ran meanwhile."""
    sums: dict[QuantizedLayer, torch.Tensor] = {}
    counts: dict[QuantizedLayer, int] = {}

    def take_note(layer: QuantizedLayer, _inputs: tuple, output: torch.Tensor) -> None:
        y_RO = output.flatten(0, -2) if isinstance(layer.layer, nn.Linear) else output.transpose(0, 1).flatten(1).T
        sums[layer] = sums.get(layer, 0) + y_RO.sum(dim=0, dtype=torch.float64)
        counts[layer] = counts.get(layer, 0) + len(y_RO)

    hooks = [layer.register_forward_hook(take_note) for layer in layers]
    try:
        walk.run(node)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: total / counts[layer] for layer, total in sums.items()}
