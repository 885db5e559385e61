"""Running a traced network piece by piece: what bias correction, reconstruction and sensitivity are built on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from quantizers.graph import ADDITIONS, is_rectifier
from quantizers.modules import QuantizedModel

Values = dict[fx.Node, Any]  # what nodes gave

WALK_BATCH = 32  # images that go through a node at a time
WALK_MEMORY = 1 << 30  # bytes of activations that a walk over the calibration images keeps at most


def run_node(network: fx.GraphModule, node: fx.Node, values: Values) -> Any:
    """The value of one node from those of the nodes before it."""
    if node.op == "placeholder":  # an argument beside the images, at its default
        return node.args[0]
    if node.op == "get_attr":
        value: Any = network
        for part in node.target.split("."):
            value = getattr(value, part)
        return value
    args = fx.node.map_arg(node.args, values.__getitem__)
    if node.op == "output":
        return args[0]
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return network.get_submodule(node.target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def last_uses(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nothing behind it among `nodes` reads: what can be freed after it."""
    seen: set[fx.Node] = set()
    freed: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(list(nodes)):
        freed[node] = [source for source in node.all_input_nodes if source not in seen]
        seen.update(freed[node])
    return freed


class Walk:
    """Images on their way through the network, node by node: what is still to be read is kept, in batches."""

    def __init__(self, network: fx.GraphModule, images: torch.Tensor, batch_size: int = WALK_BATCH):
        self.network = network
        self.batch_size = batch_size
        self.current = 0  # the batch that is being run
        self.freed = last_uses(network.graph.nodes)
        self.batches: list[Values] = [{} for _ in range(-(-len(images) // batch_size))]
        for values, batch in zip(self.batches, images.split(batch_size), strict=True):
            values[image_of(network.graph.nodes)] = batch

    def run(self, node: fx.Node) -> None:
        """The node's value for every batch; what stood for it before is replaced."""
        for place, values in enumerate(self.batches):
            self.current = place
            if not (node.op == "placeholder" and node in values):
                values[node] = run_node(self.network, node, values)

    def free(self, node: fx.Node) -> None:
        """Forget what nobody reads after the node."""
        for values in self.batches:
            for source in self.freed[node]:
                del values[source]

    def value(self, node: fx.Node) -> torch.Tensor:
        """A tensor of all images, (n, …)."""
        return torch.cat([values[node] for values in self.batches])


@dataclass(frozen=True)
class Segment:
    """A piece of the network that reads one tensor of those before it, `source`, and gives one, `result`."""

    nodes: tuple[fx.Node, ...]  # in program order, with the constants that they read
    source: fx.Node
    result: fx.Node
    layers: tuple[str, ...]  # QuantizedLayers inside, by name
    quantizers: tuple[str, ...]


def segments(model: QuantizedModel) -> list[Segment]:
    """The network cut wherever one activation alone is alive and a quantizer reads it, or it is the sum that ends a
    residual block: blocks stay whole, as in BRECQ (Li et al., ICLR 2021), what lies between is cut layer by layer. The
    whole of it, in program order."""
    network = model.network
    nodes = list(network.graph.nodes)
    modules = dict(network.named_modules())
    names = {id(module): name for name, module in model.activation_quantizers().items()}
    layer_names = {id(module): name for name, module in model.layers().items()}
    moving = _moving(nodes)
    freed = last_uses(nodes)
    alive: set[fx.Node] = set()
    pieces: list[list[fx.Node]] = [[]]
    sources: list[fx.Node] = []
    for node in nodes:
        if node not in moving:
            continue
        if node.op == "placeholder":
            alive.add(node)
            sources.append(node)
            continue
        pieces[-1].append(node)
        alive.update((node,) if node.users else ())
        alive.difference_update(freed[node])
        (cut,) = alive if len(alive) == 1 else (None,)
        readers = cut.users if cut is not None else ()
        is_end = cut is not None and cut.target in ADDITIONS and len(cut.all_input_nodes) == 2
        is_end = is_end and cut.users and not any(is_rectifier(reader, modules) for reader in readers)
        if is_end or any(r.op == "call_module" and id(modules.get(r.target)) in names for r in readers):
            pieces.append([])
            sources.append(cut)
    results = [*sources[1:], nodes[-1]]
    found = []
    for piece, source, result in zip(pieces, sources, results, strict=True):
        inside = [m for node in piece if node.op == "call_module" for m in modules[node.target].modules()]
        found.append(
            Segment(
                (*_constants(piece, moving, nodes), *piece),
                source,
                result,
                tuple(dict.fromkeys(layer_names[id(m)] for m in inside if id(m) in layer_names)),
                tuple(dict.fromkeys(names[id(m)] for m in inside if id(m) in names)),
            )
        )
    return found


def _moving(nodes: list[fx.Node]) -> set[fx.Node]:
    """The nodes whose value depends on the images, their sizes included."""
    moving: set[fx.Node] = {image_of(nodes)}
    for node in nodes:
        if node.op == "output" or any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    return moving


def image_of(nodes: Iterable[fx.Node]) -> fx.Node:
    """The placeholder of the images: the first."""
    return next(node for node in nodes if node.op == "placeholder")


def _constants(piece: list[fx.Node], moving: set[fx.Node], nodes: list[fx.Node]) -> list[fx.Node]:
    """The nodes beside the input that a piece reads, and those that they read, in program order."""
    needed: set[fx.Node] = set()
    stack = list(piece)
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in moving and source not in needed:
                needed.add(source)
                stack.append(source)
    return [node for node in nodes if node in needed]


def run_segment(network: fx.GraphModule, segment: Segment, x: torch.Tensor) -> torch.Tensor:
    """The segment's result for the value x of its source."""
    values: Values = {segment.source: x}
    freed = last_uses(segment.nodes)
    for node in segment.nodes:
        values[node] = run_node(network, node, values)
        for source in freed[node]:
            if source is not segment.result:
                values.pop(source, None)
    return values[segment.result]


def images_within(network: fx.GraphModule, images: torch.Tensor, memory_bytes: int) -> int:
    """How many images' live activations fit into `memory_bytes` while the network is walked; at least 1."""
    nodes = list(network.graph.nodes)
    freed = last_uses(nodes)
    values: Values = {}
    peak = 0
    with torch.inference_mode():
        for node in nodes:
            values[node] = images[:1] if node is image_of(nodes) else run_node(network, node, values)
            peak = max(peak, _bytes(values))
            for source in freed[node]:
                del values[source]
    return max(1, min(len(images), memory_bytes // max(1, peak)))


def _bytes(values: Values) -> int:
    tensors = {id(value): value for value in values.values() if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
