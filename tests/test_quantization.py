"""The public API: apply_quantization and compare_quantization_methods, for a user's own model and loader."""

import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fairness_metrics import compute_fairness_metrics
from quantization import METHODS, QuantizationError, apply_quantization, compare_quantization_methods
from quantizers.numerics import QuantizationWarning


class UsersModel(nn.Module):
    """A plain nn.Module of nobody's library, for 20-pixel images."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU6()
        )
        self.shortcut = nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = self.features(x)
        x = x + self.shortcut(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = UsersModel()
    for _ in range(3):
        model(torch.randn(64, 3, 20, 20))
    return model.eval()


@pytest.fixture
def loader() -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for n in (32, 32, 17):
        image = torch.randn(n, 3, 20, 20, generator=generator)
        sensitive = {
            "gender": torch.randint(0, 2, (n,), generator=generator),
            "age": torch.randint(0, 3, (n,), generator=generator),
        }
        batches.append(
            {"image": image, "label": torch.randint(0, 2, (n,), generator=generator), "sensitive": sensitive}
        )
    return batches


def logits(model, loader) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch["image"]) for batch in loader])


@pytest.mark.parametrize(
    "method",
    [*METHODS, "PTQ_INT8", "PTQ_INT4", "PTQ_INT2", "PTQ_W4A8", "QAT_INT8", "QAT_INT4", "dynamic", "bias_aware"],
)
def test_every_method_quantizes_a_copy(method, model, loader):
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    reference = logits(model, loader)
    bits = 4 if method in ("sensitive_channels", "sensitive_layers") else None  # they keep parts in 8 bits
    quantized = apply_quantization(model, method, bits, calibration_data=loader, train_data=loader)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model, loader), reference) and not model.training
    quantized = getattr(quantized, "model", quantized)  # with thresholds around it
    result = logits(quantized, loader)
    assert torch.isfinite(result).all() and not torch.equal(result, reference)
    for layer in quantized.layers().values():
        most = 2 ** (8 if layer.wide_count() else layer.bits)
        assert max(len(row.unique()) for row in layer.layer.weight.detach().flatten(1)) <= most
    if method not in ("mixed_precision", "fair_mixed_precision", "sensitive_layers"):
        assert set(quantized.widths().values()) == {quantized.description["weight_bits"]}


COMBINED = {"equalize": True, "bias_correction": True, "rounding": "adaround", "reconstruction_iterations": 10}


@pytest.mark.parametrize("method", ["ptq_static", "mixed_precision", "bias_aware_calibration"])
def test_what_makes_sense_together_composes(method, model, loader):
    plain = apply_quantization(model, method, 5, loader, calibration_samples=64)
    every = apply_quantization(model, method, 5, loader, calibration_samples=64, **COMBINED)
    assert not torch.equal(logits(plain, loader), logits(every, loader))
    assert "reconstruction" in every.reports and every.description["bias_correction_images"] == 64


@pytest.mark.parametrize(
    "options",
    [
        {"weight_granularity": "per_tensor"},
        {"activation_scheme": "symmetric"},
        {"observer": "moving_average"},
        {"equalize": True},
        {"bias_correction": True},
        {"rounding": "adaround", "reconstruction_unit": "layer", "reconstruction_iterations": 10},
    ],
)
def test_every_option_changes_the_model(options, model, loader):
    plain = apply_quantization(model, "ptq_static", 4, loader, calibration_samples=64)
    changed = apply_quantization(model, "ptq_static", 4, loader, calibration_samples=64, **options)
    assert not torch.equal(logits(plain, loader), logits(changed, loader))


def test_training_takes_the_loaders_it_is_given(model, loader):
    """`max_train` images, the calibration data where there are some, the best epoch by `validation_data`."""
    said = []
    options = {"train_data": loader, "calibration_samples": 64, "epochs": 3, "learning_rate": 0.05}
    quantized = apply_quantization(
        model, "qat", 4, loader, validation_data=loader, progress=lambda what, share: said.append(what), **options
    )
    log = quantized.reports["training"]["log"]
    assert len(log) == 3 and "epoch 3/3" in said and quantized.reports["training"]["seconds"] > 0
    best = max(row["validation_accuracy"] for row in log)
    hits = logits(quantized, loader).argmax(1) == torch.cat([batch["label"] for batch in loader])
    assert float(hits.float().mean()) == pytest.approx(best)
    few = apply_quantization(model, "qat", 4, max_train=8, **options)
    assert not torch.equal(logits(few, loader), logits(quantized, loader))
    first = [{key: value[:8] for key, value in loader[0].items() if key != "sensitive"} | {"sensitive": {}}]
    alone = apply_quantization(model, "qat", 4, loader, **{**options, "train_data": first})
    again = apply_quantization(model, "qat", 4, loader, max_train=8, **options)
    assert torch.equal(logits(alone, loader), logits(again, loader))


def test_mixed_precision_by_the_loss_uses_the_labels(model, loader):
    flipped = [{**batch, "label": 1 - batch["label"]} for batch in loader]
    tables = [
        apply_quantization(model, "mixed_precision", 4, data, sensitivity_metric="loss").reports["sensitivity"]
        for data in (loader, flipped)
    ]
    assert (tables[0]["sensitivity"] * tables[1]["sensitivity"] < 0).any()  # what hurts one helps the other


def test_bit_width_means_weights_and_activations_unless_said_otherwise(model, loader):
    def widths(**arguments):
        description = apply_quantization(model, calibration_data=loader, **arguments).description
        return description["weight_bits"], description["activation_bits"]

    assert widths() == (8, 8)
    assert widths(bit_width=4) == (4, 4)
    assert widths(bit_width=4, activation_bits=8) == (4, 8)
    assert widths(method="PTQ_W4A8") == (4, 8)
    assert widths(method="dynamic", bit_width=3) == (3, 3)


def test_options_are_those_of_the_config(model, loader):
    outputs = [
        logits(apply_quantization(model, "ptq_static", 3, loader, observer=observer), loader)
        for observer in ("minmax", "percentile", "mse")
    ]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    few = apply_quantization(model, "ptq_static", 8, loader, observer="minmax", calibration_samples=8)
    eight = [{**loader[0], "image": loader[0]["image"][:8]}]
    same = apply_quantization(model, "ptq_static", 8, eight, observer="minmax")
    assert torch.equal(logits(few, loader), logits(same, loader))


def test_tuples_are_accepted_and_give_the_same(model, loader):
    tuples = [(batch["image"], batch["label"], batch["sensitive"]) for batch in loader]
    for method in ("ptq_static", "bias_aware_calibration"):
        one = apply_quantization(model, method, 4, loader)
        other = apply_quantization(model, method, 4, tuples)
        assert torch.equal(logits(one, loader), logits(other, loader))


def test_bias_aware_calibration_weighs_groups_and_not_their_sizes(model):
    """A minority with a far wider range sets it only where the groups count the same (percentile observer)."""
    images = torch.randn(400, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    group = (torch.arange(400) % 100 == 0).long()  # 4 of 400
    images[group == 1] *= 10
    loader = [{"image": images, "label": torch.zeros(400).long(), "sensitive": {"group": group}}]
    options = {"observer": "percentile", "percentile": 95.0, "calibration_samples": 200}
    plain = apply_quantization(model, "ptq_static", 8, loader, **options)
    fair = apply_quantization(model, "bias_aware_calibration", 8, loader, **options)
    assert fair.description["calibration_groups"] == {"0": 100, "1": 4}
    scale = {name: float(q.scale) for name, q in plain.activation_quantizers().items()}
    for name, quantizer in fair.activation_quantizers().items():
        assert float(quantizer.scale) > 2 * scale[name], name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ptq_statik"}, "did you mean ptq_static"),
        ({"bit_width": 9}, "from 2 to 8"),
        ({"bit_width": 1}, "from 2 to 8"),
        ({"activation_bits": 16}, "activation_bits"),
        ({"observr": "mse"}, "did you mean observer"),
        ({"observer": "mze"}, "observer"),
        ({"observer": ["mse", "minmax"]}, "one of them"),
        ({"calibration_samples": 0}, "calibration_samples"),
        ({"method": "PTQ_INT4", "bit_width": 8}, "leave out bit_width"),
        ({"calibration_data": None}, "needs calibration_data"),
        ({"calibration_data": []}, "empty"),
        ({"method": "ptq_dynamic", "observer": "mse"}, "no option 'observer'"),
        ({"method": "qat"}, "needs train_data"),
        ({"method": "qat", "train_data": iter([])}, "must have a length"),
        ({"method": "qat", "train_data": [], "rounding": "adaround"}, "no option 'rounding'"),
        ({"method": "qat", "train_data": [], "bias_correction": True}, "no option 'bias_correction'"),
        ({"method": "mixed_precision", "first_last_bits": 8}, "no option 'first_last_bits'"),
        ({"method": "mixed_precision", "size_budget_bytes": 100}, "smallest possible model, [0-9,]+ bytes"),
        ({"method": "mixed_precision", "bit_operations_budget": 100}, "smallest possible model, [0-9,]+$"),
        ({"method": "mixed_precision", "widths": [1]}, "widths"),
        ({"rounding": "adaroun"}, "rounding"),
    ],
)
def test_bad_arguments_are_one_clear_line(model, loader, arguments, message):
    with pytest.raises(QuantizationError, match=message) as error:
        apply_quantization(model, **{"calibration_data": loader, **arguments})
    assert "\n" not in str(error.value)


def test_bad_models_and_data_are_named(model, loader):
    with pytest.raises(QuantizationError, match="no convolution or linear layer"):
        apply_quantization(nn.Sequential(nn.ReLU(), nn.Flatten()), "ptq_static", 8, loader)
    broken = [{**loader[0], "image": torch.full_like(loader[0]["image"], torch.nan)}]
    with pytest.raises(QuantizationError, match="not finite"):
        apply_quantization(model, "ptq_static", 8, broken)
    model.head.weight.data[0, 0] = torch.inf
    with pytest.raises(QuantizationError, match=r"head|mean"):
        apply_quantization(model, "ptq_dynamic", 8)
    no_groups = [{**loader[0], "sensitive": {}}]
    with pytest.raises(QuantizationError, match="no sensitive attribute"):
        apply_quantization(model, "bias_aware", 8, no_groups)


def _with_nan(images):
    images = images.clone()
    images[3, 0, 1, 1] = torch.nan
    return images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.zeros_like, "every pixel is 0; give real images"),
        (lambda images: images[:1].expand_as(images), "images are the same; ranges need different ones"),
        (_with_nan, "image 3 has values that are not finite (1 of "),
        (lambda images: images[:0], "is empty: give at least one batch of images"),
    ],
)
def test_calibration_images_that_no_range_can_come_from_are_refused(model, loader, change, message):
    spoiled = [{**loader[0], "image": change(loader[0]["image"])}]
    with pytest.raises(QuantizationError, match=re.escape(message)) as raised:
        apply_quantization(model, "ptq_static", 4, spoiled)
    assert "\n" not in str(raised.value)


def test_fewer_calibration_images_than_asked_for_are_used_with_a_warning(model, loader):
    with pytest.warns(QuantizationWarning, match="holds 17 images, fewer than the 256 of calibration_samples"):
        few = apply_quantization(model, "ptq_static", 4, loader[2:], calibration_samples=256)
    exact = apply_quantization(model, "ptq_static", 4, loader[2:], calibration_samples=17)
    torch.testing.assert_close(logits(few, loader), logits(exact, loader), rtol=0, atol=0)


def test_a_dead_layer_gives_a_finite_model_and_a_warning(model, loader):
    model.shortcut.weight.data.zero_()
    model.shortcut.bias.data.zero_()
    for method in ("ptq_static", "ptq_dynamic"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quantized = apply_quantization(model, method, 4, loader)
        silent = [str(w.message) for w in caught if "activations are zero" in str(w.message)]
        assert len(silent) == (method == "ptq_static")
        assert all("(shortcut)" in message for message in silent)
        assert torch.isfinite(logits(quantized, loader)).all()
        assert (quantized.layers()["shortcut"].weight_integer == 0).all()


def test_comparison_measures_what_it_says(model, loader, tmp_path):
    methods = ["PTQ_INT8", "PTQ_INT4", "QAT_INT4", "mixed_precision", "dynamic", "bias_aware"]
    results = compare_quantization_methods(
        model=model,
        methods=methods,
        test_loader=loader,
        sensitive_attrs=["gender", "age"],
        calibration_data=loader,
        train_loader=loader,
        observer="minmax",
    )
    table = results.table
    assert table["method"].tolist() == [name for name in ["FP32", *methods] for _ in range(2)]
    for method, attribute in (("PTQ_INT4", "age"), ("FP32", "gender")):
        row = table.query("method == @method and sensitive_attribute == @attribute").iloc[0]
        again = (
            model if method == "FP32" else apply_quantization(model, method, calibration_data=loader, observer="minmax")
        )
        metrics = compute_fairness_metrics(again, loader, attribute)
        assert row["accuracy"] == metrics["accuracy"]
        np.testing.assert_equal(row["equalized_odds_difference"], metrics["equalized_odds"])
        assert row["model_size_mb"] == metrics["model_size_mb"]
    results.save_to_csv(tmp_path / "comparison.csv")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "comparison.csv", dtype={"worst_group": str}), table, check_dtype=False
    )
    figure = results.plot_comparison(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 5000
    texts = {text.get_text() for axis in figure.axes for text in axis.get_xticklabels() + axis.get_yticklabels()}
    assert {"FP32", *methods} <= texts


def test_comparison_gives_a_width_to_the_methods_that_have_none_of_their_own(model, loader):
    table = compare_quantization_methods(
        model,
        ["PTQ_INT4", "ptq_static", "bias_aware"],
        loader,
        "gender",
        loader,
        bit_width=3,
        activation_bits=5,
    ).table.set_index("method")
    widths = list(zip(table["weight_bits"], table["activation_bits"], strict=True))
    assert widths[1:] == [(4, 4), (3, 5), (3, 5)]


def test_comparison_refuses_before_it_computes(model, loader):
    def compare(**arguments):
        return compare_quantization_methods(
            **{"model": None, "methods": ["PTQ_INT8"], "test_loader": loader, "sensitive_attrs": "gender", **arguments}
        )

    for arguments, message in (
        ({"methods": ["PTQ_INT8", "QAT_INT9"]}, "unknown method"),
        ({"methods": ["PTQ_INT8", "PTQ_INT8"]}, "twice"),
        ({"observr": "mse"}, "none of the methods has an option"),
        ({"bit_width": 1}, "bit_width"),
        ({"methods": ["QAT_INT8"]}, "needs train_loader"),
    ):
        with pytest.raises(QuantizationError, match=message):
            compare(**arguments)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 4, 3), Gate(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.gate(self.stem(x)).mean((2, 3)))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.inner(x) if float(x.mean()) < 1e9 else x


@pytest.mark.parametrize("method", ["ptq_static", "ptq_dynamic", "qat", "mixed_precision"])
def test_what_cannot_be_traced_is_named_and_what_happens_to_it_said(method, loader):
    options = {"calibration_samples": 64} if method != "ptq_dynamic" else {}
    options |= {"rounding": "adaround", "reconstruction_iterations": 3} if method == "ptq_static" else {}
    torch.manual_seed(0)
    with pytest.warns(
        QuantizationWarning, match=r"^gate cannot be traced \(.*\): it is kept whole; the conv.* in float$"
    ):
        quantized = apply_quantization(Untraceable(), method, 4, loader, train_data=loader, **options)
    assert "gate.inner" in quantized.layers()
    assert torch.isfinite(logits(quantized, loader)).all()
