"""FairnessAwareQuantizer: it climbs to the cheapest repair that holds, and what it certifies is true of new images."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from evaluation import EvaluationError, predict
from fairness_metrics import compute_fairness_metrics
from quantizers import fairness_aware, methods
from quantizers.fairness_aware import LADDER, TRAINED, FairnessAwareQuantizer, FairnessConstraintError
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError, QuantizationWarning

DP = "demographic_parity_difference"


class Brightness(nn.Module):
    """Class 1 where an image is bright; right for every image of `faces`, in float."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.convolution.weight.copy_(torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1, 1) / 27)
            self.convolution.bias.zero_()
            self.head.weight.copy_(torch.tensor([[-1.0, 1, -1, 1], [1, -1, 1, -1]]))
            self.head.bias.copy_(torch.tensor([1e-3, -1e-3]))

    def forward(self, x):
        return self.head(self.convolution(x).relu().mean((2, 3)))


def faces(n, seed, contrast=(3.0, 0.15), batch=64):
    """Bright and dark images; those of group 1 have so little contrast that few activation levels cannot see it."""
    generator = torch.Generator().manual_seed(seed)
    gender, label = torch.randint(0, 2, (2, n), generator=generator)
    signal = torch.tensor(contrast)[gender] * (2 * label - 1)
    image = signal.view(-1, 1, 1, 1) * (0.8 + 0.4 * torch.rand(n, 3, 6, 6, generator=generator))
    race = torch.randint(0, 2, (n,), generator=generator)
    return [
        {"image": image[at], "label": label[at], "sensitive": {"gender": gender[at], "race": race[at]}}
        for at in torch.arange(n).split(batch)
    ]


@pytest.fixture
def model():
    return Brightness().eval()


CLIMB = [("ptq_static", {}), ("ptq_static", {"activation_bits": 8}), ("ptq_static", {"bit_width": 8})]


def climber(**changes):
    arguments = {"bit_width": 2, "max_dp_gap": 0.2, "sensitive_attributes": ["gender"], "ladder": CLIMB}
    arguments["observer"] = "minmax"  # of all there is: the widest, which is what the low contrast suffers from
    return FairnessAwareQuantizer(**{**arguments, **changes})


# --- with real quantization -------------------------------------------------------------------------------------------


def test_it_climbs_past_what_hurts_a_group_and_the_bound_holds_on_new_images(model):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    data, new = faces(1200, 1), faces(2000, 2)
    plain = methods.apply_quantization(model, "ptq_static", 2, data, observer="minmax")
    assert compute_fairness_metrics(plain, new, "gender")[DP] > 0.4
    quantizer = climber()
    quantized = quantizer.quantize(model=model, calibration_data=data, fairness_constraint=True)
    assert quantizer.satisfied and isinstance(quantized, QuantizedModel) and not quantized.training
    assert compute_fairness_metrics(quantized, new, "gender")[DP] <= 0.2
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())

    report = quantizer.report
    assert list(report["rung"]) == [0, 1, 2] and list(report["method"]) == ["fp32", "ptq_static", "ptq_static"]
    assert report["verdict"][0] == "FP32 is within the bounds"
    assert report["selection_estimate"][1] > 0.4 and report["verdict"][1].startswith("not kept on the selection images")
    assert np.isnan(report["certification_estimate"][1])  # what fails on selection never sees them
    assert report["verdict"][2].startswith("certified at 97.5 %") and report["certification_high"][2] <= 0.2
    assert report["size_mb"][1] == pytest.approx(report["size_mb"][2], rel=0.01) and report["seconds"][1] > 0
    certificate = quantizer.certificate
    assert certificate["metric"] == DP and certificate["bound"] == 0.2 and certificate["n"] == 400
    assert certificate["low"] <= certificate["observed"] <= certificate["high"] <= 0.2
    assert certificate["level"] == 0.975 and certificate["groups_left_out"] == {}
    assert certificate["smallest_certifiable"] <= certificate["high"] + 0.01
    assert quantizer.final_dp_gap == certificate["observed"] == report["final_dp_gap"][2]
    assert "certified at 97.5 %" in quantizer.summary() and "activation_bits=8" in quantizer.summary()


def test_the_call_of_the_readme(model):
    loader = faces(1500, 3, contrast=(3.0, 2.0))
    quantizer = FairnessAwareQuantizer(bit_width=8, max_dp_gap=0.2, sensitive_attributes=["gender", "race"])
    quantized = quantizer.quantize(model=model, calibration_data=loader, fairness_constraint=True)
    assert quantizer.satisfied and quantized.description["weight_bits"] == 8
    assert len(quantizer.certificate["constraints"]) == 2
    assert quantizer.final_dp_gap == max(one["observed"] for one in quantizer.certificate["constraints"])


def test_an_impossible_bound_is_refused(model):
    data = faces(600, 4)
    quantizer = climber(max_dp_gap=1e-9)
    quantized = quantizer.quantize(model, data)
    assert quantizer.satisfied is False and 0 <= quantizer.final_dp_gap < 0.2
    assert quantized.description["activation_bits"] == 8  # the closest one
    assert "not one of the repairs is certified" in quantizer.message
    assert "With 200 certification images no bound of demographic_parity_difference over gender below 0." in (
        quantizer.message
    )
    with pytest.raises(FairnessConstraintError, match="not one of the repairs is certified") as caught:
        climber(max_dp_gap=1e-9, strict=True).quantize(model, data)
    assert isinstance(caught.value.model, QuantizedModel) and len(caught.value.report) == 4
    assert isinstance(caught.value, QuantizationError)


def test_the_size_budget_holds(model):
    data = faces(1200, 1)
    sizes = climber(max_dp_gap=1e-9)
    sizes.quantize(model, data)
    narrow, wide = sizes.report["size_mb"][1], sizes.report["size_mb"][3]
    assert narrow < wide
    ladder = [("ptq_static", {"bit_width": 8}), ("ptq_static", {"bit_width": 2, "activation_bits": 8})]
    quantizer = climber(ladder=ladder, size_budget_mb=(narrow + wide) / 2)
    quantized = quantizer.quantize(model, data)
    assert quantizer.satisfied and quantized.description["weight_bits"] == 2
    assert quantizer.report["within_budget"].tolist()[1:] == [False, True]
    assert "over the budget" in quantizer.report["verdict"][1] and np.isnan(quantizer.report["selection_estimate"][1])
    with pytest.raises(QuantizationError, match=r"no rung of the ladder could be done: ptq_static skipped: .* budget"):
        climber(size_budget_mb=narrow / 2).quantize(model, data)


def test_the_same_seed_is_the_same_result(model):
    data = faces(900, 5)
    runs = []
    for seed in (0, 0, 1):
        quantizer = climber(seed=seed)
        quantized = quantizer.quantize(model, data)
        ranges = [float(one.scale) for one in quantized.activation_quantizers().values()]
        report = quantizer.report.drop(columns="seconds")
        runs.append((report, quantizer.certificate, quantized(data[0]["image"]), ranges))
    assert runs[0][0].equals(runs[1][0]) and torch.equal(runs[0][2], runs[1][2])
    assert str(runs[0][1]) == str(runs[1][1])
    assert runs[0][3] == runs[1][3] != runs[2][3]  # another seed divides otherwise, so that the ranges differ


def images_of(loader):
    return {image.numpy().tobytes() for batch in loader for image in batch["image"]}


def spy(monkeypatch):
    """What apply_quantization is given, and what is measured, as sets of images."""
    made, measured = [], []
    apply, predict = methods.apply_quantization, fairness_aware.predict

    def applied(model, method, bits, calibration_data, **arguments):
        loaders = [calibration_data, arguments.get("validation_data") or [], arguments.get("train_data") or []]
        made.append(set().union(*map(images_of, loaders)))
        return apply(model, method, bits, calibration_data, **arguments)

    def predicted(model, loader):
        measured.append(frozenset(images_of(loader)))
        return predict(model, loader)

    monkeypatch.setattr(methods, "apply_quantization", applied)
    monkeypatch.setattr(fairness_aware, "predict", predicted)
    return made, measured


def test_what_makes_chooses_and_certifies_a_model_are_different_images(model, monkeypatch):
    made, measured = spy(monkeypatch)
    data = faces(900, 6)
    climber().quantize(model, data)
    (calibration,) = {frozenset(images) for images in made}
    selection, certification = measured[0], measured[1]
    assert set(measured) == {selection, certification}
    assert not calibration & selection and not calibration & certification and not selection & certification
    assert calibration | selection | certification == images_of(data)
    assert len(calibration) == len(selection) == len(certification) == 300


def test_the_parts_are_alike_in_every_group_and_label(model, monkeypatch):
    shares = []
    predict = fairness_aware.predict
    monkeypatch.setattr(fairness_aware, "predict", lambda m, data: shares.append(predict(m, data)) or shares[-1])
    climber().quantize(model, faces(901, 7))
    tables = [np.unique(2 * p.sensitive["gender"] + p.y_true, return_counts=True)[1] for p in shares[:2]]
    assert np.abs(tables[0] - tables[1]).max() <= 1


def test_each_given_loader_is_used_for_its_purpose(model, monkeypatch):
    made, measured = spy(monkeypatch)
    calibration, selection, certification = faces(128, 8), faces(500, 9), faces(500, 10)
    quantizer = climber()
    quantizer.quantize(model, calibration, selection_data=iter(selection), certification_data=certification)
    assert quantizer.satisfied and made[0] == images_of(calibration)
    assert measured[0] == images_of(selection) and measured[1] == images_of(certification)
    made.clear(), measured.clear()
    climber().quantize(model, selection, certification_data=certification)
    assert len(made[0]) == len(measured[0]) == 250 and not made[0] & measured[0]
    with pytest.raises(QuantizationError, match="train_data and calibration_data are the same loader, whose images"):
        climber().quantize(model, selection, train_data=selection)
    with pytest.raises(QuantizationError, match="train_data and calibration_data are the same loader, whose images"):
        climber().quantize(model, selection, train_data=selection, certification_data=certification)
    climber().quantize(
        model, calibration, train_data=calibration, selection_data=selection, certification_data=certification
    )
    for same in ("selection_data", "train_data"):
        with pytest.raises(QuantizationError, match="are the same loader: what chooses a repair cannot certify"):
            climber().quantize(model, calibration, certification_data=certification, **{same: certification})


def test_a_loader_that_shuffles_is_refused(model):
    class Shuffled(list):
        turn = 0

        def __iter__(self):
            self.turn += 1
            return iter(self[:] if self.turn % 2 else self[::-1])

    with pytest.raises(QuantizationError, match="selection_data gives other images each time, or in another order"):
        climber().quantize(model, faces(900, 1), selection_data=Shuffled(faces(300, 2)))


def test_copies_do_not_stand_on_both_sides(model):
    data = faces(600, 11)
    with pytest.warns(QuantizationWarning, match="600 images are exact copies"):
        quantizer = climber()
        quantizer.quantize(model, data + data)
    assert quantizer.certificate["n"] == 200


def test_without_the_constraint_it_is_plain_and_measured(model):
    quantizer = climber(strict=True)
    quantized = quantizer.quantize(model, faces(900, 12), fairness_constraint=False)
    assert quantized.description["activation_bits"] == 2 and len(quantizer.report) == 2
    assert quantizer.satisfied is False and quantizer.final_dp_gap > 0.4
    assert quantizer.certificate["level"] == 0.95 and "ptq_static (rung 1 of 3) is not certified" in quantizer.message


def test_a_drop_of_the_worst_group_is_bounded_too(model):
    quantizer = climber(max_dp_gap=None, max_worst_group_drop=0.1)
    quantizer.quantize(model, faces(900, 13))
    assert quantizer.satisfied and quantizer.certificate["metric"] == "worst_group_drop"
    assert quantizer.report["selection_estimate"].tolist() == pytest.approx([0, 0.5, 0], abs=0.1)
    assert quantizer.final_dp_gap < 0.2  # always measured


def test_rungs_that_cannot_be_done_are_in_the_report(model):
    ladder = ["qat", ("ptq_static", {"activation_bits": 8, "calibration_samples": 32})]
    said = []
    quantizer = climber(ladder=ladder, progress=lambda what, share: said.append((what, share)))
    quantizer.quantize(model, faces(900, 14))
    assert quantizer.satisfied and quantizer.report["verdict"][1] == "skipped: it trains, and there is no train_data"
    shares = [share for _, share in said]
    assert shares == sorted(shares) and said[0][0] == "rung 1 of 2: qat"
    quantizer = climber(ladder=[("mixed_precision", {"size_budget_bytes": 1}), *CLIMB])
    quantizer.quantize(model, faces(900, 14))
    assert quantizer.report["verdict"][1].startswith("failed: ") and quantizer.satisfied


def test_the_default_ladder_names_methods_that_exist():
    assert [name for name, _ in LADDER if name not in methods.METHODS] == []
    trains = [name in TRAINED for name, _ in LADDER]
    assert trains == sorted(trains)  # what trains comes last
    for allowed in (False, True):
        quantizer = climber(ladder=None, allow_group_thresholds=allowed)
        names = [name for name, _ in quantizer.ladder]
        assert ("threshold_adjustment" in names) is allowed


# --- with models whose gaps are known ---------------------------------------------------------------------------------


class Drawn(nn.Module):
    """Class 1 with a probability for each group: image channel 0 holds uniform numbers, channel 1 the group."""

    def __init__(self, place, rates):
        super().__init__()
        self.place = place
        self.register_buffer("rates", torch.tensor(rates))

    def forward(self, x):
        selected = x[:, 0].flatten(1)[:, self.place] < self.rates[x[:, 1, 0, 0].long()]
        return torch.stack([torch.zeros(len(x)), selected.float() - 0.5], dim=1)


def drawn_data(n, seed, n_groups=2):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(n, 3, 4, 4, generator=generator)
    group = torch.arange(n) % n_groups
    image[:, 1] = group.view(-1, 1, 1).float()
    sensitive = {"g": group, "a": group // 2, "b": group % 2}
    return [{"image": image, "label": torch.randint(0, 2, (n,), generator=generator), "sensitive": sensitive}]


def with_models(monkeypatch, rates):
    """Rung k makes the model that selects with rates[k]."""
    made = iter(range(10**6))
    monkeypatch.setattr(
        methods, "apply_quantization", lambda *_, **__: Drawn((k := next(made)) % len(rates), rates[k % len(rates)])
    )
    return [("ptq_static", {})] * len(rates)


def test_a_wrong_certificate_is_as_rare_as_promised_however_long_the_ladder(monkeypatch):
    """Every one of eight repairs has a gap exactly at the bound; to certify any is wrong."""
    ladder = with_models(monkeypatch, [(0.5, 0.3)] * 8)
    exact, runs, wrong, attempts = Drawn(15, (0.5, 0.5)), 150, 0, 0
    for run in range(runs):
        quantizer = FairnessAwareQuantizer(8, None, 0.2, ["g"], ladder=ladder)
        quantizer.quantize(exact, drawn_data(600, run))
        wrong += quantizer.satisfied
        attempts += int(quantizer.report["verdict"].str.contains("certified at").sum())
    assert attempts > 2.5 * runs  # there was every opportunity
    assert wrong / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_a_failed_certificate_is_followed_by_the_next_rung_at_half_the_error(monkeypatch):
    ladder = with_models(monkeypatch, [(0.5, 0.1), (0.5, 0.45), (0.5, 0.5)])
    # The second rung is unlucky on the certification images: there it selects nobody of group 1.
    data, certification = drawn_data(2000, 1), drawn_data(2000, 2)
    certification[0]["image"][certification[0]["image"][:, 1, 0, 0] == 1, 0, 0, 1] = 1.0
    quantizer = FairnessAwareQuantizer(8, None, 0.2, ["g"], ladder=ladder)
    quantizer.quantize(Drawn(15, (0.5, 0.5)), data, certification_data=certification)
    assert quantizer.satisfied
    verdicts = quantizer.report["verdict"].tolist()
    assert verdicts[1].startswith("not kept") and "certified at 97.5 %" in verdicts[2] and "not cert" in verdicts[2]
    assert verdicts[3].startswith("certified at 98.75 %")
    assert quantizer.report["certification_level"].tolist()[2:] == [0.975, 0.9875]


def test_near_candidates_have_their_turn_the_best_first(monkeypatch):
    """No limit keeps the bound on 100 selection images, and 5000 certification images tell."""
    ladder = with_models(monkeypatch, [(0.5, 0.5), (0.5, 0.05), (0.5, 0.5)])
    data, certification = drawn_data(200, 5), drawn_data(5000, 6)
    quantizer = FairnessAwareQuantizer(8, None, 0.15, ["g"], ladder=ladder)
    quantizer.quantize(Drawn(15, (0.5, 0.5)), data, certification_data=certification)
    report = quantizer.report
    assert (report["selection_high"][1:] > 0.15).all() and quantizer.satisfied
    best = int(report["selection_high"][1:].idxmin())
    assert report["verdict"][best].startswith("certified at 97.5 %") and np.isnan(report["certification_high"][2])


def test_the_intersection_is_held_where_it_is_asked_for(monkeypatch):
    """Selected where the attributes agree: neither attribute has a gap, their intersection has one of 0.6."""
    ladder = with_models(monkeypatch, [(0.8, 0.2, 0.2, 0.8)])
    exact, data = Drawn(15, (0.5,) * 4), drawn_data(6000, 3, n_groups=4)
    apart = FairnessAwareQuantizer(8, None, 0.15, ["a", "b"], ladder=ladder)
    apart.quantize(exact, data)
    assert apart.satisfied and apart.final_dp_gap < 0.1
    together = FairnessAwareQuantizer(8, None, 0.15, ["a", "b"], ladder=ladder, intersectional=True)
    together.quantize(exact, data)
    assert not together.satisfied and together.certificate["attribute"] == "a x b"
    assert together.final_dp_gap == pytest.approx(0.6, abs=0.1)


def test_all_bounds_must_hold(monkeypatch):
    ladder = with_models(monkeypatch, [(0.5, 0.5)])
    exact, data = Drawn(15, (0.5, 0.5)), drawn_data(6000, 4)
    bounds = {"max_dp_gap": 0.1, "metric": "equalized_odds_difference", "max_gap": 0.2}
    loose = FairnessAwareQuantizer(8, None, sensitive_attributes="g", ladder=ladder, **bounds)
    loose.quantize(exact, data)
    assert loose.satisfied and [one["bound"] for one in loose.certificate["constraints"]] == [0.1, 0.2]
    tight = FairnessAwareQuantizer(8, None, sensitive_attributes="g", ladder=ladder, **{**bounds, "max_gap": 0.01})
    tight.quantize(exact, data)
    assert not tight.satisfied and tight.certificate["metric"] == "equalized_odds_difference"


def test_all_bounds_must_hold_on_the_certification_images(monkeypatch):
    """Nobody of b = 1 is selected there, which the first attribute does not show."""
    ladder = with_models(monkeypatch, [(0.5,) * 4])
    data, certification = drawn_data(4000, 8, n_groups=4), drawn_data(2000, 9, n_groups=4)
    certification[0]["image"][certification[0]["sensitive"]["b"] == 1, 0, 0, 0] = 1.0
    quantizer = FairnessAwareQuantizer(8, None, 0.2, ["a", "b"], ladder=ladder)
    quantizer.quantize(Drawn(15, (0.5,) * 4), data, certification_data=certification)
    assert quantizer.report["verdict"][1].startswith("kept on the selection images")
    assert not quantizer.satisfied and quantizer.certificate["attribute"] == "b"
    assert [one["is_certified"] for one in quantizer.certificate["constraints"]] == [True, False]


def test_what_fp32_itself_misses_is_said(monkeypatch):
    ladder = with_models(monkeypatch, [(0.9, 0.5)])
    quantizer = FairnessAwareQuantizer(8, None, 0.2, ["g"], ladder=ladder)
    quantizer.quantize(Drawn(15, (0.9, 0.5)), drawn_data(900, 5))
    assert "FP32 itself misses the bound" in quantizer.message
    assert quantizer.report["verdict"][0].startswith("FP32 itself misses the bound: demographic_parity_difference")


def test_a_group_that_no_certification_image_has_is_named(monkeypatch):
    """Three groups calibrate, two certify: nothing is known of the third one."""
    ladder = with_models(monkeypatch, [(0.5, 0.5, 0.5)])
    quantizer = FairnessAwareQuantizer(8, None, 0.2, ["g"], ladder=ladder)
    exact = Drawn(15, (0.5, 0.5, 0.5))
    quantizer.quantize(
        exact, drawn_data(300, 1, 3), selection_data=drawn_data(2000, 2), certification_data=drawn_data(2000, 3)
    )
    assert quantizer.satisfied and quantizer.certificate["groups_left_out"] == {"2": 0}
    assert "Nothing is said of g 2 (0 images)" in quantizer.message


def test_a_class_that_one_group_alone_has_is_named(monkeypatch):
    class Reader(nn.Module):
        """The class that channel 1 holds."""

        def forward(self, x):
            return nn.functional.one_hot(x[:, 1, 0, 0].long(), 3).float()

    data = drawn_data(3000, 4)
    data[0]["label"] = torch.arange(3000) // 2 % 3
    data[0]["label"][(data[0]["sensitive"]["g"] == 1) & (data[0]["label"] == 2)] = 0
    data[0]["image"][:, 1] = data[0]["label"].view(-1, 1, 1).float()
    monkeypatch.setattr(methods, "apply_quantization", lambda *_, **__: Reader())
    quantizer = FairnessAwareQuantizer(
        8, None, None, ["g"], metric="equal_opportunity_difference", max_gap=0.1, ladder=["ptq_static"]
    )
    quantizer.quantize(Reader(), data)
    assert quantizer.satisfied and quantizer.certificate["classes_left_out"] == [2]
    assert quantizer.message.endswith("Nothing is said of equal_opportunity_difference over g of class 2")


def test_what_was_not_paid_for_is_no_certificate(monkeypatch):
    """FP32 is no better on the images that select, so that no rung is tried; those that certify would have kept it."""
    ladder = with_models(monkeypatch, [(0.5, 0.5)])
    data, certification = drawn_data(2000, 1), drawn_data(2000, 2)
    data[0]["image"][data[0]["sensitive"]["g"] == 1, 0, 0, 0] = 1.0  # nobody of group 1 is selected
    quantizer = FairnessAwareQuantizer(8, None, 0.2, ["g"], ladder=ladder)
    quantizer.quantize(Drawn(15, (0.5, 0.5)), data, certification_data=certification)
    assert not quantizer.satisfied and quantizer.certificate["high"] <= 0.2
    assert quantizer.certificate["is_certified"] is False
    assert not any(one["is_certified"] for one in quantizer.certificate["constraints"])


def test_an_iterator_can_be_divided(model):
    data = faces(1200, 1)
    given, read_once = climber(), climber()
    given.quantize(model, data)
    read_once.quantize(model, iter(data))
    columns = [name for name in given.report if name != "seconds"]
    assert given.report[columns].equals(read_once.report[columns])


def test_images_that_train_do_not_certify(model):
    """In whatever loader they are; a ladder that trains nothing does not look at them."""
    data, train = faces(600, 1), faces(128, 2)
    ladder = [*CLIMB, ("group_dro", {"epochs": 1})]
    with pytest.raises(QuantizationError, match="images of train_data are in selection_data too"):
        climber(ladder=ladder).quantize(model, data, train_data=[*train, data[3]])
    climber().quantize(model, data, train_data=[*train, data[3]])


# --- data and arguments that cannot do --------------------------------------------------------------------------------


def test_data_without_the_groups_are_refused(model):
    data = faces(300, 1)
    with pytest.raises(QuantizationError, match=r"no sensitive attribute 'age' \(it has: gender, race\)"):
        climber(sensitive_attributes=["age"]).quantize(model, data)
    with pytest.raises(QuantizationError, match=r"selection data have no sensitive attribute 'gender' .*have: none"):
        bare = [{**batch, "sensitive": {}} for batch in data]
        climber().quantize(model, data, selection_data=bare, certification_data=faces(90, 2))
    one = [{**batch, "sensitive": {"gender": 0 * batch["label"]}} for batch in data]
    with pytest.raises(QuantizationError, match=r"sensitive attribute 'gender' has one group \(0: 100 images\)"):
        climber().quantize(model, one)
    lonely = [{**batch, "sensitive": {"gender": 0 * batch["label"]}} for batch in data]
    for place in range(3):
        lonely[0]["sensitive"]["gender"][place] = 1
    with pytest.raises(QuantizationError, match=r"fewer than two groups have 20 images .they have 99, 1.") as caught:
        climber().quantize(model, lonely)
    assert "over 'gender' cannot be certified" in str(caught.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = climber()
        plain.quantize(model, lonely, fairness_constraint=False)  # measured as far as it goes
    assert plain.satisfied is False and np.isnan(plain.final_dp_gap) and "cannot be told" in plain.message


def test_no_positives_in_a_group_is_never_a_gap_of_zero(model):
    data = faces(900, 1)
    for batch in data:
        batch["label"] = batch["label"] * (1 - batch["sensitive"]["gender"])
    arguments = {"max_dp_gap": None, "metric": "equal_opportunity_difference", "max_gap": 0.2}
    with pytest.raises(QuantizationError, match=r"over 'gender' cannot be certified: fewer than two groups.*positives"):
        climber(**arguments).quantize(model, data)


def test_groups_too_small_are_named(monkeypatch):
    ladder = with_models(monkeypatch, [(0.5, 0.5, 0.5)])
    data = drawn_data(3000, 7)
    data[0]["sensitive"]["g"][:30] = 2
    data[0]["image"][:30, 1] = 2
    quantizer = FairnessAwareQuantizer(8, None, 0.2, ["g"], ladder=ladder)
    quantizer.quantize(Drawn(15, (0.5, 0.5, 0.5)), data)
    assert quantizer.satisfied and set(quantizer.certificate["groups_left_out"]) == {"2"}
    assert re.search(r"Nothing is said of g 2 \(\d+ images\)", quantizer.message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bit_width": 9}, "bit_width"),
        ({"activation_bits": 1}, "activation_bits"),
        ({"sensitive_attributes": []}, "sensitive_attributes is empty"),
        ({"sensitive_attributes": ["gender", "gender"]}, "sensitive_attributes names one twice"),
        ({"max_dp_gap": None}, "give a bound: max_dp_gap"),
        ({"max_dp_gap": 0}, r"max_dp_gap must lie in \(0, 1\], got 0"),
        ({"max_dp_gap": 5}, r"max_dp_gap must lie in \(0, 1\], got 5"),
        ({"max_worst_group_drop": -1}, "max_worst_group_drop must lie in"),
        ({"metric": "accuracy_gap"}, "metric and max_gap go together"),
        ({"max_gap": 0.1}, "metric and max_gap go together"),
        ({"metric": "accuracy_gaps", "max_gap": 0.1}, r"unknown gap 'accuracy_gaps' \(did you mean accuracy_gap\?\)"),
        ({"metric": "accuracy_gap", "max_gap": 2}, "max_gap must lie in"),
        ({"metric": DP, "max_gap": 0.1}, "bound the same gap"),
        ({"intersectional": True}, "intersectional=True needs two"),
        ({"size_budget_mb": 0}, "size_budget_mb must be above 0"),
        ({"confidence": 95}, "confidence must lie between"),
        ({"min_group_size": 0}, "min_group_size must be an integer"),
        ({"ladder": []}, "ladder is empty"),
        ({"ladder": ["ptq_statik"]}, r"ladder: unknown method 'ptq_statik' \(did you mean ptq_static\?\)"),
        ({"ladder": [("ptq_static", {"roundng": "adaround"})]}, r"no option 'roundng' \(did you mean rounding\?\)"),
        ({"ladder": [("ptq_static", {"activation_bits": 33})]}, "ladder: ptq_static: activation_bits"),
        ({"observr": "minmax"}, r"no method of the ladder has an option 'observr' \(did you mean observer\?\)"),
    ],
)
def test_arguments_that_cannot_be_are_refused(changes, message):
    with pytest.raises(QuantizationError, match=message):
        climber(**changes)


def test_before_it_has_run_there_is_nothing_to_say():
    quantizer = climber()
    assert quantizer.satisfied is None and quantizer.final_dp_gap is None and quantizer.certificate is None
    assert quantizer.summary() == "nothing has been quantized yet"


def test_images_that_choose_and_certify_are_refused_in_whatever_loader(model):
    calibration, selection, certification = faces(128, 8), faces(500, 9), faces(500, 10)
    leaked = [*certification, selection[0]]
    with pytest.raises(QuantizationError, match="64 images of certification_data are in selection_data too"):
        climber().quantize(model, calibration, selection_data=selection, certification_data=leaked)
    both = "images of certification_data are in (calibration|selection)_data too"
    with pytest.raises(QuantizationError, match=both):
        climber().quantize(model, [*calibration, certification[1]], certification_data=certification)


@pytest.mark.parametrize("where", ["selection", "certification"])
def test_a_model_that_cannot_predict_costs_its_rung(model, monkeypatch, where):
    """Not the whole climb: logits that are not finite on the images that select, or on those that certify."""
    broken = []

    def predicted(quantized, loader, *arguments, **options):
        n = sum(len(batch["label"]) for batch in loader)
        if isinstance(quantized, QuantizedModel) and not broken and (where == "selection" or seen):
            broken.append(n)
            raise EvaluationError("the logits are not finite")
        seen.extend([n] if isinstance(quantized, QuantizedModel) else [])
        return predict(quantized, loader, *arguments, **options)

    seen: list[int] = []
    monkeypatch.setattr(fairness_aware, "predict", predicted)
    quantizer = climber()
    quantizer.quantize(model, faces(128, 8), selection_data=faces(500, 9), certification_data=faces(500, 10))
    assert broken and quantizer.satisfied
    failed = quantizer.report["verdict"].str.contains("the logits are not finite")
    assert failed.sum() == 1 and not quantizer.report.loc[failed, "verdict"].str.startswith("certified").any()
