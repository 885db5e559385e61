"""A network run piece by piece gives what it gives whole."""

import pytest
import torch
from torch import nn

from models import MODELS, build_model
from quantizers import ptq
from quantizers.execution import Walk, image_of, images_within, last_uses, run_segment, segments
from quantizers.modules import QuantizedModel
from quantizers.ptq import ptq_static


def images(n: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(7))


def quantized(name: str) -> QuantizedModel:
    model = build_model(name, 3, 32, seed=3)
    with torch.no_grad():
        model(images(16))
    return ptq_static(model.eval(), images(), weight_bits=4, activation_bits=8)


@pytest.mark.parametrize("name", MODELS)
def test_segments_in_sequence_are_the_network_to_the_bit(name):
    model, x = quantized(name), images()
    pieces = segments(model)
    with torch.no_grad():
        expected, y = model.network(x), x
        for piece in pieces:
            y = run_segment(model.network, piece, y)
    assert torch.equal(y, expected)
    layers = [layer for piece in pieces for layer in piece.layers]
    quantizers = [quantizer for piece in pieces for quantizer in piece.quantizers]
    assert sorted(layers) == sorted(model.layers())
    assert sorted(quantizers) == sorted(model.activation_quantizers())
    assert len(pieces) >= 10


def test_residual_blocks_stay_whole_and_what_lies_between_is_cut():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

        def forward(self, x):
            x = torch.relu(self.a(x))
            x = x + self.c(torch.relu(self.b(x)))
            return self.d(torch.relu(x)).flatten(1)

    model = ptq.attach(Net().eval(), images(), "x", 8, 8, ptq.Recipe())
    assert [piece.layers for piece in segments(model)] == [("a",), ("b", "c"), ("d",)]


@pytest.mark.parametrize("name", ["squeezenet1_1", "vit_small_patch16_224"])
def test_a_walk_gives_every_value_and_forgets_what_nobody_reads(name):
    model, x = quantized(name), images(5)
    walk = Walk(model.network, x, batch_size=2)
    most = 0
    with torch.no_grad(), model.as_float():  # quantized, a batch of another size may round a value the other way
        for node in model.network.graph.nodes:
            walk.run(node)
            if node.op == "output":
                torch.testing.assert_close(walk.value(node), model.network(x), rtol=1e-3, atol=1e-3)
            walk.free(node)
            most = max(most, len(walk.batches[0]))
    assert len(walk.batches) == 3 and most < 20


def test_values_are_freed_at_their_last_use():
    model = quantized("squeezenet1_1")
    nodes = list(model.network.graph.nodes)
    freed = last_uses(nodes)
    for node, sources in freed.items():
        for source in sources:
            assert max(nodes.index(user) for user in source.users) == nodes.index(node)
    assert image_of(nodes).op == "placeholder"
    assert sum(map(len, freed.values())) == sum(bool(node.users) for node in nodes)


def test_images_within_a_memory():
    model, x = quantized("squeezenet1_1"), images(64)
    one = 64 * 15 * 15 * 4  # the first convolution's output, the largest; at its peak two such are alive
    assert 16 <= images_within(model.network, x, 40 * one) <= 40
    assert images_within(model.network, x, 1) == 1 and images_within(model.network, x, 10**12) == 64
