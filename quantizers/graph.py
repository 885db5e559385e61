"""Where quantizers stand: a model is traced, simplified and given quantizers at the inputs of what integer engines run.

Found from the traced graph (torch.fx), never from lists of layer names:

- convolutions and linear layers: integer weights, and a quantizer on their input;
- products of two activations (attention), for hardware that has integer ones: a quantizer on either factor. Elsewhere
  attention stays in float, where engines compute it in one piece, faster than two integer products with a softmax
  between;
- sums of two activations (residual additions) that one of these reads: a quantizer on either term. A sum that only
  norms and other float operations read (the residual stream of a pre-norm transformer) stays in float: an engine would
  compute it there;
- averages over an image (global pooling) of what a layer or such a sum gives, past a ReLU at most: a quantizer on their
  input, without which the layer before would have no integer output.

BatchNorm is folded into the layer before it first, and fused attention is written out where its products are quantized,
so that what is simulated is what an integer engine runs. A tensor that feeds several of these has one quantizer. What
stays in float (norms, softmax, GELU and SiLU, gates, embeddings added to activations) is listed in the `Placement`.

A submodule whose code torch.fx cannot trace (control flow on values) is kept as one opaque node; the convolutions and
linear layers inside still get integer weights and quantized inputs.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from quantizers.modules import QuantizedInputLayer, QuantizedLayer
from quantizers.numerics import INT8_RANGE, QuantizationError

ACTIVATION, CONSTANT, SHAPE = "activation", "constant", "shape"
MATMULS = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__"}
ADDITIONS = {torch.add, operator.add, operator.iadd, "add", "add_", "__add__"}
AVERAGES = {F.adaptive_avg_pool2d, F.avg_pool2d}
MEANS = {torch.mean, "mean"}  # averages where they are over height and width
SPATIAL = ({2, 3}, {-2, -1})
AVERAGE_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod"}
SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad", "itemsize", "nbytes"}
SHAPE_METHODS = {"size", "dim", "numel", "ndimension", "element_size"}
TRANSPARENT_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
RECTIFIER_MODULES = (nn.ReLU, nn.ReLU6)
RECTIFIERS = {F.relu, F.relu_, torch.relu, torch.relu_, F.relu6, "relu", "relu_"}
# what hands values on: each value of the result is one of the operands'
MOVING_MODULES = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.ChannelShuffle)
MOVING = {
    torch.cat, torch.concat, torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
    torch.unsqueeze, F.max_pool2d, operator.getitem, torch.chunk, torch.split, "view", "reshape", "flatten", "permute",
    "transpose", "contiguous", "chunk", "split", "squeeze", "unsqueeze", "expand",
}  # fmt: skip
SILENT = {"placeholder", "output", "get_attr"}

# whether it belongs to the first or last layer of the model is the last argument of both
NewQuantizer = Callable[[str, bool], nn.Module]  # (name, …)
NewLayer = Callable[[str, nn.Module, bool], QuantizedLayer]  # (name, layer, …)


@dataclass
class Placement:
    """What a quantized model runs in integers and what in float, by name of the graph's nodes."""

    layers: list[str] = field(default_factory=list)  # convolutions and linear layers
    matmuls: list[str] = field(default_factory=list)
    additions: list[str] = field(default_factory=list)
    activation_quantizers: list[str] = field(default_factory=list)
    folded_norms: list[str] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)  # submodule -> why it could not be traced
    float_operations: Counter = field(default_factory=Counter)  # operation -> how often
    float_layers: list[str] = field(default_factory=list)  # layers with weights that stayed in float

    def summary(self) -> dict[str, Any]:
        return {
            "layers": len(self.layers),
            "matmuls": len(self.matmuls),
            "additions": len(self.additions),
            "activation_quantizers": len(self.activation_quantizers),
            "folded_norms": len(self.folded_norms),
            "opaque": dict(self.opaque),
            "float_operations": dict(sorted(self.float_operations.items())),
            "float_layers": list(self.float_layers),
        }


def prepare(
    model: nn.Module,
    weight_bits: int,
    new_quantizer: NewQuantizer,
    first_last_bits: int | None = None,
    *,
    weight_granularity: str = "per_channel",
    int8_range: tuple[int, int] = INT8_RANGE,
    has_integer_products: bool = False,
    equalize: Callable[[fx.GraphModule], Any] | None = None,
) -> tuple[nn.Module, Placement]:
    """A copy of `model`, in eval mode, with quantizers in place, not yet calibrated; the model is not changed.

    `new_quantizer(name, is_edge)` makes the quantizer of one activation; `is_edge` is true at the input of the first
    and of the last layer, whose weights get `first_last_bits` where that is given. `int8_range` is that of
    8-bit weights; `has_integer_products` quantizes both factors of products of two activations. `equalize` is shown the
    traced network, its norms folded, before quantizers are inserted.
    """
    try:
        private = copy.deepcopy(model).eval()
    except RuntimeError as error:  # weights that a hook computes are no leaves: pruning, old-style weight_norm
        raise QuantizationError(
            f"the model cannot be copied ({' '.join(str(error).split())[:120]}); remove its reparametrisations first "
            "(torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm)"
        ) from None
    _untie(private)
    network, placement = trace(private, has_integer_products)
    fold_batch_norms(network, placement)
    if equalize is not None:
        equalize(network)

    def new_layer(name: str, layer: nn.Module, is_edge: bool) -> QuantizedLayer:
        bits = first_last_bits if is_edge and first_last_bits is not None else weight_bits
        return QuantizedLayer(name, layer, bits, weight_granularity, int8_range)

    _insert_quantizers(network, placement, new_layer, new_quantizer, has_integer_products)
    if not placement.layers:
        raise QuantizationError("the model has no convolution or linear layer that can be quantized")
    return network, placement


def _untie(model: nn.Module) -> None:
    """Give each layer weights of its own: a norm folded into one must not change the other."""
    seen = set()
    for module in model.modules():
        if is_layer(module):
            for name in ("weight", "bias"):
                parameter = module._parameters.get(name)
                if parameter is not None and id(parameter) in seen:
                    setattr(module, name, nn.Parameter(parameter.detach().clone()))
                seen.add(id(parameter))


# ------------------------------------------------------------------------------------------------------------- tracing


def trace(model: nn.Module, writes_out_attention: bool = False) -> tuple[fx.GraphModule, Placement]:
    """The graph of `model`, with untraceable submodules left whole and dead code removed."""
    placement = Placement()
    root: nn.Module = model
    while True:
        tracer = _Tracer(set(placement.opaque))
        try:
            graph = tracer.trace(root, concrete_args=_default_arguments(root))
            break
        except Exception as error:  # whatever the user's forward raises on a proxy
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            if tracer.failed is None and root is model:
                root = _Whole(model)  # the outermost forward itself: keep all of it as one node
                placement.opaque["model"] = reason
            elif tracer.failed is None or tracer.failed in placement.opaque:
                raise QuantizationError(f"the model cannot be traced: {reason}") from error
            else:
                placement.opaque[tracer.failed] = reason
    network = fx.GraphModule(root, graph)
    if writes_out_attention:
        _write_out_attention(network)
    _follow_in_place(network)
    network.graph.eliminate_dead_code()
    network.recompile()
    return network, placement


def _follow_in_place(network: fx.GraphModule) -> None:
    """Let whoever reads a tensor after it was changed in place read the result, so that quantizers may stand between.

    Additions in place become additions; other operations in place stay what they are.
    """
    modules = dict(network.named_modules())
    position = {node: place for place, node in enumerate(network.graph.nodes)}
    for node in network.graph.nodes:
        if not (node.args and isinstance(node.args[0], fx.Node) and _is_in_place(node, modules)):
            continue
        for user in list(node.args[0].users):
            if position[user] > position[node]:
                user.replace_input_with(node.args[0], node)
        if node.target is operator.iadd:
            node.target = operator.add
        elif node.op == "call_method" and node.target == "add_":
            node.target = "add"


def _is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[node.target], "inplace", False))
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.startswith("_")
    name = getattr(node.target, "__name__", "")
    is_operator = getattr(node.target, "__module__", "") == "_operator" and name in IN_PLACE_OPERATORS
    return node.op == "call_function" and (is_operator or name.endswith("_") or bool(node.kwargs.get("inplace")))


class _Whole(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


class _Tracer(fx.Tracer):
    """Keeps layers, norms and untraceable submodules whole; remembers the innermost module whose code failed."""

    def __init__(self, opaque: set[str] | None = None):  # a copy of the graph is unpickled without
        super().__init__()
        self.opaque = opaque or set()
        self.failed: str | None = None

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        if path in self.opaque or isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)) or is_layer(module):
            return True
        return super().is_leaf_module(module, path)

    def call_module(self, module, forward, args, kwargs):
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(module)
            raise


def _default_arguments(root: nn.Module) -> dict[str, Any]:
    """Every argument of forward but the first, at its default, so that `if mask is None` is decided while tracing."""
    parameters = list(inspect.signature(root.forward).parameters.values())[1:]
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        and parameter.default is not inspect.Parameter.empty
    }


def is_layer(module: nn.Module) -> bool:
    """A convolution or linear layer that uses its weight as it is (not one that reparametrises it in its forward)."""
    if not isinstance(module, (_ConvNd, nn.Linear)):
        return False
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        return False
    if torch.nn.utils.parametrize.is_parametrized(module) or module._parameters.get("weight") is None:
        return False  # its weight is computed anew at each forward pass
    if type(module).__module__.startswith("torch.nn"):
        return True
    # TensorFlow-style padding computes only the padding; the weight is used as it is
    return type(module).__name__ == "Conv2dSame" or type(module).forward in _PLAIN_FORWARDS


_PLAIN_FORWARDS = {nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward}


def _write_out_attention(network: fx.GraphModule) -> None:
    """scaled_dot_product_attention -> (q * scale) @ k^T, softmax, @ v; left as it is with a mask, causal or grouped."""
    graph = network.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.scaled_dot_product_attention:
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if arguments.get("attn_mask") is not None or arguments.get("is_causal") or arguments.get("enable_gqa"):
            continue
        scale = arguments.get("scale")
        with graph.inserting_before(node):
            query = arguments["query"]
            if scale is None:
                width = graph.call_method("size", (query, -1))
                query = graph.call_function(operator.mul, (query, graph.call_function(_inverse_root, (width,))))
            else:
                query = graph.call_function(operator.mul, (query, scale))
            key = graph.call_method("transpose", (arguments["key"], -2, -1))
            product = graph.call_function(torch.matmul, (query, key))
            weights = graph.call_method("softmax", (product,), {"dim": -1})
            result = graph.call_function(torch.matmul, (weights, arguments["value"]))
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _inverse_root(width: int) -> float:
    return 1.0 / math.sqrt(width)


# -------------------------------------------------------------------------------------------------- batch norm folding


def fold_batch_norms(network: fx.GraphModule, placement: Placement) -> None:
    """Fold each BatchNorm that alone reads a layer; of timm's BatchNormAct the activation stays.

    w' = w gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta (Jacob et al. 2018, eq. 14).
    """
    modules = dict(network.named_modules())
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    for node in list(network.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, _BatchNorm) or norm.running_var is None:
            continue
        source = _only_source(node)
        if source is None or source.op != "call_module" or len(source.users) != 1:
            continue
        layer = modules.get(source.target)
        if not is_layer(layer) or calls[source.target] != 1 or calls[node.target] != 1:
            continue
        _fold(layer, norm)
        placement.folded_norms.append(node.target)
        activation = _activation_of(norm)
        if activation is None:
            node.replace_all_uses_with(source)
            network.graph.erase_node(node)
            network.delete_submodule(node.target)
        else:
            _set_module(network, node.target, activation)
    network.recompile()


def _only_source(node: fx.Node) -> fx.Node | None:
    return node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None


def _activation_of(norm: nn.Module) -> nn.Module | None:
    """What a BatchNormAct does after its norm, or None for a plain one. (Its dropout does nothing in eval mode.)"""
    activation = getattr(norm, "act", None)
    return None if activation is None or isinstance(activation, nn.Identity) else activation


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    gain = norm.weight if norm.weight is not None else torch.ones_like(norm.running_var)
    shift = norm.bias if norm.bias is not None else torch.zeros_like(norm.running_mean)
    factor = gain.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    shape = [1] * layer.weight.ndim
    shape[axis] = -1
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(factor)
    folded = (bias - norm.running_mean.double()) * factor + shift.double()
    layer.weight.copy_(layer.weight.double() * factor.reshape(shape))
    layer.bias = nn.Parameter(folded.to(layer.weight.dtype))


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


# ---------------------------------------------------------------------------------------------------------- placement


def _insert_quantizers(
    network: fx.GraphModule,
    placement: Placement,
    new_layer: NewLayer,
    new_quantizer: NewQuantizer,
    has_integer_products: bool,
) -> None:
    modules = dict(network.named_modules())
    kinds = _kinds(network.graph, modules)
    edges = _first_and_last_layers(network.graph, modules, kinds)
    products = {
        node
        for node in network.graph.nodes
        if has_integer_products and node.target in MATMULS and _has_two_activations(node, kinds)
    }
    integer_sums = _integer_additions(network.graph, modules, kinds, products)
    averages = _averages_of_integers(network.graph, modules, kinds, integer_sums)
    quantizers: dict[fx.Node, fx.Node] = {}

    def quantized(source: fx.Node, consumer: fx.Node, is_edge: bool) -> fx.Node:
        """The quantizer on the tensor that reaches `consumer`, made before its first consumer in program order."""
        origin = _origin(source, modules)
        if origin not in quantizers:
            name = origin.name
            path = f"quantizer_{name}"
            network.add_submodule(path, new_quantizer(name, is_edge))
            with network.graph.inserting_before(consumer):
                quantizers[origin] = network.graph.call_module(path, (origin,))
            placement.activation_quantizers.append(name)
        return quantizers[origin]

    for node in list(network.graph.nodes):
        if node.op == "call_module" and is_layer(modules.get(node.target)):
            is_edge = node in edges
            source = node.args[0] if node.args else node.kwargs["input"]
            node.args, node.kwargs = (quantized(source, node, is_edge),), {}
            if node.target not in placement.layers:
                _set_module(network, node.target, new_layer(node.target, modules[node.target], is_edge))
                placement.layers.append(node.target)
        elif node.target in MATMULS or node.target in ADDITIONS:
            operands = node.args[:2]
            if node in integer_sums or node in products:
                (placement.matmuls if node in products else placement.additions).append(node.name)
                node.args = (*(quantized(operand, node, False) for operand in operands), *node.args[2:])
                continue
            if kinds[node] == ACTIVATION:
                placement.float_operations[_operation(node, modules)] += 1
        elif node.op == "call_module" and node.target in placement.opaque:
            _quantize_inside(modules[node.target], node.target, placement, new_layer, new_quantizer)
        elif node.op not in SILENT and kinds[node] == ACTIVATION:
            if any(True for _ in _weights_of(modules.get(node.target))) and node.op == "call_module":
                placement.float_layers.append(node.target)
            if node in averages:
                node.args = (quantized(node.args[0], node, False), *node.args[1:])
            if not isinstance(modules.get(node.target), TRANSPARENT_MODULES):
                placement.float_operations[_operation(node, modules)] += 1
    for node in network.graph.nodes:  # such as x.to(self.conv.weight.dtype)
        owner, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and owner in placement.layers:
            node.target = f"{owner}.layer.{name}"
    for node in list(network.graph.nodes):
        if _origin(node, modules) is not node:
            node.replace_all_uses_with(_origin(node, modules))
            network.graph.erase_node(node)
    network.graph.lint()
    network.recompile()


def _has_two_activations(node: fx.Node, kinds: dict[fx.Node, str]) -> bool:
    operands = node.args[:2] if node.op in ("call_function", "call_method") else ()
    return len(operands) == 2 and all(isinstance(o, fx.Node) and kinds[o] == ACTIVATION for o in operands)


def _integer_additions(
    graph: fx.Graph, modules: dict[str, nn.Module], kinds: dict[fx.Node, str], products: set[fx.Node]
) -> set[fx.Node]:
    """The sums of two activations whose result a layer, a product, an average or another such sum reads, past what
    rectifies or moves values."""
    found: set[fx.Node] = set()
    reaches: dict[fx.Node, bool] = {}  # does an integer operation read this node's value?
    for node in reversed(list(graph.nodes)):
        reaches[node] = any(
            _is_call_of_layer(user, modules)
            or user in products
            or is_average(user, modules)
            or user in found
            or (hands_values_on(user, modules) and reaches[user])
            for user in node.users
        )
        if node.target in ADDITIONS and _has_two_activations(node, kinds) and reaches[node]:
            found.add(node)
    return found


def _averages_of_integers(
    graph: fx.Graph, modules: dict[str, nn.Module], kinds: dict[fx.Node, str], integer_sums: set[fx.Node]
) -> set[fx.Node]:
    """The averages that alone read what a layer or an integer addition gives, past rectifiers."""
    found = set()
    for node in graph.nodes:
        if not is_average(node, modules) or not node.args or kinds[node] != ACTIVATION:
            continue
        source = node.args[0]
        while len(source.users) == 1 and (is_rectifier(source, modules) or _origin(source, modules) is not source):
            source = source.args[0]
        if len(source.users) == 1 and (_is_call_of_layer(source, modules) or source in integer_sums):
            found.add(node)
    return found


def _is_call_of_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and is_layer(modules.get(node.target))


def is_average(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """An average over height and width."""
    if node.op == "call_module":
        return isinstance(modules.get(node.target), AVERAGE_MODULES)
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in MEANS:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, (tuple, list)) and set(dims) in SPATIAL
    return node.target in AVERAGES


def is_rectifier(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """ReLU or ReLU6, which integer engines compute with the quantizer behind it."""
    if node.op == "call_module":
        return isinstance(modules.get(node.target), RECTIFIER_MODULES)
    return node.op in ("call_function", "call_method") and node.target in RECTIFIERS


def hands_values_on(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a quantizer behind the node may stand before it: it rectifies, or each value of it is an operand's."""
    if is_rectifier(node, modules):
        return True
    if node.op == "call_module":
        return isinstance(modules.get(node.target), (*TRANSPARENT_MODULES, *MOVING_MODULES))
    return node.op in ("call_function", "call_method") and node.target in MOVING


def _weights_of(module: nn.Module | None):
    """Matrices and kernels that a leaf module holds (norms have vectors only)."""
    return (p for p in module.parameters() if p.ndim > 1) if module is not None else iter(())


def _quantize_inside(
    opaque: nn.Module, path: str, placement: Placement, new_layer: NewLayer, new_quantizer: NewQuantizer
) -> None:
    """Integer weights and quantized inputs for the layers of a submodule that could not be traced."""
    for child_path, child in list(opaque.named_modules()):
        for name, layer in list(child.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                # it reads its layers' weights without calling them
                placement.float_layers.append(f"{path}.{child_path}.{name}".replace("..", "."))
            elif is_layer(layer):
                full = ".".join(part for part in (path, child_path, name) if part)
                quantizer = new_quantizer(f"{full}.input", False)
                setattr(child, name, QuantizedInputLayer(quantizer, new_layer(full, layer, False)))
                placement.layers.append(full)
                placement.activation_quantizers.append(f"{full}.input")


def _origin(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """The node whose value this is, past what does nothing in eval mode."""
    while node.op == "call_module" and isinstance(modules.get(node.target), TRANSPARENT_MODULES):
        node = node.args[0]
    return node


def _kinds(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, str]:
    """Whether each node carries data of the input, a constant of the model, or a size."""
    kinds: dict[fx.Node, str] = {}
    for node in graph.nodes:
        inputs = {kinds[source] for source in node.all_input_nodes}
        if node.op == "placeholder":
            kinds[node] = ACTIVATION
        elif node.op == "get_attr":
            kinds[node] = CONSTANT
        elif (node.op == "call_method" and node.target in SHAPE_METHODS) or (
            node.op == "call_function"
            and (node.target in (len, _inverse_root) or (node.target is getattr and node.args[1] in SHAPE_ATTRIBUTES))
        ):
            kinds[node] = SHAPE
        elif ACTIVATION in inputs:
            kinds[node] = ACTIVATION
        else:
            kinds[node] = CONSTANT if CONSTANT in inputs else SHAPE
    return kinds


def _first_and_last_layers(graph: fx.Graph, modules: dict[str, nn.Module], kinds: dict[fx.Node, str]) -> set[fx.Node]:
    """The layers that read the image and those whose output reaches the logits without another layer between."""

    found: set[fx.Node] = set()
    for start, step in (
        ([node for node in graph.nodes if node.op == "placeholder"], lambda node: list(node.users)),
        ([node for node in graph.nodes if node.op == "output"], lambda node: node.all_input_nodes),
    ):
        seen, stack = set(start), list(start)
        while stack:
            for node in step(stack.pop()):
                if node in seen or kinds[node] != ACTIVATION:
                    continue
                seen.add(node)
                if _is_call_of_layer(node, modules):
                    found.add(node)
                else:
                    stack.append(node)
    return found


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return type(modules[node.target]).__name__
    return node.target if isinstance(node.target, str) else node.target.__name__
