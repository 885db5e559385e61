"""Which setting of a block is the most accurate, and whether it is significantly so: what stands in bold in the tables.

A block holds the settings that compete: the same data set, model and width (and, cell by cell, the same seed). Its
winner is the setting of the highest accuracy. It is *significantly* the best where it beats every other setting of the
block on the same test images: McNemar's mid-p test, Holm-corrected over these comparisons, each p <= alpha. A winner
whose block holds nothing else beats nothing and is not marked. That the winner was chosen by the same images needs no
further correction: where it is tested against the runner-up at two-sided alpha, a wrong winner is declared with
probability alpha at most (Gutmann & Maymin 1987; Hung & Fithian 2019), and Holm asks for more than that.

Over several seeds an image counts once, with its difference in hits summed over the seeds, and the test flips the sign
of each image's difference. With one seed that is McNemar's test.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.result_rows import with_labels
from significance.intervals import holm
from significance.joint_bootstrap import TestSet

COLUMNS = (
    "dataset", "model", "width", "seed", "setting", "cell", "accuracy", "other_setting", "other_accuracy", "n_images",
    "n_seeds", "gained", "lost", "effect", "p", "p_holm", "is_best",
)  # fmt: skip
TAIL = 12  # standard deviations of a binomial beyond which its mass (below 1e-30) is left out


def best_tests(rows: pd.DataFrame, test_sets: Mapping[str, TestSet], alpha: float) -> pd.DataFrame:
    """One row for each other setting of each block, columns `COLUMNS`: the winner against it.

    Blocks come twice: of one seed each (`seed` and `cell` say which), and over all seeds (`seed` and `cell` missing).
    `gained` and `lost` count hits of the winner that the other misses, and the reverse; `effect` is the difference in
    accuracy on the seeds that both have; `is_best` says the same in all rows of a block.
    """
    rows = with_labels(rows[rows["status"] == "done"])
    found = []
    for (dataset, model, width), block in rows.groupby(["dataset", "model", "width"], sort=False):
        if dataset not in test_sets:
            continue
        identity = {"dataset": dataset, "model": model, "width": width}
        seeds = list(dict.fromkeys(block["seed"]))
        for seed in seeds:
            found += _block(identity | {"seed": seed}, block[block["seed"] == seed], test_sets[dataset], alpha)
        found += _block(identity | {"seed": np.nan}, block, test_sets[dataset], alpha)
    return pd.DataFrame(found, columns=list(COLUMNS))


def sign_flip_midp(difference_N: np.ndarray) -> float:
    """Two-sided mid-p of the test that flips the sign of each image's (whole) difference, exactly.

    Under the hypothesis that the two settings are alike on every image the sum is a sum of m (2 B_m - n_m) over the
    sizes m of the differences, B_m binomial of their number n_m and 1/2: their distributions are convolved.
    """
    from scipy.stats import binom

    sizes, numbers = np.unique(np.abs(difference_N[difference_N != 0]).astype(np.int64), return_counts=True)
    mass, lowest = np.ones(1), 0
    for size, n in zip(sizes.tolist(), numbers.tolist(), strict=True):
        reach = int(np.ceil(TAIL * np.sqrt(n) / 2)) + 1
        first, last = max(0, n // 2 - reach), min(n, n // 2 + reach)
        spread = np.zeros(2 * size * (last - first) + 1)
        spread[:: 2 * size] = binom.pmf(np.arange(first, last + 1), n, 0.5)
        mass, lowest = _convolve(mass, spread), lowest + size * (2 * first - n)
    at_most = -abs(int(difference_N.sum())) - lowest  # the position of the observed sum on its smaller side
    if at_most < 0:
        return 0.0
    below = float(mass[: at_most + 1].sum())
    return min(1.0, max(0.0, 2 * below - float(mass[at_most])))


# -------------------------------------------------------------------------------------------------------------- helpers


def _block(identity: dict, block: pd.DataFrame, test_set: TestSet, alpha: float) -> list[dict]:
    """Rows of `best_tests` of one block; none where it holds one setting only."""
    hits = {}  # setting -> seed -> (N,) whether it is right
    for row in block.drop_duplicates(["setting", "seed"]).itertuples():
        hits.setdefault(row.setting, {})[row.seed] = test_set.correct(row.cell)
    accuracy = {setting: float(np.mean([right.mean() for right in of.values()])) for setting, of in hits.items()}
    winner = max(accuracy, key=accuracy.__getitem__)  # of equal ones the first in the order of the plan
    cell = block.loc[block["setting"] == winner, "cell"].iloc[0] if not pd.isna(identity["seed"]) else None
    found = []
    for setting, of in hits.items():
        shared = [seed for seed in of if seed in hits[winner]]
        if setting == winner:
            continue
        entry = {**identity, "setting": winner, "cell": cell, "accuracy": accuracy[winner], "other_setting": setting}
        entry |= {"other_accuracy": accuracy[setting], "n_images": test_set.n, "n_seeds": len(shared)}
        entry |= {"gained": 0, "lost": 0, "effect": np.nan, "p": 1.0}  # no seed in common: nothing is shown
        if shared:
            difference_SN = np.stack([hits[winner][seed].astype(np.int64) - of[seed] for seed in shared])
            entry |= {"gained": int((difference_SN > 0).sum()), "lost": int((difference_SN < 0).sum())}
            entry |= {"effect": float(difference_SN.mean()), "p": sign_flip_midp(difference_SN.sum(axis=0))}
        found.append(entry)
    if found:
        adjusted = holm(np.array([entry["p"] for entry in found]))
        is_best = bool((adjusted <= alpha).all()) and all(entry["effect"] > 0 for entry in found)
        found = [entry | {"p_holm": float(p), "is_best": is_best} for entry, p in zip(found, adjusted, strict=True)]
    return found


def _convolve(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if min(len(first), len(second)) < 500:
        return np.convolve(first, second)
    from scipy.signal import fftconvolve

    return np.clip(fftconvolve(first, second), 0.0, None)
