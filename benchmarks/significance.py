"""All intervals of one model, 20,000 images in 14 groups: ours beside fairlearn's MetricFrame(n_boot=...).

    python benchmarks/significance.py [--fairlearn-replicates 40] [--replicates 10000]

Both resample the same images with replacement and give 95 % percentile intervals of the same numbers: of accuracy,
selection rate, true and false positive rate and positive predictive value the rate of every group, the rate over all
and the largest difference between groups; of accuracy the lowest group too. Ours adds the equalized odds metrics and
the balanced accuracy, which MetricFrame has not.

fairlearn is run with few replicates and its seconds are multiplied up to as many as ours: a replicate costs it the
same each time. That both give the same is checked with the replicates there are: each end of each interval may differ
by 5 standard errors of a quantile of so few draws (Maritz & Jarrett 1978, computed from our 10,000). Several medians
of both, taking turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import fairlearn.metrics as fairlearn
import numpy as np
from scipy.stats import beta
from sklearn.metrics import accuracy_score, precision_score

from group_counts import METRICS, count_table
from significance import intervals as significance
from significance.batched_metrics import table_metrics
from significance.intervals import GROUP_RATES, all_intervals

N, GROUPS, LEVEL = 20_000, 14, 0.95
GAPS = {
    "accuracy": "accuracy_gap",
    "selection_rate": "demographic_parity_difference",
    "true_positive_rate": "equal_opportunity_difference",
    "false_positive_rate": "predictive_equality_difference",
    "positive_predictive_value": "predictive_parity_difference",
}
REFERENCE = {
    "accuracy": accuracy_score,
    "selection_rate": fairlearn.selection_rate,
    "true_positive_rate": fairlearn.true_positive_rate,
    "false_positive_rate": fairlearn.false_positive_rate,
    "positive_predictive_value": precision_score,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--fairlearn-replicates", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    group_N, label_N = rng.integers(0, GROUPS, N), rng.integers(0, 2, N)
    prediction_N = np.where(rng.random(N) < 0.8 + 0.01 * group_N, label_N, 1 - label_N)

    our_seconds, their_seconds, frames = [], [], []
    for turn in range(arguments.rounds):
        started = time.perf_counter()
        counts = count_table(group_N, label_N, prediction_N, GROUPS, 2)
        ours = all_intervals(counts, 20, arguments.replicates, LEVEL, generator=np.random.default_rng(turn))
        our_seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        frame = fairlearn.MetricFrame(
            metrics=REFERENCE,
            y_true=label_N,
            y_pred=prediction_N,
            sensitive_features=group_N,
            n_boot=arguments.fairlearn_replicates,
            ci_quantiles=[(1 - LEVEL) / 2, (1 + LEVEL) / 2],
            random_state=turn,
        )
        theirs = [frame.overall_ci, frame.by_group_ci, frame.difference_ci(), frame.group_min_ci()]
        their_seconds.append(time.perf_counter() - started)
        frames.append(theirs)
    seconds, few = statistics.median(our_seconds), statistics.median(their_seconds)
    extrapolated = few * arguments.replicates / arguments.fairlearn_replicates
    print("| what | replicates | seconds (median) |\n|---|---|---|")
    print(f"| ours, measured | {arguments.replicates} | {seconds:.3f} |")
    print(f"| fairlearn, measured | {arguments.fairlearn_replicates} | {few:.1f} |")
    print(f"| fairlearn, extrapolated from the line above | {arguments.replicates} | {extrapolated:.0f} |")
    print(f"\nratio {extrapolated / seconds:,.0f} (rounds: ours {our_seconds}, fairlearn {their_seconds})")

    compared, worst = compare(counts, ours, frames, arguments)
    print(f"\n{compared} interval ends compared, largest difference {worst:.1f} Monte-Carlo standard errors (bound 5)")
    if worst > 5:
        raise SystemExit("the intervals differ by more than Monte-Carlo error")
    if extrapolated / seconds < 10_000:
        raise SystemExit("less than 10,000 times faster")


def compare(counts: np.ndarray, ours, frames, arguments) -> tuple[int, float]:
    """Ends of fairlearn's intervals, mean over the rounds, against ours: how many, and the worst difference in standard
    errors of such a mean of quantiles."""
    rng = np.random.default_rng(99)
    tables = np.concatenate(list(significance._resampled(counts, arguments.replicates, rng)), axis=-1)
    draws = dict(zip(METRICS, table_metrics(tables, np.ones(GROUPS, bool)), strict=True))
    rates = dict(zip(GROUP_RATES, significance._group_rates(tables), strict=True))
    of_all = dict(zip(GROUP_RATES, significance._group_rates(tables.sum(axis=0, keepdims=True)), strict=True))
    compared, worst = 0, 0.0

    def check(end: int, mine: float, theirs: list[float], draws_B: np.ndarray) -> None:
        nonlocal compared, worst
        mean, error = quantile_moments(draws_B, (1 + (2 * end - 1) * LEVEL) / 2, arguments.fairlearn_replicates)
        # The quantile of so few draws is also biased: what is expected of it is `mean`, our own interval's end moved.
        shift = mean - float(np.quantile(draws_B, (1 + (2 * end - 1) * LEVEL) / 2))
        compared += 1
        worst = max(worst, abs(statistics.fmean(theirs) - mine - shift) / (error / np.sqrt(arguments.rounds)))

    for end in (0, 1):
        for rate in GROUP_RATES:
            for g in range(GROUPS):
                theirs = [frame[1][end][rate].to_numpy()[g] for frame in frames]
                check(end, ours.groups[rate][g, end], theirs, rates[rate][g])
            check(end, ours.metrics[GAPS[rate]][end], [frame[2][end][rate] for frame in frames], draws[GAPS[rate]])
            mine = float(np.quantile(of_all[rate][0], (1 + (2 * end - 1) * LEVEL) / 2))
            mine = ours.metrics["accuracy"][end] if rate == "accuracy" else mine
            check(end, mine, [frame[0][end][rate] for frame in frames], of_all[rate][0])
        theirs = [frame[3][end]["accuracy"] for frame in frames]
        check(end, ours.metrics["worst_group_accuracy"][end], theirs, draws["worst_group_accuracy"])
    return compared, worst


def quantile_moments(draws_B: np.ndarray, share: float, n: int) -> tuple[float, float]:
    """Mean and standard error of numpy's quantile of n draws from the distribution of the many draws `draws_B`: of the
    two order statistics that it lies between, weighted (their spread is that of the nearer one)."""
    place = share * (n - 1)
    below = int(np.floor(place))
    ordered = np.sort(draws_B)
    edges = np.linspace(0, 1, len(ordered) + 1)
    moments = []
    for k in (below, min(below + 1, n - 1)):
        weights = np.diff(beta.cdf(edges, k + 1, n - k))
        mean = weights @ ordered
        moments.append((mean, np.sqrt(weights @ (ordered - mean) ** 2)))
    part = place - below
    mean = (1 - part) * moments[0][0] + part * moments[1][0]
    return float(mean), float(max(moments[0][1], moments[1][1]))


if __name__ == "__main__":
    main()
