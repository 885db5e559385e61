"""Predictions of any model, on any device or engine, as arrays; and what a model costs in bytes and milliseconds."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

WARMUP = 2  # passes before the clock runs


class EvaluationError(RuntimeError):
    """A model that does not give usable logits."""


@dataclass(frozen=True)
class Predictions:
    """logits (N, K) float32, y_true (N,) int64, sensitive {name: (N,) int64}, index (N,) int64: the sample's number."""

    logits: np.ndarray
    y_true: np.ndarray
    sensitive: dict[str, np.ndarray]
    index: np.ndarray

    @property
    def y_pred(self) -> np.ndarray:
        return predicted_classes(self.logits)

    @property
    def accuracy(self) -> float:
        return float((self.y_pred == self.y_true).mean())


def predicted_classes(logits_NK: np.ndarray) -> np.ndarray:
    """(N,) classes: the largest logit; with a single logit, class 1 where it is above 0."""
    return (logits_NK[:, 0] > 0).astype(np.int64) if logits_NK.shape[1] == 1 else logits_NK.argmax(axis=1)


def as_batch(batch: Any) -> Mapping[str, Any]:
    """A batch as a mapping: `{"image", "label", "sensitive"}` as is; (image, label[, sensitive]) tuples converted."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return {"image": batch[0], "label": batch[1], "sensitive": batch[2] if len(batch) == 3 else {}}
    raise TypeError(
        f"a batch must be a mapping with image, label and sensitive, or an (image, label, sensitive) tuple; "
        f"got {type(batch).__name__}"
    )


def class_logits(logits: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
    """(..., K >= 2): of a single logit z, of class 1 where it is above 0, the two that mean the same, (0, z), since
    softmax(0, z) = sigmoid(z)."""
    if logits.shape[-1] > 1:
        return logits
    if isinstance(logits, torch.Tensor):
        return torch.cat([torch.zeros_like(logits), logits], dim=-1)
    return np.concatenate([np.zeros_like(logits), logits], axis=-1)


def device_of(model: Any) -> torch.device:
    """The device of a module's first parameter or buffer; the CPU for an engine."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


def predict(model: Any, loader: Iterable, device: str | torch.device | None = None) -> Predictions:
    """Logits of `model` on every batch of `loader`, in order.

    `model` is an nn.Module (run in eval mode; its mode is restored) or an engine with `predict(x_NCHW) -> logits_NK`;
    one whose `reads_groups` is True gets each batch's sensitive attributes too.
    `device` defaults to where the model is; the model itself is not moved. Raises EvaluationError for logits that are
    not finite and ValueError for an empty loader.
    """
    device = torch.device(device) if device is not None else device_of(model)
    logits, labels, sensitive, index = [], [], {}, []
    with torch.inference_mode(), eval_mode(model):
        for batch in map(as_batch, loader):
            images = torch.as_tensor(batch["image"])
            if isinstance(model, nn.Module):
                groups = (batch["sensitive"],) if getattr(model, "reads_groups", False) else ()
                output = model(images.to(device, non_blocking=True), *groups).float().cpu().numpy()
            else:
                output = np.asarray(model.predict(images.cpu().numpy()), dtype=np.float32)
            logits.append(output.reshape(len(images), -1))
            labels.append(_codes(batch["label"]))
            for name, codes in batch["sensitive"].items():
                sensitive.setdefault(name, []).append(_codes(codes))
            first = sum(map(len, index))
            index.append(_codes(batch["index"]) if "index" in batch else np.arange(first, first + len(images)))
    if not logits:
        raise ValueError("the loader is empty: there is nothing to predict")
    result = Predictions(
        np.concatenate(logits),
        np.concatenate(labels),
        {name: np.concatenate(parts) for name, parts in sensitive.items()},
        np.concatenate(index),
    )
    bad = int((~np.isfinite(result.logits)).any(axis=1).sum())
    if bad:
        raise EvaluationError(f"{bad} of {len(result.logits)} images have logits that are not finite")
    return result


def _codes(values: Any) -> np.ndarray:
    return torch.as_tensor(values).cpu().numpy().astype(np.int64).reshape(-1)


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """The module and its children in eval mode; the mode of each one is restored."""
    if not isinstance(model, nn.Module):
        yield
        return
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a pass over a batch of `batch` images: the median and the 95th percentile of several."""

    batch: int
    median_ms: float
    p95_ms: float

    @property
    def throughput(self) -> float:
        """Images a second, at the median."""
        return 1000 * self.batch / self.median_ms


def latency(model: nn.Module, example: torch.Tensor, repeats: int) -> Latency:
    """Of a forward pass of `example` (N, 3, H, W) where the model is."""
    device = device_of(model)
    example = example.to(device)
    synchronise = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
    with torch.inference_mode(), eval_mode(model):
        return timed(lambda: model(example), len(example), repeats, synchronise)


def timed(
    run: Callable[[], object], batch: int, repeats: int, synchronise: Callable[[], None] | None = None
) -> Latency:
    """The latency of `run`, which passes once over `batch` images, after WARMUP passes; `synchronise` waits for it."""
    times = []
    for repeat in range(WARMUP + repeats):
        start = time.perf_counter()
        run()
        if synchronise is not None:
            synchronise()
        if repeat >= WARMUP:
            times.append(1000 * (time.perf_counter() - start))
    return Latency(batch, statistics.median(times), float(np.percentile(times, 95)))


def storage_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that a file of the model holds: packed integers for a quantized model, else its state dict."""
    if hasattr(model, "packed_tensors"):
        return model.packed_tensors()
    return {
        name: tensor.detach().cpu().contiguous().clone()  # tied weights share memory, which a file cannot
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def write_model(model: nn.Module, path: Path) -> float:
    """Write the model's tensors to `path` (safetensors); returns the file's size in MB (10^6 bytes)."""
    try:
        save_file(storage_tensors(model), path, metadata=getattr(model, "packed_metadata", dict)())
    except SafetensorError as error:  # its write errors, such as a full disk, are not OSErrors
        raise OSError(str(error)) from None
    return path.stat().st_size / 1e6


def model_size_mb(model: nn.Module) -> float:
    """The size in MB (10^6 bytes) of the model's file, measured on a file that is really written; of an engine that
    of the file it was loaded from."""
    if not isinstance(model, nn.Module):
        return model.size_mb
    with tempfile.TemporaryDirectory(prefix="model-size-") as folder:
        return write_model(model, Path(folder) / "model.safetensors")
