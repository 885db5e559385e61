"""Normalising in tiles and in recycled memory gives what one operation after the other in fresh memory gives."""

import numpy as np
import pytest
import torch

import batches
from batches import MEAN, STD, BatchLoader
from datasets import ImageRows, Split


def split_of(count: int, size: int) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    rows = np.arange(count)
    return Split("train", rows % 2, {}, rows, ImageRows(images, rows))


def plainly(images_NHWC: np.ndarray) -> torch.Tensor:
    """(x - 255 mean) * (1 / (255 std)), each operation on the whole batch."""
    mean, inverse_std = 255 * torch.tensor(MEAN), 1 / (255 * torch.tensor(STD))
    return ((torch.from_numpy(images_NHWC).float() - mean) * inverse_std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recycle", [False, True])
@pytest.mark.parametrize("tile", [1, 1000, 1 << 20])
@pytest.mark.parametrize("strip", [1, 1 << 12])
def test_tiles_threads_and_recycling_change_no_bit(monkeypatch, channels_last, recycle, tile, strip):
    monkeypatch.setattr(batches, "TILE_VALUES", tile)
    monkeypatch.setattr(batches, "STRIP_PIXELS", strip)
    split = split_of(11, 13)
    options = {"channels_last": channels_last, "recycle": recycle}
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            seen = 0
            for batch in BatchLoader(split, 4, **options):
                n = len(batch["image"])
                assert torch.equal(batch["image"], plainly(split.gather(np.arange(seen, seen + n))))
                wanted = torch.channels_last if channels_last else torch.contiguous_format
                assert batch["image"].is_contiguous(memory_format=wanted)
                seen += n
            assert seen == 11
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_lie_as_torchs_own_memory_does(channels_last):
    for batch in BatchLoader(split_of(5, 7), 2, channels_last=channels_last):
        n = len(batch["image"])
        own = torch.empty((n, 3, 7, 7), memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert batch["image"].stride() == own.stride() or n == 1
        assert batch["image"].data_ptr() % 64 == own.data_ptr() % 64 == 0


@pytest.mark.parametrize(("height", "width"), [(224, 224), (64, 64), (13, 13), (1, 9000), (48, 5000), (97, 300)])
def test_a_strip_is_whole_rows_of_one_image(height, width):
    pixels = batches._strip(height, width)
    assert pixels % width == 0 and (height * width) % pixels == 0
    assert pixels == width or pixels <= batches.STRIP_PIXELS


def test_brightness_is_each_images_own_in_every_tile(monkeypatch):
    split = split_of(6, 16)
    options = {"brightness": 0.5, "channels_last": True}
    whole, tiled = [], []
    for found, tile, strip in ((whole, 1 << 20, 16 * 16), (tiled, 100, 2 * 16)):
        monkeypatch.setattr(batches, "TILE_VALUES", tile)
        monkeypatch.setattr(batches, "STRIP_PIXELS", strip)
        generator = torch.Generator().manual_seed(3)
        found += [batch["image"] for batch in BatchLoader(split, 3, generator=generator, **options)]
    assert torch.equal(torch.cat(whole), torch.cat(tiled))
    mean, inverse_std = 255 * torch.tensor(MEAN), 1 / (255 * torch.tensor(STD))
    pixels = torch.cat(whole).permute(0, 2, 3, 1) / inverse_std + mean
    original = torch.from_numpy(split.gather(np.arange(6))).float()
    factors = [(pixels[i] / original[i])[(original[i] > 50) & (pixels[i] < 250)] for i in range(6)]
    assert all(float(factor.std()) < 1e-4 for factor in factors)
    assert len({round(float(factor.mean()), 3) for factor in factors}) == 6


def test_recycled_images_last_until_the_next_but_one():
    split = split_of(8, 16)
    loader = iter(BatchLoader(split, 2, recycle=True))
    first, second = next(loader)["image"], next(loader)["image"]
    assert torch.equal(first, plainly(split.gather(np.arange(2))))
    third = next(loader)["image"]
    assert third.data_ptr() == first.data_ptr() != second.data_ptr()
    assert torch.equal(second, plainly(split.gather(np.arange(2, 4))))


def test_without_recycling_every_batch_stays():
    split = split_of(9, 16)
    kept = torch.cat([batch["image"] for batch in BatchLoader(split, 2)])
    assert torch.equal(kept, plainly(split.gather(np.arange(9))))


def test_recycled_batches_serve_inference_and_then_training():
    """Memory of inference mode cannot be trained on: each iteration has its own."""
    loader = BatchLoader(split_of(8, 16), 2, recycle=True)
    layer = torch.nn.Conv2d(3, 2, 3)
    with torch.inference_mode():
        expected = [layer(batch["image"]) for batch in loader]
    for batch, values in zip(loader, expected, strict=True):
        output = layer(batch["image"])
        output.sum().backward()
        assert torch.equal(output, values)
    assert layer.weight.grad is not None
