"""Why a group suffers from quantization: what its images meet in the network before and after.

Three tables, all by group:

groups     how far its logits lie from the decision, and how steep and how curved its loss is as a function of the
           weights. To second order, weights that move by d raise the loss of a group by at most |g| |d| + λ |d|²/2, g
           and λ being the gradient and the largest Hessian eigenvalue of the group's mean cross entropy: the two
           factors that make groups unequal under pruning (Tran et al., "Pruning has a disparate impact on model
           accuracy", NeurIPS 2022, theorem 1)
clipping   what share of its activations each quantizer cuts off
exemplars  on how many of its images FP32 and the quantized model disagree: compression-identified exemplars (Hooker et
           al., "What do compressed deep neural networks forget?", 2019; "Characterising bias in compressed models",
           2020)

In FP32 a layer's BatchNorm still stands behind it, in the quantized model it is folded into the weights, so that plain
derivatives of the two cannot be compared. Here the weights w_o of each output channel change relatively, to
w_o + |w_o| u_o, and derivatives are with respect to u, at 0: a factor on the channel, such as folding puts there,
leaves their norms and eigenvalues as they are. (The filter normalization of Li et al., "Visualizing the loss landscape
of neural nets", NeurIPS 2018, for the same reason; the step of a quantized channel, too, is relative to its weights.)
A channel that is all zero does not change.

The quantized model is differentiated at its dequantized weights with its activations quantized; the gradient of a
quantizer is 1 where it rounds and 0 where it clips (straight-through: Bengio et al., 2013), its second derivative 0.
A value is clipped where it lies more than half a step beyond the last level, so that it is moved by more than rounding
would move it.

Shapes: N images, K classes, S seeds, G groups, P weights of all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.linalg import eigh_tridiagonal
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from evaluation import as_batch, class_logits, device_of, eval_mode, predict
from group_counts import intersect, wilson_interval
from quantizers.graph import is_layer
from quantizers.modules import (
    ACTIVATION_QUANTIZERS,
    TRANSPOSED,
    DynamicActivationQuantizer,
    QuantizedLayer,
    QuantizedModel,
)
from quantizers.numerics import FLOAT_BITS, activation_range, along

HALF_STEP = 0.501  # beyond the last level a value is clipped; the thousandth is for the rounding of floats
CONVERGED = 0.01  # residual of an eigenvector, relative to the eigenvalue, at which Lanczos stops
GRAPH_MEMORY = 2 << 30  # bytes that the graph of a gradient may keep; more images than it holds go through in parts
GRADIENT_BATCH = 64  # images at a time where no graph is kept
MARGIN_QUANTILE = 0.1

GROUP_COLUMNS = (
    "model", "group", "n", "logit_variance", "margin", "margin_p10", "n_sampled", "gradient_norm", "gradient_noise",
    "weight_gradient_norm", "hessian_eigenvalue", "hessian_residual", "hessian_converged", "reason",
)  # fmt: skip
CLIPPING_COLUMNS = ("layer", "group", "n", "clipping_rate", "clipped_low", "clipped_high")
EXEMPLAR_COLUMNS = (
    "group", "n", "disagreements", "share", "share_ci_low", "share_ci_high", "over_representation",
    "fp32_accuracy_exemplars", "fp32_accuracy_others",
)  # fmt: skip

Progress = Callable[[str, float], None]  # what is being done, and the share that is


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Three tables, one row a (model, group), a (layer, group) and a group; see `diagnose`."""

    groups: pd.DataFrame
    clipping: pd.DataFrame
    exemplars: pd.DataFrame


def diagnose(
    fp32: nn.Module,
    quantized: QuantizedModel | None,
    loader: Iterable,
    attributes: str | Sequence[str] | None = None,
    *,
    names: Mapping[str, Sequence[str]] | None = None,
    hessian_samples: int = 64,
    hessian_iterations: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnostics:
    """The tables of `fp32` and, unless None, of `quantized`, which was made from it, on the images of `loader`.

    Groups are the intersections of `attributes` (None: of all that the loader has), named by their values, such as
    "0 & 2", or by `names`, which for each attribute has one for every code. The loader is gone through once. Both
    models are left as they are, bit for bit.

    groups, one row a (model: "fp32" or "quantized", group), NaN where undefined, with the `reason`:

    * n: images of the group in the loader.
    * logit_variance: of the logits less their mean over classes (which softmax does not see), the mean over classes of
      the variance over images (divisor n - 1).
    * margin, margin_p10: mean and 10th percentile over images of the true class's logit minus the largest other one;
      an image is classified rightly where it is positive.
    * n_sampled: images that the following are of: at most `hessian_samples` of each group, drawn by `seed`, the same
      for both models. As many of each group because the norm of a mean of few gradients is too large.
    * gradient_norm: |dL/du|, L the mean cross entropy of these images, u the relative change of the weights of all
      quantized layers (without `quantized`: of all convolutions and linear layers), biases left out.
    * gradient_noise: what gradient_norm would be by chance alone, were the group's true gradient zero (root mean
      square, estimated from two random halves of the images): a norm that is not well above it says little.
    * weight_gradient_norm: |dL/dw|, of the weights as they stand in the model, as in Tran et al.: for comparing groups
      of one model, not models.
    * hessian_eigenvalue: the largest (algebraically) of d²L/du², by at most `hessian_iterations` steps of Lanczos; with
      0 of them NaN.
    * hessian_residual: |Hx - λx| / |λ| of its unit eigenvector x: there is an eigenvalue within this share of λ.
      hessian_converged: it is at most 0.01. Otherwise the largest eigenvalue is likely larger.

    clipping, one row a (layer: name of the activation quantizer, group): the mean over the group's images of the shares
    of values below and above the quantizer's range (clipped_low, clipped_high) and of both (clipping_rate), as the
    quantizer sees them in the quantized network. Dimension 0 is taken to be the image; a quantizer that sees another
    number of values there has NaN. Ranges of dynamic quantizers are each image's own: nothing is clipped. A quantizer
    of 32 bits has no row.

    exemplars: see `exemplar_table`.

    ValueError: a loader without images, without sensitive attributes or without one that is asked for, labels that are
    no class, codes without a name, a quantized model of another network. evaluation.EvaluationError: logits that are
    not finite.
    """
    if hessian_samples < 1 or hessian_iterations < 0:
        raise ValueError(f"hessian_samples {hessian_samples} and hessian_iterations {hessian_iterations} are too few")
    layers = _layers(fp32, quantized)  # first: it is quick to fail
    recorder = _Recorder(loader, attributes, hessian_samples, seed)
    models = {"fp32": fp32} if quantized is None else {"fp32": fp32, "quantized": quantized}
    with _counting(quantized) as counts:
        predictions = predict(_SideBySide(models.values()), recorder.batches(counts))
    logits = dict(zip(models, np.split(predictions.logits, len(models), axis=1), strict=True))
    y_true, n_classes = predictions.y_true, max(2, logits["fp32"].shape[1])
    if y_true.min() < 0 or y_true.max() >= n_classes:
        raise ValueError(f"labels {y_true.min()} to {y_true.max()} do not fit a model of {n_classes} classes")

    codes_N, group_names, codes_of = _groups(predictions.sensitive, recorder.attributes, names)
    samples = recorder.samples(codes_of)
    rows = []
    for model in models:
        slopes = _Slopes(models[model], layers[model])
        for group, name in enumerate(group_names):
            if progress is not None:
                progress(f"{model}, group {name}", len(rows) / (len(models) * len(group_names)))
            is_member_N = codes_N == group
            row, reason = _of_logits(logits[model][is_member_N], y_true[is_member_N])
            row |= {"model": model, "group": name, "n_sampled": 0, "hessian_converged": False}
            if group in samples:
                measured, another = slopes.measure(*samples[group], hessian_iterations, seed)
                row |= measured
                reason = "; ".join(filter(None, (reason, another)))
            rows.append({**row, "reason": reason})
    if progress is not None:
        progress("diagnostics", 1.0)

    exemplars = pd.DataFrame(columns=EXEMPLAR_COLUMNS)
    if quantized is not None:
        predicted = {model: class_logits(values).argmax(axis=1) for model, values in logits.items()}
        exemplars = exemplar_table(y_true, predicted["fp32"], predicted["quantized"], codes_N, group_names)
    return Diagnostics(
        pd.DataFrame(rows, columns=GROUP_COLUMNS), _clipping_table(counts, codes_N, group_names), exemplars
    )


# ----------------------------------------------------------------------------------------------------------- exemplars


def identified_exemplars(fp32_SN: np.ndarray, quantized_SN: np.ndarray) -> np.ndarray:
    """(N,) booleans: on which images the FP32 models' modal prediction is another than that of the quantized ones.

    Both are predicted classes, (S, N) of any number of seeds each, or (N,) of one model. The modal prediction is the
    class that most seeds give, the lowest of those where several are tied. ValueError for anything else.
    """
    fp32_N, quantized_N = _modal(fp32_SN, "fp32_SN"), _modal(quantized_SN, "quantized_SN")
    if len(fp32_N) != len(quantized_N):
        raise ValueError(
            f"predictions of {len(fp32_N)} images by FP32 and of {len(quantized_N)} by the quantized model"
        )
    return fp32_N != quantized_N


def exemplar_table(
    y_true: np.ndarray,
    fp32_SN: np.ndarray,
    quantized_SN: np.ndarray,
    group_codes: np.ndarray,
    group_names: Sequence[str],
) -> pd.DataFrame:
    """One row a group, of `group_codes` (N,), indices into `group_names`: how many of its images are exemplars.

    Columns: group, n; disagreements, its images on which FP32 and quantized disagree (see `identified_exemplars`);
    share, disagreements / n, with its 95 % Wilson interval share_ci_low, share_ci_high; over_representation, the
    group's share of all exemplars divided by its share of all images, 1 where exemplars do not depend on the group;
    fp32_accuracy_exemplars and fp32_accuracy_others, of the FP32 models' modal prediction. 0/0 is NaN.
    """
    is_exemplar_N = identified_exemplars(fp32_SN, quantized_SN)
    y_true, codes_N = np.asarray(y_true), np.asarray(group_codes)
    if y_true.shape != is_exemplar_N.shape or codes_N.shape != is_exemplar_N.shape:
        raise ValueError(
            f"unequal lengths: {len(is_exemplar_N)} predictions, labels {y_true.shape}, groups {codes_N.shape}"
        )
    if codes_N.size and not 0 <= codes_N.min() <= codes_N.max() < len(group_names):
        raise ValueError(f"group codes {codes_N.min()} to {codes_N.max()} for {len(group_names)} group names")
    is_right_N = _modal(fp32_SN, "fp32_SN") == y_true

    def per_group(mask_N: np.ndarray) -> np.ndarray:
        return np.bincount(codes_N[mask_N], minlength=len(group_names))

    n_G, exemplars_G = per_group(np.ones_like(is_exemplar_N)), per_group(is_exemplar_N)
    low_G, high_G = wilson_interval(exemplars_G, n_G)
    with np.errstate(invalid="ignore", divide="ignore"):
        return pd.DataFrame(
            {
                "group": list(group_names),
                "n": n_G,
                "disagreements": exemplars_G,
                "share": exemplars_G / n_G,
                "share_ci_low": low_G,
                "share_ci_high": high_G,
                "over_representation": (exemplars_G / exemplars_G.sum()) / (n_G / n_G.sum()),
                "fp32_accuracy_exemplars": per_group(is_exemplar_N & is_right_N) / exemplars_G,
                "fp32_accuracy_others": per_group(~is_exemplar_N & is_right_N) / (n_G - exemplars_G),
            },
            columns=EXEMPLAR_COLUMNS,
        )


def _modal(predictions_SN: np.ndarray, name: str) -> np.ndarray:
    predictions_SN = np.atleast_2d(np.asarray(predictions_SN))
    if predictions_SN.ndim != 2 or not len(predictions_SN):
        raise ValueError(f"{name} must have shape (seeds, images), not {predictions_SN.shape}")
    if predictions_SN.dtype.kind not in "biu" or (predictions_SN.size and predictions_SN.min() < 0):
        raise ValueError(f"{name} must hold predicted classes, integers from 0")
    n_classes = int(predictions_SN.max(initial=0)) + 1
    votes_KN = np.stack([(predictions_SN == k).sum(axis=0) for k in range(n_classes)])
    return votes_KN.argmax(axis=0)  # the first of those that are tied


# -------------------------------------------------------------------------------------------------------------- logits


def _of_logits(logits_NK: np.ndarray, y_true: np.ndarray) -> tuple[dict[str, Any], str]:
    """n, logit_variance, margin and margin_p10 of one group, and why one of them is undefined."""
    n = len(y_true)
    row: dict[str, Any] = {"n": n, "logit_variance": np.nan, "margin": np.nan, "margin_p10": np.nan}
    if n == 0:
        return row, "no image of this group"
    logits_NK = class_logits(logits_NK).astype(np.float64)
    true_N = logits_NK[np.arange(n), y_true]
    others_NK = logits_NK.copy()
    others_NK[np.arange(n), y_true] = -np.inf
    margin_N = true_N - others_NK.max(axis=1)
    row |= {"margin": margin_N.mean(), "margin_p10": np.quantile(margin_N, MARGIN_QUANTILE)}
    if n == 1:
        return row, "a single image has no variance"
    centred_NK = logits_NK - logits_NK.mean(axis=1, keepdims=True)
    return row | {"logit_variance": centred_NK.var(axis=0, ddof=1).mean()}, ""


# ------------------------------------------------------------------------------------------- the gradient, the Hessian


@contextlib.contextmanager
def straight_through(model: nn.Module) -> Iterator[None]:
    """Meanwhile every activation quantizer of the model can be differentiated, any number of times: it gives what it
    gives, its gradient is 1 where it rounds and 0 where it clips."""

    def pass_gradient(quantizer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
        (x,) = inputs
        if quantizer.bits >= FLOAT_BITS:
            return None
        low, high = _ends(quantizer, x.detach())
        is_inside = (x >= low) & (x <= high)
        return output.detach() + (x - x.detach()) * is_inside  # plus 0: the values are the quantizer's own

    quantizers = {module for module in model.modules() if isinstance(module, ACTIVATION_QUANTIZERS)}
    handles = [quantizer.register_forward_hook(pass_gradient) for quantizer in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def largest_eigenvalue(
    product: Callable[[torch.Tensor], torch.Tensor], start_P: torch.Tensor, iterations: int
) -> tuple[float, float]:
    """The largest eigenvalue of the symmetric matrix of which `product` gives products, and its relative residual.

    Lanczos from `start_P`, stopped at a residual of CONVERGED. ARPACK (scipy's eigsh) does the same, but keeps 20
    vectors of all weights, and gives no value at all where it has not converged when its products are used up. Vectors
    are not made orthogonal again: that costs copies of an eigenvalue that was found, not the largest one (Paige, 1972).
    """
    v_P, previous_P = start_P / start_P.norm(), torch.zeros_like(start_P)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    value = residual = np.nan
    for _ in range(iterations):
        w_P = product(v_P)
        if off_diagonal:
            w_P = w_P - off_diagonal[-1] * previous_P
        diagonal.append(float(w_P @ v_P))
        w_P = w_P - diagonal[-1] * v_P
        beta = float(w_P.norm())
        ritz, vectors = eigh_tridiagonal(np.array(diagonal), np.array(off_diagonal))
        value, residual = float(ritz[-1]), beta * abs(float(vectors[-1, -1]))
        if residual <= CONVERGED * abs(value):
            break
        off_diagonal.append(beta)
        previous_P, v_P = v_P, w_P / beta
    if residual == 0:
        return value, 0.0
    return value, residual / abs(value) if value else np.inf


class _Slopes:
    """First and second derivatives of a model's mean cross entropy with respect to the weights of its layers."""

    def __init__(self, model: nn.Module, axes: Mapping[str, int]):
        """`axes`: path of each weight -> the dimension of its output channels."""
        self.model = model
        self.device = device_of(model)
        self.fixed = {name: parameter.detach() for name, parameter in model.named_parameters()}
        weights = {path: model.get_parameter(path).detach() for path in axes}
        self.shapes = {path: weight.shape for path, weight in weights.items()}
        self.w_P = torch.cat([weight.reshape(-1) for weight in weights.values()]).requires_grad_()
        self.norm_P = torch.cat([_channel_norms(weight, axes[path]).reshape(-1) for path, weight in weights.items()])
        self._at_once: int | None = None

    def measure(self, images: torch.Tensor, labels: torch.Tensor, iterations: int, seed: int) -> tuple[dict, str]:
        """The columns of `diagnose` that are of these images (n, 3, H, W), and why one of them is undefined."""
        images, labels = images.to(self.device), labels.to(self.device)
        twice = sdpa_kernel(SDPBackend.MATH)  # the fused kernels of attention have no second derivative
        with torch.enable_grad(), eval_mode(self.model), straight_through(self.model), twice:
            halves = [slice(0, len(labels) // 2), slice(len(labels) // 2, None)]
            counts = [len(labels[half]) for half in halves]
            sums = [self._gradient_sum(images[half], labels[half]) for half in halves]
            g_P = (sums[0] + sums[1]) / len(labels)
            row = {
                "n_sampled": len(labels),
                "gradient_norm": float((self.norm_P * g_P).norm()),
                "gradient_noise": np.nan,
                "weight_gradient_norm": float(g_P.norm()),
                "hessian_eigenvalue": np.nan,
                "hessian_residual": np.nan,
                "hessian_converged": False,
            }
            if min(counts) > 0:  # the halves' means differ by the noise of the whole's times n / sqrt(n_1 n_2)
                difference_P = self.norm_P * (sums[0] / counts[0] - sums[1] / counts[1])
                row["gradient_noise"] = float(difference_P.norm()) * np.sqrt(counts[0] * counts[1]) / len(labels)
            if iterations == 0:
                return row, "no Hessian was asked for"
            product = self._hessian_product(images, labels)
            start_P = torch.randn(len(self.w_P), generator=torch.Generator().manual_seed(seed)).to(self.device)
            value, residual = largest_eigenvalue(
                lambda v_P: self.norm_P * product(self.norm_P * v_P), start_P, iterations
            )
        is_converged = residual <= CONVERGED
        row |= {"hessian_eigenvalue": value, "hessian_residual": residual, "hessian_converged": is_converged}
        return row, "" if is_converged else f"the Hessian's eigenvalue has not converged in {iterations} steps"

    def _loss_sum(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        parts = self.w_P.split([shape.numel() for shape in self.shapes.values()])
        weights = {path: part.view(shape) for (path, shape), part in zip(self.shapes.items(), parts, strict=True)}
        logits = torch.func.functional_call(self.model, {**self.fixed, **weights}, (images.clone(),), tie_weights=False)
        return F.cross_entropy(class_logits(logits.float().reshape(len(images), -1)), labels, reduction="sum")

    def _gradient_sum(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total_P = torch.zeros_like(self.w_P)
        for part, wanted in zip(images.split(GRADIENT_BATCH), labels.split(GRADIENT_BATCH), strict=True):
            if len(wanted):
                total_P += torch.autograd.grad(self._loss_sum(part, wanted), self.w_P)[0]
        return total_P

    def _hessian_product(self, images: torch.Tensor, labels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """v -> Hv, the gradient of the gradient's product with v (Pearlmutter 1994)."""

        def graph(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(self._loss_sum(part, wanted) / len(labels), self.w_P, create_graph=True)[0]

        at_once = self._images_at_once(images, labels)
        if len(labels) <= at_once:
            g_P = graph(images, labels)
            return lambda v_P: torch.autograd.grad(g_P, self.w_P, v_P, retain_graph=True)[0]
        parts = list(zip(images.split(at_once), labels.split(at_once), strict=True))
        return lambda v_P: sum(torch.autograd.grad(graph(*part), self.w_P, v_P)[0] for part in parts)

    def _images_at_once(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        """Of how many images GRAPH_MEMORY holds the graph of the gradient: what two keep more than one."""
        if self._at_once is None:
            kept = []
            for n in (1, 2):
                image, label = images[:1].expand(n, *images.shape[1:]), labels[:1].expand(n)
                saved: dict[int, int] = {}

                def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
                    saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                    return tensor.detach()

                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    torch.autograd.grad(self._loss_sum(image, label), self.w_P, create_graph=True)
                kept.append(sum(saved.values()))
            self._at_once = max(1, GRAPH_MEMORY // max(1, kept[1] - kept[0]))
        return self._at_once


def _channel_norms(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """The norm of each output channel's weights, at each of them."""
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    return torch.linalg.vector_norm(weight, dim=others, keepdim=True).expand_as(weight)


def _layers(fp32: nn.Module, quantized: QuantizedModel | None) -> dict[str, dict[str, int]]:
    """Of each model the path of every layer's weight -> the dimension of its output channels, in the same order."""
    if quantized is None:
        own = {name: module for name, module in fp32.named_modules() if is_layer(module)}
        if not own:
            raise ValueError("the model has no convolution or linear layer")
        return {"fp32": {_join(name, "weight"): _axis(module) for name, module in own.items()}}
    prefix = "model." if "model" in quantized.placement.opaque else ""  # of a model that was kept whole
    modules = dict(fp32.named_modules())
    found: dict[str, dict[str, int]] = {"fp32": {}, "quantized": {}}
    for path, layer in quantized.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        name = layer.name.removeprefix(prefix)
        own = modules.get(name)
        weight = getattr(own, "weight", None)
        if weight is None or weight.shape != layer.layer.weight.shape:
            raise ValueError(f"the quantized model was not made from this one: its layer {name} is another or missing")
        found["fp32"][_join(name, "weight")] = _axis(own)
        found["quantized"][_join(path, "layer.weight")] = layer.axis
    return found


def _axis(layer: nn.Module) -> int:
    return 1 if isinstance(layer, TRANSPOSED) else 0


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ------------------------------------------------------------------------------------------------------------ clipping


def _ends(quantizer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Below and above what the quantizer clips; they broadcast against x."""
    if isinstance(quantizer, DynamicActivationQuantizer):
        scale, zero_point = (along(values_N, 0, x.ndim) for values_N in quantizer.parameters_of(x))
        qmin, qmax = activation_range(quantizer.bits, quantizer.is_signed)
    else:
        quantizer.check_calibrated()
        scale, zero_point, (qmin, qmax) = quantizer.scale, quantizer.zero_point, quantizer.bounds()
    return scale * (qmin - zero_point - HALF_STEP), scale * (qmax - zero_point + HALF_STEP)


class _Counts:
    """How many values of each image each quantizer has seen and clipped."""

    def __init__(self, layers: Iterable[str]):
        self.images = 0  # of the batch that is on its way
        self.batches: dict[str, list[np.ndarray]] = {name: [] for name in layers}  # (n, 3): low, high, all
        self._current: dict[str, torch.Tensor] = {}

    def start_batch(self, images: int) -> None:
        self.end_batch()
        self.images = images

    def end_batch(self) -> None:
        """A quantizer that the batch did not reach, or not as images, has seen nothing of it."""
        for name, batches in self.batches.items():
            nothing = torch.zeros(self.images, 3, dtype=torch.int64)
            batches.append(self._current.pop(name, nothing).cpu().numpy())

    def see(self, quantizer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        (x,) = inputs
        if len(x) % self.images:
            return
        low, high = _ends(quantizer, x)
        below_N, above_N = ((x < low).reshape(self.images, -1), (x > high).reshape(self.images, -1))
        all_N = torch.full((self.images,), below_N.shape[1], device=x.device)
        counts_N3 = torch.stack([below_N.sum(dim=1), above_N.sum(dim=1), all_N], dim=1)
        self._current[quantizer.name] = self._current.get(quantizer.name, 0) + counts_N3

    def shares(self, name: str) -> np.ndarray:
        """(N, 2): of each image's values those clipped below and above; NaN where none was seen."""
        counts_N3 = np.concatenate(self.batches[name])
        with np.errstate(invalid="ignore"):
            return counts_N3[:, :2] / counts_N3[:, 2:]


@contextlib.contextmanager
def _counting(quantized: QuantizedModel | None) -> Iterator[_Counts]:
    """Meanwhile every quantizer of fewer than 32 bits is watched while it quantizes."""
    quantizers = {} if quantized is None else quantized.activation_quantizers()
    quantizers = {name: quantizer for name, quantizer in quantizers.items() if quantizer.bits < FLOAT_BITS}
    counts = _Counts(quantizers)
    handles = [quantizer.register_forward_pre_hook(counts.see) for quantizer in quantizers.values()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _clipping_table(counts: _Counts, codes_N: np.ndarray, group_names: Sequence[str]) -> pd.DataFrame:
    rows = []
    for layer in counts.batches:
        shares_N2 = counts.shares(layer)
        for group, name in enumerate(group_names):
            members_N2 = shares_N2[codes_N == group]
            low, high = members_N2.mean(axis=0) if len(members_N2) else (np.nan, np.nan)
            rows.append((layer, name, len(members_N2), low + high, low, high))
    return pd.DataFrame(rows, columns=CLIPPING_COLUMNS)


# -------------------------------------------------------------------------------------------------- images and groups


class _SideBySide(nn.Module):
    """The logits of several models, (N, models x K), so that the images are loaded once."""

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = [model(x.clone()).reshape(len(x), -1) for model in self.models]
        if len({part.shape[1] for part in logits}) > 1:
            raise ValueError("the quantized model was not made from this one: it has another number of classes")
        return torch.cat(logits, dim=1)


class _Recorder:
    """Hands the batches of a loader on, and keeps a random sample of each group's images."""

    def __init__(self, loader: Iterable, attributes: str | Sequence[str] | None, samples: int, seed: int):
        self.loader = loader
        self.attributes = [attributes] if isinstance(attributes, str) else attributes and list(attributes)
        self.size = samples
        self.seed = seed
        # values of the attributes -> (random number, image, label): the least numbers, whatever the batch size
        self._kept: dict[tuple[int, ...], list[tuple[float, torch.Tensor, int]]] = {}

    def batches(self, counts: _Counts) -> Iterator[Mapping[str, Any]]:
        random = np.random.default_rng(self.seed)
        for batch in map(as_batch, self.loader):
            self._check(batch["sensitive"])
            images, labels = torch.as_tensor(batch["image"]), torch.as_tensor(batch["label"]).reshape(-1).tolist()
            values = zip(
                *(torch.as_tensor(batch["sensitive"][name]).reshape(-1).tolist() for name in self.attributes),
                strict=True,
            )
            for group, number, image, label in zip(values, random.random(len(labels)), images, labels, strict=True):
                kept = self._kept.setdefault(group, [])
                if len(kept) < self.size or number < kept[-1][0]:
                    kept.append((float(number), image.clone(), int(label)))
                    kept.sort(key=lambda sample: sample[0])
                    del kept[self.size :]
            counts.start_batch(len(labels))
            yield batch
        counts.end_batch()

    def _check(self, sensitive: Mapping[str, Any]) -> None:
        if not sensitive:
            raise ValueError("the loader has no sensitive attributes: there are no groups to diagnose")
        if self.attributes is None:
            self.attributes = list(sensitive)
        unknown = [name for name in self.attributes if name not in sensitive]
        if unknown or not self.attributes:
            what = (
                f"unknown sensitive attribute {', '.join(map(repr, unknown))}" if unknown else "no attribute is named"
            )
            raise ValueError(f"{what}; the loader has {', '.join(map(repr, sensitive))}")

    def samples(self, codes_of: Mapping[tuple[int, ...], int]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """group -> images (n, 3, H, W) and labels (n,), in random order."""
        return {
            codes_of[values]: (torch.stack([kept[1] for kept in group]), torch.tensor([kept[2] for kept in group]))
            for values, group in self._kept.items()
        }


def _groups(
    sensitive: Mapping[str, np.ndarray], attributes: Sequence[str], names: Mapping[str, Sequence[str]] | None
) -> tuple[np.ndarray, list[str], dict[tuple[int, ...], int]]:
    """(N,) group of each image, the groups' names, and the group of each combination of values that there is."""
    values = {name: sensitive[name] for name in attributes}
    if names is None:
        distinct = {name: np.unique(column, return_inverse=True) for name, column in values.items()}
        codes = {name: inverse.reshape(-1) for name, (_, inverse) in distinct.items()}
        codes_N, group_names = intersect(codes, {name: list(map(str, seen)) for name, (seen, _) in distinct.items()})
    else:
        codes_N, group_names = intersect(values, names)
    rows = zip(*(column.tolist() for column in values.values()), strict=True)
    return codes_N, group_names, dict(zip(rows, codes_N.tolist(), strict=True))
