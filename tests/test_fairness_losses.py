"""Losses for groups: their values by hand and against the hard metrics, their gradients, the weights that follow the
worst group; and the batches in which every group has an equal share."""

import logging
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evaluation import Predictions
from fairness_losses import (
    BUFFER_BATCHES,
    CONSTRAINTS,
    FairnessPenalty,
    FairnessWarning,
    GroupBalancedLoader,
    GroupDistillation,
    GroupDRO,
    GroupError,
    Groups,
    Reweighed,
    reweighing_weights,
    soft_demographic_parity,
    soft_equalized_odds,
    worst_group_accuracy_score,
)
from group_counts import count_table, group_metrics

LARGE = 1e4  # between logits: softmax gives 0 and 1 exactly


def batch_of(groups, labels, images=None) -> dict:
    images = torch.zeros(len(labels), 3, 2, 2) if images is None else images
    return {"image": images, "label": torch.tensor(labels), "sensitive": {"gender": torch.tensor(groups)}}


def two_groups() -> Groups:
    return Groups.of([batch_of([0, 0, 0, 1], [0, 1, 1, 0])])


def logits_of(chances) -> torch.Tensor:
    """Logits (N, 2) of these probabilities of class 1."""
    chance_N = torch.tensor(chances, dtype=torch.float64)
    return torch.stack([(1 - chance_N).log(), chance_N.log()], dim=1).requires_grad_()


def ce(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    return F.cross_entropy(logits, batch["label"], reduction="none")


# -------------------------------------------------------------------------------------------------------------- groups


def test_groups_are_the_combinations_that_occur_with_their_counts():
    loader = [
        {"image": None, "label": [0, 2], "sensitive": {"gender": [1, 0], "race": [4, 2]}},
        {"image": None, "label": [2, 2, 1], "sensitive": {"gender": [1, 1, 0], "race": [4, 2, 2]}},
    ]
    groups = Groups.of(loader)
    assert groups.attributes == ("gender", "race") and groups.values == ((0, 2), (1, 2), (1, 4))
    assert groups.names == ["0 & 2", "1 & 2", "1 & 4"] and len(groups) == 3
    assert groups.counts.tolist() == [2, 1, 2]
    assert groups.label_counts.tolist() == [[0, 1, 1], [0, 0, 1], [1, 0, 1]]
    codes = groups.codes(loader[1])
    assert codes.tolist() == [2, 1, 0] and codes.dtype == torch.int64
    for attributes in ("gender", ["gender"]):
        assert Groups.of(loader, attributes).values == ((0,), (1,))
        assert Groups.of(loader, attributes).counts.tolist() == [2, 3]


def test_tuples_are_batches_too_and_two_classes_are_the_fewest():
    loader = [(torch.zeros(2, 3, 2, 2), torch.tensor([0, 0]), {"gender": torch.tensor([5, 3])})]
    groups = Groups.of(loader)
    assert groups.values == ((3,), (5,)) and groups.label_counts.tolist() == [[1, 0], [1, 0]]
    assert groups.codes(loader[0]).tolist() == [1, 0]


@pytest.mark.parametrize(
    "loader, attributes, message",
    [
        ([], None, "the loader is empty"),
        ([batch_of([0, 1], [0, 1])], ["race"], r"no sensitive attribute 'race' \(it has: gender\)"),
        ([{"image": None, "label": [0], "sensitive": {}}], None, r"no sensitive attribute at all \(it has: none\)"),
        ([{"image": None, "label": [0], "sensitive": {}}], ["gender"], r"attribute 'gender' \(it has: none\)"),
        ([batch_of([2, 2], [0, 1]), batch_of([2], [0])], None, "only one group: all 3 images have gender=2"),
    ],
    ids=["empty", "missing", "none", "named", "single"],
)
def test_what_cannot_be_grouped_is_one_clear_line(loader, attributes, message):
    with pytest.raises(GroupError, match=message) as caught:
        Groups.of(loader, attributes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda g: FairnessPenalty(g, "equalized_odds", 1.0), lambda g: GroupDRO(g, 0.1)])
def test_an_unknown_group_in_training_is_named(make):
    with pytest.raises(GroupError, match="gender=7"):
        make(two_groups())(torch.zeros(2, 2), batch_of([0, 7], [0, 1]))


# ---------------------------------------------------------------------------------------------------------------- gaps


def test_gaps_by_hand():
    logits = logits_of([0.5, 0.9, 0.1, 0.2, 0.3, 0.4])
    labels = torch.tensor([1, 1, 0, 1, 0, 0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    # selection 0.5 and 0.3; TPR 0.7 and 0.2; FPR 0.1 and 0.35
    assert soft_demographic_parity(logits, groups, 2).item() == pytest.approx(0.2)
    assert soft_equalized_odds(logits, labels, groups, 2).item() == pytest.approx(0.5)
    # without the positives of group 1 there is no TPR range: the FPR range is left
    kept = torch.tensor([0, 1, 2, 4, 5])
    assert soft_equalized_odds(logits[kept], labels[kept], groups[kept], 2).item() == pytest.approx(0.25)


@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_on_decisions_they_are_the_metrics_of_group_counts(n_classes):
    generator = np.random.default_rng(n_classes)
    seen = 0
    for _ in range(60):
        n = int(generator.integers(6, 60))
        groups, labels, predictions = (generator.integers(0, size, n) for size in (4, n_classes, n_classes))
        logits = LARGE * F.one_hot(torch.from_numpy(predictions), n_classes).double()
        metrics = group_metrics(count_table(groups, labels, predictions, 4, n_classes))
        codes = torch.from_numpy(groups)
        assert soft_demographic_parity(logits, codes, 4).item() == metrics["demographic_parity_difference"]
        if not np.isnan(metrics["equalized_odds_difference"]):
            seen += 1
            soft = soft_equalized_odds(logits, torch.from_numpy(labels), codes, 4)
            assert soft.item() == metrics["equalized_odds_difference"]
    assert seen >= 20


def test_a_single_logit_is_that_of_class_1():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    labels, groups = (torch.randint(0, size, (40,), generator=generator) for size in (2, 3))
    both = torch.cat([torch.zeros_like(z), z], dim=1)
    for single, double in (
        (soft_demographic_parity(z, groups, 3), soft_demographic_parity(both, groups, 3)),
        (soft_equalized_odds(z, labels, groups, 3), soft_equalized_odds(both, labels, groups, 3)),
    ):
        assert single.item() == double.item() > 0
    rates = [torch.sigmoid(z[groups == g]).mean().item() for g in range(3)]
    assert soft_demographic_parity(z, groups, 3).item() == pytest.approx(max(rates) - min(rates))
    batch = {"label": labels, "sensitive": {"gender": groups}}
    loss = FairnessPenalty(Groups.of([batch]), "equalized_odds", 0.0)(z, batch)
    assert loss.item() == pytest.approx(F.binary_cross_entropy_with_logits(z[:, 0], labels.double()).item())


@pytest.mark.parametrize("n_classes", [1, 2, 3])
def test_gradients_are_the_derivatives(n_classes):
    generator = torch.Generator().manual_seed(n_classes)
    logits = torch.randn(24, n_classes, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, max(2, n_classes), (24,), generator=generator)
    groups = torch.randint(0, 3, (24,), generator=generator)
    assert torch.autograd.gradcheck(lambda x: soft_demographic_parity(x, groups, 3), (logits,))
    assert torch.autograd.gradcheck(lambda x: soft_equalized_odds(x, labels, groups, 3), (logits,))
    batch = {"label": labels, "sensitive": {"gender": groups}}
    known = Groups.of([batch])
    for constraint in CONSTRAINTS:
        assert torch.autograd.gradcheck(lambda x, c=constraint: FairnessPenalty(known, c, 0.7)(x, batch), (logits,))
    assert torch.autograd.gradcheck(lambda x: Reweighed(known)(x, batch), (logits,))


def test_with_nothing_to_compare_they_are_0_with_a_gradient_of_0():
    for groups, labels in (([1, 1, 1], [0, 1, 1]), ([0], [1])):
        logits = torch.randn(len(groups), 2, requires_grad=True)
        codes, labels = torch.tensor(groups), torch.tensor(labels)
        for gap in (soft_demographic_parity(logits, codes, 3), soft_equalized_odds(logits, labels, codes, 3)):
            assert gap.item() == 0 and gap.requires_grad
            assert torch.autograd.grad(gap, logits)[0].tolist() == torch.zeros(len(groups), 2).tolist()
    # two groups, but neither their positives nor their negatives can be compared
    logits = torch.randn(2, 2, requires_grad=True)
    gap = soft_equalized_odds(logits, torch.tensor([0, 1]), torch.tensor([0, 1]), 2)
    assert gap.item() == 0 and torch.autograd.grad(gap, logits)[0].abs().sum() == 0


def test_gaps_are_computed_in_float32_whatever_the_autocast():
    logits = logits_of([0.501, 0.503, 0.509, 0.5]).float()
    groups = torch.tensor([0, 0, 1, 1])
    plain = soft_demographic_parity(logits, groups, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert soft_demographic_parity(logits, groups, 2).item() == plain.item() == pytest.approx(0.0025, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------- penalty


def test_the_penalty_is_cross_entropy_plus_the_weighted_gap():
    logits = logits_of([0.5, 0.9, 0.1, 0.2, 0.3, 0.4])
    batch = batch_of([0, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 0])
    plain = -sum(map(math.log, (0.5, 0.9, 0.9, 0.2, 0.7, 0.6))) / 6
    for constraint, gap in (("equalized_odds", 0.5), ("demographic_parity", 0.2)):
        loss = FairnessPenalty(two_groups(), constraint, 3.0)
        assert loss(logits, batch).item() == pytest.approx(plain + 3 * gap)
    smooth = F.cross_entropy(logits, batch["label"], label_smoothing=0.2).item()
    loss = FairnessPenalty(two_groups(), "demographic_parity", 3.0, label_smoothing=0.2)
    assert loss(logits, batch).item() == pytest.approx(smooth + 0.6)
    with pytest.raises(ValueError, match="unknown constraint 'parity'; choose from equalized_odds, demographic_parity"):
        FairnessPenalty(two_groups(), "parity", 1.0)


@pytest.mark.parametrize(("constraint", "few"), [("equalized_odds", 14), ("demographic_parity", 6)])
def test_batches_of_too_few_images_of_a_group_are_said_once(constraint, few):
    """Two groups, two classes: less than 4 images of each part on average."""

    def said(images: int) -> list[str]:
        batch = batch_of([i % 2 for i in range(images)], [i // 2 % 2 for i in range(images)])
        loss = FairnessPenalty(two_groups(), constraint, 1.0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                loss(logits_of([0.5] * images), batch)
        return [str(warning.message) for warning in caught if issubclass(warning.category, FairnessWarning)]

    (told,) = said(few)
    part = "3.5 images each and class" if constraint == "equalized_odds" else "3.0 images each"
    assert f"of the 2 groups a batch of {few} images has about {part}: the {constraint} gap" in told
    assert said(few + 2) == []


def test_descending_the_penalty_closes_the_gap():
    """Where cross entropy alone leaves it."""
    batch = batch_of([0, 0, 1, 1], [1, 0, 1, 0])

    def gap_after(weight: float) -> float:
        logits = logits_of([0.9, 0.5, 0.4, 0.1]).detach().requires_grad_()
        optimizer = torch.optim.SGD([logits], lr=0.1)
        loss = FairnessPenalty(two_groups(), "equalized_odds", weight)
        for _ in range(30):
            optimizer.zero_grad()
            loss(logits, batch).backward()
            optimizer.step()
        return soft_equalized_odds(logits, batch["label"], batch["sensitive"]["gender"], 2).item()

    assert gap_after(0.0) > 0.3
    assert gap_after(5.0) < 0.1


# ----------------------------------------------------------------------------------------------------------- group DRO


def test_group_dro_by_hand():
    """Sagawa et al. 2020, Algorithm 1, two steps."""
    loss = GroupDRO(two_groups(), step_size=0.5)
    assert loss.weights.tolist() == [0.5, 0.5]
    logits = logits_of([0.5, 0.25, 0.8])
    batch = batch_of([0, 0, 1], [1, 1, 1])
    group_losses = np.array([(math.log(2) + math.log(4)) / 2, -math.log(0.8)])
    q = np.array([0.5, 0.5])
    for _ in range(2):
        q = q * np.exp(0.5 * group_losses)
        q = q / q.sum()
        assert loss(logits, batch).item() == pytest.approx(q @ group_losses, rel=1e-6)
        np.testing.assert_allclose(loss.weights.numpy(), q, rtol=1e-6)


def test_its_gradient_is_that_of_the_weighted_group_losses():
    loss, batch = GroupDRO(two_groups(), 1.0), batch_of([0, 0, 1], [1, 0, 1])
    logits = logits_of([0.5, 0.25, 0.8])
    (gradient,) = torch.autograd.grad(loss(logits, batch), logits)
    q = loss.weights.double()
    expected = q[0] * ce(logits, batch)[:2].mean() + q[1] * ce(logits, batch)[2]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])


def test_the_weights_follow_the_worst_group_and_return():
    loss, batch = GroupDRO(two_groups(), 0.5), batch_of([0, 1], [1, 1])
    bad_for_1, bad_for_0 = logits_of([0.9, 0.1]), logits_of([0.1, 0.9])
    seen = []
    for _ in range(200):  # far beyond where a weight in float32 would be 0 for good
        loss(bad_for_1, batch)
        seen.append(float(loss.weights[1]))
    assert seen == sorted(seen) and seen[0] > 0.5 and seen[-1] == 1.0
    for _ in range(250):
        loss(bad_for_0, batch)
    assert float(loss.weights[0]) > 0.999


def test_a_group_that_is_not_in_the_batch_keeps_its_weight():
    groups = Groups.of([batch_of([0, 1, 2], [0, 1, 1])])
    loss = GroupDRO(groups, 2.0)
    value = loss(logits_of([0.9, 0.1]), batch_of([0, 1], [1, 1]))
    q = loss.weights.tolist()
    assert q[2] == pytest.approx(1 / 3) and sum(q) == pytest.approx(1) and q[1] > 1 / 3 > q[0]
    assert q[1] / q[0] == pytest.approx(math.exp(2 * (math.log(10) - math.log(1 / 0.9))), rel=1e-5)
    assert value.item() == pytest.approx(q[0] * -math.log(0.9) + q[1] * math.log(10), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- distillation


class Teacher(nn.Module):
    """The mean of each channel as logits, through a norm and a dropout that a training mode would show in."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(x)).mean((2, 3))


def distillation(temperature: float = 2.0, step_size: float = 0.5) -> tuple[GroupDistillation, dict, torch.Tensor]:
    """The loss, a batch, and what the teacher says of it."""
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    batch = batch_of([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2], images)
    teacher = Teacher().eval()
    with torch.no_grad():
        wanted = teacher(images)
    return GroupDistillation(Groups.of([batch]), teacher, temperature, step_size), batch, wanted


def test_a_student_that_is_the_teacher_has_no_loss():
    loss, batch, wanted = distillation()
    assert loss(wanted.clone().requires_grad_(), batch).item() == 0
    assert loss.weights.tolist() == [0.5, 0.5]
    assert loss(wanted + 1, batch).item() == pytest.approx(0, abs=1e-6)  # softmax does not see a shift


def test_distillation_by_hand():
    loss, batch, wanted = distillation(temperature=2.0, step_size=0.5)
    student = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), requires_grad=True)
    p, q = (torch.softmax(logits.double() / 2, 1) for logits in (wanted, student.detach()))
    divergence = 4 * (p * (p / q).log()).sum(1)
    drifts = np.array([divergence[:3].mean(), divergence[3:].mean()])
    weights = np.exp(0.5 * drifts) / np.exp(0.5 * drifts).sum()
    value = loss(student, batch)
    assert value.item() == pytest.approx(weights @ drifts, rel=1e-5)
    np.testing.assert_allclose(loss.weights.numpy(), weights, rtol=1e-5)
    # the gradient of T^2 KL is T (q - p), by group and image
    value.backward()
    share = torch.from_numpy(weights).repeat_interleave(3)[:, None] / 3
    torch.testing.assert_close(student.grad.double(), share * 2 * (q - p), rtol=1e-4, atol=1e-6)


def test_the_weights_go_to_the_group_that_drifts():
    loss, batch, wanted = distillation()
    student = wanted.clone()
    student[3:, 0] += 3
    for _ in range(20):
        loss(student, batch)
    assert float(loss.weights[1]) > 0.95


def test_labels_do_not_matter_to_distillation():
    (first, batch, wanted), (second, _, _) = distillation(), distillation()
    assert first(wanted * 2, batch).item() == second(wanted * 2, {**batch, "label": 2 - batch["label"]}).item() > 0


@pytest.mark.parametrize("is_training", [True, False])
def test_the_teacher_is_evaluated_and_not_changed(is_training):
    loss, batch, wanted = distillation()
    loss.teacher.train(is_training)
    loss.teacher.dropout.eval()
    modes = [module.training for module in loss.teacher.modules()]
    before = {name: tensor.clone() for name, tensor in loss.teacher.state_dict().items()}
    student = wanted.clone().requires_grad_()
    value = loss(student, batch)
    assert value.item() == 0  # in training mode it would say something else
    value.backward()
    assert [module.training for module in loss.teacher.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.teacher.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in loss.teacher.parameters())


# ---------------------------------------------------------------------------------------------------------- reweighing


def test_reweighing_by_hand():
    groups, labels = [0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]
    table = reweighing_weights(labels, groups, 2, 2)
    np.testing.assert_allclose(table, [[(4 * 3) / (6 * 1), (4 * 3) / (6 * 3)], [(2 * 3) / (6 * 2), np.nan]])
    assert np.isnan(reweighing_weights(labels, groups, 3, 2)[2]).all()


def test_reweighing_makes_group_and_label_independent():
    generator = np.random.default_rng(0)
    groups, labels = generator.integers(0, 3, 500), generator.integers(0, 4, 500)
    labels = np.where(generator.random(500) < 0.4, groups, labels)
    weights = reweighing_weights(labels, groups, 3, 4)[groups, labels]
    joint = np.zeros((3, 4))
    np.add.at(joint, (groups, labels), weights / 500)
    np.testing.assert_allclose(joint, joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True), atol=1e-12)


def test_reweighing_equals_aif360():
    pytest.importorskip("aif360")
    logging.disable(logging.WARNING)  # on import it warns of every optional package that is not installed
    try:
        from aif360.algorithms.preprocessing import Reweighing
        from aif360.datasets import BinaryLabelDataset
    finally:
        logging.disable(logging.NOTSET)
    generator = np.random.default_rng(1)
    groups = (generator.random(300) < 0.3).astype(int)
    labels = (generator.random(300) < 0.2 + 0.5 * groups).astype(int)
    data = BinaryLabelDataset(
        df=pd.DataFrame({"gender": groups, "label": labels}),
        label_names=["label"],
        protected_attribute_names=["gender"],
    )
    theirs = Reweighing([{"gender": 0}], [{"gender": 1}]).fit_transform(data).instance_weights
    np.testing.assert_allclose(reweighing_weights(labels, groups, 2, 2)[groups, labels], theirs, rtol=1e-12)


def test_reweighed_is_the_weighted_mean_of_cross_entropy():
    groups = two_groups()  # counts [[1, 2], [1, 0]]
    logits, batch = logits_of([0.2, 0.9, 0.6]), batch_of([0, 0, 1], [0, 1, 0])
    losses = [-math.log(0.8), -math.log(0.9), -math.log(0.4)]
    own = [3 * 2 / 4, 3 * 2 / (4 * 2), 1 * 2 / 4]
    assert Reweighed(groups)(logits, batch).item() == pytest.approx(np.dot(own, losses) / 3)
    table = np.array([[5.0, 7.0], [11.0, np.nan]])
    assert Reweighed(groups, table)(logits, batch).item() == pytest.approx(np.dot([5, 7, 11], losses) / 3)
    with pytest.raises(GroupError, match="gender=1 with label 1"):
        Reweighed(groups, table)(logits, batch_of([0, 0, 1], [0, 1, 1]))
    with pytest.raises(ValueError, match=r"must be \(2, classes\), it is \(3, 2\)"):
        Reweighed(groups, np.ones((3, 2)))


# --------------------------------------------------------------------------------------------------------------- score


def test_the_score_is_the_accuracy_of_the_worst_group_that_is_large_enough():
    y_true = np.array([0, 0, 0, 0, 1, 1, 1, 1, 0])
    logits = np.eye(2, dtype=np.float32)[[0, 0, 0, 1, 1, 0, 1, 0, 1]]
    gender = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2])  # 3/4, 2/4, 0/1
    predictions = Predictions(logits, y_true, {"gender": gender, "age": gender * 0}, np.arange(9))
    assert worst_group_accuracy_score(two_groups(), min_size=2)(predictions) == 0.5
    assert worst_group_accuracy_score(two_groups())(predictions) == 0.0  # a group that was not trained on counts too
    with pytest.raises(GroupError, match="no group of the validation data has 9 images; the largest has 4"):
        worst_group_accuracy_score(two_groups(), min_size=9)(predictions)
    with pytest.raises(GroupError, match=r"no sensitive attribute 'gender' \(it has: age\)"):
        worst_group_accuracy_score(two_groups())(Predictions(logits, y_true, {"age": gender}, np.arange(9)))


# ------------------------------------------------------------------------------------------------------------- batches


class Stream:
    """A shuffling loader with augmentation: image i is filled with i, and a random fraction each time it passes."""

    def __init__(self, genders, batch_size: int = 8, as_tuples: bool = False, in_order: bool = False):
        self.genders, self.batch_size = np.array(genders), batch_size
        self.as_tuples, self.in_order = as_tuples, in_order
        self.generator = np.random.default_rng(5)
        self.passes = 0

    def __len__(self) -> int:
        return -(-len(self.genders) // self.batch_size)

    def __iter__(self):
        self.passes += 1
        n = len(self.genders)
        order = np.arange(n) if self.in_order else self.generator.permutation(n)
        for start in range(0, n, self.batch_size):
            at = order[start : start + self.batch_size]
            fraction = self.generator.random(len(at)) / 2
            images = torch.from_numpy(at + fraction).float()[:, None, None, None].expand(-1, 3, 2, 2).contiguous()
            sensitive = {"gender": torch.from_numpy(self.genders[at])}
            if self.as_tuples:
                yield images, torch.from_numpy(at % 2), sensitive
            else:
                index = torch.from_numpy(at)
                yield {"image": images, "label": index % 2, "sensitive": sensitive, "index": index}


def shares(batch: dict, n_groups: int) -> list[int]:
    return np.bincount(batch["sensitive"]["gender"].numpy(), minlength=n_groups).tolist()


@pytest.mark.parametrize("as_tuples", [False, True])
def test_every_batch_has_the_groups_in_equal_shares(as_tuples):
    genders = [0] * 150 + [1] * 40 + [2] * 12  # 202 images: 25 batches of 8 and one of 2
    stream = Stream(genders, as_tuples=as_tuples)
    groups = Groups.of(stream)
    balanced = GroupBalancedLoader(stream, groups, seed=0)
    batches = list(balanced)
    assert len(batches) == len(balanced) == 26
    assert [len(batch["label"]) for batch in batches] == [8] * 25 + [2]
    totals = np.zeros(3, dtype=int)
    for batch in batches:
        assert max(shares(batch, 3)) - min(shares(batch, 3)) <= 1
        totals += shares(batch, 3)
        which = batch["image"][:, 0, 0, 0].floor().long()  # image, label, group and index still belong together
        assert batch["image"].shape == (len(which), 3, 2, 2)
        assert torch.equal(batch["label"], which % 2)
        assert torch.equal(batch["sensitive"]["gender"], torch.tensor(genders)[which])
        assert ("index" in batch) is not as_tuples
        if "index" in batch:
            assert torch.equal(batch["index"], which)
    assert np.ptp(totals) <= 12  # the odd ones go to all groups, by chance
    assert balanced.drawn.tolist() == totals.tolist()


def test_small_groups_are_repeated_and_large_ones_are_not():
    stream = Stream([0] * 152 + [1] * 8)
    balanced = GroupBalancedLoader(stream, Groups.of(stream), seed=0)
    images = torch.cat([batch["image"][:, 0, 0, 0] for batch in balanced])
    assert balanced.drawn.tolist() == [80, 80] and balanced.distinct.tolist() == [80, 8]
    assert balanced.repeats.tolist() == [1.0, 10.0]
    large, small = images[images < 152], images[images >= 152]
    assert len(large.unique()) == 80 and len(small.unique()) == 8
    _, times = small.unique(return_counts=True)
    assert times.min() >= 1  # every one of them is seen


def test_only_so_many_images_are_kept(monkeypatch):
    import fairness_losses

    kept = []

    class Watched(fairness_losses._Pool):
        def put(self, image, capacity):
            super().put(image, capacity)
            kept.append(len(self.images))
            assert image["image"].untyped_storage().nbytes() == image["image"].nbytes  # no view of a batch

    monkeypatch.setattr(fairness_losses, "_Pool", Watched)
    stream = Stream([0] * 900 + [1] * 100)
    list(GroupBalancedLoader(stream, Groups.of(stream), seed=0))
    assert max(kept) <= BUFFER_BATCHES * 4


def test_the_same_seed_gives_the_same_batches_and_each_iteration_others():
    def epochs(seed: int) -> list[torch.Tensor]:
        stream = Stream([0] * 60 + [1] * 20, in_order=True)  # the same images in each epoch: what differs is the draw
        balanced = GroupBalancedLoader(stream, Groups.of(stream), seed)
        return [torch.cat([batch["index"] for batch in balanced]) for _ in range(2)]

    first, second, other = epochs(1), epochs(1), epochs(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


def test_augmentation_stays_fresh():
    """What an epoch gives are the images as they passed in that epoch, never those of an earlier one."""
    stream = Stream([0] * 60 + [1] * 4)
    balanced = GroupBalancedLoader(stream, Groups.of(stream), seed=0)
    first, second = (set(torch.cat([b["image"][:, 0, 0, 0] for b in balanced]).tolist()) for _ in range(2))
    assert not first & second and stream.passes == 3


def test_it_reads_ahead_for_groups_that_come_late_but_only_so_far():
    near = Stream([0] * 8 * (BUFFER_BATCHES - 1) + [1] * 8, in_order=True)
    for batch in GroupBalancedLoader(near, Groups.of(near), seed=0):
        assert shares(batch, 2) == [4, 4]
    far = Stream([0] * 8 * (2 * BUFFER_BATCHES) + [1] * 8, in_order=True)
    batches = list(GroupBalancedLoader(far, Groups.of(far), seed=0))
    assert len(batches) == len(far)
    assert shares(batches[0], 2) == [8, 0]  # not seen yet: those that were share its place
    assert shares(batches[-1], 2) == [4, 4]


def test_more_groups_than_places():
    stream = Stream(list(range(6)) * 4, batch_size=4)
    balanced = GroupBalancedLoader(stream, Groups.of(stream), seed=0)
    for batch in balanced:
        assert max(shares(batch, 6)) == 1 and sum(shares(batch, 6)) == 4
    assert balanced.drawn.min() > 0


def test_a_loader_without_a_length_is_refused():
    with pytest.raises(GroupError, match="a loader that has a length"):
        GroupBalancedLoader(iter([]), two_groups(), 0)


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("batch_device", ["cpu", "cuda"])
def test_losses_are_the_same_on_cuda(batch_device):
    _, batch, _ = distillation()
    groups, logits = Groups.of([batch]), torch.randn(6, 3, generator=torch.Generator().manual_seed(4))
    moved = {
        "image": batch["image"].to(batch_device),
        "label": batch["label"].to(batch_device),
        "sensitive": {"gender": batch["sensitive"]["gender"].to(batch_device)},
    }
    for make in (
        lambda: FairnessPenalty(groups, "equalized_odds", 1.0),
        lambda: FairnessPenalty(groups, "demographic_parity", 1.0),
        lambda: GroupDRO(groups, 0.5),
        lambda: GroupDistillation(groups, Teacher(), 2.0, 0.5),
        lambda: Reweighed(groups),
    ):
        cpu, cuda = make(), make()
        for _ in range(2):
            torch.testing.assert_close(cuda(logits.cuda(), moved).cpu(), cpu(logits, batch), rtol=1e-5, atol=1e-6)
