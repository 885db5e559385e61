"""Calibration images whose groups are known: what every repair reads that looks at groups.

A group is a combination of the values of the sensitive attributes. Shapes: n images, G groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from evaluation import as_batch, class_logits, device_of, eval_mode
from quantizers.calibration import CALIBRATION_BATCH
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError, QuantizationWarning

Weighting = Literal["balanced", "worst_group"]
Drift = Literal["kl", "loss"]  # of an image: divergence from the float model's softmax, or rise of the cross entropy
WORST_SHARE = 0.5  # of the whole weight, for the worst group; the rest is shared equally by all


# what each of the images counts, (n,), or what each of the first ones counts that the memory holds
ImageWeights = torch.Tensor | Callable[[int], torch.Tensor]


def weights_of_first(weights: ImageWeights | None, count: int) -> torch.Tensor:
    """(count,) float32; None: all the same. QuantizationError where they are negative or all zero."""
    if weights is None:
        return torch.ones(count)
    weights_N = (weights(count) if callable(weights) else weights[:count]).float()
    if not bool((weights_N >= 0).all()) or not float(weights_N.sum()) > 0:
        raise QuantizationError("the weights of the images must not be negative nor all zero")
    return weights_N


@dataclass(frozen=True)
class GroupedImages:
    """`images` (n, 3, H, W), `labels` (n,) int64, `groups` (n,) int64 codes into `names`; `distinct` says how many
    different images each group has (fewer than it counts where some are repeated)."""

    images: torch.Tensor
    labels: torch.Tensor
    groups: torch.Tensor
    names: tuple[str, ...]
    distinct: dict[str, int] = field(default_factory=dict)

    def counts(self) -> torch.Tensor:
        """Images of each group, (G,) float64; at least 1, since a group is what has an image."""
        return torch.bincount(self.groups, minlength=len(self.names)).double()

    def first(self, count: int) -> GroupedImages:
        """The first `count` images. QuantizationError where a group has none of them."""
        if count >= len(self.groups):
            return self
        part = GroupedImages(self.images[:count], self.labels[:count], self.groups[:count], self.names)
        counts = torch.bincount(part.groups, minlength=len(self.names)).tolist()
        missing = [name for name, n in zip(self.names, counts, strict=True) if n == 0]
        if missing:
            raise QuantizationError(
                f"group {missing[0]} has none of the first {count} images, which are what sensitivity_samples or the "
                "memory allows: raise the former, give smaller images or fewer attributes"
            )
        return part

    def means(self, values_N: torch.Tensor) -> torch.Tensor:
        """Mean of each group, (G,), of a value for each image (n,)."""
        totals_G = torch.zeros(len(self.names), dtype=torch.float64)
        return totals_G.index_add_(0, self.groups, values_N.double().cpu()) / self.counts()

    def image_weights(self, shares_G: torch.Tensor) -> torch.Tensor:
        """(n,) float32 weights of mean 1 that give each group its share of the whole."""
        shares_G = shares_G.double() / shares_G.double().sum()
        return (len(self.groups) * shares_G / self.counts())[self.groups].float()


def gather_groups(
    loader: Iterable,
    samples: int,
    generator: np.random.Generator,
    attributes: Sequence[str] | None = None,
    *,
    is_balanced: bool = True,
) -> GroupedImages:
    """`samples` images of a loader with their groups, by the sensitive `attributes` (None: all that it has).

    Balanced: every group has the same number, ±1; a group with fewer images gives each of them once and then draws
    again at random (with replacement), which a QuantizationWarning says. One pass over the loader; a reservoir sample
    of each group (Vitter 1985), shrunk as further groups appear, keeps the memory at about `samples` images. Otherwise
    the first `samples` images, whatever their groups.
    QuantizationError where the loader is empty, has no sensitive attributes, or not those; where there is one group
    only; or where there are more groups than images. The message names the attribute and the counts.
    """
    names: list[str] = []
    kept: dict[tuple[int, ...], list[tuple[torch.Tensor, int]]] = {}
    seen: dict[tuple[int, ...], int] = {}
    for batch in map(as_batch, loader):
        names, codes = _group_codes(batch["sensitive"], attributes)
        labels = torch.as_tensor(batch["label"]).reshape(-1).tolist()
        for image, label, code in zip(torch.as_tensor(batch["image"]), labels, codes, strict=True):
            if not is_balanced and sum(seen.values()) == samples:
                break
            if is_balanced and code not in kept and kept:  # the shares shrink: a fair part of each group stays
                share = -(-samples // (len(kept) + 1))
                for other, members in kept.items():
                    if len(members) > share:
                        stay = np.sort(generator.choice(len(members), share, replace=False))
                        kept[other] = [members[int(place)] for place in stay]
            group = kept.setdefault(code, [])
            seen[code] = seen.get(code, 0) + 1
            share = -(-samples // len(kept)) if is_balanced else samples
            if len(group) < share:
                group.append((image.clone(), int(label)))
            else:
                place = int(generator.integers(seen[code]))
                if place < share:
                    group[place] = (image.clone(), int(label))
        if not is_balanced and sum(seen.values()) == samples:
            break
    ordered = sorted(kept)
    group_names = {code: " & ".join(map(str, code)) for code in ordered}
    _check_groups(names, {group_names[code]: seen[code] for code in ordered}, samples)
    shares = [samples // len(kept) + (rank < samples % len(kept)) for rank in range(len(kept))]
    chosen, groups, distinct = [], [], {}
    for place, code in enumerate(ordered):
        group = kept[code]
        share = shares[place] if is_balanced else len(group)
        picks = np.arange(len(group))
        if len(group) >= share:
            picks = generator.choice(len(group), share, replace=False)
        else:  # every image of the group once, then again at random
            picks = np.concatenate([picks, generator.integers(len(group), size=share - len(group))])
        chosen += [group[int(pick)] for pick in picks]
        groups += [place] * share
        distinct[group_names[code]] = min(share, len(group))
    _say_repeated(names, distinct, dict(zip(group_names.values(), shares, strict=True)) if is_balanced else {})
    order = generator.permutation(len(chosen))  # what reads the first images only must not read the first groups only
    return GroupedImages(
        torch.stack([chosen[place][0] for place in order]),
        torch.tensor([chosen[place][1] for place in order], dtype=torch.int64),
        torch.tensor([groups[place] for place in order], dtype=torch.int64),
        tuple(group_names[code] for code in ordered),
        distinct,
    )


def _group_codes(
    sensitive: Mapping[str, Any], attributes: Sequence[str] | None
) -> tuple[list[str], list[tuple[int, ...]]]:
    names = list(sensitive) if attributes is None else list(attributes)
    missing = [name for name in names if name not in sensitive]
    if missing or not names:
        has = ", ".join(sensitive) or "none"
        wanted = missing[0] if missing else "any"
        raise QuantizationError(
            f"calibration_data has no sensitive attribute {wanted!r} (it has: {has}): "
            'give batches {"image", "label", "sensitive": {name: codes}}'
        )
    return names, list(zip(*(torch.as_tensor(sensitive[name]).reshape(-1).tolist() for name in names), strict=True))


def _check_groups(attributes: list[str], counts: dict[str, int], samples: int) -> None:
    if not counts:
        raise QuantizationError("calibration_data is empty: give at least one batch of images")
    of = " x ".join(attributes)
    if len(counts) == 1:
        ((name, count),) = counts.items()
        raise QuantizationError(
            f"calibration_data: sensitive attribute {of} has one group ({name}: {count} images); comparing "
            "groups needs two"
        )
    if samples < len(counts):
        raise QuantizationError(
            f"{samples} calibration images cannot hold the {len(counts)} groups of {of}: raise calibration_samples"
        )


def _say_repeated(attributes: list[str], distinct: dict[str, int], shares: dict[str, int]) -> None:
    least = min(shares.values(), default=0)  # who has this many and was dealt the odd place is not short of images
    repeated = {name: share for name, share in shares.items() if distinct[name] < least}
    if repeated:
        worst = min(repeated, key=lambda name: distinct[name])
        warnings.warn(
            f"calibration_data: {len(repeated)} of {len(distinct)} groups of {' x '.join(attributes)} have fewer "
            f"images than their share and are drawn from with replacement (group {worst}: {distinct[worst]} images "
            f"for {repeated[worst]} places)",
            QuantizationWarning,
            stacklevel=3,
        )


# --------------------------------------------------------------------------------------------------------- what is lost


@torch.no_grad()
def logits_of(model: QuantizedModel, images: torch.Tensor) -> torch.Tensor:
    """(n, K) float32, on the CPU."""
    device = device_of(model)
    with eval_mode(model):
        logits = [model(batch.to(device)).float().cpu() for batch in images.split(CALIBRATION_BATCH)]
    return torch.cat([batch.reshape(len(batch), -1) for batch in logits])


def float_logits(model: QuantizedModel, images: torch.Tensor) -> torch.Tensor:
    """(n, K): of the model before quantization. Its float parameters must not yet be forgotten."""
    with model.as_float():
        return logits_of(model, images)


def drift(
    exact_NK: torch.Tensor, logits_NK: torch.Tensor, labels_N: torch.Tensor, metric: Drift = "kl"
) -> torch.Tensor:
    """(n,) float64, how far each image's prediction has moved: `kl`, the divergence of its softmax from the float
    model's, in nats; `loss`, by how much its cross entropy has risen, which may be negative."""
    exact_NK, logits_NK = (class_logits(logits.double().reshape(len(logits), -1)) for logits in (exact_NK, logits_NK))
    if metric == "kl":
        exact_NK = F.log_softmax(exact_NK, dim=1)
        return (exact_NK.exp() * (exact_NK - F.log_softmax(logits_NK, dim=1))).sum(dim=1)
    return F.cross_entropy(logits_NK, labels_N, reduction="none") - F.cross_entropy(
        exact_NK, labels_N, reduction="none"
    )


def group_shares(drift_G: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """(G,) what each group counts, summing to 1: the same, or half of it the one that has drifted most."""
    shares_G = torch.full((len(drift_G),), 1 / len(drift_G), dtype=torch.float64)
    if weighting == "worst_group":
        shares_G *= 1 - WORST_SHARE
        shares_G[int(drift_G.argmax())] += WORST_SHARE
    return shares_G
