"""Joint resampling of the test images that all cells of a data set share.

Every model is measured on the same images, so a replicate draws the images once for all of them, stratified by group:
what the models have in common is kept, and averages over models get the interval that they deserve. All differences are
paired (cell - reference on the same images) and in percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from group_counts import group_metrics
from result_rows import main_settings
from store import seed_for

COLLAPSED = 0.99  # share of one predicted class


@dataclass(frozen=True)
class TestSet:
    """The test images of one data set and what each cell predicted for them."""

    __test__ = False  # not a pytest class

    dataset: str
    attribute: str
    label_N: np.ndarray
    group_N: np.ndarray  # codes of the attribute
    group_names: Sequence[str]
    intersection_N: np.ndarray  # codes of the product of all attributes
    intersection_names: Sequence[str]
    n_classes: int
    min_group_size: int
    predictions: Mapping[str, np.ndarray] = field(repr=False)  # cell -> (N,) predicted classes

    def is_collapsed(self, cell: str) -> bool:
        """Whether the cell gives one class to nearly every image: its small gaps say nothing about fairness."""
        return bool(np.bincount(self.predictions[cell]).max() / len(self.label_N) >= COLLAPSED)

    @property
    def n(self) -> int:
        return len(self.label_N)

    def correct(self, cell: str) -> np.ndarray:
        return self.predictions[cell] == self.label_N

    def eligible(self, codes_N: np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Codes of the groups that are large enough."""
        return np.flatnonzero(np.bincount(codes_N, minlength=len(names)) >= self.min_group_size)


@dataclass(frozen=True)
class JointBootstrap:
    """The finished cells with their test sets; each method gives observed values and `replicates` resampled ones."""

    rows: pd.DataFrame  # finished cells, with labels
    test_sets: Mapping[str, TestSet]
    replicates: int
    level: float

    @property
    def equivalence_level(self) -> float:
        return round(1 - 2 * (1 - self.level), 10)

    def pairs(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows that have a finished FP32 cell to be compared with."""
        done = {cell for test_set in self.test_sets.values() for cell in test_set.predictions}
        has_both = rows["baseline_cell"].isin(done) & rows["cell"].isin(done) & (rows["cell"] != rows["baseline_cell"])
        return rows[has_both].reset_index(drop=True)

    def main_pairs(self, width: str) -> pd.DataFrame:
        """The cells of the main plain setting of a width; none where that setting is not PTQ static."""
        settings = main_settings(self.rows)
        rows = self.rows[self.rows["setting"].isin(settings) & (self.rows["width"] == width)]
        return self.pairs(rows[rows["method"] == "ptq_static"])

    def eligible_groups(self, dataset: str) -> np.ndarray:
        test_set = self.test_sets[dataset]
        return test_set.eligible(test_set.group_N, test_set.group_names)

    def changes(self, pairs: pd.DataFrame, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy of each pair, cell - reference, in points: observed (P,) and resampled (B, P)."""
        observed_P, replicates_BP = np.empty(len(pairs)), np.empty((self.replicates, len(pairs)))
        for name, block in pairs.groupby("dataset", sort=False):
            at, n = block.index.to_numpy(), self.test_sets[name].n
            sums_PG, sums_BPG = self._hits(block, self.test_sets[name].group_N, purpose)
            observed_P[at] = 100 * sums_PG.sum(axis=-1) / n
            replicates_BP[:, at] = 100 * sums_BPG.sum(axis=-1) / n
        return observed_P, replicates_BP

    def group_changes(self, pairs: pd.DataFrame, codes_N: np.ndarray, purpose: str) -> tuple[np.ndarray, np.ndarray]:
        """Likewise for each group of one data set: (P, G) and (B, P, G); an empty group is NaN."""
        n_G = np.bincount(codes_N).astype(float)
        sums_PG, sums_BPG = self._hits(pairs, codes_N, purpose)
        with np.errstate(invalid="ignore"):
            return 100 * sums_PG / n_G, 100 * sums_BPG / n_G

    def sums(self, dataset: str, values_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum of each column over the images of a data set: observed (C,) and, resampled, (B, C).

        The intersectional groups keep their sizes. Any effect whose value for each image is known, such as a group's
        rate (to first order), is such a sum, so that all questions about a data set are one product of matrices.
        """
        test_set = self.test_sets[dataset]
        observed_C = values_NC.sum(axis=0, dtype=np.float64)
        centred_NC = (values_NC - observed_C / test_set.n).astype(np.float32)  # what float32 rounds is the deviation
        replicates_BC = np.empty((self.replicates, values_NC.shape[1]))
        generator = np.random.default_rng(seed_for("analysis", "bootstrap", "sums", dataset))
        for part in _chunks(self.replicates, test_set.n):
            weights_BN = _stratified_weights(test_set.intersection_N, part.stop - part.start, generator)
            replicates_BC[part] = weights_BN @ centred_NC
        replicates_BC += observed_C
        return observed_C, replicates_BC

    def worst_group_excess(self, pairs: pd.DataFrame, purpose: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Loss of the FP32 model's worst group minus loss of all, cross-fitted: (P,), (B, P), and the groups chosen."""
        observed_P, replicates_BP = np.zeros(len(pairs)), np.zeros((self.replicates, len(pairs)))
        chosen: list[str] = []
        for name, block in pairs.groupby("dataset", sort=False):
            test_set = self.test_sets[name]
            half_N = halves(test_set)
            n_groups = len(test_set.group_names)
            codes_N = test_set.group_N + n_groups * half_N
            n_HG = np.bincount(codes_N, minlength=2 * n_groups).reshape(2, n_groups).astype(float)
            sums_PS, sums_BPS = self._hits(block.reset_index(drop=True), codes_N, purpose, 2 * n_groups)
            for p, (position, row) in enumerate(block.iterrows()):
                correct_N = test_set.correct(row["baseline_cell"])
                hits_HG = np.bincount(codes_N, weights=correct_N, minlength=2 * n_groups).reshape(2, n_groups)
                eligible = self.eligible_groups(name)
                eligible = eligible[(n_HG[:, eligible] > 0).all(axis=0)]
                for half in (0, 1):
                    worst = eligible[np.argmin(hits_HG[half, eligible] / n_HG[half, eligible])]
                    chosen.append(str(test_set.group_names[worst]))
                    other = 1 - half
                    at = slice(other * n_groups, (other + 1) * n_groups)
                    for sums, into in ((sums_PS[p], observed_P), (sums_BPS[:, p], replicates_BP.T)):
                        gain = sums[..., other * n_groups + worst] / n_HG[other, worst]
                        overall = sums[..., at].sum(axis=-1) / n_HG[other].sum()
                        into[position] += 100 * (overall - gain) / 2
        return observed_P, replicates_BP, sorted(set(chosen))

    def gap_changes(self, pairs: pd.DataFrame, metric: str, purpose: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Metric of cell - reference in points: observed (P,), bootstrap (B, P), and under random swaps (B, P)."""
        observed_P = np.empty(len(pairs))
        replicates_BP, swapped_BP = np.empty((2, self.replicates, len(pairs)))
        for name, block in pairs.groupby("dataset", sort=False):
            test_set, at = self.test_sets[name], block.index.to_numpy()
            eligible_G = np.zeros(len(test_set.group_names), dtype=bool)
            eligible_G[self.eligible_groups(name)] = True
            both_N2P = np.stack(
                [np.stack([test_set.predictions[c] for c in block[k]], axis=1) for k in ("cell", "reference")], axis=1
            )

            def change(
                weights_BN, swap_BN=None, test_set=test_set, eligible_G=eligible_G, both_N2P=both_N2P
            ) -> np.ndarray:
                counts_B2PGLK = _weighted_counts(weights_BN, test_set, both_N2P)
                if swap_BN is not None:  # an image whose two predictions change places
                    moved_B2PGLK = _weighted_counts(swap_BN, test_set, both_N2P)
                    counts_B2PGLK = counts_B2PGLK - moved_B2PGLK + moved_B2PGLK[:, ::-1]
                values_B2P = group_metrics(counts_B2PGLK, eligible=eligible_G)[metric]
                return 100 * (values_B2P[:, 0] - values_B2P[:, 1])

            ones_1N = np.ones((1, test_set.n), dtype=np.float32)
            observed_P[at] = change(ones_1N)[0]
            bootstrap = np.random.default_rng(seed_for("analysis", "bootstrap", purpose, name))
            swaps = np.random.default_rng(seed_for("analysis", "swaps", purpose, name))
            cells = 2 * len(block) * len(eligible_G) * test_set.n_classes**2
            for part in _chunks(self.replicates, test_set.n + cells):
                size = part.stop - part.start
                replicates_BP[part, at] = change(_stratified_weights(test_set.group_N, size, bootstrap))
                swap_BN = swaps.integers(0, 2, size=(size, test_set.n)).astype(np.float32)
                swapped_BP[part, at] = change(ones_1N, swap_BN)
        return observed_P, replicates_BP, swapped_BP

    def _hits(
        self, pairs: pd.DataFrame, strata_N: np.ndarray, purpose: str, n_strata: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images won minus images lost against FP32 in each stratum of one data set: (P, S) and, resampled, (B, P, S).

        The images of a replicate are the same for every pair.
        """
        name = pairs["dataset"].iloc[0]
        test_set = self.test_sets[name]
        n_strata = n_strata or int(strata_N.max()) + 1
        won_NP = np.stack(
            [
                test_set.correct(cell).astype(np.float32) - test_set.correct(reference)
                for cell, reference in zip(pairs["cell"], pairs["baseline_cell"], strict=True)
            ],
            axis=1,
        ).astype(np.float32)
        members = [np.flatnonzero(strata_N == s) for s in range(n_strata)]
        observed_PS = np.stack([won_NP[member].sum(axis=0) for member in members], axis=-1).astype(float)
        replicates_BPS = np.empty((self.replicates, len(pairs), n_strata))
        generator = np.random.default_rng(seed_for("analysis", "bootstrap", purpose, name))
        for part in _chunks(self.replicates, test_set.n):
            weights_BN = _stratified_weights(strata_N, part.stop - part.start, generator)
            for s, member in enumerate(members):
                replicates_BPS[part, :, s] = weights_BN[:, member] @ won_NP[member]
        return observed_PS, replicates_BPS


def _stratified_weights(strata_N: np.ndarray, replicates: int, generator: np.random.Generator) -> np.ndarray:
    """(B, N): how often each image is drawn when every stratum is resampled with replacement to its own size."""
    weights_BN = np.zeros((replicates, len(strata_N)), dtype=np.float32)
    for stratum in np.unique(strata_N):
        member = np.flatnonzero(strata_N == stratum)
        drawn_BM = generator.integers(0, len(member), size=(replicates, len(member)))
        drawn_BM += len(member) * np.arange(replicates)[:, None]
        counts = np.bincount(drawn_BM.ravel(), minlength=replicates * len(member))
        weights_BN[:, member] = counts.reshape(replicates, len(member))
    return weights_BN


def _weighted_counts(weights_BN: np.ndarray, test_set: TestSet, predictions_NXP: np.ndarray) -> np.ndarray:
    """(B, X, P, G, L, K) count tables of predictions (N, X, P) with the images weighted by (B, N)."""
    n_groups, k = len(test_set.group_names), test_set.n_classes
    shape = predictions_NXP.shape[1:]
    counts = np.zeros((len(weights_BN), *shape, n_groups, k, k))
    for g in range(n_groups):
        for label in range(k):
            member = np.flatnonzero((test_set.group_N == g) & (test_set.label_N == label))
            if len(member):
                is_class = (predictions_NXP[member][..., None] == np.arange(k)).astype(np.float32)
                totals = weights_BN[:, member] @ is_class.reshape(len(member), -1)
                counts[..., g, label, :] = totals.reshape(len(weights_BN), *shape, k)
    return counts


def _chunks(total: int, width: int, budget: int = 8_000_000) -> Iterator[slice]:
    """Slices of `range(total)` such that `slice x width` numbers stay within the budget."""
    step = max(1, budget // max(1, width))
    for start in range(0, total, step):
        yield slice(start, min(total, start + step))


def halves(test_set: TestSet) -> np.ndarray:
    """0 or 1 for each image: a random half of every (group, label), the same whatever cells there are."""
    generator = np.random.default_rng(seed_for("analysis", "halves", test_set.dataset))
    half_N = np.zeros(test_set.n, dtype=np.int64)
    strata_N = test_set.group_N * test_set.n_classes + test_set.label_N
    for position, stratum in enumerate(np.unique(strata_N)):
        member = generator.permutation(np.flatnonzero(strata_N == stratum))
        half_N[member[(len(member) + position % 2) // 2 :]] = 1  # odd strata give their extra image in turn
    return half_N


def equal_weights(pairs: pd.DataFrame, where: pd.Series | None = None) -> np.ndarray:
    """(P,) weights that sum to 1: every (data set, model) counts the same, and within it every pair."""
    where = pd.Series(True, index=pairs.index) if where is None else where
    keys = list(zip(pairs["dataset"], pairs["model"], strict=True))
    among = [key for key, is_in in zip(keys, where, strict=True) if is_in]
    each = {key: 1 / (len(set(among)) * among.count(key)) for key in set(among)}
    return np.array([each[key] if is_in else 0.0 for key, is_in in zip(keys, where, strict=True)])


def nan_mean(values_BP: np.ndarray, weights_P: np.ndarray) -> np.ndarray:
    """(B,) weighted mean over the pairs that are defined in a replicate; NaN where none is."""
    is_defined = ~np.isnan(values_BP)
    total_B = np.where(is_defined, values_BP, 0.0) @ weights_P
    with np.errstate(invalid="ignore"):
        return total_B / (is_defined @ weights_P)


def percentile_interval(values_B: np.ndarray, level: float) -> tuple[float, float]:
    values_B = values_B[~np.isnan(values_B)]
    if not len(values_B):
        return math.nan, math.nan
    low, high = np.quantile(values_B, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_ends(values_B: np.ndarray, level: float) -> dict[str, float]:
    low, high = percentile_interval(values_B, level)
    return {"ci_low": low, "ci_high": high}
