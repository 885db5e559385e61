"""The paired comparisons of a study as tables: every quantized cell with its FP32 model of the same seed, every repair
with its plain counterpart. From the saved predictions alone.

`paired_significance` is significance.csv, one row a (comparison, metric) over all images (group "all") and one a
(comparison, group) for accuracy:

effect, ci_low, ci_high    the difference as a share; `ci_method` says which interval: tango (accuracies,
                           rate_limits.py), bca or percentile (metrics, significance.py; those of gaps are a
                           description of spread), mover (worst_group_accuracy: Tango's or mid-p limits combined)
chosen_on                  of metrics that are about the groups which come out lowest or highest: the images that say
                           which groups these are. "other half": the worst group of each model is chosen on one half
                           of the images and measured on the other, both ways, and averaged. "same images": chosen and
                           measured on all; such gaps are biased upward, so read p_group and not the interval
gained, lost, p_mcnemar    of accuracies: images that became right, wrong; McNemar's mid-p
p_max_t                    of groups: that this group loses more than the others, corrected over the groups of a
                           comparison; of accuracy over all: that any group does
p_swap, p_group            of metrics: swap_test and flip_permutation_test of statistical_tests.py; for fairness against
                           FP32, p_group is the one. Both test the plain metric over all images. `PERMUTATIONS_IN_ALL`
                           says how small p_group can become
p_holm, p_bh               p_mcnemar, of gaps p_group, corrected over all comparisons of a kind (the groups are a family
                           of their own, every metric too)
tost_p                     of accuracies: equivalence within ±margin; `tost_p_every_group`, of accuracy over all: that
                           every large enough group is within it
flips                      images whose predicted class changed
mde                        of accuracies: the smallest difference that McNemar's test would have found with power 0.8

NaN where a column does not apply or is undefined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.contrasts import Effects
from analysis.result_rows import plain_counterparts
from group_counts import METRICS, paired_count_table
from significance.intervals import acceleration, interval_ends, left_out_tables, paired_differences
from significance.joint_bootstrap import TestSet, in_threads, resampled_metrics
from significance.rate_limits import equivalence_p, midp_interval, paired_difference_interval
from significance.statistical_tests import (
    benjamini_hochberg,
    cohens_d,
    detectable_difference,
    flip_permutation_test,
    hedges_g,
    holm,
    max_t_losses,
    mcnemar_midp,
    swap_test,
)
from store import INTERSECTION, seed_for

IDENTITY = (
    "dataset", "model", "seed", "method", "strategy", "weight_bits", "activation_bits", "options",
)  # fmt: skip
SIGNIFICANCE_COLUMNS = (
    "cell", "reference_cell", "comparison", *IDENTITY, "attribute", "metric", "group", "n", "effect", "ci_low",
    "ci_high", "gained", "lost", "p_mcnemar", "p_holm", "ci_method", "p_bh", "p_max_t", "p_swap", "p_group", "tost_p",
    "tost_p_every_group", "flips", "mde", "too_small", "chosen_on",
)  # fmt: skip
FLIP_COLUMNS = (
    "cell", "reference_cell", *IDENTITY, "attribute", "group", "n", "flips", "flip_rate", "ci_low", "ci_high",
    "harmful", "harmful_rate", "harmful_ci_low", "harmful_ci_high", "beneficial", "beneficial_rate",
    "beneficial_ci_low", "beneficial_ci_high", "too_small",
)  # fmt: skip
SEED_COLUMNS = (
    "dataset", "model", "method", "strategy", "weight_bits", "activation_bits", "options", "metric", "n_seeds",
    "mean_fp32", "mean", "mean_change", "sd_change", "cohens_d", "hedges_g",
)  # fmt: skip
SMOOTH = ("balanced_accuracy",)  # metrics without a maximum or minimum over groups: BCa holds
FIXED = ("accuracy", "balanced_accuracy")  # metrics that are not about the groups that come out lowest or highest
# Of `flip_permutation_test`, where they are needed: so many for each pair that 1 / (1 + permutations), the smallest p,
# survives Holm's correction over all comparisons of its kind; in a study of more than a thousand comparisons fewer, so
# that there are no more than this in all, but this many each
PERMUTATIONS_IN_ALL, FEWEST_PERMUTATIONS = 40_000_000, 2000


def paired_significance(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float, margin: float = 0.01
) -> pd.DataFrame:
    """The table described above; `margin` is a share of the images. `rows` are finished cells."""
    found = []
    every_pair = comparisons(rows, test_sets)
    sizes = every_pair["comparison"].value_counts()
    most = {kind: permutations(size, sizes.sum(), replicates, level) for kind, size in sizes.items()}
    for pairs, test_set in _by_data_set(every_pair, test_sets):
        tables = _paired_tables(pairs, test_set, test_set.group_N, len(test_set.group_names))
        accuracies = _accuracies(pairs, test_set, tables, replicates, level, margin)
        metrics = _metrics(pairs, test_set, tables, replicates, level, most)
        metrics = metrics[metrics["metric"] != "accuracy"]  # Tango's interval instead
        found.append(pd.concat([accuracies, metrics]))
    return _arranged(found, rows, SIGNIFICANCE_COLUMNS)


def intersection_significance(
    rows: pd.DataFrame, test_sets: Mapping[str, TestSet], replicates: int, level: float, margin: float = 0.01
) -> pd.DataFrame:
    """The rows of `paired_significance` that are about one group, for the groups of the intersection of all attributes.

    Data sets of one attribute have none.
    """
    found = []
    for pairs, test_set in _by_data_set(comparisons(rows, test_sets), test_sets):
        if len(test_set.intersection_names) > len(test_set.group_names):
            crossed = _crossed(test_set)
            tables = _paired_tables(pairs, crossed, crossed.group_N, len(crossed.group_names))
            table = _accuracies(pairs, crossed, tables, replicates, level, margin)
            found.append(table[table["group"] != "all"])
    return _arranged(found, rows, SIGNIFICANCE_COLUMNS)


def flip_table(rows: pd.DataFrame, test_sets: Mapping[str, TestSet], level: float) -> pd.DataFrame:
    """flips.csv: how often quantization changes the predicted class, over all images, in each group of the attribute
    and in each of the intersection.

    harmful: from right to wrong; beneficial: from wrong to right; flips between two wrong classes are neither. The
    intervals are mid-p (rate_limits.py): INT8 flips a few images in a thousand, and small groups have few.
    """
    found = []
    pairs = comparisons(rows, test_sets)
    for block, test_set in _by_data_set(pairs[pairs["comparison"] == "fp32"], test_sets):
        groupings = [test_set]
        if len(test_set.intersection_names) > len(test_set.group_names):
            groupings.append(_crossed(test_set))
        for grouping in groupings:
            tables = _paired_tables(block, grouping, grouping.group_N, len(grouping.group_names))
            table = _long(block, grouping, **_flips(tables))
            table = table if grouping is test_set else table[table["group"] != "all"]
            for name, count in (("flip", "flips"), ("harmful", "harmful"), ("beneficial", "beneficial")):
                table[f"{name}_rate"] = table[count] / table["n"]
                low, high = midp_interval(table[count], table["n"], level)
                prefix = "" if name == "flip" else f"{name}_"
                table[f"{prefix}ci_low"], table[f"{prefix}ci_high"] = low, high
            found.append(table)
    return _arranged(found, rows, FLIP_COLUMNS)


def seed_effects(rows: pd.DataFrame) -> pd.DataFrame:
    """Effect sizes over training seeds of each setting against FP32: a row for each (setting, metric) with two or more.

    Cohen's d and Hedges' g take the spread between seeds as the unit; with `n_seeds` below six they are rough, and no
    test is made of them.
    """
    values = rows.set_index("cell")
    pairs = rows[rows["baseline_cell"].isin(values.index) & (rows["cell"] != rows["baseline_cell"])]
    keys = [key for key in IDENTITY if key != "seed"]
    found = []
    for key, block in pairs.groupby(keys, sort=False, dropna=False):
        if block["seed"].nunique() < 2:
            continue
        for metric in METRICS:
            quantized, fp32 = (
                values.loc[block[column], metric].to_numpy(dtype=float) for column in ("cell", "baseline_cell")
            )
            is_defined = ~np.isnan(quantized - fp32)
            quantized, fp32 = quantized[is_defined], fp32[is_defined]
            if len(quantized) < 2:
                continue
            entry = dict(zip(keys, key, strict=True)) | {"metric": metric, "n_seeds": len(quantized)}
            entry |= {"mean_fp32": fp32.mean(), "mean": quantized.mean(), "mean_change": (quantized - fp32).mean()}
            entry |= {"sd_change": (quantized - fp32).std(ddof=1)}
            found.append(entry | {"cohens_d": cohens_d(quantized, fp32), "hedges_g": hedges_g(quantized, fp32)})
    return pd.DataFrame(found, columns=list(SEED_COLUMNS))


def comparisons(rows: pd.DataFrame, test_sets: Mapping[str, TestSet]) -> pd.DataFrame:
    """The rows with `reference_cell` and `comparison`: each against FP32, then each mitigated one against its plain
    counterpart. Cells without predictions, or whose reference has none, are left out."""
    done = {cell for test_set in test_sets.values() for cell in test_set.predictions}
    rows = rows[rows["cell"].isin(done)]
    plain = plain_counterparts(rows)
    pairs = pd.concat(
        [
            rows.assign(comparison="fp32", reference_cell=rows["baseline_cell"]),
            rows.assign(comparison="plain", reference_cell=rows["cell"].map(plain)),
        ],
        ignore_index=True,
    )
    pairs = pairs[pairs["reference_cell"].isin(done) & (pairs["reference_cell"] != pairs["cell"])]
    return pairs.reset_index(drop=True)


def permutations(n_corrected: int, n_pairs: int, replicates: int, level: float) -> int:
    """How many `flip_permutation_test` may draw for one of `n_corrected` pairs that are corrected together, among
    `n_pairs` in all: see `PERMUTATIONS_IN_ALL`. Few `replicates`, as the config asks for, lower the least number."""
    needed = math.ceil(round(1.1 * n_corrected / (1 - level), 6))  # the smallest p times their number is 0.9 alpha
    return max(min(replicates, FEWEST_PERMUTATIONS), min(needed, PERMUTATIONS_IN_ALL // n_pairs))


# ---------------------------------------------------------------------------------------------------------- of accuracy


def _accuracies(
    pairs: pd.DataFrame, test_set: TestSet, tables_PGLFQ: np.ndarray, replicates: int, level: float, margin: float
) -> pd.DataFrame:
    """One row a (pair, group), and one a pair for all images."""
    flips = _flips(tables_PGLFQ)
    table = _long(pairs, test_set, gained=flips["beneficial"], lost=flips["harmful"], flips=flips["flips"])
    gained, lost, n = (table[name].to_numpy() for name in ("gained", "lost", "n"))
    table["metric"], table["effect"] = "accuracy", (gained - lost) / n
    table["ci_low"], table["ci_high"] = paired_difference_interval(gained, lost, n, level)
    table["ci_method"] = "tango"
    table["p_mcnemar"] = mcnemar_midp(gained, lost)
    table["tost_p"] = equivalence_p(gained, lost, n, margin)
    table["mde"] = detectable_difference(n, gained + lost, level)
    is_all = table["group"] == "all"
    enters = ~is_all & ~table["too_small"]
    every = table[enters].groupby("pair")["tost_p"].max()
    table.loc[is_all, "tost_p_every_group"] = table.loc[is_all, "pair"].map(every)

    sizes_G = tables_PGLFQ[0].sum(axis=(1, 2, 3))
    eligible = np.flatnonzero(sizes_G >= test_set.min_group_size)
    p_PG = np.full(flips["flips"].shape, np.nan)
    if len(eligible) > 1:
        p_PG[:, eligible] = max_t_losses(
            flips["beneficial"][:, eligible],
            flips["harmful"][:, eligible],
            sizes_G[eligible],
            replicates,
            generator=np.random.default_rng(seed_for("analysis", "max_t", test_set.dataset, test_set.attribute)),
            apply=in_threads,
        )
    names = {name: g for g, name in enumerate(test_set.group_names)}
    of_group = table.loc[~is_all, "group"].map(names).to_numpy(dtype=int)
    table.loc[~is_all, "p_max_t"] = p_PG[table.loc[~is_all, "pair"], of_group]
    table.loc[is_all, "p_max_t"] = np.fmin.reduce(p_PG, axis=1)[table.loc[is_all, "pair"]]
    return table


def _flips(tables_PGLFQ: np.ndarray) -> dict[str, np.ndarray]:
    """(P, G) images: whose class changed, that became wrong, that became right."""
    n_classes = tables_PGLFQ.shape[-1]
    is_right = np.eye(n_classes, dtype=bool)  # (label, prediction)
    before_LFQ, after_LFQ = is_right[:, :, None], is_right[:, None, :]
    is_changed_FQ = ~np.eye(n_classes, dtype=bool)

    def total(mask) -> np.ndarray:
        return np.einsum("pglfq,lfq->pg", tables_PGLFQ, np.broadcast_to(mask, tables_PGLFQ.shape[2:]).astype(int))

    return {
        "flips": total(is_changed_FQ),
        "harmful": total(before_LFQ & ~after_LFQ),
        "beneficial": total(~before_LFQ & after_LFQ),
    }


# ----------------------------------------------------------------------------------------------------------- of metrics


def _metrics(
    pairs: pd.DataFrame,
    test_set: TestSet,
    tables_PGLFQ: np.ndarray,
    replicates: int,
    level: float,
    most: Mapping[str, int],
) -> pd.DataFrame:
    """One row a (pair, metric) over all images: effect, bootstrap interval, permutation p-values."""
    sizes_G = tables_PGLFQ[0].sum(axis=(1, 2, 3))
    eligible_G = sizes_G >= test_set.min_group_size
    cells = list(dict.fromkeys([*pairs["cell"], *pairs["reference_cell"]]))
    place = {cell: c for c, cell in enumerate(cells)}
    at_P, reference_P = (pairs[name].map(place).to_numpy() for name in ("cell", "reference_cell"))
    smooth = [METRICS.index(metric) for metric in SMOOTH]
    observed_MC, values_MCB = resampled_metrics(test_set, cells, replicates, eligible_G)
    worst_P3 = worst_group_changes(pairs, test_set, level)

    def one_pair(p: int) -> list[dict]:
        counts = tables_PGLFQ[p]
        exact_M = paired_differences(counts[..., None], eligible_G)[: len(METRICS), 0]
        values_MB = values_MCB[:, at_P[p]] - values_MCB[:, reference_P[p]]
        left_out, n_C = left_out_tables(counts)
        acceleration_S = acceleration(paired_differences(left_out, eligible_G)[smooth], n_C)
        observed_S = observed_MC[smooth, at_P[p]] - observed_MC[smooth, reference_P[p]]
        ends_M2 = interval_ends(values_MB.copy(), level)
        ends_M2[smooth] = interval_ends(values_MB[smooth], level, "bca", observed_S, acceleration_S)
        names = (pairs["cell"].iat[p], pairs["reference_cell"].iat[p])
        generator = np.random.default_rng(seed_for("analysis", "permutations", *names))
        p_swap = swap_test(counts, eligible_G, replicates, generator=generator)
        p_group = flip_permutation_test(counts, eligible_G, most[pairs["comparison"].iat[p]], generator=generator)
        found = []
        for m, metric in enumerate(METRICS):
            entry = {"pair": p, "metric": metric, "group": "all", "n": test_set.n, "attribute": test_set.attribute}
            entry |= {"effect": exact_M[m], "ci_low": ends_M2[m, 0], "ci_high": ends_M2[m, 1]}
            entry |= {"ci_method": "bca" if m in smooth else "percentile", "too_small": False}
            entry["chosen_on"] = None if metric in FIXED else "same images"
            if metric == "worst_group_accuracy":
                entry |= dict(zip(("effect", "ci_low", "ci_high"), worst_P3[p], strict=True))
                entry |= {"ci_method": "mover", "chosen_on": "other half"}
            found.append(entry | {"p_swap": p_swap[metric], "p_group": p_group[metric]})
        return found

    found = [entry for entries in in_threads(one_pair, range(len(pairs))) for entry in entries]
    table = pd.DataFrame(found)
    return table.join(pairs[["cell", "reference_cell", "comparison"]], on="pair")


def worst_group_changes(pairs: pd.DataFrame, test_set: TestSet, level: float) -> np.ndarray:
    """(P, 3) worst-group accuracy of `cell` - `reference_cell` and its interval, cross-fitted as in contrasts.py: each
    model's worst group is chosen on one half of the images and measured on the other, both ways, averaged.

    The halves are disjoint images. On each it is a paired difference where both models have the same worst group
    (Tango's limits) and a difference of two independent rates where they have not (mid-p limits of each); limits of
    sums are combined as Zou & Donner do (MOVER, 2008). Given the chosen groups, like every interval beside it.
    """
    effects = Effects(test_set)
    if not len(effects.groups):
        return np.full((len(pairs), 3), np.nan)
    cells = list(dict.fromkeys([*pairs["cell"], *pairs["reference_cell"]]))
    worst = {cell: effects.worst_groups(cell) for cell in cells}
    right = {cell: test_set.correct(cell) for cell in cells}
    codes = {(1 - half) * effects.n_groups + g for groups in worst.values() for half, g in enumerate(groups)}
    members = {code: np.flatnonzero(effects.code_N == code) for code in codes}  # the images to measure on
    is_same, gained, lost, hits, n, other_hits, other_n = np.zeros((7, len(pairs), 2), dtype=np.int64)
    for p, names in enumerate(zip(pairs["cell"], pairs["reference_cell"], strict=True)):
        for half in (0, 1):
            chosen = [(1 - half) * effects.n_groups + worst[name][half] for name in names]
            hit_N, other_N = (right[name][members[code]] for name, code in zip(names, chosen, strict=True))
            at = p, half
            hits[at], n[at], other_hits[at], other_n[at] = hit_N.sum(), len(hit_N), other_N.sum(), len(other_N)
            if chosen[0] == chosen[1]:
                is_same[at], gained[at], lost[at] = 1, (hit_N & ~other_N).sum(), (other_N & ~hit_N).sum()
    rate, other_rate = hits / n, other_hits / other_n
    difference = rate - other_rate
    (low, high), (other_low, other_high) = midp_interval(hits, n, level), midp_interval(other_hits, other_n, level)
    paired_low, paired_high = paired_difference_interval(gained, lost, n, level)
    below = np.where(is_same, difference - paired_low, np.hypot(rate - low, other_high - other_rate))
    above = np.where(is_same, paired_high - difference, np.hypot(high - rate, other_rate - other_low))
    mean = difference.mean(axis=1)
    return np.stack([mean, mean - np.hypot(*below.T) / 2, mean + np.hypot(*above.T) / 2], axis=1)


# -------------------------------------------------------------------------------------------------------------- helpers


def _by_data_set(pairs: pd.DataFrame, test_sets: Mapping[str, TestSet]) -> Iterator[tuple[pd.DataFrame, TestSet]]:
    for name, test_set in test_sets.items():
        block = pairs[pairs["dataset"] == name].reset_index(drop=True)
        if len(block):
            yield block, test_set


def _crossed(test_set: TestSet) -> TestSet:
    """The same images, grouped by the intersection."""
    groups = {"group_N": test_set.intersection_N, "group_names": test_set.intersection_names}
    return TestSet(**{**vars(test_set), **groups, "attribute": INTERSECTION})


def _paired_tables(pairs: pd.DataFrame, test_set: TestSet, codes_N: np.ndarray, n_groups: int) -> np.ndarray:
    """(P, G, L, F, Q)"""
    first = paired_count_table  # checks the codes once; the rest is the same sum for every pair
    cells = (pairs["reference_cell"], pairs["cell"])
    k = test_set.n_classes
    first(codes_N, test_set.label_N, *(test_set.predictions[cell.iat[0]] for cell in cells), n_groups, k)
    stratum_N = (codes_N * k + test_set.label_N) * k * k
    tables = np.empty((len(pairs), n_groups * k**3), dtype=np.int64)
    for p, (reference, cell) in enumerate(zip(*cells, strict=True)):
        codes = stratum_N + test_set.predictions[reference] * np.int64(k) + test_set.predictions[cell]
        tables[p] = np.bincount(codes, minlength=tables.shape[1])
    return tables.reshape(len(pairs), n_groups, k, k, k)


def _long(pairs: pd.DataFrame, test_set: TestSet, **counts_PG: np.ndarray) -> pd.DataFrame:
    """One row a (pair, group that has images), "all" first, with the counts; `pair` is the position of the pair."""
    n_G = np.bincount(test_set.group_N, minlength=len(test_set.group_names))
    there = np.flatnonzero(n_G)
    names = ["all", *(test_set.group_names[g] for g in there)]
    table = pd.DataFrame(
        {
            "pair": np.repeat(np.arange(len(pairs)), len(names)),
            "attribute": test_set.attribute,
            "group": names * len(pairs),
            "n": np.tile([test_set.n, *n_G[there]], len(pairs)),
            "too_small": np.tile([False, *(n_G[there] < test_set.min_group_size)], len(pairs)),
            **{
                name: np.concatenate([count.sum(axis=1, keepdims=True), count[:, there]], axis=1).ravel()
                for name, count in counts_PG.items()
            },
        }
    )
    return table.join(pairs[["cell", "reference_cell", "comparison"]], on="pair")


def _arranged(found: Sequence[pd.DataFrame], rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The rows in the order comparison, cell, metrics, groups; with the identity of the cell and corrected p-values."""
    if not found:
        return pd.DataFrame(columns=list(columns))
    table = pd.concat(found, ignore_index=True)
    identity = rows.set_index("cell")[[name for name in IDENTITY if name in rows]]
    table = table.join(identity, on="cell")
    cells = {cell: i for i, cell in enumerate(rows["cell"])}
    kind = table["comparison"].eq("plain")
    if "metric" in table:
        metrics = {metric: i for i, metric in enumerate(METRICS)}
        order = [kind, table["cell"].map(cells), table["group"].ne("all"), table["metric"].map(metrics)]
    else:
        order = [kind, table["cell"].map(cells)]
    order = np.lexsort([*(np.asarray(key) for key in reversed(order))])
    table = table.iloc[order].reset_index(drop=True)
    if "p_holm" in columns:
        _correct(table)
    return table.reindex(columns=list(columns))


def _correct(table: pd.DataFrame) -> None:
    if "p_group" not in table:
        table["p_group"] = np.nan
    p = table["p_mcnemar"].fillna(table["p_group"])
    table["p_holm"], table["p_bh"] = np.nan, np.nan
    for _, family in p[p.notna()].groupby([table["comparison"], table["metric"], table["group"] == "all"]):
        table.loc[family.index, "p_holm"] = holm(family.to_numpy())
        table.loc[family.index, "p_bh"] = benjamini_hochberg(family.to_numpy())
