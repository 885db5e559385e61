"""Ranges that look at groups: sizes of groups do not matter, and minimax lowers the worst group's error."""

import numpy as np
import pytest
import torch
from torch import nn

from quantizers import ptq
from quantizers.fair_ranges import observe_groups
from quantizers.groups import GroupedImages


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.layer(x).mean((2, 3))


def grouped(counts: tuple[int, ...], scales: tuple[float, ...], seed: int = 0) -> GroupedImages:
    """Images whose pixels have a group's own spread."""
    generator = torch.Generator().manual_seed(seed)
    parts = [scale * torch.randn(n, 3, 8, 8, generator=generator) for n, scale in zip(counts, scales, strict=True)]
    codes = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return GroupedImages(torch.cat(parts), codes % 2, codes, tuple(map(str, range(len(counts)))))


def statistics(images: GroupedImages, kind: str, observer: str = "mse"):
    quantized = ptq.attach(OneLayer().eval(), images.images, "ptq_static", 4, 4, ptq.Recipe())
    seen = observe_groups(quantized, images, kind, observer)["x"]  # the images themselves
    return seen


@pytest.mark.parametrize("observer", ["percentile", "mse", "entropy", "moving_average"])
def test_weighted_ranges_do_not_depend_on_how_many_images_a_group_has(observer):
    """Ten times the images of one group (each one ten times) change nothing."""
    once = grouped((16, 16), (1.0, 4.0))
    often = torch.cat([torch.arange(16).repeat(10), torch.arange(16, 32)])
    more = GroupedImages(once.images[often], once.labels[often], once.groups[often], once.names)
    one, other = (statistics(images, "weighted", observer) for images in (once, more))
    if observer == "moving_average":  # the same images in another order of terms
        assert other.range(observer, 4, 99.0) == pytest.approx(one.range(observer, 4, 99.0), rel=0.2)
    else:
        assert other.range(observer, 4, 99.0) == pytest.approx(one.range(observer, 4, 99.0), rel=1e-6)
    plain = ptq.attach(OneLayer().eval(), more.images, "ptq_static", 4, 4, ptq.Recipe())
    seen = ptq.observe_activations(plain, more.images, ptq.Recipe())["x"]
    assert seen.range("percentile", 4, 95.0)[1] < 0.8 * statistics(more, "weighted").range("percentile", 4, 95.0)[1]


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_minimax_ranges_lower_the_worst_groups_error(bits, is_symmetric):
    images = grouped((40, 8, 8), (1.0, 5.0, 0.2))
    seen = statistics(images, "minimax")
    low, high = seen.range("mse", bits, 99.9, is_symmetric)
    plain = statistics(images, "weighted").range("mse", bits, 99.9, is_symmetric)
    if not is_symmetric:
        errors, plain_errors = seen.group_errors(bits, low, high), seen.group_errors(bits, *plain)
        assert errors.max() < 0.97 * plain_errors.max()
        grid = [seen.group_errors(bits, a * low, b * high).max() for a in (0.7, 0.9, 1.1, 1.4) for b in (0.7, 0.9, 1.2)]
        assert errors.max() < min(grid) * 1.05  # near it there is nothing better
    else:
        assert low == -high and high != pytest.approx(plain[1], rel=0.01)


def test_group_errors_are_those_of_the_images():
    """The histogram's error of a group is the mean over its images of squared error over energy."""
    images = grouped((20, 5), (1.0, 3.0))
    seen = statistics(images, "minimax")
    low, high, bits = -2.0, 2.5, 4
    scale = (high - low) / 15
    zero_point = round(-low / scale)
    for group, error in enumerate(seen.group_errors(bits, low, high)):
        x = images.images[images.groups == group].double()
        rounded = ((x / scale).round().clamp(-zero_point, 15 - zero_point)) * scale
        relative = ((rounded - x) ** 2).flatten(1).mean(1) / (x**2).flatten(1).mean(1)
        assert error == pytest.approx(float(relative.mean()), rel=0.02)


def test_a_group_alone_is_what_an_ordinary_observer_sees():
    images = grouped((24,), (1.5,))
    for observer in ("minmax", "percentile", "mse", "entropy", "moving_average"):
        plain = ptq.attach(OneLayer().eval(), images.images, "ptq_static", 4, 4, ptq.Recipe())
        seen = ptq.observe_activations(plain, images.images, ptq.Recipe())["x"]
        mine = statistics(images, "weighted", observer).range(observer, 4, 99.0)
        assert mine == pytest.approx(seen.range(observer, 4, 99.0), rel=1e-4)
    assert np.isfinite(mine).all()
