"""Output calibration: the quantized model's logits brought back to the float model's probabilities, z' = a z + b with
one a > 0 for all classes and a b for each (temperature scaling with a bias for each class: Guo et al., "On calibration
of modern neural networks", ICML 2017; Alexandari et al., "Maximum likelihood with bias-corrected calibration is
hard-to-beat at label shift adaptation", ICML 2020).

Rounding errors do not average out over the layers: they shift the logits, of one group more than of another, and a
model that still ranks its images well decides by a threshold that is no longer in the right place. The fit is convex,
reads no labels, and takes no bytes: a goes into the scales of the last layer's integers, b into its bias.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize

from quantizers.groups import Drift, GroupedImages, Weighting, drift, float_logits, group_shares, logits_of
from quantizers.modules import QuantizedLayer, QuantizedModel
from quantizers.numerics import MAX_BITS, QuantizationError

OPTIONS = {"maxiter": 500, "ftol": 1e-13, "gtol": 1e-9}
SCALES = (1e-3, 1e3)  # between which a is sought


def fit_output(
    logits_NK: torch.Tensor, exact_NK: torch.Tensor, weights_N: torch.Tensor | None = None
) -> tuple[float, torch.Tensor]:
    """(a, b (K,)) float64 of least weighted divergence of softmax(exact) from softmax(a logits + b), images (N, K).

    A single logit stands for two classes of which the other has 0. Biases of several classes sum to 0, as those that
    they start from do (the gradient has no such part). Raises QuantizationError where the logits are not finite, or all
    the same.
    """
    logits_NK, exact_NK = logits_NK.double(), exact_NK.double()
    if not bool(torch.isfinite(logits_NK).all() and torch.isfinite(exact_NK).all()):
        raise QuantizationError("output calibration: the logits are not finite")
    spread = float((logits_NK - logits_NK.mean(dim=0)).square().mean().sqrt())
    if spread == 0:
        raise QuantizationError("output calibration: the model gives every image the same logits")
    weights_N = torch.ones(len(logits_NK)) if weights_N is None else weights_N
    weights_N = weights_N.double() / weights_N.double().sum()
    labels_N = torch.zeros(len(logits_NK), dtype=torch.int64)  # that the divergence does not read
    classes = logits_NK.shape[1]

    def divergence(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        p = torch.from_numpy(parameters).requires_grad_()
        value = (weights_N * drift(exact_NK, p[0] / spread * logits_NK + p[1:], labels_N)).sum()
        (gradient,) = torch.autograd.grad(value, p)
        return float(value.detach()), gradient.numpy()

    start = np.r_[spread, np.zeros(classes)]  # a z of the same spread: of the order of 1, like b
    bounds = [(SCALES[0] * spread, SCALES[1] * spread), *[(None, None)] * classes]
    found = minimize(divergence, start, jac=True, method="L-BFGS-B", bounds=bounds, options=OPTIONS).x
    return float(found[0] / spread), torch.from_numpy(found[1:])


def calibrate_output(
    quantized: QuantizedModel,
    grouped: GroupedImages,
    *,
    weighting: Weighting = "balanced",
    metric: Drift = "kl",
) -> None:
    """Give `quantized`, whose float parameters are kept, the output scale and biases that fit `grouped` best, every
    group counting the same or the worst one half; the worst group is the one that has drifted most.

    `reports["output_fit"]` has a and b, `reports["output_calibration"]` the drift of each group before and after.
    Raises QuantizationError where the logits are not what the last layer gives (SqueezeNet has a ReLU and a mean behind
    it).
    """
    exact_NK, before_NK = float_logits(quantized, grouped.images), logits_of(quantized, grouped.images)
    drift_G = grouped.means(drift(exact_NK, before_NK, grouped.labels, metric))
    weights_N = grouped.image_weights(group_shares(drift_G, weighting))
    a, bias_K = fit_output(before_NK, exact_NK, weights_N)
    _fold(_last_layer(quantized, grouped.images), a, bias_K)
    quantized.round_biases()
    after_NK = logits_of(quantized, grouped.images)
    quantized.reports["output_calibration"] = _report(grouped, exact_NK, before_NK, after_NK)
    quantized.reports["output_fit"] = {"scale": a, "bias": bias_K.tolist()}


def _last_layer(quantized: QuantizedModel, images: torch.Tensor) -> QuantizedLayer:
    """The one whose outputs are the logits."""
    ran: list[tuple[QuantizedLayer, torch.Tensor]] = []
    layers = quantized.layers().values()
    hooks = [layer.register_forward_hook(lambda layer, _, output: ran.append((layer, output))) for layer in layers]
    try:
        logits_NK = logits_of(quantized, images[:2])
    finally:
        for hook in hooks:
            hook.remove()
    layer, output = ran[-1]
    if output.numel() != logits_NK.numel() or not torch.equal(output.float().cpu().reshape_as(logits_NK), logits_NK):
        raise QuantizationError(
            f"output calibration: the logits are not what the last layer, {layer.name}, gives: its scale and bias "
            "cannot be set there; leave the repair out for this architecture"
        )
    return layer


@torch.no_grad()
def _fold(layer: QuantizedLayer, a: float, bias_K: torch.Tensor) -> None:
    weight, bias = layer.layer.weight, layer.layer.bias
    before_K = torch.zeros(len(bias_K), dtype=torch.float64) if bias is None else bias.double().cpu()
    if layer.bits <= MAX_BITS:
        layer.set_weights(layer.weight_integer, layer.weight_scale * a)
    else:
        weight.mul_(a)
    layer.set_bias((a * before_K + bias_K).to(weight))


def _report(grouped: GroupedImages, exact_NK, before_NK, after_NK) -> pd.DataFrame:
    columns = {
        name: grouped.means(drift(exact_NK, logits_NK, grouped.labels)).numpy()
        for name, logits_NK in (("drift_before", before_NK), ("drift_after", after_NK))
    }
    return pd.DataFrame({"group": list(grouped.names), **columns})
