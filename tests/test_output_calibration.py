"""The logits' scale and biases, fitted to the float model's predictions. Each test fails where the fit does nothing."""

import copy

import pytest
import torch
from torch import nn

from deployment import export_onnx, load_engine
from evaluation import model_size_mb
from quantization import QuantizationError, apply_quantization
from quantizers import ptq
from quantizers.groups import GroupedImages, drift, float_logits, group_shares, logits_of
from quantizers.output_calibration import calibrate_output, fit_output

BITS = {"weight_bits": 3, "activation_bits": 4}


def network(outputs: int = 3, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, outputs, bias=bias),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[-1].weight *= 40
    return model


def grouped(n: int = 60) -> GroupedImages:
    generator = torch.Generator().manual_seed(1)
    groups = (torch.arange(n) % 3 == 0).long()
    images = torch.randn(n, 3, 8, 8, generator=generator) + groups[:, None, None, None]
    return GroupedImages(images, torch.arange(n) % 2, groups, ("many", "few"))


def shifted(outputs: int = 3, bias: bool = True, **recipe) -> ptq.QuantizedModel:
    """A quantized model whose logits are half as large as they should be, and off by a constant."""
    quantized = ptq.ptq_static(network(outputs, bias), grouped().images, keep_float=True, **BITS, **recipe)
    layer = list(quantized.layers().values())[-1]
    layer.set_weights(layer.weight_integer, layer.weight_scale / 2)
    with torch.no_grad():
        layer.set_bias(torch.arange(outputs) - 0.7)
    return quantized


def mean_drift(quantized: ptq.QuantizedModel, images: GroupedImages) -> torch.Tensor:
    exact_NK, logits_NK = float_logits(quantized, images.images), logits_of(quantized, images.images)
    return images.means(drift(exact_NK, logits_NK, images.labels))


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_an_affine_error_is_undone(outputs):
    exact_NK = torch.randn(200, outputs, generator=torch.Generator().manual_seed(0)).double() * 2
    bias_K = torch.arange(outputs).double() + 1
    a, b_K = fit_output((exact_NK - bias_K) / 4, exact_NK)
    assert a == pytest.approx(4, rel=1e-3)
    restored = a * (exact_NK - bias_K) / 4 + b_K - exact_NK
    if outputs > 1:  # a constant of all classes is nothing
        restored -= restored.mean(dim=1, keepdim=True)
        assert float(b_K.sum()) == pytest.approx(0, abs=1e-9)
    assert float(restored.abs().max()) < 1e-2


def test_the_fit_is_the_minimum():
    """Neither a step of the scale nor one of a bias lowers the weighted divergence."""
    generator = torch.Generator().manual_seed(2)
    exact_NK, logits_NK = (torch.randn(100, 3, generator=generator).double() for _ in range(2))
    logits_NK += exact_NK
    weights_N = torch.rand(100, generator=generator).double()

    def divergence(a, b_K):
        return float((weights_N * drift(exact_NK, a * logits_NK + b_K, torch.zeros(100).long())).sum())

    a, b_K = fit_output(logits_NK, exact_NK, weights_N)
    best = divergence(a, b_K)
    for step in (-1e-2, 1e-2):
        assert divergence(a + step, b_K) > best
        for k in range(3):
            assert divergence(a, b_K + step * nn.functional.one_hot(torch.tensor(k), 3)) > best


@pytest.mark.parametrize(("outputs", "bias"), [(3, True), (3, False), (1, True)])
def test_it_brings_the_predictions_back_in_the_same_bytes(outputs, bias):
    images, quantized = grouped(), shifted(outputs, bias)
    before, size, integers = mean_drift(quantized, images), model_size_mb(quantized), _integers(quantized)
    logits_NK = logits_of(quantized, images.images)
    calibrate_output(quantized, images)
    after = mean_drift(quantized, images)
    assert bool((after < 0.5 * before).all())
    a, b_K = quantized.reports["output_fit"]["scale"], torch.tensor(quantized.reports["output_fit"]["bias"])
    wanted_NK = a * logits_NK + b_K
    ((quantizer, layer),) = [pair for pair in quantized.inputs() if pair[1].name == "6"]
    step_K = quantizer.scale * layer.weight_scale  # of the accumulator, to which the bias is rounded
    assert bool(((logits_of(quantized, images.images) - wanted_NK).abs() < 0.51 * step_K).all())
    assert (layer.layer.bias / step_K).tolist() == pytest.approx((layer.layer.bias / step_K).round().tolist(), abs=1e-3)
    assert model_size_mb(quantized) == size
    for name, integer in _integers(quantized).items():
        assert torch.equal(integer, integers[name]), name
    report = quantized.reports["output_calibration"]
    assert report["group"].tolist() == ["many", "few"]
    assert report["drift_before"].to_numpy() == pytest.approx(before.numpy())
    assert report["drift_after"].to_numpy() == pytest.approx(after.numpy())


def _integers(quantized):
    return {name: layer.weight_integer.clone() for name, layer in quantized.layers().items()}


def test_groups_count_as_the_weighting_says():
    """Two groups that want opposite biases: the fit is between them, nearer to the one that counts more."""
    images = grouped()
    logits_N1 = torch.randn(60, 1, generator=torch.Generator().manual_seed(3))
    wanted_N1 = logits_N1 + torch.where(images.groups == 1, 3.0, -1.0)[:, None]
    drift_G = images.means(drift(wanted_N1, logits_N1, images.labels))
    assert int(drift_G.argmax()) == 1  # which has a third of the images
    plain, balanced, worst = (
        float(fit_output(logits_N1, wanted_N1, weights_N)[1])
        for weights_N in (None, *(images.image_weights(group_shares(drift_G, w)) for w in ("balanced", "worst_group")))
    )
    assert -1 < plain < balanced < worst < 3


@pytest.mark.parametrize("weighting", ["balanced", "worst_group"])
def test_the_model_gets_the_fit_of_its_weighting(weighting):
    images, quantized = grouped(), shifted()
    exact_NK, logits_NK = float_logits(quantized, images.images), logits_of(quantized, images.images)
    drift_G = images.means(drift(exact_NK, logits_NK, images.labels))
    a, b_K = fit_output(logits_NK, exact_NK, images.image_weights(group_shares(drift_G, weighting)))
    calibrate_output(quantized, images, weighting=weighting)
    assert quantized.reports["output_fit"] == {"scale": a, "bias": b_K.tolist()}


def test_the_file_has_it(tmp_path):
    quantized = shifted()
    calibrate_output(quantized, grouped())
    quantized.forget_float()
    images = grouped().images
    export_onnx(quantized, tmp_path / "model.onnx", example=images[:2])
    logits_NK = load_engine(tmp_path / "model.onnx", engine="onnxruntime").predict(images.numpy())
    assert torch.from_numpy(logits_NK) == pytest.approx(logits_of(quantized, images), abs=1e-4)


def test_it_starts_from_another_repair():
    images = grouped()
    batches = [{"image": images.images, "label": images.labels, "sensitive": {"size": images.groups}}]
    both = apply_quantization(
        network(), "output_calibration", 3, batches, calibration_samples=60, start="sensitive_layers",
        start_options={"layer_share": 0.5, "sensitivity_samples": 30},
    )  # fmt: skip
    assert both.description["strategy"] == "output_calibration" and both.description["start"] == "sensitive_layers"
    assert {"sensitive_layers", "output_calibration"} <= set(both.reports)
    assert {quantizer.bits for quantizer in both.activation_quantizers().values()} == {3, 8}
    once = apply_quantization(network(), "output_calibration", 3, iter(batches), calibration_samples=60)
    plain = apply_quantization(network(), "ptq_static", 3, batches, calibration_samples=60)
    for name, integer in _integers(plain).items():  # the same model but for the output
        assert torch.equal(integer, _integers(once)[name]), name
    with pytest.raises(QuantizationError, match="start"):
        apply_quantization(network(), "output_calibration", 3, batches, start="output_calibration")


class WithReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return torch.relu(self.body(x))


def test_a_network_that_does_not_end_in_its_last_layer_is_refused_as_it_was():
    images = grouped()
    quantized = ptq.ptq_static(WithReLU().eval(), images.images, keep_float=True, **BITS)
    before = copy.deepcopy(quantized.state_dict())
    with pytest.raises(QuantizationError, match=r"not what the last layer, body\.6, gives"):
        calibrate_output(quantized, images)
    for name, value in quantized.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_logits_that_say_nothing_are_refused():
    with pytest.raises(QuantizationError, match="the same logits"):
        fit_output(torch.ones(5, 2), torch.randn(5, 2))
    with pytest.raises(QuantizationError, match="not finite"):
        fit_output(torch.full((5, 2), torch.nan), torch.randn(5, 2))


def test_repeated_images_and_weights_are_the_same():
    images = grouped()
    quantized = shifted()
    exact_NK, logits_NK = float_logits(quantized, images.images), logits_of(quantized, images.images)
    order = torch.cat([torch.arange(60), torch.arange(10)])
    weights_N = torch.ones(60)
    weights_N[:10] = 2
    a, b_K = fit_output(logits_NK, exact_NK, weights_N)
    again, again_K = fit_output(logits_NK[order], exact_NK[order])
    assert a == pytest.approx(again, rel=1e-4) and b_K.tolist() == pytest.approx(again_K.tolist(), abs=1e-4)
