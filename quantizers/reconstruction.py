"""Reconstruction: rounding that is learned so that each piece of the network gives what it gave in float.

Weights: AdaRound (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020), each weight
rounded up or down as a sigmoid learns. Pieces: residual blocks (BRECQ: Li et al., ICLR 2021) or single layers, one
after the other, each on what the quantized pieces before it give and against what the float network gave. An image's
error is relative to its own energy, as in the mse observer. Activation scales are learned with them by the gradients of
LSQ (Esser et al., ICLR 2020), and half of the activations are not quantized, drawn anew in each step, which keeps the
few images from being learned by heart (QDrop: Wei et al., ICLR 2022). A piece keeps what was learned only where its
error on all the images is less than with rounding to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import nn

from evaluation import device_of, eval_mode
from quantizers.execution import WALK_BATCH, WALK_MEMORY, Segment, Walk, images_within, run_segment, segments
from quantizers.groups import ImageWeights, weights_of_first
from quantizers.learned import LearnedActivation, mixed, replaced
from quantizers.modules import ActivationQuantizer, QuantizedLayer, QuantizedModel
from quantizers.numerics import FLOAT_BITS, MAX_BITS, QuantizationError, along

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # of the rectified sigmoid: AdaRound, eq. 23
WARM_UP = 0.2  # share of the iterations without pressure towards up or down
BETA_START, BETA_END = 20.0, 2.0  # the exponent of that pressure, annealed: AdaRound, eq. 24
PRESSURE = 0.01  # its weight in the loss
LEAST_ENERGY = 1e-3  # of the mean image's: an image of less counts as if it had so much
LARGEST_BLOCK = 3  # single-layer pieces that follow one another are learned together up to so many layers, as in BRECQ

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Reconstruction:
    """What was done: on how many images, and for each piece its layers and its squared error, as a share of the energy
    of its float output, mean over images, rounded to nearest and as it is now."""

    unit: str
    images: int
    iterations: int
    pieces: list[dict] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """A row for each piece: `layers`, `error_nearest`, `error_learned`."""
        return pd.DataFrame(self.pieces, columns=["layers", "error_nearest", "error_learned"])


def reconstruct(
    model: QuantizedModel,
    images: torch.Tensor,
    *,
    unit: str = "block",
    iterations: int = 300,
    batch_size: int = 32,
    learning_rate: float = 1e-1,
    scale_learning_rate: float = 3e-3,
    learn_activation_scales: bool = True,
    drop: float = 0.5,
    seed: int = 0,
    memory_bytes: int = WALK_MEMORY,
    progress: Progress | None = None,
    image_weights: ImageWeights | None = None,
) -> Reconstruction:
    """Learn the rounding of every quantized layer, in place, and the scales of the activations between them.

    Weights and ranges must be set, and the float parameters not yet forgotten. `images` (n, 3, H, W): as many as
    `memory_bytes` of live activations hold, the first ones. `unit` is "block" or "layer"; `drop` the share of the
    activations that are taken as they are in a step. `image_weights` (n,), not negative, or a function that gives those
    of so many of the first images, say how much each image's error counts, in what is learned and in whether it is
    kept; None: all the same. The same seed gives the same model, of images that lie in memory in the same way
    (channels_last or not). If it fails, the pieces that are not done are as they were.
    """
    if unit not in ("block", "layer"):
        raise QuantizationError(f"unknown reconstruction unit {unit!r}; choose from block, layer")
    network, device = model.network, device_of(model)
    generator = torch.Generator().manual_seed(seed)
    with eval_mode(model):
        # kept at once: the live values of the float and of the quantized network, and the piece's own target
        images = images[: images_within(network, images.to(device), memory_bytes // 3)].to(device)
        weights_N = weights_of_first(image_weights, len(images))
        weights_N = (weights_N / weights_N.mean()).to(device)
        report = Reconstruction(unit, len(images), iterations)
        pieces = {piece.nodes[0]: piece for piece in (_blocks if unit == "block" else _layers)(model)}
        exact, quantized = Walk(network, images), Walk(network, images)
        for node in network.graph.nodes:
            if node in pieces:
                learning = _Learning(model, pieces[node], learn_activation_scales, weights_N)
                if learning.layers:
                    if progress is not None:
                        progress(f"reconstructing {learning.layers[0].name}", len(report.pieces) / len(pieces))
                    before, after = learning.run(
                        exact.value(pieces[node].source),
                        quantized.value(pieces[node].source),
                        iterations,
                        min(batch_size, len(images)),
                        (learning_rate, scale_learning_rate),
                        drop,
                        generator,
                    )
                    names = [layer.name for layer in learning.layers]
                    report.pieces.append({"layers": " ".join(names), "error_nearest": before, "error_learned": after})
            with torch.no_grad():
                with model.as_float():
                    exact.run(node)
                quantized.run(node)
            exact.free(node)
            quantized.free(node)
    return report


def _blocks(model: QuantizedModel) -> list[Segment]:
    """The network's segments, single-layer ones that follow one another joined."""
    pieces: list[Segment] = []
    is_open = False  # may the last piece grow?
    for segment in segments(model):
        is_single = len(segment.layers) <= 1
        if is_open and is_single and len(pieces[-1].layers) + len(segment.layers) <= LARGEST_BLOCK:
            last = pieces.pop()
            nodes = tuple(dict.fromkeys((*last.nodes, *segment.nodes)))
            segment = Segment(
                nodes,
                last.source,
                segment.result,
                (*last.layers, *segment.layers),
                tuple(dict.fromkeys((*last.quantizers, *segment.quantizers))),
            )
        pieces.append(segment)
        is_open = is_single
    return pieces


def _layers(model: QuantizedModel) -> list[Segment]:
    """Each layer with the quantizer before it, unless an earlier layer has that, and the activation behind it."""
    network = model.network
    modules = dict(network.named_modules())
    quantizers = {id(module): name for name, module in model.activation_quantizers().items()}
    pieces, taken = [], set()
    for node in network.graph.nodes:
        if node.op != "call_module":
            continue
        layers = [module for module in modules[node.target].modules() if isinstance(module, QuantizedLayer)]
        if not layers or len(node.all_input_nodes) != 1:  # several inputs: code that cannot be traced, left as it is
            continue
        nodes, source = [node], node.args[0]
        before = source.op == "call_module" and quantizers.get(id(modules[source.target]))
        if before and source not in taken:
            taken.add(source)
            nodes, source = [source, node], source.args[0]
        after = next(iter(node.users)) if len(node.users) == 1 else None
        if after is not None and after.op == "call_module" and isinstance(modules[after.target], (nn.ReLU, nn.ReLU6)):
            nodes.append(after)
        names = (quantizers[id(modules[nodes[0].target])],) if nodes[0] is not node else ()
        pieces.append(Segment(tuple(nodes), source, nodes[-1], tuple(layer.name for layer in layers), names))
    return pieces


class _Learning:
    """One piece while it is learned."""

    def __init__(self, model: QuantizedModel, piece: Segment, learn_activation_scales: bool, weights_N: torch.Tensor):
        self.model, self.piece = model, piece
        self.weights_N = weights_N  # of the images, 1 in the mean
        self.learn_activation_scales = learn_activation_scales
        layers, quantizers = model.layers(), model.activation_quantizers()
        self.layers = [layers[name] for name in piece.layers if layers[name].bits <= MAX_BITS]
        self.quantizers = [
            quantizers[name]
            for name in piece.quantizers
            if isinstance(quantizers[name], ActivationQuantizer) and quantizers[name].bits < FLOAT_BITS
        ]

    def run(
        self,
        exact: torch.Tensor,
        x: torch.Tensor,
        iterations: int,
        batch_size: int,
        learning_rates: tuple[float, float],
        drop: float,
        generator: torch.Generator,
    ) -> tuple[float, float]:
        """Learn from the source's values in the float and in the quantized network; the errors before and after."""
        with torch.no_grad():
            with self.model.as_float():
                target = self._output(exact)
            before = self._error(x, target)
            weights = [(layer.weight_integer.clone(), layer.weight_scale.clone()) for layer in self.layers]
            scales = [(quantizer.scale.clone(), quantizer.zero_point.clone()) for quantizer in self.quantizers]
        if not math.isfinite(before):
            raise QuantizationError(f"{self.layers[0].name}: its output is not finite on the calibration images")
        with replaced(self.model.network, self._learned) as learned:
            self._optimise(list(learned.values()), exact, x, target, iterations, batch_size, learning_rates, drop,
                           generator)  # fmt: skip
        for module in learned.values():
            module.freeze()
        with torch.no_grad():
            is_sound = all(bool(torch.isfinite(quantizer.scale)) for quantizer in self.quantizers)
            after = self._error(x, target) if is_sound else math.inf
        if not after < before:
            for layer, (integer, scale) in zip(self.layers, weights, strict=True):
                layer.set_weights(integer, scale)
            for quantizer, (scale, zero_point) in zip(self.quantizers, scales, strict=True):
                quantizer.set_parameters(scale, zero_point)
            after = before
        return before, after

    def _learned(self, module: nn.Module) -> nn.Module | None:
        if module in self.layers:
            return SoftLayer(module)
        if module in self.quantizers:
            activation = LearnedActivation(module)
            activation.theta.requires_grad_(self.learn_activation_scales)
            return activation
        return None

    def _optimise(self, learned, exact, x, target, iterations, batch_size, learning_rates, drop, generator) -> None:
        soft = [module for module in learned if isinstance(module, SoftLayer)]
        scales = [module.theta for module in learned if isinstance(module, LearnedActivation)]
        groups = [{"params": [module.up for module in soft], "lr": learning_rates[0]}]
        if self.learn_activation_scales and scales:
            groups.append({"params": scales, "lr": learning_rates[1]})
        optimizer = torch.optim.Adam(groups)
        schedule = (
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations)) if len(groups) > 1 else None
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        # tokens have theirs last; a single logit may have no dimension of its own
        channels = 1 if target.ndim == 1 else target.shape[2] if target.ndim == 3 else target.shape[1]
        # each image counts the same, whatever its energy; all together what they would in a plain mean
        energy_N = _energy(target)
        importance_N = self.weights_N * energy_N.mean() / energy_N
        for module in learned:
            if isinstance(module, LearnedActivation):
                module.drop, module.generator = drop, generator
        for step in range(iterations):
            index = torch.randint(len(x), (batch_size,), generator=generator).to(x.device)
            batch, wanted = x[index], target[index]
            if drop > 0:
                batch = mixed(exact[index], batch, drop, generator)
            error = _of_images((run_segment(self.model.network, self.piece, batch) - wanted).pow(2))
            loss = (error * importance_N[index]).mean() * channels
            progress = (step / max(1, iterations) - WARM_UP) / (1 - WARM_UP)
            if progress > 0:
                beta = BETA_END + 0.5 * (BETA_START - BETA_END) * (1 + math.cos(math.pi * progress))
                loss = loss + PRESSURE * sum(module.undecided(beta) for module in soft)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
                optimizer.param_groups[0]["lr"] = rates[0]  # only the scales settle: rounding has to be driven home

    def _output(self, x: torch.Tensor) -> torch.Tensor:
        batches = [run_segment(self.model.network, self.piece, batch) for batch in x.split(WALK_BATCH)]
        return torch.cat(batches)

    def _error(self, x: torch.Tensor, target: torch.Tensor) -> float:
        error_N = _of_images((self._output(x) - target).pow(2))
        return float((self.weights_N * error_N / _energy(target)).mean())


def _energy(target: torch.Tensor) -> torch.Tensor:
    """(N,) mean square of each image's values, at least a share (LEAST_ENERGY) of the mean of all."""
    energy_N = _of_images(target.pow(2))
    return energy_N.clamp(min=LEAST_ENERGY * float(energy_N.mean()) or 1.0)


def _of_images(values: torch.Tensor) -> torch.Tensor:
    """(N,) means of (N, ...)."""
    return values.reshape(len(values), -1).mean(dim=1)


class SoftLayer(nn.Module):
    """A layer whose weights stand between the two integers next to them: floor + h(up), h from 0 to 1 (AdaRound,
    eq. 22 and 23). It starts at the float weights."""

    def __init__(self, quantized: QuantizedLayer):
        super().__init__()
        self._quantized = [quantized]  # in a list: not a submodule
        self.axis, self.bounds = quantized.axis, quantized.bounds()
        weight = quantized.float_weight
        self.scale = along(quantized.weight_scale, self.axis, weight.ndim)
        steps = weight / self.scale
        self.floor = steps.floor()
        rest = (steps - self.floor).clamp(1e-3, 1 - 1e-3)
        share = (rest - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.up = nn.Parameter(torch.log(share / (1 - share)))
        self.latest = torch.empty(0)  # the share that the last forward pass used

    @property
    def layer(self) -> nn.Module:
        return self._quantized[0].layer

    def share(self) -> torch.Tensor:
        return (torch.sigmoid(self.up) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)

    def undecided(self, beta: float) -> torch.Tensor:
        """0 where every weight was up or down in the last forward pass (AdaRound, eq. 24)."""
        return self.latest.numel() - (2 * self.latest - 1).abs().pow(beta).sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.latest = self.share()
        weight = (self.floor + self.latest).clamp(*self.bounds) * self.scale
        return torch.func.functional_call(self.layer, {"weight": weight}, (x,))

    @torch.no_grad()
    def freeze(self) -> None:
        (quantized,) = self._quantized
        integer = (self.floor + (self.share() >= 0.5)).clamp(*self.bounds)
        quantized.set_weights(integer.to(torch.int8), quantized.weight_scale.clone())
