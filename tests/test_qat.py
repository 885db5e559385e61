"""Quantization-aware training: its gradients, what it leaves behind, and that it learns."""

import pytest
import torch
from torch import nn

from quantizers import qat
from quantizers.learned import LearnedStep
from quantizers.modules import QuantizedModel
from quantizers.numerics import QuantizationError
from quantizers.ptq import ptq_static
from quantizers.qat import learnable, quantization_aware_training
from sections.training import Training
from training import TrainingError, train


def settings(**keys) -> Training:
    defaults = {"epochs": 3, "learning_rate": 3e-3, "weight_decay": 0.0, "warmup_epochs": 0.0, "precision": "fp32"}
    return Training(**{**defaults, "per_model": {}, **keys})


class Stripes(nn.Module):
    """Small, with what QAT has to deal with: norms to fold, a depthwise layer, an addition, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.depthwise(x)
        return self.head(x.mean((2, 3)))


def batches(n: int = 256, seed: int = 0) -> list[dict]:
    """Noisy stripes (3, 8, 8); the class is which of the four directions they run in."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=generator)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(2.1 * way) for way in (row, column, row + column, row - column)])
    images = waves[labels][:, None] + 2.0 * torch.randn(n, 3, 8, 8, generator=generator)
    return [
        {"image": images[start : start + 32], "label": labels[start : start + 32], "sensitive": {}}
        for start in range(0, n, 32)
    ]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Stripes()
    train(model, batches(512), batches(256, 1), settings(epochs=20, learning_rate=0.02))
    return model


@pytest.fixture
def images() -> torch.Tensor:
    return torch.cat([batch["image"] for batch in batches(128)])


def accuracy(model: nn.Module, data: list[dict]) -> float:
    with torch.no_grad():
        hits = [(model(batch["image"]).argmax(1) == batch["label"]).float() for batch in data]
    return float(torch.cat(hits).mean())


# ------------------------------------------------------------------------------------------------------------ gradients


def test_learned_step_by_hand():
    """Esser et al. 2020, eqs. 1-3 and 5, on the grid -2 … 1 of step 0.5."""
    x = torch.tensor([-3.0, -0.6, 0.2, 0.4, 2.0], requires_grad=True)  # in steps: -6, -1.2, 0.4, 0.8, 4
    scale = torch.tensor(0.5, requires_grad=True)
    y = LearnedStep.apply(x, scale, -2, 1, 0.25)
    assert y.tolist() == [-1.0, -0.5, 0.0, 0.5, 0.5]
    y.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert x.grad.tolist() == [0.0, 10.0, 100.0, 1000.0, 0.0]
    # outside: the bound; inside: round(v) - v
    expected = -2 * 1 + (-1 + 1.2) * 10 + (0 - 0.4) * 100 + (1 - 0.8) * 1000 + 1 * 10000
    assert float(scale.grad) == pytest.approx(0.25 * expected, rel=1e-5)


def test_the_ends_of_the_range_are_inside_it():
    """A value that is the lowest or the highest level learns; so do the bounds that differ by channel."""
    for bounds in (
        (-2.0, 1.0),
        (torch.tensor(-2.0), torch.tensor(1.0)),
        (torch.tensor([-2.0] * 4), torch.tensor([1.0] * 4)),
    ):
        x = torch.tensor([-1.0, 0.5, -1.0000001, 0.50000006], requires_grad=True)  # scale 0.5: two ends, two beyond
        scale = torch.tensor(0.5, requires_grad=True)
        LearnedStep.apply(x, scale, *bounds, 1.0).backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        assert x.grad.tolist() == [1.0, 2.0, 0.0, 0.0]
        assert float(scale.grad) == -2 * 4 + 1 * 8  # at an end the value is its level: no error of rounding


def test_the_gradient_of_a_scale_is_the_derivative_where_nothing_rounds_over():
    """All values clipped: y = bound * s is differentiable, and its derivative known without the paper."""
    x = torch.tensor([[5.0, -9.0], [7.0, 8.0]], dtype=torch.float64)
    scale = torch.tensor([[0.5], [0.25]], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s: LearnedStep.apply(x, s, -2, 1, 1.0), (scale,))


def test_weights_biases_and_scales_all_learn(trained, images):
    quantized = attached(trained, images, 4, 4)
    with learnable(quantized):
        model_loss(quantized).backward()
        named = dict(quantized.named_parameters())
        thetas = [name for name in named if name.endswith("theta")]
        assert len(thetas) == len(quantized.placement.layers) + len(quantized.placement.activation_quantizers)
        for name, parameter in named.items():
            assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


def test_a_step_changes_every_channel_by_the_same_share(trained, images):
    """Channels whose weights differ by 1000 after folding learn alike: one step moves each by a share of itself."""
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(72, 4))
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0] * 1e-3
    quantized = attached(model, images, 8, 8)
    with learnable(quantized):
        learned = next(module for module in quantized.modules() if isinstance(module, qat.LearnedLayer))
        before = (learned.weight * learned.unit).detach().clone()
        optimizer = torch.optim.AdamW(quantized.parameters(), lr=1e-2, weight_decay=0)
        model_loss(quantized).backward()
        optimizer.step()
        change = ((learned.weight * learned.unit) - before).detach().abs().amax(dim=(1, 2, 3))
        assert float(change[1] / change[0]) == pytest.approx(1e-3, rel=0.01)


def attached(model: nn.Module, images: torch.Tensor, weight_bits: int, activation_bits: int) -> QuantizedModel:
    """A post-training quantized model that still has its float weights."""
    recipe = qat.ptq.Recipe()
    quantized = qat.ptq.attach(model, images, "qat", weight_bits, activation_bits, recipe)
    statistics = qat.ptq.observe_activations(quantized, images, recipe)
    qat.ptq.quantize(quantized, statistics, images, recipe)
    return quantized


def model_loss(model: nn.Module) -> torch.Tensor:
    (batch, *_) = batches(32, seed=5)
    return nn.functional.cross_entropy(model(batch["image"]), batch["label"])


# ----------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 4)])
def test_before_training_it_is_the_post_training_model_and_what_is_frozen_is_what_was_trained(trained, images, bits):
    quantized = attached(trained, images, *bits).eval()
    plain = quantized(images)
    with learnable(quantized):
        torch.testing.assert_close(quantized(images), plain)
        with torch.no_grad():
            for parameter in quantized.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        learned = quantized(images)
        assert not torch.allclose(learned, plain, atol=1e-3)
    torch.testing.assert_close(quantized(images), learned, rtol=1e-5, atol=1e-5)


def test_it_is_an_ordinary_quantized_model_and_the_callers_is_untouched(trained, images):
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    quantized, result = quantization_aware_training(
        trained, images, batches(64), batches(64, 1), settings(epochs=1), weight_bits=2, activation_bits=4
    )
    assert all(torch.equal(before[key], value) for key, value in trained.state_dict().items())
    assert not quantized.training and quantized.description["method"] == "qat"
    assert quantized.description["best_epoch"] == result.best_epoch == 1
    for layer in quantized.layers().values():
        assert len(layer.weight_integer.unique()) <= 4
        scale = layer.weight_scale.reshape(-1, *[1] * (layer.layer.weight.ndim - 1))
        assert torch.equal(layer.layer.weight, layer.weight_integer * scale)
        assert layer.float_weight is None
    copy, _ = quantization_aware_training(
        trained, images, batches(64), None, settings(epochs=1), weight_bits=2, activation_bits=4
    )
    copy.load_packed(quantized.packed_tensors())
    assert torch.equal(copy(images), quantized(images))


def test_it_learns_what_post_training_quantization_loses(trained, images):
    test = batches(512, 3)
    plain = ptq_static(trained, images, weight_bits=2, activation_bits=2)
    learned, result = quantization_aware_training(
        trained, images, batches(1024), batches(256, 1), settings(epochs=12), weight_bits=2, activation_bits=2
    )
    lost = accuracy(trained, test) - accuracy(plain, test)
    assert lost > 0.1
    assert accuracy(learned, test) > accuracy(plain, test) + lost / 3
    assert result.best_accuracy == max(row["validation_accuracy"] for row in result.log)


def test_it_holds_the_best_epoch_by_validation_accuracy(trained, images):
    validation = batches(256, 1)
    learned, result = quantization_aware_training(
        trained, images, batches(128), validation, settings(learning_rate=0.1), weight_bits=3, activation_bits=4
    )
    assert accuracy(learned, validation) == pytest.approx(result.best_accuracy, abs=1e-6)


def test_without_a_validation_loader_the_last_epoch_counts(trained, images):
    _, result = quantization_aware_training(
        trained, images, batches(64), None, settings(epochs=2), weight_bits=4, activation_bits=4
    )
    assert result.best_epoch == 2 and len(result.log) == 2


def test_the_same_training_gives_the_same_model(trained, images):
    def once() -> torch.Tensor:
        quantized, _ = quantization_aware_training(
            trained, images, batches(64), None, settings(epochs=1), weight_bits=4, activation_bits=4
        )
        return quantized(images)

    assert torch.equal(once(), once())


def test_what_training_would_undo_is_refused(trained, images):
    for option in ({"rounding": "adaround"}, {"bias_correction": True}):
        with pytest.raises(QuantizationError, match="leave out rounding and bias_correction"):
            quantization_aware_training(
                trained, images, batches(64), None, settings(), weight_bits=4, activation_bits=4, **option
            )


def test_a_training_that_fails_says_so(trained, images):
    broken = [{**batch, "image": batch["image"] * torch.nan} for batch in batches(64)]
    with pytest.raises(TrainingError, match="loss is nan"):
        quantization_aware_training(trained, images, broken, None, settings(), weight_bits=4, activation_bits=4)


def test_equalized_models_train_too(trained, images):
    quantized, _ = quantization_aware_training(
        trained, images, batches(128), batches(256, 1), settings(), weight_bits=4, activation_bits=4, equalize=True
    )
    assert accuracy(quantized, batches(512, 3)) > accuracy(trained, batches(512, 3)) - 0.08


def test_modules_are_put_back_when_something_fails(trained, images):
    quantized = attached(trained, images, 4, 4)
    kinds = [type(module) for module in quantized.modules()]
    with pytest.raises(RuntimeError, match="stop"), learnable(quantized):
        raise RuntimeError("stop")
    assert [type(module) for module in quantized.modules()] == kinds


def test_the_bias_that_is_trained_is_the_one_that_ships(trained, images):
    """Inside the training biases are rounded as an engine rounds them, so that nothing changes at its end."""
    quantized = attached(trained, images, 3, 4).eval()
    with learnable(quantized), torch.no_grad():
        for parameter in quantized.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        learned = quantized(images)
    quantized.round_biases()
    torch.testing.assert_close(quantized(images), learned, rtol=1e-5, atol=1e-5)
