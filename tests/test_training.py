"""The training loop: what it learns, which weights it keeps, its schedule, and how it stops."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import training
from models import build_model
from sections.training import Training
from training import TrainingError, choose_precision, cross_entropy, train


def settings(**keys) -> Training:
    defaults = {"epochs": 3, "learning_rate": 0.05, "weight_decay": 0.0, "warmup_epochs": 0.0, "precision": "fp32"}
    return Training(**{**defaults, "per_model": {}, **keys})


def toy_batches(n: int = 64, batch_size: int = 16, seed: int = 0) -> list[dict]:
    """Images (3, 4, 4) whose class is the sign of their mean: linearly separable, with a margin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    images = 0.3 * torch.randn(n, 3, 4, 4, generator=generator) + (labels * 2.0 - 1.0)[:, None, None, None]
    return [
        {"image": images[i : i + batch_size], "label": labels[i : i + batch_size], "sensitive": {}}
        for i in range(0, n, batch_size)
    ]


def toy_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Scripted:
    """Stands in for `predict`: validation accuracies given by hand; keeps the weights that each epoch ended with."""

    def __init__(self, monkeypatch, *accuracies: float):
        self.accuracies = list(accuracies)
        self.states = []
        monkeypatch.setattr(training, "predict", self)

    def __call__(self, model, loader, device):
        self.states.append(state(model))
        return type("Result", (), {"accuracy": self.accuracies[len(self.states) - 1]})


# ----------------------------------------------------------------------------------------------------------- the result


def test_a_separable_problem_is_learned():
    result = train(toy_model(), toy_batches(), toy_batches(seed=1), settings(epochs=6, learning_rate=0.01))
    assert result.best_accuracy == 1.0
    losses = [epoch["train_loss"] for epoch in result.log]
    assert losses[-1] < 0.1 < losses[0]


def test_the_log_has_every_epoch_and_field():
    model = toy_model()
    validation = toy_batches(seed=1)
    result = train(model, toy_batches(), validation, settings(epochs=3))
    assert [epoch["epoch"] for epoch in result.log] == [1, 2, 3]
    for epoch in result.log:
        assert list(epoch) == ["epoch", "learning_rate", "train_loss", "validation_accuracy", "seconds"]
    assert result.log[-1]["learning_rate"] == pytest.approx(0, abs=1e-12)  # cosine to zero
    assert result.best_accuracy == max(epoch["validation_accuracy"] for epoch in result.log)
    assert result.log[result.best_epoch - 1]["validation_accuracy"] == result.best_accuracy
    seconds = [0.0, *(epoch["seconds"] for epoch in result.log), result.seconds]
    assert seconds == sorted(seconds) and seconds[1] > 0
    assert result.precision == "fp32"
    assert not any(module.training for module in model.modules())  # left in eval mode


def test_the_train_loss_is_the_mean_over_images():
    """With a learning rate of almost 0 it is the cross entropy of the initial model; the last batch is smaller."""
    model = toy_model()
    loader = toy_batches(n=20, batch_size=16)
    images, labels = (torch.cat([batch[key] for batch in loader]) for key in ("image", "label"))
    expected = nn.functional.cross_entropy(model(images), labels).item()
    result = train(model, loader, loader, settings(epochs=1, learning_rate=1e-12))
    assert result.log[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_weights_of_the_best_epoch_are_restored(monkeypatch):
    script = Scripted(monkeypatch, 0.6, 0.8, 0.7, 0.8)
    model = toy_model()
    result = train(model, toy_batches(), [], settings(epochs=4))
    assert (result.best_epoch, result.best_accuracy) == (2, 0.8)  # the first of two equal ones
    assert same(state(model), script.states[1])
    assert not same(script.states[1], script.states[3])


def test_buffers_are_restored_with_the_weights(monkeypatch):
    script = Scripted(monkeypatch, 0.9, 0.5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 2))
    train(model, toy_batches(), [], settings(epochs=2))
    assert same(state(model), script.states[0])
    assert not torch.equal(model[0].running_mean, script.states[1]["0.running_mean"])


@pytest.mark.parametrize(
    "patience, epochs, best", [(1, 3, 2), (2, 6, 4), (3, 7, 4), (None, 7, 4)], ids=["1", "2", "3", "never"]
)
def test_early_stop_counts_epochs_without_a_better_one(monkeypatch, patience, epochs, best):
    script = Scripted(monkeypatch, 0.5, 0.6, 0.6, 0.7, 0.7, 0.1, 0.1)
    result = train(toy_model(), toy_batches(), [], settings(epochs=7, patience=patience))
    assert (len(result.log), result.best_epoch) == (epochs, best)
    assert len(script.states) == epochs


def test_a_model_that_never_predicts_right_still_has_a_best_epoch(monkeypatch):
    Scripted(monkeypatch, 0.0, 0.0)
    assert train(toy_model(), toy_batches(), [], settings(epochs=2)).best_epoch == 1


def test_same_seed_same_weights_to_the_bit():
    def trained(seed: int) -> dict:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, 2))
        train(model, toy_batches(), toy_batches(seed=1), settings(epochs=3))
        return state(model)

    first = trained(1)
    assert same(first, trained(1))
    assert not same(first, trained(2))


# --------------------------------------------------------------------------------------------------------------- score


def scripted_score(*values: float):
    """A score of given values, which keeps the predictions that it was asked about."""
    seen = []

    def score(predictions):
        seen.append(predictions)
        return values[len(seen) - 1]

    return score, seen


def test_the_best_epoch_is_that_of_the_largest_score(monkeypatch):
    script = Scripted(monkeypatch, 0.9, 0.2, 0.3, 0.4)
    score, seen = scripted_score(-3.0, -1.0, -2.0, -1.0)
    model = toy_model()
    result = train(model, toy_batches(), [], settings(epochs=4), score=score)
    assert (result.best_epoch, result.best_score, result.best_accuracy) == (2, -1.0, 0.2)  # its accuracy, not the best
    assert same(state(model), script.states[1])
    assert [epoch["validation_score"] for epoch in result.log] == [-3.0, -1.0, -2.0, -1.0]
    assert [epoch["validation_accuracy"] for epoch in result.log] == [0.9, 0.2, 0.3, 0.4]
    assert list(result.log[0]) == [
        "epoch", "learning_rate", "train_loss", "validation_accuracy", "validation_score", "seconds",
    ]  # fmt: skip
    assert len(seen) == 4 and result.start is None


def test_the_score_sees_the_validation_predictions():
    validation = [{**batch, "sensitive": {"gender": batch["label"] + 5}} for batch in toy_batches(n=20, seed=1)]
    score, seen = scripted_score(1.0)
    model = toy_model()
    train(model, toy_batches(), validation, settings(epochs=1), score=score)
    with torch.no_grad():
        logits = torch.cat([model(batch["image"]) for batch in validation])
    np.testing.assert_allclose(seen[0].logits, logits.numpy(), rtol=1e-6)
    assert seen[0].sensitive["gender"].tolist() == (seen[0].y_true + 5).tolist()


def test_patience_counts_epochs_without_a_better_score(monkeypatch):
    Scripted(monkeypatch, 0.1, 0.2, 0.3, 0.4, 0.5)
    score, _ = scripted_score(0.5, 0.4, 0.3, 0.2, 0.1)
    result = train(toy_model(), toy_batches(), [], settings(epochs=5, patience=2), score=score)
    assert (len(result.log), result.best_epoch) == (3, 1)


@pytest.mark.parametrize("is_scored", [False, True])
@pytest.mark.parametrize("start, best", [(0.8, 0), (0.7, 0), (0.6, 2)], ids=["better", "equal", "worse"])
def test_the_start_competes_only_where_it_may(monkeypatch, start, best, is_scored):
    def once(keep_start: bool):
        values = [start] * keep_start + [0.5, 0.7]
        script = Scripted(monkeypatch, *([0.1] * len(values) if is_scored else values))
        score = scripted_score(*values)[0] if is_scored else None
        model = toy_model()
        result = train(model, toy_batches(), [], settings(epochs=2), score=score, keep_start=keep_start)
        assert len(result.log) == 2  # the start is no epoch
        assert result.best_score == (max(start, 0.7) if keep_start else 0.7)
        assert same(state(model), script.states[result.best_epoch + keep_start - 1])
        return result, state(model)

    result, kept = once(keep_start=True)
    assert result.best_epoch == best
    measured = {"validation_accuracy": 0.1, "validation_score": start} if is_scored else {"validation_accuracy": start}
    assert result.start == measured
    assert same(kept, state(toy_model())) is (best == 0)
    assert once(keep_start=False)[0].best_epoch == 2


def test_what_cannot_be_compared_is_refused():
    def nothing(predictions):
        return math.nan

    with pytest.raises(TrainingError, match=r"^validation in epoch 1: the score is NaN"):
        train(toy_model(), toy_batches(), toy_batches(), settings(), score=nothing)
    with pytest.raises(TrainingError, match=r"^validation before the training: the score is NaN"):
        train(toy_model(), toy_batches(), toy_batches(), settings(), score=nothing, keep_start=True)
    for keys in ({"score": nothing}, {"keep_start": True}):
        with pytest.raises(ValueError, match="give a validation loader"):
            train(toy_model(), toy_batches(), None, settings(), **keys)


# ---------------------------------------------------------------------------------------------------------------- loss


def test_cross_entropy_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    batch = {"label": torch.tensor([0, 1])}
    log = math.log1p(math.exp(-2))  # -log softmax of the larger of (2, 0)
    assert cross_entropy()(logits, batch).item() == pytest.approx((log + math.log(2)) / 2)
    # smoothing 0.2 over 2 classes: the target is (0.9, 0.1) and (0.1, 0.9)
    smooth = (0.9 * log + 0.1 * (log + 2) + math.log(2)) / 2
    assert cross_entropy(0.2)(logits, batch).item() == pytest.approx(smooth)


def test_cross_entropy_is_computed_in_float32():
    logits = torch.tensor([[0.1, 0.2, 0.4]], dtype=torch.bfloat16)
    value = cross_entropy()(logits, {"label": [2]})
    assert value.dtype == torch.float32
    assert value.item() == nn.functional.cross_entropy(logits.float(), torch.tensor([2])).item()


def test_label_smoothing_of_the_settings_is_used():
    loader = toy_batches(n=16)
    model = toy_model()
    expected = cross_entropy(0.3)(model(loader[0]["image"]), loader[0]).item()
    result = train(model, loader, loader, settings(epochs=1, learning_rate=1e-12, label_smoothing=0.3))
    assert result.log[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_loss_argument_replaces_cross_entropy():
    seen = []

    def push_class_1(logits_NK, batch):
        seen.append(batch["sensitive"]["gender"])
        return (logits_NK[:, 0] - logits_NK[:, 1]).mean()

    loader = [{**batch, "sensitive": {"gender": batch["label"] + 5}} for batch in toy_batches()]
    model = toy_model()
    result = train(model, loader, loader, settings(epochs=4, learning_rate=0.2, gradient_clip=None), loss=push_class_1)
    with torch.no_grad():
        gain = [logits[:, 1] - logits[:, 0] for logits in (toy_model()(loader[0]["image"]), model(loader[0]["image"]))]
    assert gain[1].mean() > gain[0].mean() + 1  # whatever epoch was the best, it went where the loss pulls
    assert result.log[-1]["train_loss"] < -1  # no cross entropy is negative
    assert len(seen) == 16 and set(seen[0].tolist()) == {5, 6}  # the whole batch, groups included


# --------------------------------------------------------------------------------------------------- errors on the way


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_in_one_line(value):
    epochs = []

    def loss(logits_NK, batch):
        epochs.append(1)
        return logits_NK.mean() * (value if len(epochs) > 4 else 1.0)  # in the second epoch

    with pytest.raises(TrainingError) as caught:
        train(toy_model(), toy_batches(), toy_batches(), settings(epochs=3, learning_rate=0.125), loss=loss)
    message = str(caught.value)
    assert "in epoch 2" in message and "training.learning_rate" in message and "0.125" in message
    assert "\n" not in message


def test_validation_logits_that_are_not_finite_end_the_training():
    class OnlyInTraining(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = toy_model()

        def forward(self, x):
            return self.inner(x) if self.training else self.inner(x) * math.nan

    with pytest.raises(
        TrainingError, match=r"^validation in epoch 1: 64 of 64 images have logits that are not finite$"
    ):
        train(OnlyInTraining(), toy_batches(), toy_batches(), settings())


def test_empty_loaders():
    with pytest.raises(ValueError, match="the training loader is empty"):
        train(toy_model(), [], toy_batches(), settings())
    with pytest.raises(ValueError, match="the loader is empty"):
        train(toy_model(), toy_batches(), [], settings())


# ------------------------------------------------------------------------------------------------ schedule, optimizer


def rates(monkeypatch, config: Training, steps_per_epoch: int) -> list[float]:
    """The learning rate of every step that was taken."""
    taken = []
    step = torch.optim.AdamW.step

    def record(optimizer, *arguments, **keys):
        taken.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *arguments, **keys)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    train(toy_model(), toy_batches(n=4 * steps_per_epoch, batch_size=4), toy_batches(n=8), config)
    assert all(first == second for first, second in taken)
    return [first for first, _ in taken]


def test_cosine_by_hand(monkeypatch):
    half = math.sqrt(0.5)
    expected = [0.08, 0.04 * (1 + half), 0.04, 0.04 * (1 - half)]  # 4 steps, no warm-up
    assert rates(monkeypatch, settings(epochs=2, learning_rate=0.08), 2) == pytest.approx(expected)


def test_warm_up_then_cosine_by_hand(monkeypatch):
    # 1 of 3 epochs of 2 steps: 1/3, 2/3, then the cosine of 0, 1/4, 2/4, 3/4 of the way
    half = math.sqrt(0.5)
    factors = [1 / 3, 2 / 3, 1, (1 + half) / 2, 1 / 2, (1 - half) / 2]
    taken = rates(monkeypatch, settings(epochs=3, warmup_epochs=1.0, learning_rate=0.09), 2)
    assert taken == pytest.approx([0.09 * factor for factor in factors])


def test_warm_up_takes_at_most_half_of_the_training(monkeypatch):
    # 10 warm-up epochs of 2 epochs of 2 steps: 2 steps of warm-up are left, then the peak
    taken = rates(monkeypatch, settings(epochs=2, warmup_epochs=10.0, learning_rate=0.09), 2)
    assert taken == pytest.approx([0.03, 0.06, 0.09, 0.045])


def test_no_weight_decay_on_biases_and_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model[3].weight.requires_grad_(False)
    decayed, plain = training._parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]  # a frozen parameter is in neither
    assert {id(p) for p in plain["params"]} == {id(p) for p in (model[0].bias, *model[1].parameters(), model[3].bias)}


def test_gradients_are_clipped_to_the_norm(monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def record(optimizer, *arguments, **keys):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())
        return step(optimizer, *arguments, **keys)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)

    def large(logits_NK, batch):
        return 1000 * logits_NK[:, 0].mean()

    train(toy_model(), toy_batches(), toy_batches(), settings(epochs=1, gradient_clip=0.25), loss=large)
    assert norms == pytest.approx([0.25] * 4, rel=1e-4)
    norms.clear()
    train(toy_model(), toy_batches(), toy_batches(), settings(epochs=1, gradient_clip=None), loss=large)
    assert min(norms) > 1


# ------------------------------------------------------------------------------------------------------------ precision


def test_auto_precision_by_device_and_model(monkeypatch):
    plain, depthwise = build_model("squeezenet1_1", 2, 32), build_model("mobilenet_v2", 2, 32)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        assert choose_precision("auto", plain, cpu) == expected
        assert choose_precision("auto", depthwise, cpu) == "fp32"  # bf16 halves its speed there
        assert choose_precision("auto", depthwise, cuda) == "bf16"
        for precision in ("fp32", "bf16"):
            assert choose_precision(precision, depthwise, cpu) == precision
            assert choose_precision(precision, plain, cuda) == precision


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_computes_in_that_precision_and_keeps_float32_weights(precision):
    kinds = set()

    def loss(logits_NK, batch):
        kinds.add(logits_NK.dtype)
        return cross_entropy()(logits_NK, batch)

    model = toy_model()
    result = train(model, toy_batches(), toy_batches(), settings(epochs=2, precision=precision), loss=loss)
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert result.precision == precision
    assert model[1].weight.dtype == torch.float32
    assert result.best_accuracy == 1.0


def test_progress_goes_from_0_towards_1():
    told = []
    train(
        toy_model(), toy_batches(n=88, batch_size=4), toy_batches(), settings(epochs=2),
        progress=lambda text, share: told.append((text, share)),
    )  # fmt: skip
    assert [text for text, _ in told] == ["epoch 1/2"] * 3 + ["epoch 2/2"] * 3  # steps 0, 10, 20 of 22
    np.testing.assert_allclose([share for _, share in told], [0, 10 / 44, 20 / 44, 22 / 44, 32 / 44, 42 / 44])
