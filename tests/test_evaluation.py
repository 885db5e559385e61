"""Predictions, sizes and latencies of modules and engines."""

import statistics
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import evaluation
from evaluation import (
    EvaluationError,
    Predictions,
    as_batch,
    device_of,
    eval_mode,
    latency,
    model_size_mb,
    predict,
    predicted_classes,
    write_model,
)
from models import build_model, count_parameters


def images(n: int, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches(*sizes: int) -> list[dict]:
    """Mapping batches of these sizes; labels count up, gender alternates."""
    first = 0
    made = []
    for size in sizes:
        number = torch.arange(first, first + size)
        made.append({"image": images(size, seed=first), "label": number % 3, "sensitive": {"gender": number % 2}})
        first += size
    return made


def small_model() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Engine:
    """Not an nn.Module: logits are the mean of each channel."""

    def predict(self, x_NCHW):
        assert isinstance(x_NCHW, np.ndarray) and x_NCHW.dtype == np.float32
        return x_NCHW.mean(axis=(2, 3)).astype(np.float64)


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits: float):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


# ------------------------------------------------------------------------------------------------------------- predict


def test_predictions_are_the_models_own_output_in_order():
    model = small_model()
    loader = batches(4, 4, 3)
    result = predict(model, loader)
    with torch.no_grad():
        expected = torch.cat([model.eval()(batch["image"]) for batch in loader]).numpy()
    np.testing.assert_array_equal(result.logits, expected)
    assert result.logits.dtype == np.float32
    np.testing.assert_array_equal(result.y_true, np.arange(11) % 3)
    np.testing.assert_array_equal(result.sensitive["gender"], np.arange(11) % 2)
    np.testing.assert_array_equal(result.index, np.arange(11))  # the position, where the batch has no numbers
    np.testing.assert_array_equal(result.y_pred, expected.argmax(axis=1))
    assert result.accuracy == (expected.argmax(axis=1) == np.arange(11) % 3).sum() / 11


def test_the_batches_own_sample_numbers_are_kept():
    loader = batches(2, 2)
    for batch, number in zip(loader, ([40, 7], [9, 1]), strict=True):
        batch["index"] = torch.tensor(number)
    assert predict(small_model(), loader).index.tolist() == [40, 7, 9, 1]


def test_tuples_mappings_and_numpy_give_the_same():
    model = small_model()
    mappings = batches(4, 2)
    expected = predict(model, mappings)
    tuples = [(batch["image"], batch["label"], batch["sensitive"]) for batch in mappings]
    arrays = [
        {
            "image": batch["image"].numpy(),
            "label": batch["label"].tolist(),
            "sensitive": {"gender": batch["sensitive"]["gender"].numpy()},
        }
        for batch in mappings
    ]
    for loader in (tuples, [list(batch) for batch in tuples], arrays, iter(mappings)):
        result = predict(model, loader)
        np.testing.assert_array_equal(result.logits, expected.logits)
        np.testing.assert_array_equal(result.y_true, expected.y_true)
        np.testing.assert_array_equal(result.sensitive["gender"], expected.sensitive["gender"])
    pairs = predict(model, [batch[:2] for batch in tuples])
    np.testing.assert_array_equal(pairs.logits, expected.logits)
    assert pairs.sensitive == {}


@pytest.mark.parametrize("batch", [torch.zeros(2, 3, 8, 8), (1,), (1, 2, {}, 4), None, "image"])
def test_another_kind_of_batch_is_refused(batch):
    with pytest.raises(TypeError, match=f"mapping with image, label and sensitive.*got {type(batch).__name__}"):
        as_batch(batch)


def test_each_modules_own_mode_is_restored():
    model = small_model().train()
    model[0][1].eval()  # a frozen BatchNorm inside a model that trains
    before = [module.training for module in model.modules()]
    statistics_before = model[0][1].running_mean.clone()
    predict(model, batches(4))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model[0][1].running_mean, statistics_before)
    with pytest.raises(ZeroDivisionError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before
    model.eval()
    predict(model, batches(4))
    assert not any(module.training for module in model.modules())


def test_a_prediction_changes_no_state_of_the_model():
    model = small_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    predict(model, batches(4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_engine_needs_only_predict():
    loader = batches(3, 2)
    result = predict(Engine(), loader)
    expected = np.concatenate([batch["image"].numpy().mean(axis=(2, 3)) for batch in loader])
    np.testing.assert_allclose(result.logits, expected, rtol=1e-6)
    assert result.logits.dtype == np.float32
    assert device_of(Engine()) == torch.device("cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_counted_and_refused(bad):
    class Sometimes(nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 2)
            logits[1, 0] = bad
            return logits

    with pytest.raises(EvaluationError, match=r"^2 of 7 images have logits that are not finite$"):
        predict(Sometimes(), batches(4, 3))


def test_an_empty_loader_is_an_error():
    with pytest.raises(ValueError, match="the loader is empty"):
        predict(small_model(), [])


def test_low_precision_logits_become_float32():
    model = small_model().to(torch.bfloat16)
    loader = [{**batch, "image": batch["image"].to(torch.bfloat16)} for batch in batches(3)]
    result = predict(model, loader)
    with torch.no_grad():
        expected = model.eval()(loader[0]["image"])
    assert result.logits.dtype == np.float32
    np.testing.assert_array_equal(result.logits, expected.float().numpy())


def test_predicted_classes_by_hand():
    assert predicted_classes(np.array([[0.1, 0.3, 0.2], [5, 5, 5], [-1, -3, -2]])).tolist() == [1, 0, 0]
    assert predicted_classes(np.array([[0.5], [-0.5], [0.0], [1e-9]])).tolist() == [1, 0, 0, 1]  # class 1 above 0


def test_a_single_logit_is_the_logit_of_class_1():
    loader = [(images(4), torch.tensor([1, 1, 0, 1]))]
    assert predict(Constant(0.2), loader).accuracy == 0.75
    assert predict(Constant(-0.2), loader).accuracy == 0.25

    class Flat(Engine):
        def predict(self, x_NCHW):
            return np.array([1.0, -1.0, -1.0, 1.0])  # (N,), not (N, 1)

    result = predict(Flat(), loader)
    assert result.logits.shape == (4, 1)
    assert result.y_pred.tolist() == [1, 0, 0, 1]
    assert result.accuracy == 0.75


def test_accuracy_by_hand():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=np.float32)
    assert Predictions(logits, np.array([0, 1, 0]), {}, np.arange(3)).accuracy == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------------- size and latency


def test_the_size_is_that_of_the_file_that_is_written(tmp_path):
    model = build_model("squeezenet1_1", 2, 32)
    size = write_model(model, tmp_path / "model.safetensors")
    written = (tmp_path / "model.safetensors").stat().st_size
    assert size == written / 1e6 == model_size_mb(model)
    payload = 4 * count_parameters(model)
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert written == 8 + header + payload
    assert header < 200 * len(model.state_dict())


def test_the_file_holds_the_buffers_that_predictions_need(tmp_path):
    model = small_model()
    write_model(model, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    numbers = count_parameters(model) + 2 * 4  # running mean and variance of 4 channels; not num_batches_tracked
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + 4 * numbers
    written = load_file(tmp_path / "model.safetensors")
    assert model.state_dict().keys() - written.keys() == {"0.1.num_batches_tracked"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in written.items())


def test_no_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation.tempfile, "tempdir", str(tmp_path))
    assert model_size_mb(small_model()) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_model(small_model(), tmp_path / "no folder" / "model.safetensors")


def test_latency_is_the_median_after_warm_up(monkeypatch):
    durations = [9.0, 9.0, 0.001, 0.5, 0.002, 0.004, 0.003]  # two warm-up passes; one outlier
    clock = {"now": 100.0, "calls": 0}

    class Timed(Constant):
        def forward(self, x):
            clock["now"] += durations[clock["calls"]]
            clock["calls"] += 1
            assert not self.training and x.shape == (2, 3, 8, 8)
            return super().forward(x)

    model = Timed(0.0).train()
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    found = latency(model, images(2), repeats=5)
    assert found.median_ms == pytest.approx(1000 * statistics.median(durations[2:]))
    assert found.p95_ms == pytest.approx(1000 * np.percentile(durations[2:], 95))
    assert found.throughput == pytest.approx(2 / statistics.median(durations[2:]))
    assert clock["calls"] == 7
    assert model.training


def test_latency_is_a_time():
    class Sleep(Constant):
        def forward(self, x):
            time.sleep(0.01)
            return super().forward(x)

    assert 10 <= latency(Sleep(0.0), images(1), repeats=3).median_ms < 1000
