"""Calibration: which images set the activation ranges, and setting them.

The images pass once through the float network, its quantizers only watching: see quantizers.observers.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch

from evaluation import as_batch, device_of, eval_mode
from quantizers.modules import ActivationQuantizer, QuantizedModel
from quantizers.numerics import FLOAT_BITS, QuantizationError, QuantizationWarning
from quantizers.observers import HISTOGRAM_OBSERVERS, ActivationStatistics

CALIBRATION_BATCH = 64

Statistics = dict[str, ActivationStatistics]  # by the name of the quantizer
Source = Callable[[QuantizedModel, torch.Tensor, Callable[[], Statistics]], Statistics]


def gather_images(
    loader: Iterable, samples: int, with_labels: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The first `samples` images of a loader, (n, 3, H, W) with n <= samples, and their labels (n,) where asked for.
    QuantizationError if there is none, a QuantizationWarning if there are fewer than `samples`."""
    images, labels, count = [], [], 0
    for batch in map(as_batch, loader):
        images.append(torch.as_tensor(batch["image"])[: samples - count])
        labels.append(torch.as_tensor(batch["label"])[: samples - count])
        count += len(images[-1])
        if count >= samples:
            break
    if not count:
        raise QuantizationError("calibration_data is empty: give at least one batch of images")
    if count < samples:
        warnings.warn(
            f"calibration_data holds {count} images, fewer than the {samples} of calibration_samples: all are used",
            QuantizationWarning,
            stacklevel=2,
        )
    return (torch.cat(images), torch.cat(labels)) if with_labels else torch.cat(images)


def check_images(images: torch.Tensor) -> None:
    """QuantizationError for images that ranges cannot be taken from: none, not finite, constant, or all the same."""
    if not len(images):
        raise QuantizationError("calibration_data is empty: give at least one batch of images")
    bad_N = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bool(bad_N.any()):
        first = int(bad_N.nonzero()[0])
        raise QuantizationError(
            f"calibration_data: image {first} has values that are not finite ({int(bad_N.sum())} of {len(images)} have)"
        )
    if bool((images == images.flatten()[0]).all()):
        raise QuantizationError(f"calibration_data: every pixel is {float(images.flatten()[0]):g}; give real images")
    if len(images) > 1 and bool((images == images[:1]).all()):
        raise QuantizationError(f"calibration_data: all {len(images)} images are the same; ranges need different ones")


def observe(model: QuantizedModel, images: torch.Tensor, with_histogram: bool = True) -> Statistics:
    """What every static activation quantizer sees of `images` (n, 3, H, W) in the float model, in one pass. They depend
    neither on the quantizers' widths nor, with the histogram, on the observer that reads them.

    QuantizationError where a quantizer sees nothing, or values that are not finite.
    """
    if _source is not None:
        return _source(model, images, lambda: _pass(model, images, with_histogram=True))
    return _pass(model, images, with_histogram)


@contextlib.contextmanager
def observing_through(source: Source) -> Iterator[None]:
    """Meanwhile what `observe` gives is what `source(model, images, look)` gives, which may know it already; `look()`
    makes the pass."""
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before


_source: Source | None = None


def _pass(model: QuantizedModel, images: torch.Tensor, with_histogram: bool) -> Statistics:
    statistics = {
        name: ActivationStatistics(name, with_histogram)
        for name, quantizer in model.activation_quantizers().items()
        if isinstance(quantizer, ActivationQuantizer)
    }
    device = device_of(model)
    observers = {name: seen.observe for name, seen in statistics.items()}
    with torch.inference_mode(), eval_mode(model), model.as_float(), model.observing(observers):
        for batch in images.split(CALIBRATION_BATCH):
            model(batch.to(device, copy=True))  # a model may write into its input
    for seen in statistics.values():
        seen.bounds()
    return statistics


def set_ranges(model: QuantizedModel, statistics: Statistics, observer: str, percentile: float) -> None:
    """Give every static activation quantizer the range that `observer` chooses for its width."""
    quantizers = model.activation_quantizers()
    for name, seen in statistics.items():
        quantizer = quantizers[name]
        if quantizer.bits < FLOAT_BITS:
            quantizer.set_range(*seen.range(observer, quantizer.bits, percentile, quantizer.is_symmetric))


def calibrate(model: QuantizedModel, images: torch.Tensor, observer: str, percentile: float) -> Statistics:
    """`observe`, then `set_ranges`."""
    statistics = observe(model, images, observer in HISTOGRAM_OBSERVERS)
    set_ranges(model, statistics, observer, percentile)
    return statistics
