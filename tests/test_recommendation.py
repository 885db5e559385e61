import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from analysis.configurations import MEASURES, accuracy_intervals, configurations
from analysis.recommendation import BOUND_LABELS, PREFERENCES, Bounds, recommend, recommendation_sentences
from analysis.winners import best_tests, sign_flip_midp
from significance.intervals import mcnemar_midp

NONE = Bounds(largest_loss=None, largest_worst_group_loss=None)
NAN = float("nan")


def candidates(*rows):
    """Configurations: (setting, accuracy %, worst-group accuracy %, gap, MB, ms)."""
    names = ["setting", "accuracy", "worst_group_accuracy", "accuracy_gap", "size_mb", "latency_ms_b1"]
    frame = pd.DataFrame([row + (NAN,) * (len(names) - len(row)) for row in rows], columns=names)
    frame = frame.assign(dataset="d", model="m", is_fp32=frame["setting"].str.startswith("FP32"), n_seeds=1)
    return frame.assign(change=NAN, ci_low=NAN, ci_high=NAN, width="W8A8")


FOUR = candidates(
    ("FP32 a", 90.0, 80.0, 10.0, 40.0, 4.0),
    ("FP32 b", 94.0, 84.0, 10.0, 80.0, 8.0),
    ("W8", 93.0, 83.5, 9.5, 20.0, 2.0),
    ("W4", 92.9, 83.0, 12.0, 10.0, NAN),
)


# ------------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("bounds", "order", "held"),
    [
        (NONE, [3, 2, 0, 1], {}),
        # against FP32 b, the more accurate: a loss of 1.0 holds the bound of 1, one of 1.1 does not
        (Bounds(), [2, 1], {"largest_loss": 2, "largest_worst_group_loss": 3}),
        (Bounds(largest_loss=1.1), [3, 2, 1], {"largest_loss": 3, "largest_worst_group_loss": 3}),
        (Bounds(largest_worst_group_loss=0.5), [2, 1], {"largest_loss": 2, "largest_worst_group_loss": 2}),
        (Bounds(None, None, smallest_accuracy=92.9), [3, 2, 1], {"smallest_accuracy": 3}),
        (Bounds(None, None, largest_gap=9.9), [2], {"largest_gap": 1}),
        (Bounds(None, None, largest_size_mb=40.0), [3, 2, 0], {"largest_size_mb": 3}),
        (Bounds(None, None, largest_latency_ms=100.0), [2, 0, 1], {"largest_latency_ms": 3}),  # W4 was not measured
        (Bounds(None, None, prefer="latency"), [2, 0, 1], {}),
        (Bounds(None, None, prefer="worst_group"), [1, 2, 3, 0], {}),
        (Bounds(None, None, prefer="accuracy"), [1, 2, 3, 0], {}),
        (Bounds(None, None, prefer="gap"), [2, 1, 0, 3], {}),  # of equal gaps the higher worst group
        (Bounds(None, None, smallest_accuracy=95.0), [], {"smallest_accuracy": 0}),
    ],
)
def test_the_rule_by_hand(bounds, order, held):
    found = recommend(FOUR, bounds)
    assert (found.order, found.reference, found.candidates, found.held) == (order, 1, 4, held)


def test_equal_sizes_are_ranked_by_the_worst_group_then_accuracy_then_the_plan():
    rows = candidates(
        ("A", 90.0, NAN, 1.0, 5.0),
        ("B", 90.0, 80.0, 1.0, 5.0),
        ("C", 91.0, 80.0, 1.0, 5.0),
        ("D", 91.0, 80.0, 1.0, 5.0),
    )
    assert recommend(rows, NONE).order == [2, 3, 1, 0]


def test_without_fp32_no_bound_on_a_loss_is_held_and_it_is_said():
    rows = FOUR[~FOUR["is_fp32"]].reset_index(drop=True)
    found = recommend(rows, Bounds())
    assert found.order == [] and found.reference is None
    (told,) = recommendation_sentences(rows, Bounds())
    assert told.startswith("None of the 2 finished configurations holds every bound.")
    assert told.endswith("There is no finished FP32 model to count losses against.")


def test_a_value_that_was_not_measured_holds_no_bound():
    rows = candidates(("FP32", 90.0, 80.0, 10.0, 40.0), ("X", NAN, NAN, NAN, 1.0), ("Y", 90.0, 80.0, NAN, NAN))
    assert recommend(rows, Bounds()).order == [0]  # X has no accuracy, Y no size to prefer
    assert recommend(rows, Bounds(None, None, largest_gap=50.0)).held == {"largest_gap": 1}


def test_sentences_say_what_and_why_for_each_data_set():
    two = pd.concat([FOUR, FOUR.iloc[:2].assign(dataset="e")], ignore_index=True)
    first, second = recommendation_sentences(two, Bounds())
    assert first.startswith(
        "d: m at W8: accuracy 93.0 %, worst group 83.5 %, accuracy gap 9.5 points, 20.0 MB, 2.00 ms"
    )
    assert "the smallest file of the 2 of 4 finished configurations that hold every bound" in first
    assert "accuracy at most 1 point below the most accurate FP32 model (held by 2)" in first
    assert (
        second.startswith("e: m at FP32 b") and "It is the only one of 2 finished configurations that holds" in second
    )


def test_every_bound_and_preference_has_words():
    assert set(BOUND_LABELS) == set(Bounds(1, 1, 1, 1, 1, 1).limits())
    assert all(column in MEASURES for column, _, _ in PREFERENCES.values())


# ------------------------------------------------------------------------------------------------------- configurations


def rows_of(accuracies, **more):
    """Finished cells: (setting's observer, seed) -> accuracy, all W4A4 static of one model."""
    return pd.DataFrame(
        [
            {
                "cell": f"{observer}{seed}", "dataset": "d", "model": "m", "seed": seed, "method": "ptq_static",
                "strategy": None, "weight_bits": 4.0, "activation_bits": 4.0,
                "options": f'{{"observer":"{observer}"}}', "status": "done", "accuracy": accuracy, **more,
            }
            for (observer, seed), accuracy in accuracies.items()
        ]
    )  # fmt: skip


def images_of(right):
    """A stand-in for a TestSet: cell -> whether each image is right."""
    n = len(next(iter(right.values())))
    return {"d": SimpleNamespace(n=n, correct=lambda cell: np.asarray(right[cell], dtype=bool))}


def test_configurations_are_means_over_the_seeds_that_finished():
    rows = rows_of({("mse", 0): 0.8, ("mse", 1): 0.9, ("minmax", 0): 0.7, ("minmax", 1): 0.1})
    rows["size_mb"] = [2.0, 4.0, 1.0, 9.0]
    rows.loc[3, "status"] = "failed"
    found = configurations(rows)
    assert found["setting"].tolist() == ["W4A4 static (mse)", "W4A4 static (minmax)"]
    assert found["accuracy"].tolist() == pytest.approx([85.0, 70.0]) and found["size_mb"].tolist() == [3.0, 1.0]
    assert found["n_seeds"].tolist() == [2, 1] and found["cells"].tolist() == [["mse0", "mse1"], ["minmax0"]]
    assert found["latency_ms_b1"].isna().all() and not found["is_fp32"].any()
    assert configurations(rows[rows["status"] == "failed"]).empty


def test_latencies_are_those_of_one_engine_and_of_no_simulation():
    rows = rows_of({("mse", 0): 0.8, ("minmax", 0): 0.7, ("entropy", 0): 0.7}).assign(latency_ms_b1=[1.0, 2.0, 3.0])

    def latencies(*engines, weight_bits=4.0):
        return configurations(rows.assign(engine=engines, weight_bits=weight_bits))["latency_ms_b1"].tolist()

    assert latencies("onnxruntime", "torch", "onnxruntime") == pytest.approx([1.0, NAN, 3.0], nan_ok=True)
    assert latencies("openvino", "openvino", "onnxruntime") == pytest.approx([1.0, 2.0, NAN], nan_ok=True)
    assert np.isnan(latencies("torch", "torch", "torch")).all()  # integers that PyTorch only simulates
    assert not np.isnan(latencies("torch", "torch", "torch", weight_bits=[NAN] * 3)).any()  # FP32 that it runs


def test_the_interval_of_a_mean_over_seeds_counts_an_image_once():
    """Two seeds that agree on every image have the interval of one; two that are independent have one √2 narrower."""
    rng = np.random.default_rng(0)
    n, p = 4000, 0.8
    one, other = rng.random(n) < p, rng.random(n) < p
    rows = rows_of({("mse", 0): 0.8, ("mse", 1): 0.8}, accuracy_ci_low=0.1, accuracy_ci_high=0.2)
    widths = []
    for right in ({"mse0": one, "mse1": one}, {"mse0": one, "mse1": other}):
        (found,) = accuracy_intervals(rows, images_of(right), 4000, 0.95).to_dict("records")
        mean = np.mean([right["mse0"].mean(), right["mse1"].mean()])
        assert found["accuracy_ci_low"] < mean < found["accuracy_ci_high"]
        widths.append(found["accuracy_ci_high"] - found["accuracy_ci_low"])
    normal = 2 * norm.ppf(0.975) * np.sqrt(p * (1 - p) / n)
    assert widths == pytest.approx([normal, normal / np.sqrt(2)], rel=0.06)
    (alone,) = accuracy_intervals(rows.iloc[:1], images_of({"mse0": one}), 100, 0.95).to_dict("records")
    assert (alone["accuracy_ci_low"], alone["accuracy_ci_high"]) == (0.1, 0.2)  # of one seed: those of its row


# -------------------------------------------------------------------------------------------------------------- winners


@pytest.mark.parametrize("differences", [[1, 1, 1, -1, 0], [2, 2, -1, 1, 3, -2, 0], [3, 3, 3], [1, -1], [0], [-2, 1]])
def test_sign_flips_are_those_of_all_signs(differences):
    """Against the enumeration of every assignment of signs."""
    nonzero = [abs(value) for value in differences if value]
    observed = abs(sum(differences))
    sums = [
        sum(s * v for s, v in zip(signs, nonzero, strict=True))
        for signs in itertools.product((1, -1), repeat=len(nonzero))
    ]
    below = np.mean([value <= -observed for value in sums])
    expected = min(1.0, 2 * below - np.mean([value == -observed for value in sums]))
    assert sign_flip_midp(np.array(differences)) == pytest.approx(expected)


def test_with_one_seed_the_sign_flip_is_mcnemars_test():
    for gained, lost in ((0, 0), (3, 1), (10, 25), (400, 300), (2000, 1800)):
        difference_N = np.repeat([1, -1, 0], [gained, lost, 50])
        assert sign_flip_midp(difference_N) == pytest.approx(mcnemar_midp(gained, lost), rel=1e-9)


def test_large_sums_agree_with_the_normal_distribution():
    rng = np.random.default_rng(1)
    difference_N = rng.choice([-3, -2, -1, 0, 1, 2, 3], size=20_000)
    z = difference_N.sum() / np.sqrt((difference_N.astype(float) ** 2).sum())
    assert sign_flip_midp(difference_N) == pytest.approx(2 * norm.sf(abs(z)), rel=0.01)


def block(hits, alpha=0.05, seeds=1):
    """best_tests of settings a, b, … of which so many of 100 images are right, nested, on each seed."""
    right = {f"{name}{seed}": np.arange(100) < n for name, n in hits.items() for seed in range(seeds)}
    rows = rows_of({(name, seed): n / 100 for name, n in hits.items() for seed in range(seeds)})
    tests = best_tests(rows, images_of(right), alpha)
    return tests, tests[tests["seed"].isna()]


def test_the_winner_is_bold_only_where_it_beats_every_other():
    _, tests = block({"a": 90, "b": 80, "c": 50})
    assert tests["setting"].unique().tolist() == ["W4A4 static (a)"] and tests["is_best"].all()
    assert tests[["gained", "lost"]].values.tolist() == [[10, 0], [40, 0]]
    # mid-p of 10 : 0 is 2^-10; as the larger of two p it is not multiplied by Holm
    assert tests["p"].tolist() == pytest.approx([2**-10, 2**-40]) and tests["p_holm"].iloc[0] == pytest.approx(2**-10)
    _, tests = block({"a": 90, "b": 87, "c": 50})  # 3 : 0 is p = 1/8
    assert not tests["is_best"].any() and tests["p_holm"].iloc[1] < 0.05
    _, tests = block({"a": 90, "b": 90})
    assert not tests["is_best"].any() and tests["p"].tolist() == [1.0]
    _, tests = block({"a": 90})
    assert tests.empty


def test_holm_decides_where_one_comparison_alone_would_pass():
    """5 : 0 is p = 2^-5 = 0.031: enough against one other setting, not where two stand as close."""
    assert block({"a": 90, "b": 85})[1]["is_best"].all()
    tests = block({"a": 90, "b": 85, "c": 85})[1]
    assert tests["p"].tolist() == pytest.approx([2**-5] * 2) and not tests["is_best"].any()


def test_blocks_are_of_one_seed_and_over_all_seeds():
    tests, over_seeds = block({"a": 90, "b": 87}, seeds=3)
    assert tests["seed"].dropna().tolist() == [0, 1, 2] and tests["cell"].dropna().tolist() == ["a0", "a1", "a2"]
    assert len(over_seeds) == 1 and over_seeds["cell"].isna().all() and over_seeds["n_seeds"].tolist() == [3]
    # the same three images in three seeds are three images, not nine
    assert over_seeds["p"].tolist() == pytest.approx([2**-3]) and over_seeds["gained"].tolist() == [9]
    assert over_seeds["effect"].tolist() == pytest.approx([0.03])


def test_settings_without_a_seed_in_common_are_not_compared():
    right = {"a0": np.ones(50), "b1": np.zeros(50)}
    tests = best_tests(rows_of({("a", 0): 1.0, ("b", 1): 0.0}), images_of(right), 0.05)
    assert tests["seed"].isna().all() and tests["n_seeds"].tolist() == [0] and not tests["is_best"].any()


@pytest.mark.parametrize("n_equal", [2, 4])
def test_settings_that_are_equally_good_are_rarely_called_the_best(n_equal):
    """Nothing is better: a bold winner is an error, made in at most 5 % of studies (7.7 %: three standard errors)."""
    rng = np.random.default_rng(n_equal)
    names = "abcd"[:n_equal]
    rows = rows_of({(name, 0): 0.8 for name in names})
    errors = 0
    for _ in range(600):
        difficulty_N = rng.random((1, 300))  # shared, as images are
        right = (0.6 * difficulty_N + 0.4 * rng.random((n_equal, 300))) < 0.6
        tests = best_tests(rows, images_of(dict(zip([f"{name}0" for name in names], right, strict=True))), 0.05)
        errors += bool(tests["is_best"].iloc[0])
    assert errors <= 0.077 * 600
    if n_equal == 2:
        assert errors >= 0.02 * 600  # and it is not silent
