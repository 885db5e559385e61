"""Calibration: which images set the activation ranges, and setting them.

The images pass twice through the float network (its quantizers only watch): once for the extremes of every activation,
once for its histogram, unless the observer needs only the extremes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evaluation import as_batch, device_of, eval_mode
from quantizers.modules import ActivationQuantizer, QuantizedModel
from quantizers.numerics import QuantizationError
from quantizers.observers import ActivationStatistics

CALIBRATION_BATCH = 64


def gather_images(loader: Iterable, samples: int) -> torch.Tensor:
    """The first `samples` images of a loader, (n, 3, H, W) with n <= samples. QuantizationError if there is none."""
    images, count = [], 0
    for batch in map(as_batch, loader):
        image = torch.as_tensor(batch["image"])[: samples - count]
        images.append(image)
        count += len(image)
        if count >= samples:
            break
    if not count:
        raise QuantizationError("calibration_data is empty: give at least one batch of images")
    return torch.cat(images)


def gather_balanced_images(
    loader: Iterable, samples: int, generator: np.random.Generator, attributes: Sequence[str] | None = None
) -> tuple[torch.Tensor, dict[tuple[int, ...], int]]:
    """`samples` images in which every group of the sensitive `attributes` (None: all) has the same number, ±1.

    One pass over the loader; a reservoir sample of each group (Vitter 1985), shrunk as further groups appear, keeps the
    memory at about `samples` images. A group with fewer images than its share is drawn from with replacement. Returns
    the images and how many distinct ones each group gave. QuantizationError where the loader carries no sensitive
    attributes.
    """
    kept: dict[tuple[int, ...], list[torch.Tensor]] = {}
    seen: dict[tuple[int, ...], int] = {}
    for batch in map(as_batch, loader):
        codes = _group_codes(batch["sensitive"], attributes)
        for image, code in zip(torch.as_tensor(batch["image"]), codes, strict=True):
            group = kept.setdefault(code, [])
            seen[code] = seen.get(code, 0) + 1
            share = -(-samples // len(kept))
            if len(group) < share:
                group.append(image.clone())
            else:
                place = int(generator.integers(seen[code]))
                if place < share:
                    group[place] = image.clone()
    if not kept:
        raise QuantizationError("calibration_data is empty: give at least one batch of images")
    if samples < len(kept):
        raise QuantizationError(
            f"{samples} calibration images cannot hold {len(kept)} groups: raise calibration_samples"
        )
    shares = [samples // len(kept) + (rank < samples % len(kept)) for rank in range(len(kept))]
    chosen, distinct = [], {}
    for share, code in zip(shares, sorted(kept), strict=True):
        group = kept[code]
        if len(group) >= share:
            picks = generator.choice(len(group), share, replace=False)
        else:  # every image of the group once, then again at random
            picks = np.concatenate([np.arange(len(group)), generator.integers(len(group), size=share - len(group))])
        chosen += [group[int(pick)] for pick in picks]
        distinct[code] = min(share, len(group))
    return torch.stack(chosen), distinct


def _group_codes(sensitive: Mapping[str, Any], attributes: Sequence[str] | None) -> list[tuple[int, ...]]:
    names = list(sensitive) if attributes is None else list(attributes)
    missing = [name for name in names if name not in sensitive]
    if missing or not names:
        has = ", ".join(sensitive) or "none"
        wanted = missing[0] if missing else "any"
        raise QuantizationError(
            f"calibration_data has no sensitive attribute {wanted!r} (it has: {has}): "
            'give batches {"image", "label", "sensitive": {name: codes}}'
        )
    return list(zip(*(torch.as_tensor(sensitive[name]).reshape(-1).tolist() for name in names), strict=True))


def calibrate(model: QuantizedModel, images: torch.Tensor, observer: str, percentile: float) -> None:
    """Set the range of every static activation quantizer from `images` (n, 3, H, W); the weights are still float."""
    quantizers = {
        name: quantizer
        for name, quantizer in model.activation_quantizers().items()
        if isinstance(quantizer, ActivationQuantizer)
    }
    statistics = {name: ActivationStatistics(name) for name in quantizers}
    _run(model, images, {name: seen.observe_extremes for name, seen in statistics.items()})
    for seen in statistics.values():
        seen.bounds()  # refuses before the second pass
    if observer != "minmax":
        _run(model, images, {name: seen.observe_histogram for name, seen in statistics.items()})
    for name, quantizer in quantizers.items():
        quantizer.set_range(*statistics[name].range(observer, quantizer.bits, percentile))


def _run(model: QuantizedModel, images: torch.Tensor, observers: dict) -> None:
    device = device_of(model)
    with torch.inference_mode(), eval_mode(model), model.observing(observers):
        for batch in images.split(CALIBRATION_BATCH):
            model(batch.to(device))
