import numpy as np
import pandas as pd
import pytest

from analysis.cost_benefit import COST_COLUMNS, cost_benefit_table, worst_group_gain
from significance.joint_bootstrap import TestSet

GROUP = np.repeat([0, 1], [100, 50])
LABEL = np.zeros(150, dtype=np.int64)


def predictions(*wrong):
    """So many images wrong in each group, the first ones."""
    predicted = np.zeros(150, dtype=np.int64)
    for start, count in zip((0, 100), wrong, strict=True):
        predicted[start : start + count] = 1
    return predicted


def images(cells, **more):
    names = ["a", "b"]
    values = {"group_N": GROUP, "min_group_size": 20, "predictions": cells, **more}
    return TestSet("faces", "g", LABEL, values["group_N"], names, GROUP, names, 2, values["min_group_size"], cells)


def row(cell, method="ptq_static", bits=4, seed=0, strategy=None, options='{"observer":"mse"}', **more):
    return {
        "cell": cell, "dataset": "faces", "model": "vit", "seed": seed, "method": method, "strategy": strategy,
        "weight_bits": bits, "activation_bits": bits, "options": options, "status": "done", "size_mb": 4.0,
        "calibration_seconds": 2.0, "training_seconds": np.nan, **more,
    }  # fmt: skip


def gain(test_set, pairs, replicates=400, level=0.95):
    return worst_group_gain(test_set, pairs, replicates, level, np.random.default_rng(0))


def test_gain_is_the_difference_of_the_two_worst_groups_worked_by_hand():
    # plain: a 90 %, b 60 %; repaired: a 70 %, b 80 %. Each has a worst group of its own: 70 - 60
    test_set = images({"plain": predictions(10, 20), "fair": predictions(30, 10)})
    value, low, high = gain(test_set, [("fair", "plain")])
    assert value == pytest.approx(10)
    assert low < 10 < high
    assert gain(test_set, [("plain", "plain")]) == (0, 0, 0)  # paired: what is the same cancels


def test_gain_is_a_mean_over_seeds_and_images_are_drawn_once_for_all_of_them():
    one = images({"plain": predictions(10, 20), "fair": predictions(10, 10)})
    many = images({f"{name}{s}": one.predictions[name] for name in ("plain", "fair") for s in range(3)})
    assert gain(one, [("fair", "plain")]) == pytest.approx(gain(many, [(f"fair{s}", f"plain{s}") for s in range(3)]))
    mixed = images({"plain": predictions(10, 20), "fair": predictions(10, 10), "worse": predictions(10, 30)})
    assert gain(mixed, [("fair", "plain"), ("worse", "plain")])[0] == pytest.approx((20 - 20) / 2)


def test_the_interval_is_that_of_a_bootstrap_over_rows():
    """Against drawing rows with replacement, the same statistic of each: ends within Monte-Carlo error."""
    rng = np.random.default_rng(1)
    plain, fair = ((rng.random(150) < p).astype(np.int64) for p in (0.3, 0.2))
    test_set = images({"plain": plain, "fair": fair})
    value, low, high = gain(test_set, [("fair", "plain")], replicates=20_000)
    at = rng.integers(0, 150, (20_000, 150))
    is_b = GROUP[at] == 1
    worst = []
    for predicted in (fair, plain):
        is_right = predicted[at] == 0
        rates = [(is_right & member).sum(axis=1) / member.sum(axis=1) for member in (~is_b, is_b)]
        worst.append(np.minimum(*rates))
    found = 100 * (worst[0] - worst[1])
    np.testing.assert_allclose([low, high], np.quantile(found, [0.025, 0.975]), atol=0.8)
    assert low < value < high


def test_groups_that_are_too_small_do_not_count_and_without_any_there_is_no_gain():
    cells = {"plain": predictions(10, 50), "fair": predictions(20, 0)}
    assert gain(images(cells, min_group_size=60), [("fair", "plain")])[0] == pytest.approx(-10)
    assert np.isnan(gain(images(cells, min_group_size=200), [("fair", "plain")])).all()


def table(rows, cells=None):
    cells = cells or {each["cell"]: predictions(10, 20) for each in rows}
    return cost_benefit_table(pd.DataFrame(rows), {"faces": images(cells)}, 200, 0.95)


def test_everything_is_compared_with_the_main_plain_setting_of_the_same_bits_model_and_seed():
    other = '{"observer":"minmax"}'
    rows = [
        row("fp32", "none", np.nan, options=None), row("minmax", options=other), row("plain"), row("plain1", seed=1),
        row("plain8", bits=8), row("qat", "qat", training_seconds=60.0, size_mb=5.0),
        row("qat1", "qat", seed=1, training_seconds=80.0, size_mb=5.0),
        row("fair", strategy="group_dro", training_seconds=30.0), row("alone", "qat", bits=2),
    ]  # fmt: skip
    cells = {each["cell"]: predictions(10, 20) for each in rows} | {
        "qat": predictions(10, 15),
        "qat1": predictions(0, 10),
    }
    found = table(rows, cells)
    assert tuple(found) == COST_COLUMNS
    found = found.set_index("setting")
    assert set(found.index) == {"W4A4 static (minmax)", "W4A4 QAT (mse)", "W4A4 static (mse) + group DRO"}
    assert set(found["reference"]) == {"W4A4 static (mse)"}  # two cells have it, minmax one
    qat = found.loc["W4A4 QAT (mse)"]
    assert qat["n_seeds"] == 2 and qat["gain"] == pytest.approx((10 + 20) / 2)
    assert qat["seconds"] == pytest.approx((62 + 82) / 2) and qat["reference_seconds"] == 2.0
    assert (qat["size_mb"], qat["reference_size_mb"]) == (5.0, 4.0)


def test_seconds_that_were_not_measured_stay_missing():
    rows = [row("plain", calibration_seconds=np.nan), row("fair", strategy="x", calibration_seconds=np.nan)]
    (found,) = table(rows).to_dict("records")
    assert np.isnan(found["seconds"]) and np.isnan(found["reference_seconds"])
    (found,) = table([row("plain"), row("fair", strategy="x", training_seconds=3.0)]).to_dict("records")
    assert found["seconds"] == 5.0


def test_nothing_to_compare_is_an_empty_table():
    for rows in ([], [row("fp32", "none", np.nan, options=None)], [row("plain")]):
        found = cost_benefit_table(pd.DataFrame(rows), {"faces": images({"plain": predictions(0, 0)})}, 100, 0.95)
        assert found.empty and tuple(found) == COST_COLUMNS
