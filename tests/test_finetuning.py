"""Fine-tuning of quantized models: it starts exactly where they are, and each loss does to them what it is for."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from evaluation import predict
from fairness_losses import (
    FairnessPenalty,
    GroupBalancedLoader,
    GroupDistillation,
    GroupDRO,
    GroupError,
    Groups,
    Reweighed,
    worst_group_accuracy_score,
)
from fairness_metrics import compute_fairness_metrics
from quantizers import methods, ptq
from quantizers.bias_correction import correct_biases
from quantizers.finetuning import fine_tune
from quantizers.modules import DynamicActivationQuantizer, QuantizedModel
from quantizers.numerics import along
from quantizers.qat import LearnedLayer, PassedActivation, learnable, weights_that_round_to
from quantizers.reconstruction import reconstruct
from sections.training import Training
from training import TrainingError, cross_entropy, train


def settings(**keys) -> Training:
    defaults = {"epochs": 2, "learning_rate": 3e-3, "weight_decay": 0.0, "warmup_epochs": 0.0, "precision": "fp32"}
    return Training(**{**defaults, "per_model": {}, **keys})


STANDSTILL = settings(epochs=1, learning_rate=1e-12)


class Small(nn.Module):
    """A norm to fold, a depthwise layer, an addition, two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6())
        self.middle, self.head = nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.depthwise(x)
        return self.head(torch.relu(self.middle(x.mean((2, 3)))))


def shortcut(n: int, seed: int, minority: float = 0.1) -> list[dict]:
    """Images (3, 6, 6), their class in two places: weakly in channel 0, strongly in channel 1, where it is the other
    way round for the minority, gender 1. A model that is right on average is wrong on the minority."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    genders = (torch.rand(n, generator=generator) < minority).long()
    way = labels * 2.0 - 1
    means = torch.stack([0.5 * way, way * (1 - 2 * genders), torch.zeros(n)], dim=1)
    means = means + 0.6 * torch.randn(n, 3, generator=generator)
    images = means[:, :, None, None] + 0.1 * torch.randn(n, 3, 6, 6, generator=generator)
    return [
        {"image": images[i : i + 32], "label": labels[i : i + 32], "sensitive": {"gender": genders[i : i + 32]}}
        for i in range(0, n, 32)
    ]


TRAIN, VALIDATION, TEST = shortcut(1024, 0), shortcut(512, 1), shortcut(2048, 2)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    train(model, TRAIN, VALIDATION, settings(epochs=6, learning_rate=0.01))
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.cat([batch["image"] for batch in TRAIN[:3]])


def quantize(model: nn.Module, images: torch.Tensor, weight_bits: int = 4, activation_bits: int = 8, **recipe):
    """A post-training quantized model that keeps its float parameters."""
    recipe = ptq.Recipe(**recipe)
    quantized = ptq.attach(model, images, "ptq_static", weight_bits, activation_bits, recipe)
    ptq.quantize(quantized, ptq.observe_activations(quantized, images, recipe), images, recipe)
    return quantized


def nearest(model, images):
    return quantize(model, images, 3, 8)


def eight_bits(model, images):
    return quantize(model, images, 8, 8, backend="arm")


def symmetric_per_tensor(model, images):
    return quantize(model, images, 4, 4, backend="tensorrt", weight_granularity="per_tensor", reduce_range=False)


def adaround(model, images):
    quantized = quantize(model, images, 3, 8)
    rounded = {name: layer.weight_integer.clone() for name, layer in quantized.layers().items()}
    reconstruct(quantized, images, iterations=150)
    quantized.round_biases()
    assert any(not torch.equal(rounded[name], layer.weight_integer) for name, layer in quantized.layers().items())
    return quantized


def far_from_nearest(model, images):
    """Integers that no rounding of the float weights gives, the ends of the range among them."""
    quantized = quantize(model, images, 3, 8)
    for seed, layer in enumerate(quantized.layers().values()):
        generator = torch.Generator().manual_seed(seed)
        integer = torch.randint(-4, 4, layer.weight_integer.shape, generator=generator).to(torch.int8)
        layer.set_weights(integer, layer.weight_scale.clone())
    return quantized


def bias_corrected(model, images):
    quantized = quantize(model, images, 3, 8)
    correct_biases(quantized, images)
    quantized.round_biases()
    return quantized


def mixed_widths(model, images):
    quantized = quantize(model, images, 4, 8)
    bits = dict(zip(quantized.layers(), (16, 2, 32, 8), strict=True))
    for name, layer in quantized.layers().items():
        layer.set_bits(bits[name])
    ptq.quantize_weights(quantized, ptq.Recipe())
    quantized.round_biases()
    return quantized


def dynamic(model, images):
    quantized = ptq.attach(model, images, "ptq_dynamic", 4, 8, ptq.Recipe(), is_dynamic=True)
    ptq.quantize_weights(quantized, ptq.Recipe())
    return quantized


def loaded(model, images):
    """From its packed file: nothing is known but the integers."""
    quantized = quantize(model, images, 3, 8)
    fresh = ptq.attach(model, images, "ptq_static", 3, 8, ptq.Recipe())
    fresh.load_packed(quantized.packed_tensors())
    assert all(layer.float_weight is None for layer in fresh.layers().values())
    return fresh


REPAIRS = (
    nearest, eight_bits, symmetric_per_tensor, adaround, far_from_nearest, bias_corrected, mixed_widths, dynamic,
    loaded,
)  # fmt: skip
every_repair = pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.__name__)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------------------------------------- the start


@every_repair
def test_without_a_step_the_model_is_the_same_to_the_bit(trained, images, repair):
    quantized = repair(trained, images).eval()
    before, logits = state(quantized), quantized(images)
    with learnable(quantized, keep_rounding=True):
        torch.testing.assert_close(quantized(images), logits, rtol=1e-5, atol=1e-5)
        quantized.train()
        torch.testing.assert_close(quantized(images), logits, rtol=1e-5, atol=1e-5)
        quantized.eval()
    assert same(before, state(quantized))
    assert torch.equal(quantized(images), logits)


@every_repair
def test_so_is_it_after_a_training_that_goes_nowhere(trained, images, repair):
    quantized = repair(trained, images).eval()
    before, logits = state(quantized), quantized(images)
    fine_tune(quantized, TRAIN[:2], None, STANDSTILL, loss=cross_entropy())
    after = state(quantized)
    for name in before:
        if name.endswith(("weight_integer", "weight_scale", ".scale", "zero_point")):
            assert torch.equal(before[name], after[name]), name
    torch.testing.assert_close(quantized(images), logits, rtol=1e-5, atol=1e-5)
    assert not quantized.training


def test_learnable_without_keep_rounding_starts_at_the_nearest(trained, images):
    """What quantization-aware training does; learned rounding would be lost."""
    quantized = adaround(trained, images)
    before = state(quantized)
    with learnable(quantized):
        pass
    assert not same(before, state(quantized))


def test_weights_start_as_near_to_the_float_ones_as_the_middle_halves_of_their_cells_allow(trained, images):
    for repair in (nearest, adaround, far_from_nearest):
        for layer in repair(trained, images).layers().values():
            start = weights_that_round_to(layer)
            scale = along(layer.weight_scale, layer.axis, start.ndim)
            low, high = layer.bounds()
            assert torch.equal((start / scale).round().clamp(low, high).to(torch.int8), layer.weight_integer)
            steps, q = layer.float_weight / scale, layer.weight_integer.float()
            inside = ((steps > q - 0.25) | (q == low)) & ((steps < q + 0.25) | (q == high))
            torch.testing.assert_close(start[inside], layer.float_weight[inside], rtol=1e-5, atol=0)  # not moved
            moved = ((start / scale) - q)[~inside]  # to the nearer end of the middle half
            torch.testing.assert_close(moved, 0.25 * (steps - q).sign()[~inside], rtol=0, atol=1e-4)


def test_bounds_may_differ_between_channels(trained, images):
    """A layer whose first channels have 2 bits among 4: its bounds are tensors."""
    quantized = quantize(trained, images, 4, 8)
    layer = quantized.layers()["depthwise.0"]
    low, high = torch.tensor([-2, -2] + [-8] * 6), torch.tensor([1, 1] + [7] * 6)
    layer.bounds = lambda: (low, high)
    integer = layer.weight_integer.clone()
    integer[:2].clamp_(-2, 1)
    layer.set_weights(integer, layer.weight_scale.clone())
    with learnable(quantized, keep_rounding=True):
        learned = next(m for m in quantized.modules() if isinstance(m, LearnedLayer) and m.layer is layer.layer)
        assert learned.gradient_scale.flatten().tolist() == pytest.approx([1 / 3] * 2 + [1 / math.sqrt(63)] * 6)
        cross_entropy()(quantized(images), {"label": torch.zeros(len(images), dtype=torch.long)}).backward()
        assert learned.theta.grad.shape == (8,)
    assert torch.equal(layer.weight_integer, integer)
    fine_tune(quantized, TRAIN[:8], None, settings(epochs=1, learning_rate=0.05), loss=cross_entropy())
    assert not torch.equal(layer.weight_integer, integer)
    assert set(layer.weight_integer[:2].unique().tolist()) <= {-2, -1, 0, 1}


def test_the_gradient_passes_a_dynamic_range(trained, images):
    """As it is, but for the ends of the range, which rounding of the zero point may leave just outside."""
    quantized = dynamic(trained, images)
    count = len(quantized.activation_quantizers())
    with learnable(quantized, keep_rounding=True):
        assert sum(isinstance(module, PassedActivation) for module in quantized.modules()) == count > 0
    quantizer = DynamicActivationQuantizer("x", 4)
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = PassedActivation(quantizer)(x)
    assert torch.equal(y, quantizer(x))
    weight = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    (weight * y).sum().backward()
    stopped = x.grad.flatten(1) != weight.flatten(1)
    assert bool((x.grad.flatten(1)[stopped] == 0).all()) and int(stopped.sum(dim=1).max()) <= 2


# ---------------------------------------------------------------------------------------------------------- the result


@every_repair
def test_every_parameter_learns_and_the_result_is_an_ordinary_quantized_model(trained, images, repair):
    quantized = repair(trained, images).eval()
    with learnable(quantized, keep_rounding=True):
        cross_entropy()(quantized(TRAIN[0]["image"]), TRAIN[0]).backward()
        for name, parameter in quantized.named_parameters():
            is_at_rest = repair is loaded and name.endswith("theta")  # the middle of a cell says nothing of its scale
            if repair is not far_from_nearest and not is_at_rest:  # whose activations are all beyond their ranges
                assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name
    before = state(quantized)
    result = fine_tune(quantized, TRAIN[:8], VALIDATION, settings(epochs=1), loss=cross_entropy())
    assert quantized.description["epochs"] == 1 and quantized.description["best_epoch"] == result.best_epoch == 1
    report = quantized.reports["training"]
    assert report["seconds"] == result.seconds and report["log"] == [{"precision": "fp32", **result.log[0]}]
    assert not same(before, state(quantized)) and not quantized.training
    for layer in quantized.layers().values():
        weight = layer.layer.weight
        if layer.bits <= 8:
            low, high = layer.bounds()
            assert low <= int(layer.weight_integer.min()) and int(layer.weight_integer.max()) <= high
            assert torch.equal(weight, layer.weight_integer * along(layer.weight_scale, layer.axis, weight.ndim))
        elif layer.bits == 16:
            assert torch.equal(weight, weight.half().float())
    fresh = copy.deepcopy(quantized)
    fresh.load_packed(quantized.packed_tensors())
    assert torch.equal(fresh(images), quantized(images))
    biases = state(quantized)
    quantized.round_biases()
    assert same(biases, state(quantized))  # they were rounded


def test_the_model_that_was_validated_is_the_one_that_is_left(trained, images):
    quantized = adaround(trained, images)
    result = fine_tune(quantized, TRAIN, VALIDATION, settings(learning_rate=0.02), loss=cross_entropy())
    assert predict(quantized, VALIDATION).accuracy == pytest.approx(result.best_accuracy, abs=1e-6)
    assert result.best_accuracy == max(epoch["validation_accuracy"] for epoch in result.log)


def test_keep_start_never_falls_behind_the_start(trained, images):
    quantized = adaround(trained, images)
    before = state(quantized)

    def away(logits, batch):
        return -cross_entropy()(logits, batch).clamp(max=20)

    harmful = settings(epochs=2, learning_rate=0.05)
    result = fine_tune(quantized, TRAIN[:8], VALIDATION, harmful, loss=away, keep_start=True)
    assert result.best_epoch == quantized.description["best_epoch"] == 0 and len(result.log) == 2
    assert same(before, state(quantized))
    fine_tune(quantized, TRAIN[:8], VALIDATION, harmful, loss=away)
    assert not same(before, state(quantized))


@pytest.mark.parametrize("loss, error", [("nan", TrainingError), ("group", GroupError), ("crash", RuntimeError)])
def test_a_training_that_fails_leaves_the_model_as_it_was(trained, images, loss, error):
    quantized = adaround(trained, images).eval()
    before, logits = state(quantized), quantized(images)
    kinds = [type(module) for module in quantized.modules()]
    steps = []

    def broken(values, batch):
        steps.append(1)
        if loss == "nan" or len(steps) < 3:
            return values.mean() * (math.nan if loss == "nan" and len(steps) > 1 else 1.0)
        if loss == "group":
            Groups.of(TRAIN).codes({"sensitive": {"gender": torch.tensor([3])}})
        raise RuntimeError("stop")

    with pytest.raises(error):
        fine_tune(quantized, TRAIN[:8], VALIDATION, settings(), loss=broken)
    assert same(before, state(quantized)) and [type(module) for module in quantized.modules()] == kinds
    assert not quantized.training and torch.equal(quantized(images), logits)


def test_the_same_training_gives_the_same_model(trained, images):
    def once() -> dict:
        quantized = quantize(trained, images)
        loss = GroupDRO(Groups.of(TRAIN), 0.1)
        loader = GroupBalancedLoader(TRAIN[:6], Groups.of(TRAIN), 3)
        fine_tune(quantized, loader, VALIDATION, settings(epochs=1), loss=loss)
        return state(quantized)

    assert same(once(), once())


# ---------------------------------------------------------------------------------------------------- what losses do


@pytest.fixture(scope="module")
def start(trained, images) -> QuantizedModel:
    return quantize(trained, images, 4, 8)


def tuned(start: QuantizedModel, loss, loader=None, **keys) -> QuantizedModel:
    """A fine-tuned copy; its last epoch counts."""
    quantized = copy.deepcopy(start)
    fine_tune(quantized, loader or TRAIN, None, settings(**{"epochs": 3, "learning_rate": 0.01, **keys}), loss=loss)
    return quantized


@pytest.fixture(scope="module")
def plain(start) -> dict:
    """The metrics after fine-tuning with cross entropy alone."""
    return measure(tuned(start, cross_entropy()))


def measure(model: nn.Module) -> dict:
    return compute_fairness_metrics(model, TEST, "gender")


def test_the_start_has_a_gap_that_cross_entropy_does_not_close(start, plain):
    for metrics in (measure(start), plain):
        assert metrics["equalized_odds"] > 0.4 and metrics["worst_group_accuracy"] < 0.6 < 0.8 < metrics["accuracy"]
        assert metrics["worst_group"] == "1"


def test_the_penalty_closes_the_gap(start, plain):
    metrics = measure(tuned(start, FairnessPenalty(Groups.of(TRAIN), "equalized_odds", 1.0)))
    assert metrics["equalized_odds"] < 0.5 * plain["equalized_odds"]
    assert metrics["accuracy"] > 0.65


def test_group_dro_raises_the_worst_group(start, plain):
    loss = GroupDRO(Groups.of(TRAIN), 0.1)
    metrics = measure(tuned(start, loss))
    assert metrics["worst_group_accuracy"] > plain["worst_group_accuracy"] + 0.1
    assert float(loss.weights[1]) > 0.5


def test_balanced_batches_raise_the_worst_group(start, plain):
    loader = GroupBalancedLoader(TRAIN, Groups.of(TRAIN), seed=0)
    metrics = measure(tuned(start, cross_entropy(), loader))
    assert metrics["worst_group_accuracy"] > plain["worst_group_accuracy"] + 0.1
    assert loader.repeats[0] == 1 < loader.repeats[1]


def test_reweighing_takes_back_what_the_correlation_taught(images):
    """Gender in a channel of its own, four in five of each gender in one class: the gap in selection falls."""

    def correlated(n: int, seed: int) -> list[dict]:
        generator = torch.Generator().manual_seed(seed)
        genders = torch.randint(0, 2, (n,), generator=generator)
        labels = torch.where(torch.rand(n, generator=generator) < 0.8, genders, 1 - genders)
        means = torch.stack([labels * 2.0 - 1, genders * 2.0 - 1, torch.zeros(n)], 1)
        means = means + 0.8 * torch.randn(n, 3, generator=generator)
        pictures = means[:, :, None, None].expand(-1, -1, 6, 6).contiguous()
        return [
            {"image": pictures[i : i + 32], "label": labels[i : i + 32], "sensitive": {"gender": genders[i : i + 32]}}
            for i in range(0, n, 32)
        ]

    data, test = correlated(1024, 0), correlated(2048, 1)
    torch.manual_seed(0)
    model = Small()
    train(model, data, None, settings(epochs=4, learning_rate=0.01))
    start = quantize(model.eval(), torch.cat([batch["image"] for batch in data[:3]]), 4, 8)
    gaps = [
        compute_fairness_metrics(tuned(start, loss, data), test, "gender")["equalized_odds"]
        for loss in (cross_entropy(), Reweighed(Groups.of(data)))
    ]
    assert gaps[1] < 0.5 * gaps[0]


def test_distillation_brings_every_group_back_to_the_teacher(trained, images):
    start = quantize(trained, images, 2, 4, weight_observer="minmax")
    teacher_logits = predict(trained, TEST).logits
    genders = torch.cat([batch["sensitive"]["gender"] for batch in TEST]).numpy()

    def drift(model: nn.Module) -> np.ndarray:
        p, q = (torch.from_numpy(x).double().softmax(1) for x in (teacher_logits, predict(model, TEST).logits))
        divergence = (p * (p / q).log()).sum(1).numpy()
        return np.array([divergence[genders == g].mean() for g in range(2)])

    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    loss = GroupDistillation(Groups.of(TRAIN), trained, temperature=2.0, step_size=0.1)
    after = drift(tuned(start, loss))
    assert (after < 0.3 * drift(start)).all()
    assert (after < 0.5 * drift(tuned(start, cross_entropy()))).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())


def test_the_epoch_of_the_best_worst_group_is_kept(start):
    quantized = copy.deepcopy(start)
    groups = Groups.of(TRAIN)
    score = worst_group_accuracy_score(groups, min_size=20)
    result = fine_tune(
        quantized, TRAIN, VALIDATION, settings(epochs=4, learning_rate=0.02), loss=GroupDRO(groups, 0.2), score=score
    )
    scores = [epoch["validation_score"] for epoch in result.log]
    assert result.best_score == max(scores) == scores[result.best_epoch - 1]
    assert score(predict(quantized, VALIDATION)) == pytest.approx(result.best_score)


@pytest.mark.parametrize("sizes, least", [((30, 5), 1), ((30, 25, 5), 20), ((9, 8), 1)])
def test_the_worst_group_that_chooses_is_one_of_several(trained, monkeypatch, sizes, least):
    """Two groups of 20 images at least, or all groups: never the accuracy of the one large group alone."""
    asked = []
    monkeypatch.setattr(methods, "worst_group_accuracy_score", lambda groups, size: asked.append(size))
    (batch,) = shortcut(sum(sizes), 3)[:1] if sum(sizes) <= 32 else [_joined(shortcut(sum(sizes), 3))]
    batch["sensitive"] = {"gender": torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))}
    methods.apply_quantization(
        trained, "group_dro", 4, TRAIN, train_data=TRAIN, validation_data=[batch], calibration_samples=32, epochs=1,
        reconstruction_iterations=1,
    )  # fmt: skip
    assert asked == [least]


def _joined(batches: list[dict]) -> dict:
    sensitive = {name: torch.cat([batch["sensitive"][name] for batch in batches]) for name in batches[0]["sensitive"]}
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("image", "label")} | {"sensitive": sensitive}


def test_groups_are_counted_in_all_images_though_an_epoch_leaves_some_out():
    """Else the weights are those of one shuffle, and a small group may turn up in the middle of the training."""
    whole = _joined(shortcut(65, 1))
    whole["sensitive"]["gender"][:] = torch.arange(65) % 2
    whole["sensitive"]["gender"][64] = 2
    items = [
        {
            "image": whole["image"][i],
            "label": whole["label"][i],
            "sensitive": {"gender": whole["sensitive"]["gender"][i]},
        }
        for i in range(65)
    ]
    loader = DataLoader(items, batch_size=32, drop_last=True)
    assert len(Groups.of(loader)) == 2 and Groups.of(methods._whole(loader)).counts.tolist() == [32, 32, 1]
    shuffled = DataLoader(items, batch_size=32, drop_last=True, shuffle=True)
    assert Groups.of(methods._whole(shuffled)).counts.tolist() == [32, 32, 1]
    chosen = DataLoader(items, batch_size=32, drop_last=True, sampler=torch.utils.data.SubsetRandomSampler(range(64)))
    assert methods._whole(chosen) is chosen  # it trains on these alone


@pytest.mark.parametrize("method", ["qat", "group_dro"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_trains_in_the_precision_that_is_asked_for(trained, method, precision):
    quantized = methods.apply_quantization(
        trained, method, 4, TRAIN, train_data=TRAIN, calibration_samples=32, epochs=1, precision=precision
    )
    assert {epoch["precision"] for epoch in quantized.reports["training"]["log"]} == {precision}
