"""Models that give a single logit, of class 1 where it is above 0: every method takes them, and sees what they say."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from evaluation import predict
from quantizers import methods
from training import cross_entropy

TRAINED = [name for name, entry in methods.METHODS.items() if entry.needs_train_data]
FAST = {"epochs": 1, "calibration_samples": 64, "sensitivity_samples": 32, "reconstruction_iterations": 5}


class Bright(nn.Module):
    """Class 1 where an image is bright; the logit (N, 1), (N,), or the two logits that mean the same."""

    def __init__(self, shape: str = "column"):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2 if shape == "two" else 1)
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.convolution.weight.copy_(torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1, 1) / 27)
            self.convolution.weight += 0.01 * torch.randn(4, 3, 3, 3, generator=generator)
            self.second.weight.copy_((torch.eye(4) + 0.02 * torch.randn(4, 4, generator=generator)).view(4, 4, 1, 1))
            self.convolution.bias.zero_()
            self.second.bias.zero_()
            self.head.weight.zero_()[-1] = torch.tensor([1.0, -1, 1, -1])
            self.head.bias.zero_()

    def forward(self, x):
        z = self.head(self.second(self.convolution(x).relu()).relu().mean((2, 3)))
        return z.squeeze(1) if self.shape == "flat" else z


def images(n: int = 128, seed: int = 0, is_column: bool = False) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    label, group = torch.randint(0, 2, (2, n), generator=generator)
    image = (2.0 * label - 1).view(-1, 1, 1, 1) * (0.5 + torch.rand(n, 3, 6, 6, generator=generator))
    wanted = label.float().unsqueeze(1) if is_column else label
    return [
        {"image": image[at], "label": wanted[at], "sensitive": {"g": group[at]}} for at in torch.arange(n).split(32)
    ]


@pytest.mark.parametrize("shape", ["column", "flat"])
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_every_method_takes_one(method, shape):
    options = {key: value for key, value in FAST.items() if key in methods.options_of(methods.METHODS[method])}
    train = images(128, 1, is_column=True) if method in TRAINED else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = methods.apply_quantization(
            Bright(shape).eval(), method, 4, images(), activation_bits=6, train_data=train, **options
        )
    predictions = predict(quantized, images(256, 2))
    assert predictions.logits.shape == (256, 2 if method == "threshold_adjustment" else 1)
    assert np.mean(predictions.y_pred == predictions.y_true) > 0.95


@pytest.mark.parametrize("metric", ["kl", "loss"])
@pytest.mark.parametrize("shape", ["column", "flat"])
def test_its_sensitivity_is_that_of_the_two_logits_that_mean_the_same(shape, metric):
    """No layer costs it nothing, which would give every layer the fewest bits."""
    tables = []
    for model in (Bright(shape), Bright("two")):
        quantized = methods.apply_quantization(
            model.eval(), "mixed_precision", 4, images(), sensitivity_samples=128, sensitivity_metric=metric
        )
        tables.append(quantized.reports["sensitivity"])
    columns = [name for name in tables[0] if tables[0][name].dtype.kind == "f"]
    # float32 logits of another layout: how many of their bits agree depends on the processor
    np.testing.assert_allclose(tables[0][columns], tables[1][columns], rtol=1e-4, atol=1e-8)
    assert (tables[0][columns].abs().to_numpy() > 1e-9).any()


@pytest.mark.parametrize("labels", [torch.tensor([1, 0, 1]), torch.tensor([[1.0], [0.0], [1.0]])])
@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_its_cross_entropy_is_the_binary_one_and_has_a_gradient(shape, labels):
    z = torch.tensor([0.3, -1.2, -0.5], dtype=torch.float32, requires_grad=True)
    value = cross_entropy()(z.reshape(shape), {"label": labels})
    expected = nn.functional.binary_cross_entropy_with_logits(z, torch.tensor([1.0, 0, 1]))
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, z)
    assert (gradient[torch.tensor([0, 2])] < 0).all() and gradient[1] > 0
