"""Limits of a rate, of a difference of rates and of a paired difference that hold for small groups, near 0 and near 1.

Which method where was decided by exact enumeration of every table of n images; tests/test_significance_simulations.py
does it, for these and for those that were rejected:

a rate, two-sided            `midp_interval`: exact binomial, half of the observed outcome's probability counted
                             (Lancaster 1961; Berry & Armitage 1995). Wilson's interval covers too little where a
                             fraction of a success is expected, which is where flips of an 8-bit model are; Clopper &
                             Pearson's covers too much; the bootstrap's percentile interval is the point 0 where no
                             success is seen
a paired difference,         `paired_difference_interval`: Tango's score interval (1998), from n = 5 on; the
two-sided                    percentile interval fails where few pairs are discordant
one-sided, to certify        Clopper & Pearson, Newcombe's combination of them, and Tango's score with a continuity
                             correction: see certification.py
"""

import numpy as np
from scipy.special import betainc, betaincinv, ndtr, ndtri

CONTINUITY = 1.0  # images, against the claim, in Tango's score (Edwards 1948)
BISECTIONS = 60


def proportion_limits(successes, n, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Clopper & Pearson's lower and upper limit of a proportion, each one-sided at `level`, elementwise; NaN where n is
    0. Counts may be fractions (the beta distribution does not mind)."""
    successes, n = np.broadcast_arrays(np.asarray(successes, float), np.asarray(n, float))
    failures = n - successes
    has_low, has_high = successes > 0, failures > 0
    low = betaincinv(np.where(has_low, successes, 1), failures + 1, 1 - level)
    high = betaincinv(successes + 1, np.where(has_high, failures, 1), level)
    return (
        np.where(n > 0, np.where(has_low, low, 0.0), np.nan),
        np.where(n > 0, np.where(has_high, high, 1.0), np.nan),
    )


def midp_interval(successes, n, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Two-sided mid-p interval of a proportion, elementwise; NaN where n is 0."""
    both = np.stack(np.broadcast_arrays(np.asarray(successes, float), np.asarray(n, float)), axis=-1)
    distinct, places = np.unique(both.reshape(-1, 2), axis=0, return_inverse=True)  # a study's counts repeat
    successes, n = distinct.T
    tail = (1 - level) / 2
    low = np.where(successes > 0, _where_midp_is(tail, successes, n), 0.0)
    high = np.where(successes < n, _where_midp_is(1 - tail, successes, n), 1.0)
    places = places.reshape(both.shape[:-1])
    return np.where(n > 0, low, np.nan)[places], np.where(n > 0, high, np.nan)[places]


def _where_midp_is(target: float, successes: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The p with P(X > successes) + P(X = successes) / 2 = target; the left side rises in p."""
    has_some, has_rest = successes > 0, successes < n
    low, high = np.zeros_like(successes), np.ones_like(successes)
    for _ in range(BISECTIONS):
        p = (low + high) / 2
        more = np.where(has_rest, betainc(successes + 1, np.where(has_rest, n - successes, 1), p), 0.0)
        as_many = np.where(has_some, betainc(np.where(has_some, successes, 1), n - successes + 1, p), 1.0)
        is_below = (more + as_many) / 2 < target
        low, high = np.where(is_below, p, low), np.where(is_below, high, p)
    return (low + high) / 2


def difference_limits(successes_1, n_1, successes_2, n_2, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limit of the difference of two independent proportions p_1 - p_2, each one-sided at `level`."""
    low_1, high_1 = proportion_limits(successes_1, n_1, level)
    low_2, high_2 = proportion_limits(successes_2, n_2, level)
    with np.errstate(invalid="ignore"):
        p_1, p_2 = np.true_divide(successes_1, n_1), np.true_divide(successes_2, n_2)
    difference = p_1 - p_2
    return difference - np.hypot(p_1 - low_1, high_2 - p_2), difference + np.hypot(high_1 - p_1, p_2 - low_2)


def paired_difference_limits(
    broken, mended, n, level: float, continuity: float = CONTINUITY
) -> tuple[np.ndarray, np.ndarray]:
    """Tango's lower and upper limit of (broken - mended) / n, each one-sided at `level`, elementwise; NaN where n is 0.

    Of n pairs, `broken` are successes of the first alone and `mended` of the second alone. With `continuity` 0 these
    are the limits that Tango published.
    """
    broken, mended, n = np.broadcast_arrays(*(np.asarray(count, float) for count in (broken, mended, n)))
    z = float(ndtri(level))
    return -_tango_upper(mended, broken, n, z, continuity), _tango_upper(broken, mended, n, z, continuity)


def paired_difference_interval(gained, lost, n, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Tango's two-sided score interval of (gained - lost) / n, elementwise; NaN where n is 0."""
    return paired_difference_limits(gained, lost, n, (1 + level) / 2, continuity=0.0)


def equivalence_p(gained, lost, n, margin: float) -> np.ndarray:
    """p of the two one-sided tests (Schuirmann 1987) that (gained - lost) / n lies within ±margin, elementwise.

    Each is Tango's score test with the continuity correction, which is wrong at most 5.1 % of the time at 5 % (without
    it 6.9 %, see certification.py). NaN where n is 0. That every one of several groups lies within is shown by the
    largest of their p-values, without a correction: an intersection-union test (Berger 1982).
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin must be between 0 and 1, not {margin}")
    gained, lost, n = np.broadcast_arrays(*(np.asarray(count, float) for count in (gained, lost, n)))
    below = ndtr(tango_score(gained, lost, n, margin, CONTINUITY))  # against: the difference is +margin or more
    above = ndtr(tango_score(lost, gained, n, margin, CONTINUITY))
    return np.where(n > 0, np.minimum(1.0, np.maximum(below, above)), np.nan)


def tango_score(broken, mended, n, difference, continuity: float = 0.0) -> np.ndarray:
    """Tango (1998), equations 24 to 26: (b - c - n d) / sqrt(n (2 q + d (1 - d))), q the maximum likelihood estimate of
    the probability of `mended` where that of `broken` is larger by d; 0/0 is 0."""
    a = 2 * n
    b = -broken - mended + (2 * n - broken + mended) * difference
    c = -mended * difference * (1 - difference)
    with np.errstate(invalid="ignore", divide="ignore"):
        q = (np.sqrt(np.maximum(b * b - 4 * a * c, 0)) - b) / (2 * a)
        variance = np.maximum(n * (2 * q + difference * (1 - difference)), 0)
        distance = broken - mended - n * difference + continuity
        return np.where(distance == 0, 0.0, distance / np.sqrt(variance))


def _tango_upper(broken: np.ndarray, mended: np.ndarray, n: np.ndarray, z: float, continuity: float) -> np.ndarray:
    """Where the score, which falls in the difference, reaches -z."""
    with np.errstate(invalid="ignore"):
        low = np.where(n > 0, (broken - mended) / n, np.nan)
    high = np.ones_like(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_possible = tango_score(broken, mended, n, middle, continuity) > -z
        low, high = np.where(is_possible, middle, low), np.where(is_possible, high, middle)
    return np.where(np.isnan(low), np.nan, high)
