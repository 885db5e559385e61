"""Thresholds of groups: fairlearn's decisions, the same for the same image, and refusals that name the group."""

import numpy as np
import pytest
import torch
from torch import nn

from evaluation import model_size_mb, predict
from fairness_metrics import compute_fairness_metrics
from quantization import apply_quantization
from quantizers.numerics import QuantizationError
from quantizers.thresholds import CONSTRAINTS, GroupThresholds, adjust_thresholds

METRIC = {
    "demographic_parity": "demographic_parity_difference",
    "equalized_odds": "equalized_odds_difference",
    "true_positive_rate_parity": "equal_opportunity_difference",
    "false_positive_rate_parity": "predictive_equality_difference",
}


class Margin(nn.Module):
    """The margin is the first pixel."""

    def __init__(self, classes: int = 2):
        super().__init__()
        self.classes = classes
        self.description, self.reports = {}, {}

    def packed_tensors(self):
        return {}

    def packed_metadata(self):
        return {}

    def forward(self, x):
        margin = x[:, 0, 0, 0]
        return torch.stack([torch.zeros_like(margin), margin, *[margin - 9] * (self.classes - 2)], dim=1)


def faces(n: int = 6000, seed: int = 0, groups: int = 3) -> list[dict]:
    generator = np.random.default_rng(seed)
    group = generator.integers(0, groups, n)
    label = (generator.random(n) < np.array([0.3, 0.5, 0.6])[group]).astype(int)
    margin = (2 * label - 1) + 1.5 * generator.normal(size=n) + np.array([0.5, 0.0, -1.0])[group]
    image = torch.zeros(n, 3, 1, 1)
    image[:, 0, 0, 0] = torch.from_numpy(margin)
    return [{"image": image, "label": torch.from_numpy(label), "sensitive": {"race": torch.from_numpy(group)}}]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_decisions_are_fairlearns_and_the_gap_closes(constraint):
    from fairlearn.postprocessing import ThresholdOptimizer
    from sklearn.linear_model import LogisticRegression

    (batch,) = loader = faces()
    adjusted = adjust_thresholds(Margin(), loader, constraint=constraint)
    before = compute_fairness_metrics(Margin(), loader, "race")
    after = compute_fairness_metrics(adjusted, loader, "race")
    assert after[METRIC[constraint]] < 0.03 < 0.12 < before[METRIC[constraint]]
    # fairlearn itself, on a score that ranks the images as the margin does
    margin, label, group = (
        np.asarray(v) for v in (batch["image"][:, 0, 0, 0], batch["label"], batch["sensitive"]["race"])
    )
    scores = margin.astype(np.float64)[:, None]
    estimator = LogisticRegression().fit(scores, label)
    theirs = ThresholdOptimizer(
        estimator=estimator, constraints=constraint, objective="accuracy_score", prefit=True,
        predict_method="decision_function", grid_size=1000,
    ).fit(scores, label, sensitive_features=group)  # fmt: skip
    chance = theirs._pmf_predict(scores, sensitive_features=group)[:, 1]
    mine = predict(adjusted, loader).y_pred
    is_certain = (chance < 1e-9) | (chance > 1 - 1e-9)
    assert is_certain.mean() > 0.2 and (mine[is_certain] == (chance[is_certain] > 0.5)).all()
    for lower, upper in ((0.0, 0.5), (0.5, 1.0)):  # where they draw, as often
        drawn = ~is_certain & (chance > lower) & (chance <= upper)
        if drawn.sum() > 200:
            spread = np.sqrt((chance[drawn] * (1 - chance[drawn])).sum())
            assert abs(mine[drawn].sum() - chance[drawn].sum()) < 4.5 * spread


def test_a_decision_does_not_depend_on_the_batch():
    (batch,) = faces(500)
    adjusted = adjust_thresholds(Margin(), [batch], constraint="equalized_odds")
    whole = adjusted(batch["image"], batch["sensitive"])
    order = torch.randperm(500)
    shuffled = adjusted(batch["image"][order], {"race": batch["sensitive"]["race"][order]})
    assert torch.equal(whole[order], shuffled)
    one = adjusted(batch["image"][3:4], {"race": batch["sensitive"]["race"][3:4]})
    assert torch.equal(one[0], whole[3])


def test_the_last_bits_of_a_margin_do_not_decide():
    """Which differ between devices, and between batches on one: what is drawn is drawn for the pixels."""
    (batch,) = faces(4000)
    adjusted = adjust_thresholds(Margin(), [batch], constraint="equalized_odds")
    before = adjusted(batch["image"], batch["sensitive"]).argmax(dim=1)
    adjusted.model.register_forward_hook(lambda module, given, logits: logits * (1 + 1e-6))
    after = adjusted(batch["image"].contiguous(memory_format=torch.channels_last), batch["sensitive"]).argmax(dim=1)
    assert 0 < int(before.sum()) < 4000 and int((before != after).sum()) <= 4  # those at a threshold


def test_what_cannot_be_adjusted_is_refused():
    (batch,) = faces(300)
    race = batch["sensitive"]["race"]
    with pytest.raises(QuantizationError, match="the model has 3"):
        adjust_thresholds(Margin(3), [batch], constraint="equalized_odds")
    with pytest.raises(QuantizationError, match=r"'gender' \(the data has: race\)"):
        adjust_thresholds(Margin(), [batch], attributes=["gender"], constraint="equalized_odds")
    with pytest.raises(QuantizationError, match=r"race has one group \(300 images\)"):
        adjust_thresholds(Margin(), [batch | {"sensitive": {"race": race * 0}}], constraint="equalized_odds")
    none = [batch | {"label": torch.where(race == 1, 0, batch["label"])}]
    with pytest.raises(
        QuantizationError, match=f"group 1 of race has 0 positives among {int((race == 1).sum())} images"
    ):
        adjust_thresholds(Margin(), none, constraint="equalized_odds")
    with pytest.raises(QuantizationError, match="unknown constraint"):
        adjust_thresholds(Margin(), [batch], constraint="fair")
    adjusted = adjust_thresholds(Margin(), [batch], constraint="equalized_odds")
    with pytest.raises(QuantizationError, match="need the sensitive attribute 'race'"):
        adjusted(batch["image"], {})
    with pytest.raises(QuantizationError, match=r"group \d of race has no threshold"):
        adjusted(batch["image"], {"race": race + 7})


def test_a_quantized_model_with_thresholds_counts_them_in_its_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()
    loader = [faces(60)[0] | {"image": torch.randn(60, 3, 8, 8)}]
    adjusted = apply_quantization(model, "threshold_adjustment", 4, loader, calibration_samples=60)
    assert isinstance(adjusted, GroupThresholds) and adjusted.description["strategy"] == "threshold_adjustment"
    assert model_size_mb(adjusted) - model_size_mb(adjusted.model) > adjusted.rules.nbytes / 1e6
