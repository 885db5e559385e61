"""Tests, corrections, effect sizes and detectable effects for models measured on the same images.

Each test says what its null hypothesis is, since with gaps between groups that is where one goes wrong:

one group's accuracy changed     `mcnemar_midp`: of the images whose correctness changed, half were gained (Fagerland,
                                 Lydersen & Laake 2013)
two models have other gaps       `swap_test`: the models are exchangeable image by image. It holds near ties, but a
                                 model that errs more has larger gaps by chance alone: as a statement about fairness
                                 it is for models of about the same accuracy, a repair and its plain counterpart
quantization treats groups       `flip_permutation_test`: among images of the same label and FP32 prediction, which
unequally, as a metric shows it  quantized prediction an image gets does not depend on its group. The group labels are
                                 permuted there; FP32's own gap and the loss of accuracy are in the null distribution
some group loses more than       `max_t_losses`: whether an image is gained, lost or neither does not depend on its
the others                       group. Group labels are permuted, the largest studentized excess loss decides,
                                 step-down (Westfall & Young 1993): the family-wise error over the groups is held

Permutation p-values count the observation among the permutations (Phipson & Smyth 2010): they are never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.special import bdtr, betaincinv, gammaln, ndtri

from group_counts import METRICS
from significance.batched_metrics import table_metrics

PERMUTATION_BLOCK = 1000  # permutations by one generator, so that they do not depend on what runs side by side
CHUNK = 200_000  # numbers held at once for the max-T test
ENOUGH = 100  # permutations as far out as the observation after which its p-value is known well enough: to a tenth
PILOT = 500  # permutations that tell where the middle of the null distribution is
FIRST_BATCH, LARGEST_BATCH = 500, 8000  # permutations drawn at once; the second bounds the memory
FEW = 25  # images to draw, below which it is quicker one by one
TIE = 5e-7  # two changes of a metric closer than this are the same up to float32's rounding

# --- one group, two models --------------------------------------------------------------------------------------------


def mcnemar_midp(gained, lost):
    """Two-sided mid-p of McNemar's exact test: of `gained + lost` discordant pairs, half are expected either way.

    Elementwise; a float for two numbers.
    """
    from scipy.stats import binom  # here: it takes half a second, which a cell that is computed need not wait

    gained, lost = np.broadcast_arrays(np.asarray(gained, dtype=np.int64), np.asarray(lost, dtype=np.int64))
    n, fewer = gained + lost, np.minimum(gained, lost)
    p = np.minimum(1.0, 2 * bdtr(fewer.astype(float), n, 0.5) - binom.pmf(fewer, n, 0.5))
    return float(p) if p.ndim == 0 else p


# --- gaps: permutations of one pair of models -------------------------------------------------------------------------


def swap_test(
    counts_GLFQ: np.ndarray,
    eligible_G: np.ndarray,
    most: int,
    *,
    generator: np.random.Generator,
    enough: int = ENOUGH,
) -> dict[str, float]:
    """Two-sided p for each metric: the two models' predictions change places at random, image by image; `most` times at
    most, see `_sequential_p`."""
    counts = np.asarray(counts_GLFQ)
    both = counts + counts.swapaxes(2, 3)
    kinds = [at for at in np.argwhere(both).tolist() if at[2] < at[3]]  # one model says f and the other q
    agreed_GLK1 = np.diagonal(counts, axis1=2, axis2=3)[..., None].astype(np.float32)

    def swapped(size: int) -> np.ndarray:
        fp32_GLKB, quantized_GLKB = (np.repeat(agreed_GLK1, size, axis=-1) for _ in range(2))
        for g, label, f, q in kinds:  # each way round with probability 1/2
            n = int(both[g, label, f, q])
            first_B = fair_coins(n, size, generator)
            for table, of_f, of_q in ((fp32_GLKB, first_B, n - first_B), (quantized_GLKB, n - first_B, first_B)):
                table[g, label, f] += of_f
                table[g, label, q] += of_q
        return table_metrics(quantized_GLKB, eligible_G) - table_metrics(fp32_GLKB, eligible_G)

    distance_M = np.abs(_change(counts, eligible_G))  # the null distribution is symmetric about 0
    return _sequential_p(distance_M, lambda size: np.abs(swapped(size)), most, enough)


def flip_permutation_test(
    counts_GLFQ: np.ndarray,
    eligible_G: np.ndarray,
    most: int,
    *,
    generator: np.random.Generator,
    enough: int = ENOUGH,
) -> dict[str, float]:
    """Two-sided p for each metric: quantized predictions are permuted over the eligible groups among images of the same
    label and FP32 prediction, `most` times at most, see `_sequential_p`. NaN for the metrics that no such permutation
    changes (those of all images together).

    Far out is what lies as far from the null distribution's mean as the observation does; the mean is that of `PILOT`
    permutations which serve for nothing else.
    """
    counts = np.asarray(counts_GLFQ)[eligible_G]
    if len(counts) < 2:
        return dict.fromkeys(METRICS, np.nan)
    everyone_G = np.ones(len(counts), dtype=bool)
    fp32_M1 = table_metrics(counts.sum(axis=3)[..., None].astype(np.float32), everyone_G)

    def permuted(size: int) -> np.ndarray:
        return table_metrics(_permuted_predictions(counts, size, generator), everyone_G) - fp32_M1

    pilot_MB = permuted(PILOT)
    is_defined_MB = ~np.isnan(pilot_MB)
    with np.errstate(invalid="ignore"):
        centre_M = np.where(is_defined_MB, pilot_MB, 0).sum(axis=1, dtype=float) / is_defined_MB.sum(axis=1)
    distance_M = np.abs(_change(counts, everyone_G) - centre_M)
    distance_M[[METRICS.index("accuracy"), METRICS.index("balanced_accuracy")]] = np.nan
    return _sequential_p(distance_M, lambda size: np.abs(permuted(size) - centre_M[:, None]), most, enough)


def _sequential_p(
    distance_M: np.ndarray, null_distances: Callable[[int], np.ndarray], most: int, enough: int
) -> dict[str, float]:
    """p for each metric, of how far out it lies under permutations; NaN where `distance_M` is.

    Permutations are drawn until, for every metric, `enough` of them lie as far out, and `most` at most: Besag &
    Clifford's sequential p-value (1991), enough / (the number drawn when that many did), which is as valid as that of a
    fixed number. So large ones cost few permutations, and small ones get the many that a correction over hundreds of
    comparisons asks for. `null_distances(B)` draws B more, (M, B).
    """
    drawn_M, reached_M = np.zeros((2, len(METRICS)), dtype=np.int64)  # permutations in which the metric is defined
    p_M, total, size = np.full(len(METRICS), np.nan), 0, FIRST_BATCH
    while total < most and (undecided_M := np.isnan(p_M) & ~np.isnan(distance_M)).any():
        size = min(size, most - total)
        null_MB = null_distances(size)
        for m in np.flatnonzero(undecided_M):
            null_B = null_MB[m][~np.isnan(null_MB[m])]
            far_B = np.flatnonzero(null_B >= distance_M[m] - TIE)
            if reached_M[m] + len(far_B) >= enough:
                p_M[m] = enough / (drawn_M[m] + far_B[enough - reached_M[m] - 1] + 1)
            reached_M[m] += len(far_B)
            drawn_M[m] += len(null_B)
        total, size = total + size, min(2 * size, LARGEST_BATCH)
    p_M = np.where(np.isnan(p_M), (1 + reached_M) / (1 + drawn_M), p_M)
    p_M = np.where(np.isnan(distance_M) | (drawn_M == 0), np.nan, p_M)
    return dict(zip(METRICS, p_M.tolist(), strict=True))


def fair_coins(n: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """`size` draws of the binomial distribution of n fair coins: the ones among n random bits, which is quicker than
    `generator.binomial` where n is small."""
    if n > 1000:
        return generator.binomial(n, 0.5, size)
    words = generator.integers(0, 2**64, (-(-n // 64), size), dtype=np.uint64)
    if n % 64:
        words[-1] &= np.uint64((1 << (n % 64)) - 1)
    return np.bitwise_count(words).sum(axis=0, dtype=np.int64)


def _permuted_predictions(counts_GLFQ: np.ndarray, size: int, generator) -> np.ndarray:
    """(G, L, Q, B) tables of the quantized predictions, permuted over the groups within each (label, FP32 one)."""
    n_classes = counts_GLFQ.shape[1]
    quantized_GLQB = np.zeros((*counts_GLFQ.shape[:3], size), dtype=np.float32)
    for label in range(n_classes):
        for f in range(n_classes):
            of_G, of_Q = counts_GLFQ[:, label, f].sum(axis=1), counts_GLFQ[:, label, f].sum(axis=0)
            quantized_GLQB[:, label] += _permuted_table(of_G, of_Q, size, generator)
    return quantized_GLQB


def _permuted_table(n_G: np.ndarray, n_Q: np.ndarray, replicates: int, generator) -> np.ndarray:
    """(G, Q, B) tables with the given margins, as random permutations make them."""
    tables_GQB = np.zeros((len(n_G), len(n_Q), replicates), dtype=np.float32)
    most = int(np.argmax(n_Q))  # the fewest draws: the most frequent prediction gets what is left
    rest_GB = np.repeat(n_G[:, None], replicates, axis=1)
    is_first = True
    for q in np.flatnonzero(n_Q):
        if q == most:
            continue
        if is_first:
            method = "count" if n_Q[q] < FEW else "marginals"  # one by one, or group by group
            drawn_BG = generator.multivariate_hypergeometric(n_G, n_Q[q], size=replicates, method=method)
            drawn_GB, is_first = drawn_BG.T, False
        else:
            drawn_GB = _hypergeometric(rest_GB, int(n_Q[q]), generator)
        tables_GQB[:, q] = drawn_GB
        rest_GB = rest_GB - drawn_GB
    tables_GQB[:, most] = rest_GB
    return tables_GQB


def _hypergeometric(colours_GB: np.ndarray, n: int, generator) -> np.ndarray:
    """Draw n without replacement from urns that differ between replicates, colour by colour."""
    drawn_GB = np.zeros_like(colours_GB)
    left_B, others_B = np.full(colours_GB.shape[1], n), colours_GB.sum(axis=0)
    for g, colour_B in enumerate(colours_GB):
        others_B = others_B - colour_B
        drawn_GB[g] = generator.hypergeometric(colour_B, others_B, left_B)
        left_B = left_B - drawn_GB[g]
    return drawn_GB


def _change(counts_GLFQ: np.ndarray, eligible_G: np.ndarray) -> np.ndarray:
    """(M,) quantized - FP32, in the precision of the permuted ones."""
    quantized, fp32 = (counts_GLFQ.sum(axis=axis)[..., None].astype(np.float32) for axis in (2, 3))
    return (table_metrics(quantized, eligible_G) - table_metrics(fp32, eligible_G))[:, 0]


# --- does any group lose more -----------------------------------------------------------------------------------------


def max_t_losses(
    gained_PG: np.ndarray,
    lost_PG: np.ndarray,
    n_G: np.ndarray,
    replicates: int,
    *,
    generator: np.random.Generator,
    apply: Callable[[Callable, Sequence], Iterable] = map,
) -> np.ndarray:
    """(P, G) step-down max-T p-values of "this group loses more than the other groups together", for P pairs of models
    measured on the same images. The groups given are the family.

    Under the null hypothesis the images that a pair gains or loses are a random subset of all, so the null
    distribution depends on a pair only through how many those are; one permutation of the group labels therefore serves
    all pairs: the first images of the permutation are those lost, the next ones those gained. `apply` may run the
    blocks of permutations side by side.
    """
    gained_PG, lost_PG, n_G = np.atleast_2d(gained_PG), np.atleast_2d(lost_PG), np.asarray(n_G)
    if len(n_G) < 2:
        return np.full(gained_PG.shape, np.nan)
    ends_P2 = np.stack([lost_PG.sum(axis=1), (lost_PG + gained_PG).sum(axis=1)], axis=1)
    marks_S, places = np.unique(ends_P2, return_inverse=True)
    lost_at_P, both_at_P = places.reshape(ends_P2.shape).T
    n_G = n_G.astype(np.float32)
    observed_PG = excess_loss(gained_PG.astype(np.float32), lost_PG.astype(np.float32), n_G)
    order_PG = np.argsort(-observed_PG, axis=1, kind="stable")
    sorted_PG = np.take_along_axis(observed_PG, order_PG, axis=1)
    bound_PG = sorted_PG - 1e-5 * np.abs(sorted_PG)  # ties up to rounding count
    in_order = (np.arange(len(order_PG))[:, None] * len(n_G) + order_PG).ravel()
    labels_N = np.repeat(np.arange(len(n_G)), n_G.astype(int))
    n_marked = int(marks_S[-1])  # the images after these are neither lost nor gained in any pair
    segment_M = np.searchsorted(marks_S, np.arange(n_marked), side="right") * len(n_G)
    per_chunk = max(1, CHUNK // (observed_PG.size + marks_S.size * len(n_G)))

    def one_block(block: tuple[np.random.Generator, int]) -> np.ndarray:
        """How many of the permutations reach what was observed."""
        generator, size = block
        at_least_PG = np.zeros(observed_PG.shape, dtype=np.int64)
        for start in range(0, size, per_chunk):
            cumulated_BSG = np.empty((min(per_chunk, size - start), len(marks_S), len(n_G)), dtype=np.float32)
            for cumulated_SG in cumulated_BSG:
                drawn_M = labels_N[generator.choice(len(labels_N), n_marked, replace=False)]
                counts = np.bincount(segment_M + drawn_M, minlength=len(marks_S) * len(n_G))
                np.cumsum(counts.reshape(-1, len(n_G)), axis=0, out=cumulated_SG, dtype=np.float32)
            lost_BPG = cumulated_BSG[:, lost_at_P]
            gained_BPG = cumulated_BSG[:, both_at_P] - lost_BPG
            null_BPG = excess_loss(gained_BPG, lost_BPG, n_G, (gained_PG.sum(axis=1), lost_PG.sum(axis=1)))
            null_BPG = null_BPG.reshape(len(null_BPG), -1)[:, in_order].reshape(null_BPG.shape)
            for g in range(len(n_G) - 2, -1, -1):  # the largest of this group and those observed to lose less
                np.maximum(null_BPG[..., g], null_BPG[..., g + 1], out=null_BPG[..., g])
            at_least_PG += (null_BPG >= bound_PG).sum(axis=0)
        return at_least_PG

    sizes = [min(PERMUTATION_BLOCK, replicates - start) for start in range(0, replicates, PERMUTATION_BLOCK)]
    at_least_PG = sum(apply(one_block, list(zip(generator.spawn(len(sizes)), sizes, strict=True))))
    p_PG = np.maximum.accumulate((1 + at_least_PG) / (1 + replicates), axis=1)
    adjusted_PG = np.empty_like(p_PG)
    np.put_along_axis(adjusted_PG, order_PG, p_PG, axis=1)
    return adjusted_PG


def excess_loss(
    gained_G: np.ndarray, lost_G: np.ndarray, n_G: np.ndarray, totals: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """(..., G) studentized difference between the mean loss of a group and that of all other groups together. `totals`,
    gained and lost over all groups, saves summing them.

    Studentized with each side's own variance, so that groups that flip more without losing more are not taken for
    losers (Janssen 1997), a group's variance being drawn to that of all images by one image's weight: a group of few
    images has none of its own when nothing in it changed.
    """
    gained, lost = (gained_G.sum(axis=-1), lost_G.sum(axis=-1)) if totals is None else totals
    net, squares = ((lost + sign * gained)[..., None].astype(lost_G.dtype) for sign in (-1, 1))
    n = n_G.sum()
    pooled, rest_n_G = squares / n - (net / n) ** 2, n - n_G
    net_G, squares_G = lost_G - gained_G, lost_G + gained_G
    rest_net_G = net - net_G
    mean_G, rest_mean_G = net_G / n_G, rest_net_G / rest_n_G
    variance_G = (squares_G - net_G * mean_G + pooled) / (n_G * (n_G + 1))  # of the mean
    rest_variance_G = (squares - squares_G - rest_net_G * rest_mean_G + pooled) / (rest_n_G * (rest_n_G + 1))
    # 0 only where no image or every image of both sides changed; the means are the same there
    error_G = np.sqrt(np.maximum(variance_G + rest_variance_G, np.finfo(np.float32).tiny))
    return (mean_G - rest_mean_G) / error_G


# --- corrections ------------------------------------------------------------------------------------------------------


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment (Holm 1979): reject where it is <= alpha and the family-wise error is <= alpha."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, stepped)
    return adjusted


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values: reject where they are <= q and the expected share of false rejections is <= q (1995)."""
    from scipy.stats import false_discovery_control

    p = np.asarray(p, dtype=float)
    return false_discovery_control(p, method="bh") if p.size else p.copy()


# --- effect sizes over seeds ------------------------------------------------------------------------------------------


def cohens_d(first: np.ndarray, second: np.ndarray) -> float:
    """(mean of first - mean of second) / pooled standard deviation; NaN with fewer than two values a side, or no
    spread."""
    first, second = (values[~np.isnan(values)] for values in (np.asarray(first, float), np.asarray(second, float)))
    if min(len(first), len(second)) < 2:
        return float("nan")
    freedom = len(first) + len(second) - 2
    pooled = ((len(first) - 1) * first.var(ddof=1) + (len(second) - 1) * second.var(ddof=1)) / freedom
    return float((first.mean() - second.mean()) / np.sqrt(pooled)) if pooled > 0 else float("nan")


def hedges_g(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's d times the exact correction for its bias in small samples (Hedges 1981): with 2 + 2 values 0.56."""
    freedom = np.sum(~np.isnan(first)) + np.sum(~np.isnan(second)) - 2
    if freedom < 2:
        return float("nan")
    bias = np.exp(gammaln(freedom / 2) - gammaln((freedom - 1) / 2)) * np.sqrt(2 / freedom)
    return cohens_d(first, second) * float(bias)


# --- what could have been seen ----------------------------------------------------------------------------------------


def detectable_difference(n, discordant, level: float = 0.95, power: float = 0.8) -> np.ndarray:
    """The smallest |paired difference in accuracy| that McNemar's test finds with `power` in n images, elementwise.

    Connor's sample size formula (Biometrics 1987) solved for the difference, at the share of discordant images that was
    observed; and at least what so few images can show at all, every discordant one falling the same way: a share of
    which the test's smallest significant count is reached with `power`. NaN where no outcome would be significant.
    """
    n, discordant = np.broadcast_arrays(np.asarray(n, float), np.asarray(discordant, float))
    z_a, z_b = float(ndtri((1 + level) / 2)), float(ndtri(power))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = discordant / n
        root = np.sqrt(np.maximum(z_a**2 * share - (1 + z_b**2 / n) * (z_a**2 - z_b**2) * share, 0))
        by_formula = (z_a * np.sqrt(share) + root) / (1 + z_b**2 / n) / np.sqrt(n)
    fewest = next(k for k in range(1, 100) if mcnemar_midp(0, k) <= 1 - level + 1e-12)
    is_possible = n >= fewest
    at_least = betaincinv(fewest, np.where(is_possible, n - fewest + 1, 1), power)
    return np.where(is_possible, np.fmax(by_formula, at_least), np.nan)


def detectable_change_of_rate(n, rate, level: float = 0.95, power: float = 0.8) -> np.ndarray:
    """The smallest drop from a known `rate` that n independent images show with `power`, elementwise: an exact
    two-sided binomial test's lower tail. NaN where even 0 successes would not be significant."""
    from scipy.stats import binom

    n, rate = np.broadcast_arrays(np.asarray(n, float), np.asarray(rate, float))
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):
        critical = np.where(n > 0, binom.ppf(tail, n, rate), np.nan)
        critical = np.where(bdtr(critical, n.astype(int), rate) <= tail, critical, critical - 1)  # the largest refused
    is_possible = critical >= 0
    # The alternative at which P(X <= critical) = power.
    safe = np.where(is_possible, critical, 0)
    alternative = 1 - betaincinv(np.maximum(n - safe, 1), safe + 1, power)
    return np.where(is_possible, rate - alternative, np.nan)
