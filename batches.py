"""Batches of a split: gathered from the cached images, then augmented and normalised on the device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, per channel, for pixels in [0, 1]: what pretrained weights expect
STD = (0.229, 0.224, 0.225)
ALIGNMENT = 64  # bytes, of the images of a batch: what torch's own memory has
STRIP_PIXELS = 4096  # side by side at most: means and deviations are repeated so many times, 96 kB of both
TILE_VALUES = 3 << 15  # normalised at a time, by one thread: they stay in a core's cache between the operations


class BatchLoader:
    """Iterate over a split as `{"image": (n, 3, H, W) float32, "label": (n,) int64, "sensitive": {name: (n,) int64},
    "index": (n,) int64}`, all on `device`; images are normalised with MEAN and STD.

    Without `shuffle` the order is the split's. Augmentation: `flip` mirrors half of the images, `shift` moves each by
    up to so many pixels along both axes (the edge is repeated), `brightness` scales its pixels by a factor in 1 ±
    brightness. Everything random is drawn from `generator` when an iteration starts, on its device, one draw a sample
    in split order: what happens to a sample in an epoch depends neither on the batch size nor on the device of the
    batches. `drop_last` leaves a last, smaller batch out; `channels_last` chooses the memory format of the images.

    With `recycle` the images of a batch on the CPU are valid until the next but one is asked for, in whose memory that
    one is then: fresh memory costs a page fault for every 4 kB, more than normalising. It is for loops that keep
    nothing of the images, such as `predict`.
    """

    def __init__(
        self,
        split,
        batch_size: int,
        *,
        device: str | torch.device = "cpu",
        shuffle: bool = False,
        generator: torch.Generator | None = None,
        flip: bool = False,
        shift: int = 0,
        brightness: float = 0.0,
        drop_last: bool = False,
        channels_last: bool = False,
        recycle: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if shift < 0 or not 0 <= brightness < 1:
            raise ValueError(
                f"shift must not be negative and brightness must lie in [0, 1), got {shift} and {brightness}"
            )
        self.is_augmented = bool(flip or shift or brightness)
        if generator is None and (shuffle or self.is_augmented):
            raise ValueError("shuffling and augmentation need a generator: every random choice has a seed of its own")
        self.split = split
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.generator = generator
        self.flip = flip
        self.shift = shift
        self.brightness = brightness
        self.drop_last = drop_last
        self.recycle = recycle
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._mean = 255 * torch.tensor(MEAN, device=self.device).view(1, 3, 1, 1)
        self._inverse_std = 1 / (255 * torch.tensor(STD, device=self.device).view(1, 3, 1, 1))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def annotations(self) -> list[dict]:
        """Labels and sensitive attributes of the whole split, without images, in one batch."""
        return [
            {
                "label": torch.from_numpy(self.split.labels),
                "sensitive": {name: torch.from_numpy(values) for name, values in self.split.sensitive.items()},
            }
        ]

    def __iter__(self) -> Iterator[dict]:
        count = len(self.split)
        order = self._randperm(count) if self.shuffle else np.arange(count)
        draws = self._draw(count) if self.is_augmented else None
        buffers: list[torch.Tensor | None] = [None, None]  # of this iteration: another may be in inference mode
        pixels = None  # read into the same memory batch after batch; nobody gets it
        with _other_threads(self.device) as pool:
            for batch in range(len(self)):
                positions = order[batch * self.batch_size : (batch + 1) * self.batch_size]
                if pixels is None:
                    gathered = pixels = self.split.gather(positions)
                else:
                    gathered = self.split.gather(positions, pixels[: len(positions)])
                images_NHWC = torch.from_numpy(gathered).to(self.device)
                factor = None
                if draws is not None:
                    at = torch.from_numpy(positions)
                    flip, down, right, factor = (draw[at].to(self.device) for draw in draws)
                    images_NHWC = move_images(images_NHWC, flip, down, right)
                reused = buffers[batch % 2] if self.recycle else None
                images = self._normalise(images_NHWC, factor if self.brightness else None, reused, pool)
                if self.recycle and reused is None:
                    buffers[batch % 2] = images
                yield {
                    "image": images,
                    "label": torch.from_numpy(self.split.labels[positions]).to(self.device),
                    "sensitive": {
                        name: torch.from_numpy(values[positions]).to(self.device)
                        for name, values in self.split.sensitive.items()
                    },
                    "index": torch.from_numpy(self.split.index[positions]).to(self.device),
                }

    def _randperm(self, count: int) -> np.ndarray:
        return torch.randperm(count, generator=self.generator, device=self.generator.device).cpu().numpy()

    def _draw(self, count: int) -> tuple[torch.Tensor, ...]:
        """Per sample: is it mirrored, how far down and right does it move, what scales its pixels."""
        options = {"generator": self.generator, "device": self.generator.device}
        flip = torch.rand(count, **options) < 0.5 if self.flip else torch.zeros(count, dtype=torch.bool)
        down = torch.randint(-self.shift, self.shift + 1, (count,), **options)
        right = torch.randint(-self.shift, self.shift + 1, (count,), **options)
        factor = 1 + self.brightness * (2 * torch.rand(count, **options) - 1)
        return flip.cpu(), down.cpu(), right.cpu(), factor.cpu()

    def _new(self, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Uninitialised float32 in the memory format. On the CPU it is NumPy's memory, which asks the kernel for huge
        pages (torch's does not): a page fault for 2 MB instead of one for 4 kB."""
        if self.device.type != "cpu":
            return torch.empty(shape, device=self.device, memory_format=self.memory_format)
        memory = np.empty(math.prod(shape) + ALIGNMENT // 4, np.float32)
        first = -memory.ctypes.data % ALIGNMENT // 4
        values = torch.from_numpy(memory[first : first + math.prod(shape)])
        if self.memory_format is torch.channels_last:
            n, channels, height, width = shape
            return values.view(n, height, width, channels).permute(0, 3, 1, 2)
        return values.view(shape)

    def _normalise(
        self,
        images_NHWC: torch.Tensor,
        factor: torch.Tensor | None,
        out: torch.Tensor | None,
        pool: ThreadPoolExecutor | None,
    ) -> torch.Tensor:
        """(n, 3, H, W) float32; in the first n places of `out` where that is given."""
        n, height, width, channels = images_NHWC.shape
        if out is None:
            out = self._new((n, channels, height, width))
        out = out[:n]
        if self.memory_format is torch.channels_last:
            # Many pixels of interleaved channels at once: an innermost axis of 3 would not be vectorised.
            pixels = _strip(height, width)
            shape = (n * height * width // pixels, pixels * channels)
            source, target = images_NHWC.reshape(shape), out.permute(0, 2, 3, 1).view(shape)
            mean, inverse_std = self._mean.view(-1).repeat(pixels), self._inverse_std.view(-1).repeat(pixels)
            factor = None if factor is None else factor.repeat_interleave(height * width // pixels)[:, None]
        else:
            source, target = images_NHWC.permute(0, 3, 1, 2), out
            mean, inverse_std = self._mean, self._inverse_std
            factor = None if factor is None else factor[:, None, None, None]

        if self.device.type != "cpu":
            values = target.copy_(source.contiguous())
            if factor is not None:
                values.mul_(factor).clamp_(max=255)
            values.sub_(mean).mul_(inverse_std)
            return out
        # The same with NumPy, whose calls cost a fifth of torch's, and which starts no threads of its own in ours.
        pixels_M, values_M, mean, inverse_std = source.numpy(), target.numpy(), mean.numpy(), inverse_std.numpy()
        factors = None if factor is None else factor.numpy()

        def normalise(tile: slice) -> None:
            values = values_M[tile]
            np.copyto(values, np.ascontiguousarray(pixels_M[tile]))  # transposed as bytes: four times less to move
            if factors is not None:
                np.multiply(values, factors[tile], out=values)
                np.minimum(values, 255, out=values)
            np.subtract(values, mean, out=values)
            np.multiply(values, inverse_std, out=values)

        _in_tiles(normalise, len(target), max(1, TILE_VALUES // target[0].numel()), pool)
        return out


def _strip(height: int, width: int) -> int:
    """Pixels of as many whole rows of an image as are normalised at once: a divisor of its height, so that each strip
    belongs to one image. Short ones cost more in NumPy's own loop than in arithmetic."""
    rows = [rows for rows in range(1, height + 1) if height % rows == 0 and rows * width <= STRIP_PIXELS]
    return width * max(rows, default=1)


@contextlib.contextmanager
def _other_threads(device: torch.device) -> Iterator[ThreadPoolExecutor | None]:
    """One less than torch has, for as long as an iteration takes; None where the caller's own is all there is."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield None
        return
    with ThreadPoolExecutor(torch.get_num_threads() - 1) as pool:
        yield pool


def _in_tiles(work: Callable[[slice], None], count: int, size: int, pool: ThreadPoolExecutor | None) -> None:
    """`work` on slices of 0 … count of this size, by this thread and those of `pool`: whoever is free takes the next,
    and none waits for the others after every operation."""
    starts = iter(range(0, count, size))

    def run() -> None:
        for start in starts:
            work(slice(start, min(start + size, count)))

    others = [] if pool is None else [pool.submit(run) for _ in range(torch.get_num_threads() - 1)]
    run()
    for other in others:
        other.result()


def move_images(images_NHWC: torch.Tensor, flip: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Mirror the images where `flip`, then move each `down` and `right` by whole pixels, repeating the edge."""
    n, height, width, channels = images_NHWC.shape
    rows = torch.arange(height, device=images_NHWC.device) - down[:, None]
    rows = rows.clamp_(0, height - 1) + height * torch.arange(n, device=images_NHWC.device)[:, None]
    columns = (torch.arange(width, device=images_NHWC.device) - right[:, None]).clamp_(0, width - 1)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    # Rows are copied whole; only then are pixels gathered, along the innermost axis.
    moved = images_NHWC.reshape(n * height, width * channels).index_select(0, rows.reshape(-1))
    moved_NCHW = moved.view(n, height, width, channels).permute(0, 3, 1, 2).contiguous()
    columns = columns[:, None, None, :].expand(n, channels, height, width)
    return moved_NCHW.gather(3, columns).permute(0, 2, 3, 1)
