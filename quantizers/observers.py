"""How quantization ranges are chosen from what was seen: minmax, percentile, mse, entropy.

Activations are seen twice: first their extremes, then a histogram between them, so that every observer and every width
reads the same exact statistics, whatever the batch size. Weights are seen whole, each output channel on its own.

minmax      the extremes: nothing clipped (Jacob et al., CVPR 2018)
percentile  the given percentile on either side (McKinstry et al., 2018; Wu et al., 2020)
mse         the range of the least mean squared quantization error (Choukroun et al., 2019; Banner et al., 2019)
entropy     the range of the least KL divergence of the quantized from the seen distribution (Migacz, GTC 2017)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quantizers.numerics import QuantizationError, along, symmetric_scale, weight_range

OBSERVERS = ("minmax", "percentile", "mse", "entropy")
BINS = 4096
ENTROPY_BINS = 2048
HISTOGRAM_CHUNK = 1 << 23  # values counted at a time: torch.histc counts in float32, exact up to 2^24
WEIGHT_CHUNK = 1 << 16  # weights searched at a time, so that they stay in the processor's cache


class ActivationStatistics:
    """Extremes, then the histogram, of one activation tensor over the calibration set."""

    def __init__(self, name: str):
        self.name = name
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None
        self.histogram: torch.Tensor | None = None  # (BINS,) float64

    def observe_extremes(self, x: torch.Tensor) -> None:
        low, high = torch.aminmax(x.detach().float())
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def observe_histogram(self, x: torch.Tensor) -> None:
        low, high = self.bounds()
        if low == high:
            counts = torch.zeros(BINS, dtype=torch.float64)
            counts[0] = x.numel()
        else:
            counts = torch.zeros(BINS, dtype=torch.float64)
            for part in x.detach().float().flatten().split(HISTOGRAM_CHUNK):
                counts += torch.histc(part, bins=BINS, min=low, max=high).double().cpu()
        self.histogram = counts if self.histogram is None else self.histogram + counts

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

    def range(self, observer: str, bits: int, percentile: float) -> tuple[float, float]:
        """The range [low, high], 0 within, that `observer` chooses for a width of `bits`."""
        low, high = self.bounds()
        low, high = min(low, 0.0), max(high, 0.0)
        if observer == "minmax" or low == high:
            return low, high
        assert self.histogram is not None, "observers other than minmax read the histogram"
        edges = np.linspace(*self.bounds(), BINS + 1)
        centres, counts = (edges[:-1] + edges[1:]) / 2, self.histogram.numpy()
        if observer == "percentile":
            return percentile_range(edges, counts, percentile)
        if observer == "mse":
            return mse_range(centres, counts, low, high, bits)
        if observer == "entropy":
            return entropy_range(centres, counts, low, high, bits)
        raise QuantizationError(f"unknown observer {observer!r}; choose from {', '.join(OBSERVERS)}")


def percentile_range(edges: np.ndarray, counts: np.ndarray, percentile: float) -> tuple[float, float]:
    """The quantiles 1 - p and p of the histogram, widened to hold 0."""
    cumulative = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    share = percentile / 100
    low, high = np.interp([1 - share, share], cumulative, edges)
    return min(float(low), 0.0), max(float(high), 0.0)


def mse_range(
    centres: np.ndarray, counts: np.ndarray, low: float, high: float, bits: int, candidates: int = 48, rounds: int = 3
) -> tuple[float, float]:
    """The clipping range of the least squared error: its two ends searched in turn, each round finer than the last."""
    seen = counts > 0
    centres, counts = centres[seen], counts[seen]
    best = (low, high)
    span = 1.0
    for _ in range(rounds):
        for end in (1, 0):
            if best[end] == 0.0:
                continue
            limit = (low, high)[end]
            share = best[end] / limit
            shares = np.clip(np.linspace(share - span, share + span, candidates), 0.01, 1.0)
            shares = np.unique(np.append(shares, share))
            ends = shares * limit
            lows, highs = (np.full_like(ends, best[0]), ends) if end else (ends, np.full_like(ends, best[1]))
            best_end = float(ends[_histogram_errors(centres, counts, lows, highs, bits).argmin()])
            best = (best[0], best_end) if end else (best_end, best[1])
        span /= 8
    return best


def _histogram_errors(
    centres: np.ndarray, counts: np.ndarray, lows: np.ndarray, highs: np.ndarray, bits: int
) -> np.ndarray:
    """Squared quantization error of the histogram for each candidate range (C,)."""
    levels = 2**bits - 1
    scale = ((highs - lows) / levels)[:, None]
    zero_point = np.round(-lows[:, None] / scale).clip(0, levels)
    quantized = np.round(centres / scale).clip(-zero_point, levels - zero_point) * scale
    return ((quantized - centres) ** 2) @ counts


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
    """Chooses the per-channel scales of a weight tensor."""

    observer: str = "mse"
    percentile: float = 99.99

    def scales(self, w: torch.Tensor, bits: int, axis: int, name: str) -> torch.Tensor:
        """(O,) float32 scales, O = w.shape[axis]. QuantizationError for weights that are not finite."""
        w_OK = w.detach().float().movedim(axis, 0).reshape(w.shape[axis], -1)
        if not bool(torch.isfinite(w_OK).all()):
            raise QuantizationError(f"{name}: its weights are not finite")
        max_abs = w_OK.abs().amax(dim=1)
        if self.observer == "minmax":
            return symmetric_scale(max_abs, bits)
        if self.observer == "percentile":
            return symmetric_scale(_row_percentile(w_OK.abs(), self.percentile), bits)
        rows = max(1, WEIGHT_CHUNK // w_OK.shape[1])
        if self.observer == "mse":
            parts = [mse_scales(part, bits) for part in w_OK.split(rows)]
        elif self.observer == "entropy":
            parts = [entropy_scales(part, bits) for part in w_OK.split(rows)]
        else:
            raise QuantizationError(f"unknown observer {self.observer!r}; choose from {', '.join(OBSERVERS)}")
        return torch.cat(parts)


def _row_percentile(values_OK: torch.Tensor, percentile: float) -> torch.Tensor:
    rank = percentile / 100 * (values_OK.shape[1] - 1)
    ordered = values_OK.sort(dim=1).values
    below, above = ordered[:, int(np.floor(rank))], ordered[:, int(np.ceil(rank))]
    return below + (above - below) * (rank - np.floor(rank))


def mse_scales(w_OK: torch.Tensor, bits: int) -> torch.Tensor:
    """The scales of the least squared error, all channels at once: a coarse, then a fine search of the clipping."""
    widest = symmetric_scale(w_OK.abs().amax(dim=1), bits)
    best_share = torch.ones_like(widest)
    best_error = torch.full_like(widest, torch.inf)
    for offsets in (torch.linspace(0.1, 1.2, 12), torch.linspace(-0.08, 0.08, 9)):
        centre = torch.zeros_like(best_share) if best_error.isinf().all() else best_share.clone()
        for offset in offsets.tolist():
            share = (centre + offset).clamp(min=0.02)
            error = _squared_error(w_OK, widest * share, bits)
            better = error < best_error
            best_share = torch.where(better, share, best_share)
            best_error = torch.where(better, error, best_error)
    zero = w_OK.abs().amax(dim=1) == 0
    return torch.where(zero, widest, widest * best_share)


def _squared_error(w_OK: torch.Tensor, scale_O: torch.Tensor, bits: int) -> torch.Tensor:
    qmin, qmax = weight_range(bits)
    scale = along(scale_O, 0, 2)
    return (w_OK / scale).round_().clamp_(qmin, qmax).mul_(scale).sub_(w_OK).square_().sum(dim=1)


def entropy_scales(w_OK: torch.Tensor, bits: int, bins: int = 512) -> torch.Tensor:
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
        scales.append(float(symmetric_scale(torch.tensor(high), bits)))
    return torch.tensor(scales, dtype=torch.float32, device=w_OK.device)
