"""How quantization ranges are chosen from what was seen: minmax, moving_average, percentile, mse, entropy.

Activations are seen once: their extremes, and a histogram of logarithmic bins (256 an octave) that needs no range known
beforehand, so that every observer and every width reads the same statistics, whatever the batch size. Weights are seen
whole, each output channel on its own or all of a layer together.

minmax          the extremes: nothing clipped (Jacob et al., CVPR 2018)
moving_average  the exponential moving average of the extremes of 16 images at a time (Jacob et al., CVPR 2018)
percentile      the given percentile on either side (McKinstry et al., 2018; Wu et al., 2020)
mse             the range of the least mean squared quantization error (Choukroun et al., 2019; Banner et al., 2019),
                each image's error relative to the image's own energy: in a plain mean, one image with activations ten
                times the usual ones counts like a hundred images, and its range is everybody's
entropy         the range of the least KL divergence of the quantized from the seen distribution (Migacz, GTC 2017)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quantizers.numerics import INT8_RANGE, MAX_BITS, QuantizationError, along, symmetric_scale, weight_range

OBSERVERS = ("minmax", "moving_average", "percentile", "mse", "entropy")
WEIGHT_OBSERVERS = ("minmax", "percentile", "mse", "entropy")
HISTOGRAM_OBSERVERS = ("percentile", "mse", "entropy")
GRANULARITIES = ("per_channel", "per_tensor")
ENTROPY_BINS = 2048
AVERAGED_IMAGES = 16  # images whose common extremes are one term of the moving average
AVERAGING = 0.1  # weight of the newest term
WEIGHT_CHUNK = 1 << 16  # weights searched at a time, so that they stay in the processor's cache

# A bin is the upper 14 bits of a value's float16 code: sign, 5 bits of exponent, 8 of mantissa.
BINS = 1 << 14
_FIRST_IMAGE_MAX = 6  # values are scaled by a power of two: the first image's largest to 2^6, of 2^16 that float16 has


def _bin_edges() -> tuple[np.ndarray, np.ndarray]:
    """Ends nearer to and farther from zero of the bins of positive values (BINS / 2,)."""
    code = np.arange(BINS // 2 + 1)
    exponent, mantissa = code >> 8, (code & 255) / 256
    value = np.where(exponent == 0, mantissa * 2.0**-14, (1 + mantissa) * 2.0 ** (exponent - 15.0))
    value = np.minimum(value, 65536.0)  # infinity: beyond the scaled range
    return value[:-1], value[1:]


_NEAR, _FAR = _bin_edges()
LOWER = np.concatenate([-_FAR[::-1], _NEAR])  # ends of all bins, (BINS,), ascending
UPPER = np.concatenate([-_NEAR[::-1], _FAR])
ORDER = np.concatenate([np.arange(BINS - 1, BINS // 2 - 1, -1), np.arange(BINS // 2)])  # codes of the ascending bins
# Where in its bin a value is taken to be: spread (golden ratio), for at the same place of each bin, such as its middle,
# all of them would fall on the grid of a quantizer whose scale is a power of two.
_PLACE = np.modf(np.arange(BINS // 2) * 0.6180339887498949)[0]
_VALUE = _NEAR + _PLACE * (_FAR - _NEAR)
_VALUE[0] = 0.0  # zero, and what is a million times smaller than the largest
VALUES = np.concatenate([-_VALUE[::-1], _VALUE])


class ActivationStatistics:
    """Extremes and histograms of one activation tensor over the calibration set; dimension 0 is the image."""

    def __init__(self, name: str, with_histogram: bool = True):
        self.name = name
        self.with_histogram = with_histogram
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None
        self.images = 0
        self._lows: list[torch.Tensor] = []  # of each image
        self._highs: list[torch.Tensor] = []
        self._counts: torch.Tensor | None = None  # (2, BINS) float64: values; values over the energy of their image
        self._exponent: int | None = None
        self._terms: list[tuple[float, float]] | None = None  # of parts that were put together: their extremes

    def observe(self, x: torch.Tensor) -> None:
        """Take note of activations (n, …)."""
        x_NK = x.detach().float().reshape(x.shape[0], -1)
        low_N, high_N = torch.aminmax(x_NK, dim=1)
        low, high = low_N.min(), high_N.max()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.images += len(x_NK)
        self._lows.append(low_N)
        self._highs.append(high_N)
        if self.with_histogram:
            self._count(x_NK, torch.maximum(low_N.abs(), high_N.abs()))

    def _count(self, x_NK: torch.Tensor, largest_N: torch.Tensor) -> None:
        if self._exponent is None:  # images that are all zero fall into the bin of zero whatever the factor
            usable = largest_N[(largest_N > 0) & torch.isfinite(largest_N)]
            if len(usable):
                self._exponent = _FIRST_IMAGE_MAX - int(np.ceil(np.log2(float(usable[0]))))
        factor = 1.0 if self._exponent is None else 2.0**self._exponent
        codes_NK = ((x_NK * factor).half().view(torch.int16).int() & 0xFFFF) >> 2
        energy_N = x_NK.square().mean(dim=1, dtype=torch.float64)
        weight_N = torch.where(energy_N > 0, 1 / energy_N, 0.0).nan_to_num(0.0, 0.0, 0.0)
        counts = _histograms(codes_NK, weight_N).cpu()
        self._counts = counts if self._counts is None else self._counts + counts

    def bounds(self) -> tuple[float, float]:
        """The extremes; QuantizationError if nothing, or something that is not finite, was seen."""
        if self.low is None:
            raise QuantizationError(f"{self.name}: no calibration image reached this layer")
        low, high = float(self.low), float(self.high)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise QuantizationError(
                f"{self.name}: the activations of the calibration images are not finite (range {low} to {high})"
            )
        return low, high

    def is_silent(self) -> bool:
        """Whether every activation seen was zero."""
        return self.bounds() == (0.0, 0.0)

    def range(self, observer: str, bits: int, percentile: float, is_symmetric: bool = False) -> tuple[float, float]:
        """The range [low, high], 0 within, that `observer` chooses for a width of `bits`; symmetric: [-high, high]."""
        low, high = self.bounds()
        low, high = min(low, 0.0), max(high, 0.0)
        if observer == "moving_average":
            low, high = self._averaged_extremes()
        elif observer != "minmax" and bits <= MAX_BITS and low < high:
            low, high = self._searched_range(observer, bits, percentile, is_symmetric, low, high)
        return (-max(-low, high), max(-low, high)) if is_symmetric else (low, high)

    def share_scale(self, others: Sequence[ActivationStatistics]) -> None:
        """Count in the bins that one of `others` has chosen, so that the histograms can be put together."""
        if self._exponent is None:
            self._exponent = next((other._exponent for other in others if other._exponent is not None), None)

    @classmethod
    def mixed(cls, parts: Sequence[ActivationStatistics]) -> ActivationStatistics:
        """The statistics of all parts together, each with the same weight however many images it has. The parts'
        bins must be the same (`share_scale`)."""
        whole = cls(parts[0].name, parts[0].with_histogram)
        whole.low = torch.stack([part.low for part in parts]).min()
        whole.high = torch.stack([part.high for part in parts]).max()
        whole.images = sum(part.images for part in parts)
        whole.share_scale(parts)
        whole._terms = [part._averaged_extremes() for part in parts]
        if whole.with_histogram:
            whole._counts = torch.stack([part._counts / part.images for part in parts]).mean(dim=0)
        return whole

    def histograms_of(self, parts: Sequence[ActivationStatistics]) -> tuple[np.ndarray, np.ndarray]:
        """(V,) values and (V, G) counts, one column a part: the mean over its images of their counts, each divided by
        the image's mean square, over its number of values; self is those parts `mixed`."""
        counts_VG = np.stack([part._counts[1].numpy()[ORDER] / part._counts[0].sum().item() for part in parts], axis=1)
        seen = counts_VG.sum(axis=1) > 0
        factor = 1.0 if self._exponent is None else 2.0**-self._exponent
        return np.clip(VALUES[seen] * factor, *self.bounds()), counts_VG[seen]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that was observed, to be kept; the histogram without its empty bins."""
        assert self.low is not None and self._terms is None, "of one pass over the images"
        kept = {
            "extremes": np.array([float(self.low), float(self.high)]),
            "images": np.array(self.images),
            "lows": torch.cat(self._lows).cpu().numpy(),
            "highs": torch.cat(self._highs).cpu().numpy(),
        }
        if self._counts is not None:
            counts = self._counts.numpy()
            kept["bins"] = np.flatnonzero(counts.any(axis=0)).astype(np.int32)
            kept["counts"] = counts[:, kept["bins"]]
        if self._exponent is not None:
            kept["exponent"] = np.array(self._exponent)
        return kept

    @classmethod
    def from_arrays(cls, name: str, kept: Mapping[str, np.ndarray]) -> ActivationStatistics:
        """What `arrays` gave, on the CPU. KeyError, IndexError or ValueError where it is not whole."""
        seen = cls(name, with_histogram="bins" in kept)
        low, high = kept["extremes"].tolist()
        seen.low, seen.high = torch.tensor(low), torch.tensor(high)
        seen.images = int(kept["images"])
        seen._lows, seen._highs = [torch.from_numpy(kept["lows"])], [torch.from_numpy(kept["highs"])]
        if seen.with_histogram:
            counts = np.zeros((2, BINS))
            counts[:, kept["bins"]] = kept["counts"]
            seen._counts = torch.from_numpy(counts)
        seen._exponent = int(kept["exponent"]) if "exponent" in kept else None
        return seen

    def _averaged_extremes(self) -> tuple[float, float]:
        """A term of age t weighs AVERAGING (1 - AVERAGING)^t over the sum of them all: the first is not favoured."""
        if self._terms is not None:
            low, high = np.mean(np.array(self._terms), axis=0)
            return float(low), float(high)
        lows, highs = torch.cat(self._lows), torch.cat(self._highs)
        terms = [
            (float(part_low.min()), float(part_high.max()))
            for part_low, part_high in zip(lows.split(AVERAGED_IMAGES), highs.split(AVERAGED_IMAGES), strict=True)
        ]
        weights = (1 - AVERAGING) ** np.arange(len(terms) - 1, -1, -1)
        low, high = np.average(np.array(terms), axis=0, weights=weights)
        return min(float(low), 0.0), max(float(high), 0.0)

    def histogram(self, is_relative: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(lower ends, upper ends, values, counts) of the bins that are not empty, ascending; relative: each image's
        counts divided by the mean square of its activations."""
        assert self._counts is not None, "observers other than minmax and moving_average read the histogram"
        counts = self._counts[int(is_relative)].numpy()[ORDER]
        seen = counts > 0
        factor = 1.0 if self._exponent is None else 2.0**-self._exponent
        low, high = self.bounds()
        return (
            np.clip(LOWER[seen] * factor, low, high),
            np.clip(UPPER[seen] * factor, low, high),
            np.clip(VALUES[seen] * factor, low, high),
            counts[seen],
        )

    def _searched_range(
        self, observer: str, bits: int, percentile: float, is_symmetric: bool, low: float, high: float
    ) -> tuple[float, float]:
        lower, upper, values, counts = self.histogram(is_relative=observer == "mse")
        if observer == "percentile":
            return percentile_range(lower, upper, counts, percentile)
        if observer == "mse":
            return mse_range(values, counts, low, high, bits, is_symmetric)
        if observer == "entropy":
            if is_symmetric:
                low, high = -max(-low, high), max(-low, high)
            edges = np.linspace(low, high, ENTROPY_BINS + 1)
            return entropy_range((edges[:-1] + edges[1:]) / 2, spread(lower, upper, counts, edges), low, high, bits)
        raise QuantizationError(f"unknown observer {observer!r}; choose from {', '.join(OBSERVERS)}")


def _histograms(codes_NK: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """(2, BINS) float64: counts of the codes, and counts weighted by image."""
    if codes_NK.is_cuda:  # weighted counting adds in any order there; integers have one sum
        rows = torch.arange(len(codes_NK), device=codes_NK.device)[:, None]
        counts_NB = torch.bincount((codes_NK + BINS * rows).flatten(), minlength=BINS * len(codes_NK))
        counts_NB = counts_NB.view(-1, BINS).double()
        return torch.stack([counts_NB.sum(dim=0), weight_N @ counts_NB])
    codes, weights = codes_NK.flatten(), weight_N.repeat_interleave(codes_NK.shape[1])
    return torch.stack([torch.bincount(codes, minlength=BINS).double(), torch.bincount(codes, weights, minlength=BINS)])


def percentile_range(
    lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, percentile: float
) -> tuple[float, float]:
    """The quantiles 1 - p and p of a histogram of ascending bins, widened to hold 0."""
    cumulative = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    share = percentile / 100
    first = int(np.searchsorted(cumulative, 1 - share, side="right")) - 1
    last = int(np.searchsorted(cumulative, share, side="left")) - 1
    first, last = min(max(first, 0), len(counts) - 1), min(max(last, 0), len(counts) - 1)

    def inside(place: int, quantile: float) -> float:
        part = (quantile - cumulative[place]) / (cumulative[place + 1] - cumulative[place])
        return float(lower[place] + min(max(part, 0.0), 1.0) * (upper[place] - lower[place]))

    return min(inside(first, 1 - share), 0.0), max(inside(last, share), 0.0)


def spread(lower: np.ndarray, upper: np.ndarray, counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The histogram over other `edges`, each bin's mass spread evenly over it."""
    ends = np.unique(np.concatenate([lower, upper]))
    width = np.maximum(upper - lower, np.finfo(float).tiny)

    def below(x: np.ndarray) -> np.ndarray:
        """The mass below each x: whole bins, and the part of the bin that holds it."""
        place = np.searchsorted(lower, x, side="right") - 1
        whole = np.concatenate([[0.0], np.cumsum(counts)])
        at = place.clip(0)
        part = np.clip((x - lower[at]) / width[at], 0.0, 1.0)
        return np.where(place < 0, 0.0, whole[at] + part * counts[at])

    assert ends[0] >= edges[0] - 1e-9 * abs(edges[0]) and ends[-1] <= edges[-1] + 1e-9 * abs(edges[-1])
    cumulative = below(edges)
    cumulative[0], cumulative[-1] = 0.0, counts.sum()
    return np.diff(cumulative)


def mse_range(
    values: np.ndarray,
    counts: np.ndarray,
    low: float,
    high: float,
    bits: int,
    is_symmetric: bool = False,
    candidates: int = 16,
    rounds: int = 4,
) -> tuple[float, float]:
    """The clipping range of the least squared error: the best of a coarse grid, then each end in turn, ever finer. Of
    `counts` (V, G), a histogram for each group over the same values, the range whose worst group's error is least.

    The grid is geometric, down to a 2000th of [low, high] on either side: one image may have set these.
    """
    shares = np.geomspace(1.0, 1 / 2000, 4 * candidates if is_symmetric or low == 0 or high == 0 else candidates)
    step = shares[0] / shares[1]
    if is_symmetric:
        ends = shares * max(-low, high)
        best = ends[_histogram_errors(values, counts, -ends, ends, bits, True).argmin()]
        for _ in range(rounds):
            ends = best * np.geomspace(1 / step, step, candidates + 1)  # the middle one: as it is
            best = ends[_histogram_errors(values, counts, -ends, ends, bits, True).argmin()]
            step **= 0.25
        return -float(best), float(best)
    lows, highs = (np.unique(shares * end) for end in (low, high))
    lows, highs = (grid.ravel() for grid in np.meshgrid(lows, highs))
    chosen = _histogram_errors(values, counts, lows, highs, bits, False).argmin()
    best_low, best_high = lows[chosen], highs[chosen]
    for _ in range(rounds):
        around = np.geomspace(1 / step, step, candidates + 1)
        ends = (best_high * around).clip(max=high)
        errors = _histogram_errors(values, counts, np.full_like(ends, best_low), ends, bits, False)
        best_high = ends[errors.argmin()]
        ends = (best_low * around).clip(min=low)
        errors = _histogram_errors(values, counts, ends, np.full_like(ends, best_high), bits, False)
        best_low = ends[errors.argmin()]
        step **= 0.25
    return float(best_low), float(best_high)


def _histogram_errors(
    values: np.ndarray, counts: np.ndarray, lows: np.ndarray, highs: np.ndarray, bits: int, is_symmetric: bool
) -> np.ndarray:
    """Squared quantization error of the histogram for each candidate range (C,); of `counts` (V, G), one histogram
    for each group, that of the group where it is largest."""
    if is_symmetric:
        qmin, qmax = weight_range(bits)
        scale = np.maximum(-lows, highs)[:, None] / (qmax + 0.5)
    else:
        levels = 2**bits - 1
        scale = ((highs - lows) / levels)[:, None]
        zero_point = np.round(-lows[:, None] / scale).clip(0, levels)
        qmin, qmax = -zero_point, levels - zero_point
    quantized = np.divide(values, scale, dtype=np.float32)
    np.rint(quantized, out=quantized)
    np.clip(quantized, qmin, qmax, out=quantized)
    quantized *= scale.astype(np.float32)
    quantized -= values.astype(np.float32)
    np.square(quantized, out=quantized)
    errors = quantized @ counts.astype(np.float32)
    return errors if errors.ndim == 1 else errors.max(axis=1)


def entropy_range(
    centres: np.ndarray, counts: np.ndarray, low: float, high: float, bits: int, candidates: int = 64
) -> tuple[float, float]:
    """The range [f low, f high] of the least KL(P || Q).

    P is the histogram with the clipped mass moved into the outermost bins kept, Q the histogram inside the range,
    merged into 2^bits levels and spread evenly over the bins of each level that are not empty (Migacz, GTC 2017).
    """
    shift = 2 if len(centres) > ENTROPY_BINS else 1
    counts = counts.reshape(-1, shift).sum(axis=1)
    centres = centres.reshape(-1, shift).mean(axis=1)
    levels = 2**bits
    best, best_divergence = (low, high), np.inf
    for share in np.linspace(1.0, 0.05, candidates):
        inside = (centres >= share * low) & (centres <= share * high)
        if inside.sum() < levels:
            break
        kept = counts[inside]
        first, last = np.flatnonzero(inside)[[0, -1]]
        p = kept.copy()
        p[0] += counts[:first].sum()
        p[-1] += counts[last + 1 :].sum()
        scale = share * (high - low) / (levels - 1)
        level = np.round((centres[inside] - share * low) / scale).astype(np.int64).clip(0, levels - 1)
        filled = p > 0
        mass = np.bincount(level, weights=kept, minlength=levels)
        bins = np.bincount(level, weights=filled, minlength=levels)
        q = np.where(filled, (mass / np.maximum(bins, 1))[level], 0.0)
        total_q = q.sum()
        if total_q == 0:
            continue
        # a level all of whose mass was clipped away has q = 0 where p > 0: an infinite divergence, made finite
        q = np.maximum(q / total_q, 1e-12)
        p = p / p.sum()
        divergence = float((p[filled] * np.log(p[filled] / q[filled])).sum())
        if divergence < best_divergence - 1e-12:
            best, best_divergence = (float(share * low), float(share * high)), divergence
    return best


# ------------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class WeightObserver:
    """Chooses the scales of a weight tensor: one for each output channel, or one."""

    observer: str = "mse"
    percentile: float = 99.99
    granularity: str = "per_channel"
    int8_range: tuple[int, int] = INT8_RANGE

    def scales(self, w: torch.Tensor, bits: int, axis: int, name: str) -> torch.Tensor:
        """(O,) float32 scales, O = w.shape[axis], or (1,) per tensor. QuantizationError for weights that are not
        finite."""
        w_OK = w.detach().float().movedim(axis, 0).reshape(w.shape[axis], -1)
        if self.granularity == "per_tensor":
            w_OK = w_OK.reshape(1, -1)
        if not bool(torch.isfinite(w_OK).all()):
            raise QuantizationError(f"{name}: its weights are not finite")
        max_abs = w_OK.abs().amax(dim=1)
        qmax = weight_range(bits, self.int8_range)[1]
        if self.observer == "minmax" or bits > MAX_BITS:
            return symmetric_scale(max_abs, qmax)
        if self.observer == "percentile":
            return symmetric_scale(_row_percentile(w_OK.abs(), self.percentile), qmax)
        rows = max(1, WEIGHT_CHUNK // w_OK.shape[1])
        if self.observer == "mse":
            parts = [mse_scales(part, bits, self.int8_range) for part in w_OK.split(rows)]
        elif self.observer == "entropy":
            parts = [entropy_scales(part, bits, int8_range=self.int8_range) for part in w_OK.split(rows)]
        else:
            raise QuantizationError(f"unknown observer {self.observer!r}; choose from {', '.join(WEIGHT_OBSERVERS)}")
        return torch.cat(parts)


def _row_percentile(values_OK: torch.Tensor, percentile: float) -> torch.Tensor:
    rank = percentile / 100 * (values_OK.shape[1] - 1)
    ordered = values_OK.sort(dim=1).values
    below, above = ordered[:, int(np.floor(rank))], ordered[:, int(np.ceil(rank))]
    return below + (above - below) * (rank - np.floor(rank))


def mse_scales(w_OK: torch.Tensor, bits: int, int8_range: tuple[int, int] = INT8_RANGE) -> torch.Tensor:
    """The scales of the least squared error, all channels at once: a coarse, then a fine search of the clipping."""
    bounds = weight_range(bits, int8_range)
    widest = symmetric_scale(w_OK.abs().amax(dim=1), bounds[1])
    best_share = torch.ones_like(widest)
    best_error = torch.full_like(widest, torch.inf)
    for offsets in (torch.linspace(0.1, 1.2, 12), torch.linspace(-0.08, 0.08, 9)):
        centre = torch.zeros_like(best_share) if best_error.isinf().all() else best_share.clone()
        for offset in offsets.tolist():
            share = (centre + offset).clamp(min=0.02)
            error = _squared_error(w_OK, widest * share, bounds)
            better = error < best_error
            best_share = torch.where(better, share, best_share)
            best_error = torch.where(better, error, best_error)
    zero = w_OK.abs().amax(dim=1) == 0
    return torch.where(zero, widest, widest * best_share)


def _squared_error(w_OK: torch.Tensor, scale_O: torch.Tensor, bounds: tuple[int, int]) -> torch.Tensor:
    scale = along(scale_O, 0, 2)
    return (w_OK / scale).round_().clamp_(*bounds).mul_(scale).sub_(w_OK).square_().sum(dim=1)


def entropy_scales(
    w_OK: torch.Tensor, bits: int, bins: int = 512, int8_range: tuple[int, int] = INT8_RANGE
) -> torch.Tensor:
    """The scales of the least KL divergence, channel by channel, on a symmetric histogram of each."""
    scales = []
    for row in w_OK.cpu():
        limit = float(row.abs().max())
        if limit == 0.0:
            scales.append(1.0)
            continue
        edges = np.linspace(-limit, limit, bins + 1)
        counts = np.histogram(row.numpy(), bins=edges)[0].astype(np.float64)
        _, high = entropy_range((edges[:-1] + edges[1:]) / 2, counts, -limit, limit, bits)
        scales.append(float(symmetric_scale(torch.tensor(high), weight_range(bits, int8_range)[1])))
    return torch.tensor(scales, dtype=torch.float32, device=w_OK.device)
