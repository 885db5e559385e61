"""Cross-layer equalization: the ranges of channels made equal across layers without changing what the network computes
(Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV 2019, section 4.1).

For f with f(s x) = s f(x), s > 0, a channel may be divided by s where it is made and multiplied by s where it is read.
With r1 and r2 the largest |weight| that makes and that reads channel c, s_c = sqrt(r1 r2) / r2 (eq. 11) makes both
sqrt(r1 r2). Who makes and who reads is found from the traced graph, never from lists of layer names:

- a layer's channels are followed through ReLU, LeakyReLU, PReLU, dropout, pooling, means, padding with zeros, products
  with a gate that does not depend on them, concatenations of channels and flattening, to all the layers that read them;
- several readers are equalized together (r2 is the largest of theirs), and a reader of several makers slice by slice;
  a depthwise convolution reads one set and makes the next, the paper's chain of three;
- ReLU6 is not homogeneous. The paper replaces it by ReLU; here it becomes a `ChannelClip` with the bound 6 / s_c, which
  is the same function exactly;
- beyond the paper, the gain and bias of a LayerNorm or of a BatchNorm that could not be folded make channels like a
  layer (as SmoothQuant, Xiao et al., ICML 2023, migrates scales), which gives transformers something to equalize.

Whatever else touches the channels (a residual addition, SiLU, GELU, sigmoid, softmax, a submodule that could not be
traced, the network's output) leaves them as they are, and so does a weight that is used twice, shared, read or hooked.

High-bias absorption (section 4.1.3) is left out: it is not exact behind padding with zeros (every padded 3x3
convolution), nor on any image whose activations fall below the absorbed bias.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from evaluation import device_of, eval_mode
from quantizers.graph import SHAPE_ATTRIBUTES, SHAPE_METHODS, TRANSPARENT_MODULES, is_layer
from quantizers.modules import TRANSPOSED
from quantizers.numerics import QuantizationError, along

# A channel whose equalized range is below this part of the layer's largest rounds to zero in 8 bits, equalized or not;
# scaling it would only amplify its bias. Such are the channels that training switched off (BatchNorm gains near 0).
NEGLIGIBLE = 1 / 256
LARGEST_SCALE = 1e3  # and 1 / it the smallest: ranges up to 10^6 apart, weights far from the limits of float16
NORM_DEVIATIONS = 3  # a norm's channel is taken to reach |bias| + 3 |gain| (as the paper takes pre-activations to)
ROUNDS, TOLERANCE = 300, 1e-3  # passes over all sets at most; the largest relative change after which they end


@dataclass(frozen=True)
class Equalization:
    """One set of channels: divided by their scales in `producer`, multiplied by them in each of the `consumers`."""

    producer: str  # a layer or a norm, by name
    consumers: tuple[str, ...]  # layers
    through: tuple[str, ...]  # the operations between, in program order
    smallest_scale: float
    largest_scale: float


class ChannelClip(nn.Module):
    """min(max(x, 0), bound), the bound of each channel its own: ReLU6 after its channels were scaled.

    `bound` broadcasts against x: (C, 1, 1) for (N, C, H, W), (C,) for (N, C). Where it is not below the largest value
    that a channel takes, it does nothing there: with all bounds infinite this is a ReLU.
    """

    def __init__(self, bound: torch.Tensor):
        super().__init__()
        self.register_buffer("bound", bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.minimum(x.relu(), self.bound)

    def extra_repr(self) -> str:
        return f"{self.bound.numel()} channels, bounds {float(self.bound.min()):.4g} to {float(self.bound.max()):.4g}"


@torch.no_grad()
def equalize(
    network: fx.GraphModule, sample: torch.Tensor | None = None, *, with_norms: bool = True
) -> list[Equalization]:
    """Equalize a traced network with BatchNorms folded, in place, before quantizers are inserted; what was scaled.

    It computes the same function afterwards, up to rounding. `sample` is one or more input images (n, 3, H, W): their
    shapes, not their values, let channels be followed through flattenings, views and gates whose effect the graph
    alone does not prove; without it less is equalized. `with_norms=False` leaves out what the paper leaves out, the
    gains of norms. Raises QuantizationError where the network cannot be run on the sample.
    """
    channels = _Channels(network, {} if sample is None else _shapes(network, sample), with_norms)
    sets = channels.equalizable()
    modules = {node: network.get_submodule(node.target) for s in sets for node in (s.producer, *s.consumers)}
    parts = {node: _Part(module) for node, module in modules.items()}
    scales = _balance(sets, parts)
    done = [
        Equalization(
            s.producer.target,
            tuple(node.target for node in s.consumers),
            tuple(channels.operation_name(node) for node in s.through),
            float(scales[s.producer].min()),
            float(scales[s.producer].max()),
        )
        for s in sets
    ]
    for part in parts.values():
        part.write()
    channels.write_clips(scales)
    return done


def equalizing_scale(made_C: torch.Tensor, read_C: torch.Tensor) -> torch.Tensor:
    """s (C,) of eq. 11, such that made / s = read * s; 1 for channels that are dead or next to it (NEGLIGIBLE)."""
    range_C = (made_C * read_C).sqrt()
    is_alive = (range_C > 0) & (range_C >= NEGLIGIBLE * range_C.max())  # false where not a number
    return torch.where(is_alive, range_C / read_C, torch.ones_like(range_C))


# ----------------------------------------------------------------------------------------------------- finding the sets


@dataclass
class _Set:
    """Channels made by one node and read by others; `reads` says where in each reader's input they begin."""

    producer: fx.Node
    reads: list[tuple[fx.Node, int, int]] = field(default_factory=list)  # (reader, first entry, entries a channel)
    through: list[fx.Node] = field(default_factory=list)
    is_blocked: bool = False

    @property
    def consumers(self) -> list[fx.Node]:
        return list(dict.fromkeys(reader for reader, _, _ in self.reads))


@dataclass(frozen=True)
class _Segment:
    """Consecutive entries of a channel dimension: all channels of one producer, or (None) channels left as they are."""

    producer: fx.Node | None
    channels: int
    entries: int = 1  # of each channel, next to one another (more than 1 after a flattening)

    @property
    def size(self) -> int:
        return self.channels * self.entries


@dataclass(frozen=True)
class _Layout:
    """Which dimension of a tensor holds channels, and whose."""

    segments: tuple[_Segment, ...]
    before: int | None  # how many dimensions stand before it; None: not known
    after: tuple[int | None, ...]  # the sizes of those behind it; None: not known

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)

    @property
    def producers(self) -> list[fx.Node]:
        return [segment.producer for segment in self.segments if segment.producer is not None]

    def flattened(self, entries: int) -> tuple[_Segment, ...]:
        return tuple(replace(segment, entries=segment.entries * entries) for segment in self.segments)

    def spread(self, values: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        """The producers' values (C,) along the channel dimension; 1 where there is none."""
        parts = [
            values[s.producer].repeat_interleave(s.entries) if s.producer in values else torch.ones(s.size)
            for s in self.segments
        ]
        return torch.cat([part.cpu() for part in parts])


def _functions(*names: str) -> set[Any]:
    """What a graph may call these: the functions of torch and torch.nn.functional, and the tensor methods (names)."""
    return {*names, *(getattr(space, name) for name in names for space in (torch, F) if hasattr(space, name))}


# f(s x) = s f(x), entry by entry
HOMOGENEOUS = {
    *_functions("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "dropout", "dropout2d", "contiguous", "clone"),
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, *TRANSPARENT_MODULES),
}
CLIPS = _functions("hardtanh", "hardtanh_", "relu6", "clamp", "clamp_", "clip", "clip_") | {nn.ReLU6, nn.Hardtanh}
CONCATENATIONS = _functions("cat", "concat", "concatenate")
RESHAPES = _functions("flatten", "reshape", "view", "squeeze", "unsqueeze") | {nn.Flatten}
REDUCTIONS = _functions("mean", "amax")
PRODUCTS = _functions("mul", "mul_") | {operator.mul, operator.imul}
# the same on each channel, over this many dimensions behind it
SPATIAL = {
    operation: dimensions
    for dimensions in (1, 2, 3)
    for operation in (
        *_functions(f"max_pool{dimensions}d", f"avg_pool{dimensions}d", f"adaptive_avg_pool{dimensions}d"),
        getattr(F, f"adaptive_max_pool{dimensions}d"),  # torch's own returns indices too
        *(getattr(nn, f"{kind}{dimensions}d") for kind in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")),
        *(getattr(nn, f"{kind}{dimensions}d") for kind in ("ZeroPad", "ReflectionPad", "ReplicationPad")),
    )
}
NORMS = {nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}  # dimensions behind the channels; None: 0 or 1


class _Channels:
    """Follows the channels that layers and norms make to whatever reads them, in one pass in program order."""

    def __init__(self, network: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]], with_norms: bool):
        self.network = network
        self.modules = dict(network.named_modules())
        self.shapes = shapes
        self.with_norms = with_norms
        self.fixed = _fixed_modules(network)
        self.sets: dict[fx.Node, _Set] = {}
        self.layouts: dict[fx.Node, _Layout] = {}
        self.bounds: dict[fx.Node, float | torch.Tensor] = {}  # of clips
        for node in network.graph.nodes:
            if not _reads_shape(node):
                self._visit(node)

    def equalizable(self) -> list[_Set]:
        return [s for s in self.sets.values() if s.reads and not s.is_blocked]

    def write_clips(self, scales: dict[fx.Node, torch.Tensor]) -> None:
        """Divide the bound of every clip on the way by the scales, a ReLU6 becoming a ChannelClip. Names stay."""
        for node, bound in self.bounds.items():
            layout = self.layouts[node]
            scale = layout.spread(scales)
            if bool((scale == 1).all()):
                continue
            module = self.modules.get(node.target) if node.op == "call_module" else None
            if isinstance(module, ChannelClip):
                module.bound.div_(scale.to(module.bound).reshape(module.bound.shape))
                continue
            producer = next(p for p in layout.producers if p in scales)
            like = self.modules[producer.target].weight
            clip = ChannelClip((bound / scale).to(like).reshape(-1, *(1 for _ in layout.after)))
            source = _source(node)
            node.op, node.target, node.args, node.kwargs = "call_module", f"channel_clip_{node.name}", (source,), {}
            self.network.add_submodule(node.target, clip.train(self.network.training))
        self.network.graph.lint()
        self.network.recompile()

    def operation_name(self, node: fx.Node) -> str:
        operation = self._operation(node)
        return operation if isinstance(operation, str) else operation.__name__

    # ------------------------------------------------------------------------------------------------------- one node

    def _visit(self, node: fx.Node) -> None:
        source = _source(node)
        module = self.modules.get(node.target) if node.op == "call_module" else None
        made = self._made(node, module)
        inputs = [layout for layout in map(self.layouts.get, node.all_input_nodes) if layout is not None]
        if made is None:
            passed = self._checked(self._passed(node, source), node)
            if passed is None:
                self._block(inputs)
                return
            for producer in dict.fromkeys(passed.producers):
                self.sets[producer].through.append(node)
            self.layouts[node] = passed
            return
        layout = self.layouts.get(source)
        if is_layer(module) and self._is_free(node) and layout is not None and _fits(layout, module):
            begin = 0
            for segment in layout.segments:
                if segment.producer is not None:
                    self.sets[segment.producer].reads.append((node, begin, segment.entries))
                begin += segment.size
            self._block([other for other in inputs if other is not layout])
        else:
            self._block(inputs)
        made = self._checked(made, node)
        if made is not None:
            self.layouts[node] = made
            for producer in made.producers:
                self.sets[producer] = _Set(producer)

    def _block(self, layouts: list[_Layout]) -> None:
        for layout in layouts:
            for producer in layout.producers:
                self.sets[producer].is_blocked = True

    def _checked(self, layout: _Layout | None, node: fx.Node) -> _Layout | None:
        """The layout with what the node's shape tells; None if it contradicts it."""
        shape = self.shapes.get(node)
        if layout is None or shape is None:
            return layout
        before = len(shape) - 1 - len(layout.after)
        if before < 0 or layout.before not in (None, before) or shape[before] != layout.size:
            return None
        return replace(layout, before=before, after=shape[before + 1 :])

    def _is_free(self, node: fx.Node) -> bool:
        return node.target not in self.fixed

    def _made(self, node: fx.Node, module: nn.Module | None) -> _Layout | None:
        """The layout of what a layer or norm makes: its own channels, to be scaled only if it is free. Else None."""
        if module is None:
            return None
        producer = node if self._is_free(node) else None
        if is_layer(module):
            weight = module.weight
            after = (None,) * (weight.ndim - 2)
            axis = 1 if isinstance(module, TRANSPOSED) else 0
            before = None if isinstance(module, nn.Linear) else 1
            return _Layout((_Segment(producer, weight.shape[axis]),), before, after)
        gain = getattr(module, "weight", None)
        if not self.with_norms or gain is None or gain.ndim != 1 or producer is None:
            return None
        if _is_layer_norm(module):
            return _Layout((_Segment(producer, len(gain)),), None, ())
        if type(module) in NORMS:
            count = NORMS[type(module)]
            if count is None and node not in self.shapes:
                return None
            after = (None,) * (len(self.shapes[node]) - 2 if count is None else count)
            return _Layout((_Segment(producer, len(gain)),), 1, after)
        return None

    # ------------------------------------------------------------------------------------------------ what lets pass

    def _passed(self, node: fx.Node, source: fx.Node | None) -> _Layout | None:
        """The layout behind an operation that commutes with a positive scale of each channel; None behind others."""
        operation = self._operation(node)
        if operation in CONCATENATIONS:
            return self._concatenated(node)
        if operation in PRODUCTS:
            return self._multiplied(node)
        layout = self.layouts.get(source)
        if layout is None or any(other in self.layouts for other in node.all_input_nodes if other is not source):
            return None
        module = self.modules.get(node.target) if node.op == "call_module" else None
        if module is not None and _has_hooks(module):
            return None
        if operation in HOMOGENEOUS:
            return layout
        if operation in CLIPS or isinstance(module, ChannelClip):
            bound = _upper_bound(node, operation, module)
            if bound is not None and not (isinstance(bound, float) and math.isinf(bound)):
                self.bounds[node] = bound
            return None if bound is None else layout
        if operation in SPATIAL:
            return _pooled(node, operation, module, layout)
        if operation is F.pad:
            return _padded(node, layout)
        if operation in RESHAPES:
            return self._reshaped(node, source, module, layout)
        if operation in REDUCTIONS:
            return _reduced(node, layout)
        if operation is operator.getitem:
            return _indexed(node, layout)
        return None

    def _operation(self, node: fx.Node) -> Any:
        return type(self.modules[node.target]) if node.op == "call_module" else node.target

    def _concatenated(self, node: fx.Node) -> _Layout | None:
        tensors, dim = _argument(node, 0, "tensors", ()), _argument(node, 1, "dim", node.kwargs.get("axis", 0))
        known = [self.layouts[t] for t in tensors if t in self.layouts] if isinstance(tensors, (list, tuple)) else []
        if not known or not isinstance(dim, int):
            return None
        before, after = known[0].before, len(known[0].after)
        if any((layout.before, len(layout.after)) != (before, after) for layout in known):
            return None
        if dim != (-1 - after if dim < 0 else before):
            return None
        segments = []
        for tensor in tensors:
            shape = self.shapes.get(tensor)
            if tensor in self.layouts:
                segments += self.layouts[tensor].segments
            elif shape is not None and len(shape) > after:
                segments.append(_Segment(None, shape[-1 - after]))
            else:
                return None
        return _Layout(tuple(segments), before, known[0].after)

    def _multiplied(self, node: fx.Node) -> _Layout | None:
        """x * gate, where the gate does not depend on how x is scaled: nothing that does is without a layout."""
        factors = [_argument(node, 0, "input", None), _argument(node, 1, "other", None)]
        scaled = [factor for factor in factors if isinstance(factor, fx.Node) and factor in self.layouts]
        if len(scaled) != 1:
            return None
        other = factors[1 - factors.index(scaled[0])]
        is_same_shape = node in self.shapes and self.shapes[node] == self.shapes.get(scaled[0])
        return self.layouts[scaled[0]] if isinstance(other, (int, float)) or is_same_shape else None

    def _reshaped(self, node: fx.Node, source: fx.Node, module: nn.Module | None, layout: _Layout) -> _Layout | None:
        """Dimensions behind the channels reshaped among themselves, or all of them flattened into the channels."""
        old, new, before = self.shapes.get(source), self.shapes.get(node), layout.before
        if old is None or new is None:
            # without shapes: flatten(1) of channels whose extent is known, such as behind a pooling to 1 x 1
            first = module.start_dim if module is not None else _argument(node, 1, "start_dim", 0)
            last = module.end_dim if module is not None else _argument(node, 2, "end_dim", -1)
            is_flatten = self._operation(node) in _functions("flatten") | {nn.Flatten}
            if not is_flatten or (first, last) != (before, -1) or None in layout.after:
                return None
            return _Layout(layout.flattened(math.prod(layout.after)), before, ())
        if old[:before] != new[:before] or len(new) == before:
            return None
        if new[before] == old[before]:
            return _Layout(layout.segments, before, new[before + 1 :])
        if len(new) == before + 1:
            return _Layout(layout.flattened(math.prod(old[before + 1 :])), before, ())
        return None


def _shapes(network: fx.GraphModule, sample: torch.Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor of the graph when the network runs on (two images of) the sample."""
    found = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if isinstance(value, torch.Tensor):
                found[node] = tuple(value.shape)
            return value

    try:
        with eval_mode(network):
            Recorder(network).run(sample[:2].to(device_of(network)).clone())
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise QuantizationError(f"the model cannot be run on the images: {reason}") from error
    return found


def _fixed_modules(network: fx.GraphModule) -> set[str]:
    """Paths of modules whose weights must stay: called more than once, shared, read directly or watched by a hook."""
    nodes = network.graph.nodes
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    fixed = {path for path, count in calls.items() if count > 1}
    for node in nodes:
        if node.op == "get_attr" and not all(_reads_shape(user) for user in node.users):
            fixed.add(node.target.rpartition(".")[0])
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    owners = Counter(tensor.data_ptr() for _, tensor in tensors if tensor.numel())
    fixed |= {name.rpartition(".")[0] for name, tensor in tensors if owners[tensor.data_ptr()] > 1}
    return fixed | {path for path, module in network.named_modules() if path and _has_hooks(module)}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in SHAPE_METHODS
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES


def _is_layer_norm(module: nn.Module) -> bool:
    """A LayerNorm over the last dimension; timm's subclass computes the same, others of that name may not."""
    home = type(module).__module__
    is_known = type(module).__name__ == "LayerNorm" and home.startswith(("torch.nn.", "timm.layers."))
    return is_known and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1


def _fits(layout: _Layout, layer: nn.Module) -> bool:
    """Whether the layer reads the layout's channels as its input channels."""
    if isinstance(layer, nn.Linear):
        return not layout.after and layout.size == layer.in_features
    return layout.before == 1 and len(layout.after) == layer.weight.ndim - 2 and layout.size == layer.in_channels


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _source(node: fx.Node) -> fx.Node | None:
    """The tensor that a layer or an operation works on, its first argument."""
    source = _argument(node, 0, "input", None)
    return source if isinstance(source, fx.Node) else None


def _upper_bound(node: fx.Node, operation: Any, module: nn.Module | None) -> float | torch.Tensor | None:
    """c of clamp(x, 0, c), infinite without an upper bound; None where the lower one is not 0."""
    if isinstance(module, ChannelClip):
        return module.bound.flatten()
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        low, high = module.min_val, module.max_val
    elif operation is F.relu6:
        low, high = 0, 6
    elif operation in _functions("hardtanh", "hardtanh_"):
        low, high = _argument(node, 1, "min_val", -1), _argument(node, 2, "max_val", 1)
    else:
        low, high = _argument(node, 1, "min", None), _argument(node, 2, "max", None)
        high = math.inf if high is None else high
    is_number = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return float(high) if is_number and low == 0 and high > 0 else None


def _pooled(node: fx.Node, operation: Any, module: nn.Module | None, layout: _Layout) -> _Layout | None:
    """Behind a pooling or padding module over the dimensions behind the channels, all of them."""
    count = SPATIAL[operation]
    adaptive = getattr(operation, "__name__", "").lower().startswith("adaptive")
    # behind the tensor: adaptive pooling (output_size, return_indices), max pooling (..., return_indices seventh)
    position = 2 if adaptive else 6
    is_max = "max" in getattr(operation, "__name__", "").lower()
    asks = getattr(module, "return_indices", False) if module else _argument(node, position, "return_indices", False)
    if len(layout.after) != count or (is_max and asks is not False):
        return None
    after: tuple[int | None, ...] = (None,) * count
    if adaptive:
        size = module.output_size if module is not None else _argument(node, 1, "output_size", None)
        sizes = tuple(size) if isinstance(size, (list, tuple)) else (size,) * count
        after = tuple(known if isinstance(known, int) else None for known in sizes)
    return replace(layout, after=after)


def _padded(node: fx.Node, layout: _Layout) -> _Layout | None:
    padding, mode = _argument(node, 1, "pad", None), _argument(node, 2, "mode", "constant")
    is_zero = mode != "constant" or _argument(node, 3, "value", None) in (None, 0)
    if not isinstance(padding, (list, tuple)) or len(padding) > 2 * len(layout.after) or not is_zero:
        return None
    return replace(layout, after=(None,) * len(layout.after))


def _reduced(node: fx.Node, layout: _Layout) -> _Layout | None:
    """Behind a mean or maximum over other dimensions than that of the channels."""
    dims, keeps = _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False)
    dims = (dims,) if isinstance(dims, int) else dims
    if not isinstance(dims, (list, tuple)) or not dims or not all(isinstance(dim, int) for dim in dims):
        return None
    channel = -1 - len(layout.after)
    if layout.before is None and any(dim >= 0 for dim in dims):
        return None
    from_end = [dim if dim < 0 else dim - layout.before + channel for dim in dims]
    if channel in from_end:
        return None
    if keeps:
        after = tuple(1 if place - len(layout.after) in from_end else size for place, size in enumerate(layout.after))
        return replace(layout, after=after)
    gone = sum(dim < channel for dim in from_end)
    after = tuple(size for place, size in enumerate(layout.after) if place - len(layout.after) not in from_end)
    return replace(layout, before=None if layout.before is None else layout.before - gone, after=after)


def _indexed(node: fx.Node, layout: _Layout) -> _Layout | None:
    """Behind x[:, 0] or x[:, 1:], where the dimensions indexed stand before that of the channels."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    is_plain = all(isinstance(part, (int, slice)) and not isinstance(part, bool) for part in index)
    if layout.before is None or len(index) > layout.before or not is_plain:
        return None
    return replace(layout, before=layout.before - sum(isinstance(part, int) for part in index))


# ---------------------------------------------------------------------------------------------------------- the scales


class _Part:
    """The largest |weight| between any two channels of one layer or norm, and the factors found for its channels."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.groups = getattr(module, "groups", 1)
        weight = module.weight.detach().float()
        if not is_layer(module):
            bias = 0 if module.bias is None else module.bias.detach().float().abs()
            self.magnitude_OI = (bias + NORM_DEVIATIONS * weight.abs())[:, None]
        else:
            magnitude = weight.abs().flatten(2).amax(dim=2) if weight.ndim > 2 else weight.abs()
            self.magnitude_OI = magnitude.T if isinstance(module, TRANSPOSED) else magnitude  # (O, I / groups)
        outputs, inputs = self.magnitude_OI.shape
        self.output_factor_O = torch.ones(outputs, dtype=torch.float64, device=weight.device)
        self.input_factor_I = torch.ones(inputs * self.groups, dtype=torch.float64, device=weight.device)

    def output_range(self) -> torch.Tensor:
        """r1 (O,), with the factors found so far."""
        read_GOI = self._grouped() * self.input_factor_I.float().reshape(self.groups, 1, -1)
        return read_GOI.amax(dim=2).flatten() * self.output_factor_O

    def input_range(self) -> torch.Tensor:
        """r2 (I,), with the factors found so far."""
        made_GOI = self._grouped() * self.output_factor_O.float().reshape(self.groups, -1, 1)
        return made_GOI.amax(dim=1).flatten() * self.input_factor_I

    def _grouped(self) -> torch.Tensor:
        return self.magnitude_OI.reshape(self.groups, -1, self.magnitude_OI.shape[1])

    def write(self) -> None:
        weight, bias, outputs = self.module.weight, self.module.bias, self.output_factor_O
        if isinstance(self.module, TRANSPOSED):
            scaled = weight.double() * along(outputs, 1, weight.ndim) * along(self.input_factor_I, 0, weight.ndim)
        elif is_layer(self.module):
            inputs = self.input_factor_I.reshape(self.groups, 1, -1)
            grouped = weight.double().reshape(self.groups, len(outputs) // self.groups, inputs.shape[2], -1)
            scaled = grouped * outputs.reshape(self.groups, -1, 1, 1) * inputs[..., None]
        else:
            scaled = weight.double() * outputs
        weight.copy_(scaled.reshape(weight.shape))
        if bias is not None:
            bias.copy_(bias.double() * outputs)


def _balance(sets: list[_Set], parts: dict[fx.Node, _Part]) -> dict[fx.Node, torch.Tensor]:
    """The scales (C,) of each producer. In a chain every set moves the ranges of the next: repeated until at rest."""
    scales = {s.producer: torch.ones_like(parts[s.producer].output_factor_O) for s in sets}
    for _ in range(ROUNDS):
        largest_change = 0.0
        for s in sets:
            old = scales[s.producer]
            made = parts[s.producer].output_range()
            ranges = {node: parts[node].input_range() for node in s.consumers}
            slices = [ranges[node][_entries(old, begin, count)].reshape(-1, count) for node, begin, count in s.reads]
            read = torch.stack([entries.amax(dim=1) for entries in slices]).amax(dim=0)
            new = (old * equalizing_scale(made, read)).clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
            change = new / old
            parts[s.producer].output_factor_O /= change
            for node, begin, count in s.reads:
                parts[node].input_factor_I[_entries(old, begin, count)] *= change.repeat_interleave(count)
            scales[s.producer] = new
            largest_change = max(largest_change, float((change - 1).abs().max()))
        if largest_change < TOLERANCE:
            break
    return scales


def _entries(scale_C: torch.Tensor, begin: int, count: int) -> slice:
    return slice(begin, begin + len(scale_C) * count)
