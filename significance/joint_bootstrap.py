"""Joint resampling of the test images that all cells of a data set share.

Every model is measured on the same images, so a replicate draws the images once for all of them: what the models have
in common is kept, and averages over models get the interval that they deserve. All differences are paired (cell -
reference on the same images) and in percentage points.

A replicate is a weight for each image, how often it was drawn. What is asked of it are counts: how many images of a
(group, label) got a prediction, in hundreds of cells. That is a matrix product of the weights with what was predicted,
in float32, which is exact for counts below 2^24.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from group_counts import METRICS
from significance.batched_metrics import table_metrics
from store import seed_for

BLOCK = 250  # replicates drawn by one generator, so that the draws do not depend on how many threads there are
MAX_THREADS = 4  # each holds a block
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

    def pairs(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows that have a finished FP32 cell to be compared with."""
        done = {cell for test_set in self.test_sets.values() for cell in test_set.predictions}
        has_both = rows["baseline_cell"].isin(done) & rows["cell"].isin(done) & (rows["cell"] != rows["baseline_cell"])
        return rows[has_both].reset_index(drop=True)

    def eligible_groups(self, dataset: str) -> np.ndarray:
        test_set = self.test_sets[dataset]
        return test_set.eligible(test_set.group_N, test_set.group_names)

    def changes(self, pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy of each pair, cell - FP32, in points: observed (P,) and resampled (B, P)."""
        observed_P, replicates_BP = np.empty(len(pairs)), np.empty((self.replicates, len(pairs)))
        for name, block in pairs.groupby("dataset", sort=False):
            test_set, at = self.test_sets[name], block.index.to_numpy()
            won_NP = np.stack(
                [
                    test_set.correct(cell).astype(np.float32) - test_set.correct(reference)
                    for cell, reference in zip(block["cell"], block["baseline_cell"], strict=True)
                ],
                axis=1,
            )
            observed_P[at], replicates_BP[:, at] = self.sums(name, won_NP * (100 / test_set.n))
        return observed_P, replicates_BP

    def sums(self, dataset: str, values_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum of each column over the images of a data set: observed (C,) and, resampled, (B, C).

        Any effect whose value for each image is known, such as a group's rate (to first order), is such a sum, so that
        all questions about a data set are one product of matrices.
        """
        test_set = self.test_sets[dataset]
        observed_C = values_NC.sum(axis=0, dtype=np.float64)
        centred_NC = (values_NC - observed_C / test_set.n).astype(np.float32)  # what float32 rounds is the deviation
        replicates_BC = np.empty((self.replicates, values_NC.shape[1]))
        weights_BN = image_weights(test_set, self.replicates)

        def one_block(part: slice) -> None:
            replicates_BC[part] = weights_BN[part].astype(np.float32) @ centred_NC

        in_blocks(one_block, self.replicates)
        replicates_BC += observed_C
        return observed_C, replicates_BC

    def gap_changes(self, pairs: pd.DataFrame, metric: str, purpose: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Metric of cell - reference in points: observed (P,), bootstrap (B, P), and under random swaps (B, P)."""
        observed_P = np.empty(len(pairs))
        replicates_BP, swapped_BP = np.empty((2, self.replicates, len(pairs)))
        for name, block in pairs.groupby("dataset", sort=False):
            test_set, at = self.test_sets[name], block.index.to_numpy()
            eligible_G = np.zeros(len(test_set.group_names), dtype=bool)
            eligible_G[self.eligible_groups(name)] = True
            cells = [*block["cell"], *block["reference"]]
            tables = ReplicateTables(test_set, cells, test_set.group_N, len(test_set.group_names))
            weights_BN = image_weights(test_set, self.replicates)
            whole = tables.count(np.ones((1, test_set.n), dtype=np.float32))

            def change(counts_GLKBX, eligible_G=eligible_G) -> np.ndarray:
                values_B2P = table_metrics(counts_GLKBX, eligible_G)[METRICS.index(metric)]
                first, second = np.split(values_B2P, 2, axis=-1)
                return 100 * (first - second)

            def one_block(part: slice, tables=tables, weights_BN=weights_BN, whole=whole, name=name, at=at) -> None:
                replicates_BP[part, at] = change(tables.count(weights_BN[part]))
                # an image whose two predictions change places, in every pair at once
                generator = np.random.default_rng(seed_for("analysis", "swaps", purpose, name, part.start))
                size, n = part.stop - part.start, weights_BN.shape[1]
                bits = np.frombuffer(generator.bytes(size * -(-n // 8)), dtype=np.uint8).reshape(size, -1)
                moved = tables.count(np.unpackbits(bits, axis=1)[:, :n])
                there, back = np.split(moved, 2, axis=-1)
                swapped_BP[part, at] = change(whole - moved + np.concatenate([back, there], axis=-1))

            observed_P[at] = change(whole)[0]
            in_blocks(one_block, self.replicates)
        return observed_P, replicates_BP, swapped_BP


# ----------------------------------------------------------------------------------------------------------- replicates


def image_weights(test_set: TestSet, replicates: int) -> np.ndarray:
    """(B, N) uint8: how often each image is drawn when every intersectional group is resampled with replacement to its
    own size, so that the sizes of all groups are those of the test set."""
    codes = np.ascontiguousarray(test_set.intersection_N, dtype=np.int32)
    return _image_weights(test_set.dataset, codes.tobytes(), replicates)


@functools.lru_cache(maxsize=2)  # every question about a data set is asked of the same images
def _image_weights(dataset: str, codes: bytes, replicates: int) -> np.ndarray:
    codes_N = np.frombuffer(codes, dtype=np.int32)
    place_N = np.argsort(np.argsort(codes_N, kind="stable"))  # of each image where the groups stand one after another
    sizes = np.unique(codes_N, return_counts=True)[1]
    weights_BN = np.empty((replicates, len(codes_N)), dtype=np.uint8)

    def one_block(part: slice) -> None:
        generator = np.random.default_rng(seed_for("analysis", "images", dataset, part.start))
        drawn_BN = np.empty((part.stop - part.start, len(codes_N)), dtype=np.uint32)
        for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
            at = slice(start, start + size)
            drawn_BN[:, at] = start + generator.integers(0, size, (len(drawn_BN), size), dtype=np.uint32)
        for b, drawn_N in enumerate(drawn_BN, start=part.start):
            weights_BN[b] = np.bincount(drawn_N, minlength=len(codes_N))[place_N]

    in_blocks(one_block, replicates)
    weights_BN.setflags(write=False)
    return weights_BN


class ReplicateTables:
    """Counts of (group, label, prediction) in many cells, for images with weights."""

    def __init__(self, test_set: TestSet, cells: Sequence[str], codes_N: np.ndarray, n_groups: int):
        self.shape = (n_groups, test_set.n_classes, test_set.n_classes)
        self.n_cells = len(cells)
        self.members, self.is_class = {}, {}
        for g in range(n_groups):
            for label in range(test_set.n_classes):
                member = np.flatnonzero((codes_N == g) & (test_set.label_N == label))
                if not len(member):
                    continue
                predicted_NC = np.stack([test_set.predictions[cell][member] for cell in cells], axis=1)
                self.members[g, label] = member
                self.is_class[g, label] = [(predicted_NC == k).astype(np.float32) for k in range(1, test_set.n_classes)]

    def count(self, weights_BN: np.ndarray) -> np.ndarray:
        """(G, L, K, B, C) float32."""
        tables = np.zeros((*self.shape, len(weights_BN), self.n_cells), dtype=np.float32)
        for (g, label), member in self.members.items():
            weights_BM = weights_BN[:, member].astype(np.float32, copy=False)
            of_label_KBC = tables[g, label]
            of_label_KBC[0] = weights_BM.sum(axis=1, keepdims=True)
            for k, is_class_MC in enumerate(self.is_class[g, label], start=1):
                np.matmul(weights_BM, is_class_MC, out=of_label_KBC[k])
                of_label_KBC[0] -= of_label_KBC[k]
        return tables


def resampled_metrics(
    test_set: TestSet, cells: Sequence[str], replicates: int, eligible_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every metric of every cell: observed (M, C), and (M, C, B) for the same N images drawn from all N for all cells
    (the nonparametric bootstrap; here the sizes of the groups vary). float32, both computed by the same operations."""
    tables = ReplicateTables(test_set, cells, test_set.group_N, len(test_set.group_names))
    n = test_set.n
    values_MCB = np.empty((len(METRICS), len(cells), replicates), dtype=np.float32)

    def one_block(part: slice) -> None:
        generator = np.random.default_rng(seed_for("analysis", "metrics", test_set.dataset, part.start))
        weights_BN = np.empty((part.stop - part.start, n), dtype=np.float32)
        for weights_N in weights_BN:
            weights_N[:] = np.bincount(generator.integers(0, n, n, dtype=np.uint32), minlength=n)
        values_MCB[:, :, part] = table_metrics(tables.count(weights_BN), eligible_G).swapaxes(1, 2)

    in_blocks(one_block, replicates)
    observed_MC = table_metrics(tables.count(np.ones((1, n), dtype=np.float32)), eligible_G)[:, 0]
    return observed_MC, values_MCB


def in_blocks(one_block: Callable[[slice], None], replicates: int) -> None:
    """`one_block` for each slice of at most BLOCK replicates, several at a time."""
    parts = [slice(start, min(replicates, start + BLOCK)) for start in range(0, replicates, BLOCK)]
    for _ in in_threads(one_block, parts):
        pass


def n_threads() -> int:
    """The processors there are, or OMP_NUM_THREADS where it is set; `MAX_THREADS` at most."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(MAX_THREADS, int(asked) if asked.isdecimal() and int(asked) > 0 else available)


def in_threads(function: Callable, items: Sequence) -> Iterator:
    """function(item) for each, in order; as many at a time as there are processors (OMP_NUM_THREADS, where it is set).
    What is called runs outside Python's lock for the most part. BLAS gets one thread: several of its own would wait for
    each other."""
    threads = n_threads()
    with threadpool_limits(1, user_api="blas"):
        if threads == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, items)


# -------------------------------------------------------------------------------------------------------------- helpers


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
